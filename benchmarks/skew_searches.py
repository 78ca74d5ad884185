"""What calibration does to searches where most claims have the same gold label: none, mean, `--prior` P and auto.

    python benchmarks/skew_searches.py --model M --testbeds builtin gsm8k --data_dir data --json skew.json
    python scripts/with_server.py -- python benchmarks/skew_searches.py --model gemma-3-270m --size 32 --draws 1

Asks the server of VLLM_BASE_URL. Pools of --size claims, each of another group (so that there are no constraints), with
a given share of True ones. Every search labels each pool with every calibration, several at once; so do answers without
demonstrations and after gold ones. Agreement with gold, balanced accuracy, and F1 of True and of the rarer label. The
share is also estimated from different answers (kind "estimate"). What is in --json is not asked again: the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.errors import APIError
from core.files import write_atomically
from core.flags import FlagParser
from core.llm_api.llm import ModelAPI, open_model_api
from core.settings import Settings
from src.icm.consistency import Labels
from src.icm.label_names import confusion
from src.icm.objective import LogOdds, Objective, label_of
from src.icm.prior import estimate
from src.icm.problem import Candidate, SearchSettings, StartShare, Stream, balanced_labels, generator
from src.icm.searches import SEARCHES
from src.icm.testbeds import BadInput, Claim
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, prepare_batches
from src.pipeline.prior_estimate import with_prior
from src.results.by_class import by_class
from src.results.run_folder import RunFolder

ALPHA: Final = 50.0
CALIBRATIONS: Final = ("none", "mean", "prior", "auto")
WITHOUT_SEARCH: Final = ("zero-shot", "gold demonstrations")
ESTIMATE: Final = "estimate"
Row = dict[str, Any]
NAMED_BY: Final = ("testbed", "percent", "draw", "how", "calibration")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row. percent: of the pool's claims that are True. how: a search, or one of WITHOUT_SEARCH, or ESTIMATE."""

    testbed: str
    percent: int
    draw: int
    how: str
    calibration: str


def trues_of(percent: int, size: int) -> int:
    """How many claims are True: at least one, and not all."""
    return min(max(1, round(size * percent / 100)), size - 1)


def skewed(claims: Sequence[Claim], size: int, trues: int, draw: int) -> list[Claim]:
    """`size` claims, each of another group and each its own group, `trues` of them True, in random order.

    Raises BadInput where the groups do not suffice.
    """
    groups: dict[str, dict[bool, Claim]] = defaultdict(dict)
    for claim in claims:
        if claim.gold is not None:
            groups[claim.group].setdefault(bool(claim.gold), claim)
    rng = np.random.default_rng([2026, draw])
    names = list(groups)
    order = [groups[names[at]] for at in rng.permutation(len(names)).tolist()]
    picked: dict[bool, list[Claim]] = {True: [], False: []}
    wanted = {True: trues, False: size - trues}
    rarer = 2 * trues < size
    # Groups that hold one label only come first, and the rarer label before the other.
    for several, label in ((1, rarer), (1, not rarer), (2, rarer), (2, not rarer)):
        for group in order:
            taken = any(claim in picked[any_label] for any_label, claim in group.items())
            if len(group) == several and label in group and not taken and len(picked[label]) < wanted[label]:
                picked[label].append(group[label])
    if any(len(picked[label]) < count for label, count in wanted.items()):
        raise BadInput(f"there are not enough groups for {trues} of {size} True; use a smaller --size")
    chosen = [*picked[True], *picked[False]]
    return [replace(chosen[at], group=f"row {chosen[at].row}") for at in rng.permutation(size).tolist()]


