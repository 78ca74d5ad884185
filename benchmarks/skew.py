"""What calibration does where most claims have the same gold label, and what knowing the share does (`--prior`).

    python scripts/with_server.py -- python benchmarks/skew.py --model gemma-3-270m
    python scripts/with_server.py -- python benchmarks/skew.py --model gemma-3-270m --draws 1 --true 62 --search

Pools of the built-in claims, one of each pair (so that there are no constraints), with a given number of True ones. The
same answers, zero-shot and leave-one-out with gold labels as demonstrations, are compared with five offsets: none, the
mean, and three that use the share p of True claims. --search labels each pool by ICM with the three of icm label.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.errors import APIError
from core.flags import FlagParser
from core.llm_api.llm import ModelAPI, open_model_api
from core.settings import Settings
from src.icm.objective import LogOdds, Objective, calibration_offset
from src.icm.problem import Candidate, SearchSettings
from src.icm.testbeds import Claim
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, Pool, prepare_batches
from src.results.run_folder import RunFolder

ALPHA: Final = 50.0


@dataclass(frozen=True, slots=True)
class Right:
    """How good labels are. balanced: mean of the shares of each class that are right. f1: of the rarer class, False.

    true_share: of the labels.
    """

    agreement: float
    balanced: float
    f1: float
    true_share: float


def right(labels: Sequence[bool], gold: Sequence[bool]) -> Right:
    """Compare N labels with gold, which has both classes."""
    said, truth = np.asarray(labels, dtype=bool), np.asarray(gold, dtype=bool)
    found = int((~said & ~truth).sum())
    wrong = int((said != truth).sum())
    return Right(
        agreement=float((said == truth).mean()),
        balanced=float((said[truth].mean() + (~said[~truth]).mean()) / 2),
        f1=2 * found / (2 * found + wrong) if found or wrong else 1.0,
        true_share=float(said.mean()),
    )


def mean_probability(scores: Sequence[float], prior: float) -> float:
    """The offset b for which the mean of sigmoid(s - b) is the share of True claims, by bisection."""
    values = np.asarray(scores, dtype=np.float64)
    low, high = float(values.min()) - 40, float(values.max()) + 40
    for _ in range(100):
        middle = (low + high) / 2
        too_many = np.mean(1 / (1 + np.exp(-(values - middle)))) > prior
        low, high = (middle, high) if too_many else (low, middle)
    return low


def shifted_mean(scores: Sequence[float], prior: float) -> float:
    """The mean, less the log-odds of the share: a mean calibration whose result gets another prior by Bayes' rule."""
    return float(np.mean(scores) - np.log(prior / (1 - prior)))


def number(log_odds: LogOdds) -> float:
    """Log-odds of two labels, which are one number."""
    if isinstance(log_odds, tuple):
        raise TypeError(f"log-odds of {len(log_odds) + 1} labels")
    return log_odds


OFFSETS: Final[dict[str, Callable[[Sequence[float], float], float]]] = {
    "none": lambda scores, prior: 0.0,
    "mean": lambda scores, prior: number(calibration_offset(scores, "mean")),
    "mean less log-odds of p": shifted_mean,
    "mean probability is p": mean_probability,
    "quantile 1 - p": lambda scores, prior: number(calibration_offset(scores, "mean", prior)),
}


def skewed(claims: Sequence[Claim], size: int, trues: int, draw: int) -> list[Claim]:
    """`size` claims, each of another pair and each its own group, `trues` of them True, in random order."""
    pairs: dict[str, dict[bool, Claim]] = {}
    for claim in claims:
        pairs.setdefault(claim.group, {})[claim.gold is True] = claim
    rng = np.random.default_rng([2026, draw])
    chosen = rng.permutation(len(pairs))[:size].tolist()
    names = list(pairs)
    picked = [pairs[names[pair]][at < trues] for at, pair in enumerate(chosen)]
    return [replace(picked[at], group=f"row {picked[at].row}") for at in rng.permutation(size).tolist()]


def pool_of(size: int, trues: int, draw: int, objective: Objective) -> Pool:
    """One pool of the built-in claims."""
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        skewed(claims, size, trues, draw),
        path,
        batch_size=size,
        consistency="none",
        objective=objective,
        settings=SearchSettings(seed=draw),
    )
    return pool


