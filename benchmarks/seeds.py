"""ICM against zero-shot, many-shot with gold labels and many-shot with random labels, over several seeds.

    VLLM_BASE_URL=http://localhost:8000 python benchmarks/seeds.py --seeds 1 2 3 4 5 -- \
        --testbed builtin --model gemma-3-270m --batch_size 64 --alpha 50 --calibrate mean

What stands behind -- goes to ICM.py, with --label_rest. Every seed draws its own pool, seed labels and search. Two sets
of claims are compared: the pool (ICM's own labels; the other rows leave one out), and all claims outside it, labelled
by the pool's labels as demonstrations. Intervals are Wilson's on the counts of all seeds together; the claims of
different seeds overlap, so they are a little too narrow. Runs resume and are kept; a second call costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.llm_api.llm import ModelAPI, open_model_api
from core.settings import Settings
from src.experiments import ICM
from src.experiments.single_run import pool_of
from src.icm.annealing import Candidate, Stream, generator
from src.icm.consistency import Labels
from src.icm.objective import wilson_interval
from src.pipeline.baselines import Prediction, predict
from src.pipeline.labelling import Labelling

Counts = tuple[int, int]


async def leave_one_out(labelling: Labelling, labels: Labels) -> Prediction:
    """Every pool claim predicted from the others' labels, in the search's own kind of layout."""
    problem = labelling.pool.problem
    [evaluation] = await labelling.scorer().evaluate([Candidate(labels, problem.new_layout(range(problem.size)))])
    return Prediction(dict(evaluation.log_odds), evaluation.offset)


async def baselines_of(seed: int, args: argparse.Namespace, api: ModelAPI) -> dict[tuple[str, str], Counts]:
    """Agreement of every baseline, by (row, set of claims), for the pool that this seed draws."""
    pool = pool_of(argparse.Namespace(**{**vars(args), "seed": seed, "label_rest": True}))
    labelling = await Labelling.open(pool, api)
    size = len(pool.claims)
    everything = [*pool.gold, *(claim.gold for claim in pool.rest)]
    rest = range(size, len(everything))
    shuffled = generator(seed, Stream.SEEDS, 2).permutation(np.array([i < size // 2 for i in range(size)]))
    random_labels: Labels = tuple(shuffled.tolist())
    order = pool.problem.new_layout(range(size)).demonstrations
    counts: dict[tuple[str, str], Counts] = {}
    for name, claims_asked in (("pool", range(size)), ("rest", rest)):
        zero = await predict(api, labelling.book, labelling.tokens, claims_asked)
        counts["zero-shot", name] = zero.agreement(everything)
        counts["zero-shot, calibrated", name] = zero.calibrated().agreement(everything)
    for row, labels in (("many-shot, gold labels", tuple(pool.gold)), ("many-shot, random labels", random_labels)):
        left_out = await leave_one_out(labelling, labels)
        counts[row, "pool"] = left_out.agreement(everything)
        shown = await predict(
            api, labelling.book, labelling.tokens, rest, demonstrations=order, labels=labels, name=row
        )
        counts[row, "rest"] = replace(shown, offset=left_out.offset).agreement(everything)
    return counts


def icm_counts(run: Path) -> tuple[dict[tuple[str, str], Counts], dict[str, object]]:
    """Agreement of a finished ICM run (all labels of the pool, predicted ones included), and its run.json."""
    document = json.loads((run / "run.json").read_text())
    counts: dict[tuple[str, str], Counts] = {}
    rows = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    for name, chosen in (("pool", [r for r in rows if r["by"] != "many-shot"]),
                         ("rest", [r for r in rows if r["by"] == "many-shot"])):  # fmt: skip
        known = [r for r in chosen if r["gold"] is not None]
        counts["ICM", name] = sum(r["label"] == r["gold"] for r in known), len(known)
    return counts, document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table, write it with --json."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own, _, icm = (
        (given[: given.index("--")], "--", given[given.index("--") + 1 :]) if "--" in given else (given, "", [])
    )
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--prefix", default="seeds", help="runs are called PREFIX-seedS")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(own)
    args = ICM.build_parser().parse_args(icm)
    table: dict[tuple[str, str], list[Counts]] = defaultdict(list)
    costs = []
    for seed in options.seeds:
        name = f"{options.prefix}-seed{seed}"
        code = ICM.main([*icm, "--label_rest", "--seed", str(seed), "--run", name])
        if code != 0:
            return code
        counts, document = icm_counts(args.runs_dir / name)
        costs.append(document["cost"])

        async def baselines(seed: int = seed) -> dict[tuple[str, str], Counts]:
            settings = Settings.load({"cache_path": args.runs_dir / "responses.sqlite"})
            async with open_model_api(settings, model=args.model) as api:
                return await baselines_of(seed, args, api)

        counts |= asyncio.run(baselines())
        for key, value in counts.items():
            table[key].append(value)
    print(f"\nagreement with gold, {len(options.seeds)} seeds, calibration: {args.calibrate}")
    print(f"{'':<28}{'pool: seed by seed':<40}{'together':<26}{'other claims: together'}")
    for row in dict.fromkeys(row for row, _ in table):
        pool, rest = table[row, "pool"], table[row, "rest"]
        print(f"{row:<28}{' '.join(f'{a / n:.2f}' for a, n in pool):<40}{_together(pool):<26}{_together(rest)}")
    if options.json:
        rows = [{"row": row, "claims": name, "counts": counts} for (row, name), counts in table.items()]
        places = {"runs_dir", "data_dir", "data"}
        flags = {k: v for k, v in vars(args).items() if k not in places}
        options.json.write_text(
            json.dumps({"flags": flags, "seeds": options.seeds, "rows": rows, "cost": costs}) + "\n"
        )
    return 0


def _together(counts: Sequence[Counts]) -> str:
    agreeing, compared = sum(a for a, _ in counts), sum(n for _, n in counts)
    low, high = wilson_interval(agreeing, compared)
    return f"{agreeing / compared:.2f} ({low:.2f} to {high:.2f})" if compared else "-"


if __name__ == "__main__":
    sys.exit(main())