async def opened(api: ModelAPI, args: argparse.Namespace, cell: Cell) -> Labelling:
    """The cell's pool, tokenized, with its calibration; --prior auto is estimated."""
    trues = trues_of(cell.percent, args.size)
    objective = {
        "none": Objective(ALPHA),
        "mean": Objective(ALPHA, "mean"),
        "prior": Objective(ALPHA, "mean", trues / args.size),
        "auto": Objective(ALPHA, "mean", estimate_prior=True),
    }[cell.calibration]
    testbed, claims, path = load_testbed(cell.testbed, args.data_dir)
    start: StartShare = "prior" if cell.calibration in ("prior", "auto") else "half"
    settings = SearchSettings(seed=cell.draw, start_share=start)
    if cell.how in SEARCHES:
        settings = replace(settings, search=cell.how)
    [pool] = prepare_batches(
        testbed,
        skewed(claims, args.size, trues, cell.draw),
        path,
        batch_size=args.size,
        consistency="none",
        objective=objective,
        settings=settings,
    )
    return await Labelling.open(pool, api)


async def measured(api: ModelAPI, args: argparse.Namespace, cell: Cell) -> Row:
    """The cell's row."""
    api, started = api.share(exclusive=False), time.perf_counter()
    labelling = await opened(api, args, cell)
    named = {name: getattr(cell, name) for name in NAMED_BY}
    if cell.how == ESTIMATE:
        return named | {"estimates": await estimates(labelling)}
    labelling, found = await with_prior(labelling, quiet=True)
    pool = labelling.pool
    utility = None
    if cell.how == "zero-shot":
        labels = likeliest(pool.problem.objective, (await labelling.zero_shot()).log_odds)
    elif cell.how == "gold demonstrations":
        labels = likeliest(pool.problem.objective, await answers_after(labelling, tuple(pool.gold)))
    else:
        labelling = labelling.planned_for(await api.kv_cache_tokens())
        with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run") as run:
            state = await labelling.search(run, lambda state, record: None)
        utility = state.evaluation.utility
        labels = {claim: label for claim, label in enumerate(state.labels) if label is not None}
        if len(labels) < args.size:
            labels |= (await labelling.predict_unlabelled(state)).labels
    given = [bool(labels[claim]) for claim in range(args.size)]
    return (
        named
        | figures(given, [bool(label) for label in pool.gold])
        | {"U": utility, "asked": api.stats.asked, "seconds": round(time.perf_counter() - started, 1)}
        | ({} if found is None else {"estimate": found.record()})
    )


def likeliest(objective: Objective, log_odds: Mapping[int, LogOdds]) -> dict[int, int]:
    """Labels against the objective's offset."""
    offset = objective.offset(list(log_odds.values()))
    return {claim: label_of(value, offset) for claim, value in log_odds.items()}


async def answers_after(labelling: Labelling, labels: Labels) -> dict[int, LogOdds]:
    """Every claim's log-odds, nats, after all others with these labels."""
    layout = labelling.pool.problem.new_layout(range(len(labels)), labels=labels)
    [found] = await labelling.scorer().evaluate([Candidate(labels, layout)])
    return dict(found.log_odds)


def figures(given: Sequence[bool], gold: Sequence[bool]) -> Row:
    """How good labels are, by gold that has both classes."""
    table = confusion(zip(given, gold, strict=True), 2)
    true, false = by_class(table), by_class([row[::-1] for row in table[::-1]])
    assert true.balanced is not None
    rarer = true if 2 * sum(gold) < len(gold) else false
    return {
        "agreement": sum(map(bool.__eq__, given, gold)) / len(gold),
        "balanced": true.balanced.value,
        "f1_true": 0.0 if true.f1 is None else true.f1.value,
        "f1_rarer": 0.0 if rarer.f1 is None else rarer.f1.value,
        "true_share": sum(given) / len(gold),
    }