@dataclass(frozen=True, slots=True)
class Answers:
    """One pool's answers with every offset. spread: standard deviation of the log-odds, nats."""

    spread: float
    by_offset: dict[str, Right]


async def answers(api: ModelAPI, size: int, trues: int, draw: int) -> dict[str, Answers]:
    """By how they were asked: zero-shot, or with gold demonstrations."""
    pool = pool_of(size, trues, draw, Objective(ALPHA))
    labelling = await Labelling.open(pool, api)
    gold = [claim.gold is True for claim in pool.claims]
    layout = pool.problem.new_layout(range(size))
    [shown] = await labelling.scorer().evaluate([Candidate(tuple(gold), layout)])
    asked = {"zero-shot": (await labelling.zero_shot()).log_odds, "gold demonstrations": shown.log_odds}
    found = {}
    for how, log_odds in asked.items():
        scores = [number(log_odds[claim]) for claim in range(size)]
        limits = {name: offset(scores, trues / size) for name, offset in OFFSETS.items()}
        by_offset = {name: right([score > limit for score in scores], gold) for name, limit in limits.items()}
        found[how] = Answers(float(np.std(scores)), by_offset)
    return found


async def searched(api: ModelAPI, size: int, trues: int, draw: int, objective: Objective) -> tuple[Right, float, float]:
    """ICM's labels of the whole pool, also those that the search did not give; U; seconds."""
    pool = pool_of(size, trues, draw, objective)
    labelling = (await Labelling.open(pool, api)).planned_for(await api.kv_cache_tokens())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
        state = await labelling.search(run, lambda state, record: None)
    labels = {claim: label for claim, label in enumerate(state.labels) if label is not None}
    if len(labels) < size:
        labels |= (await labelling.predict_unlabelled(state)).labels
    gold = [claim.gold is True for claim in pool.claims]
    found = right([bool(labels[claim]) for claim in range(size)], gold)
    return found, state.evaluation.utility, time.perf_counter() - started


async def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Every row of the table."""
    rows: list[dict[str, object]] = []
    async with open_model_api(Settings.load({"cache_path": args.cache}), model=args.model) as api:
        for trues in args.true:
            if args.search:
                prior = trues / args.size
                for name, objective in {
                    "none": Objective(ALPHA),
                    "mean": Objective(ALPHA, "mean"),
                    "prior": Objective(ALPHA, "mean", prior),
                }.items():
                    if args.only and name not in args.only:
                        continue
                    for draw in range(args.draws):
                        one, utility, seconds = await searched(api, args.size, trues, draw, objective)
                        rows.append(_row(trues, "ICM", name, [one], draw=draw, U=utility, seconds=seconds))
                continue
            drawn = [await answers(api, args.size, trues, draw) for draw in range(args.draws)]
            for how in drawn[0]:
                spread = float(np.mean([each[how].spread for each in drawn]))
                for name in OFFSETS:
                    found = [each[how].by_offset[name] for each in drawn]
                    rows.append(_row(trues, how, name, found, spread=spread))
    return rows


def _row(trues: int, asked: str, offset: str, found: Sequence[Right], **more: float) -> dict[str, object]:
    """Means over draws; printed as soon as it is known."""
    means = {key: round(float(np.mean([asdict(each)[key] for each in found])), 3) for key in asdict(found[0])}
    row: dict[str, object] = {"true": trues, "asked": asked, "offset": offset, **means}
    row |= {key: round(value, 2) for key, value in more.items()}
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> int:
    """Print the table; with --json also write it."""
    parser = FlagParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--size", type=int, default=64, help="claims of a pool, at most 128")
    parser.add_argument("--true", type=int, nargs="+", default=[32, 51, 61, 62], help="how many of them are True")
    parser.add_argument("--draws", type=int, default=5, help="pools of each share")
    parser.add_argument("--search", action="store_true", help="label each pool by ICM")
    parser.add_argument("--only", nargs="*", choices=("none", "mean", "prior"), help="only these searches")
    parser.add_argument("--cache", type=Path, default=None, help="response cache to use and fill")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if not 1 < args.size <= 128 or not all(0 < trues < args.size for trues in args.true):
        parser.error("--size is at most 128, and --true between 1 and one less than it")
    try:
        rows = asyncio.run(measure(args))
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json is not None:
        args.json.write_text(json.dumps({"model": args.model, "size": args.size, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