async def estimates(labelling: Labelling) -> Row:
    """The share of True estimated from different answers, the first of them those of --prior auto."""
    problem = labelling.pool.problem
    size = problem.size
    half = tuple(balanced_labels(size, 2, generator(problem.settings.seed, Stream.SEEDS, 2)))
    zero = (await labelling.zero_shot()).log_odds
    true, false = [await answers_after(labelling, (label,) * size) for label in (True, False)]
    found: dict[str, Sequence[float]] = {
        "all True and all False": [_number(true[at]) + _number(false[at]) for at in range(size)],
        "all True": [_number(true[at]) for at in range(size)],
        "all False": [_number(false[at]) for at in range(size)],
        "zero-shot": [_number(zero[at]) for at in range(size)],
        "random halves": [_number(value) for _, value in sorted((await answers_after(labelling, half)).items())],
    }
    after = zero
    for _ in range(3):
        labels = likeliest(Objective(ALPHA, "mean"), after)
        after = await answers_after(labelling, tuple(labels[at] for at in range(size)))
    found["bootstrapped against the mean"] = [_number(after[at]) for at in range(size)]
    records = {name: estimate(scores, problem.groups).record() for name, scores in found.items()}
    return {name: {key: _rounded(value) for key, value in one.items()} for name, one in records.items()}


def _number(log_odds: LogOdds) -> float:
    assert not isinstance(log_odds, tuple)
    return log_odds


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def cells_of(args: argparse.Namespace) -> Iterator[Cell]:
    """Every cell, pool after pool."""
    for testbed, draw, percent in product(args.testbeds, range(args.draws), args.percent):
        yield Cell(testbed, percent, draw, ESTIMATE, "mean")
        for how, calibration in product((*WITHOUT_SEARCH, *args.searches), args.calibrations):
            yield Cell(testbed, percent, draw, how, calibration)


async def measure(args: argparse.Namespace, rows: dict[Cell, Row]) -> None:
    """Add every row that is missing; each is written before the next begins."""
    cells = list(cells_of(args))
    missing = [cell for cell in cells if cell not in rows]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them known", file=sys.stderr, flush=True)
    at_once = asyncio.Semaphore(args.at_once)
    async with open_model_api(Settings.load({"cache_path": args.cache}), model=args.model) as api:

        async def one(cell: Cell) -> None:
            async with at_once:
                rows[cell] = await measured(api, args, cell)
            write(args, rows)
            row = rows[cell]
            shown = {name: round(row[name], 3) for name in ("agreement", "balanced", "f1_rarer") if name in row}
            done = sum(each in rows for each in cells)
            print(f"{done}/{len(cells)}", *(str(row[name]) for name in NAMED_BY), shown, file=sys.stderr, flush=True)

        await asyncio.gather(*(one(cell) for cell in missing))


def write(args: argparse.Namespace, rows: Mapping[Cell, Row]) -> None:
    """Replace --json."""
    if args.json is None:
        return
    ordered = [rows[cell] for cell in sorted(rows, key=lambda cell: [getattr(cell, name) for name in NAMED_BY])]
    document = {"model": args.model, "size": args.size, "alpha": ALPHA, "rows": ordered}
    write_atomically(args.json, json.dumps(document, indent=1) + "\n")


def read(args: argparse.Namespace) -> dict[Cell, Row]:
    """The rows of --json. Raises BadInput where it is of another model or size."""
    if args.json is None or not args.json.exists():
        return {}
    document = json.loads(args.json.read_text())
    if (document.get("model"), document.get("size")) != (args.model, args.size):
        raise BadInput(f"{args.json}: is of another model or --size")
    return {Cell(*(row[name] for name in NAMED_BY)): row for row in document["rows"]}


def table(rows: Sequence[Row]) -> str:
    """Means over pools, as Markdown: agreement / balanced accuracy / F1 of the rarer label; then the estimates."""
    lines: list[str] = []
    for testbed in dict.fromkeys(row["testbed"] for row in rows):
        of = [row for row in rows if row["testbed"] == testbed]
        percents = sorted({row["percent"] for row in of})
        lines += ["", f"{testbed}: agreement / balanced accuracy / F1 of the rarer label, by share of True", ""]
        lines.append(f"| | calibration | {' | '.join(f'{percent}%' for percent in percents)} |")
        lines.append("| --- " * (2 + len(percents)) + "|")
        kinds = dict.fromkeys((row["how"], row["calibration"]) for row in of if row["how"] != ESTIMATE)
        order = [*WITHOUT_SEARCH, *SEARCHES]
        for how, calibration in sorted(kinds, key=lambda kind: (order.index(kind[0]), CALIBRATIONS.index(kind[1]))):
            cells = []
            for percent in percents:
                same = [r for r in of if (r["how"], r["calibration"], r["percent"]) == (how, calibration, percent)]
                means = [fmean(r[name] for r in same) for name in ("agreement", "balanced", "f1_rarer")] if same else []
                cells.append(" / ".join(f"{mean:.2f}" for mean in means) or "–")
            lines.append(f"| {how} | {calibration} | {' | '.join(cells)} |")
        lines += losses(testbed, of, percents)
        lines += ["", f"{testbed}: share of True estimated without labels (used in how many pools of how many)", ""]
        lines.append(f"| answers | {' | '.join(f'{percent}%' for percent in percents)} |")
        lines.append("| --- " * (1 + len(percents)) + "|")
        estimated = [row for row in of if row["how"] == ESTIMATE]
        for name in dict.fromkeys(name for row in estimated for name in row["estimates"]):
            cells = []
            for percent in percents:
                found = [row["estimates"][name] for row in estimated if row["percent"] == percent]
                shares = ", ".join(f"{one['share']:.2f}" for one in found)
                cells.append(f"{shares} ({sum(one['prior'] is not None for one in found)} of {len(found)})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def losses(testbed: str, rows: Sequence[Row], percents: Sequence[int]) -> list[str]:
    """What is lost of the balanced accuracy that the mean has at 50%: a table, or nothing where 50% was not asked."""

    def balanced(how: str, calibration: str, percent: int) -> float | None:
        wanted = (how, calibration, percent)
        same = [r["balanced"] for r in rows if (r["how"], r["calibration"], r["percent"]) == wanted]
        return fmean(same) if same else None

    others = [percent for percent in percents if percent != 50]
    hows = [how for how in (*WITHOUT_SEARCH, *SEARCHES) if balanced(how, "mean", 50) is not None]
    if not hows or not others:
        return []
    lines = ["", f"{testbed}: balanced accuracy lost, of the mean's at 50%, by {' / '.join(CALIBRATIONS)}", ""]
    lines.append(f"| | {' | '.join(f'{percent}%' for percent in others)} |")
    lines.append("| --- " * (1 + len(others)) + "|")
    for how in hows:
        most = balanced(how, "mean", 50)
        assert most is not None
        cells = []
        for percent in others:
            found = [balanced(how, calibration, percent) for calibration in CALIBRATIONS]
            cells.append(" / ".join("–" if one is None else f"{most - one:.2f}" for one in found))
        lines.append(f"| {how} | {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Print the table; with --json also keep it. Exit codes: 0 done, 1 the model failed, 2 bad input, 130 stopped."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="gemma-3-270m", help="name under which the model is served")
    parser.add_argument("--testbeds", nargs="+", default=["builtin"], help="testbeds with two labels")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="where the testbeds' files lie")
    parser.add_argument("--size", type=int, default=64, help="claims of a pool")
    parser.add_argument(
        "--percent", type=int, nargs="+", default=[50, 80, 95, 99, 20, 5, 1], help="how many of 100 claims are True"
    )
    parser.add_argument("--draws", type=int, default=3, help="pools of each share")
    parser.add_argument("--searches", nargs="*", choices=list(SEARCHES), default=["bootstrapping", "ascent"])
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=list(CALIBRATIONS))
    parser.add_argument("--at_once", type=int, default=8, help="cells that are asked at the same time")
    parser.add_argument("--cache", type=Path, default=None, help="response cache to use and fill")
    parser.add_argument("--json", type=Path, default=None, help="where rows are kept, and read from")
    args = parser.parse_args()
    if args.size < 16 or not all(0 < percent < 100 for percent in args.percent) or min(args.draws, args.at_once) < 1:
        parser.error("--size is at least 16, --percent between 1 and 99, --draws and --at_once at least 1")
    rows: dict[Cell, Row] = {}
    try:
        rows = read(args)
        asyncio.run(measure(args, rows))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except APIError as error:
        print(f"error: {error}; the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(table([rows[cell] for cell in cells_of(args)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
