"""What the cheaper searches cost and lose: agreement with gold, questions, tokens and seconds of each.

    python scripts/with_server.py -- python benchmarks/variants.py --seeds 1 2 3 -- \
        --testbed builtin --model gemma-3-270m --batch_size 32 --alpha 50 --calibrate mean

Options after -- go to ICM.py. Every variant and seed is a separate run, kept and resumed; each variant has a separate
response cache, so that none gains from what another asked. Agreement counts all labels of the pool, also those of
claims that the search did not take in. Ratios are to the exact search of the same seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from src.experiments import ICM
from src.icm.objective import wilson_interval

VARIANTS: Final[dict[str, tuple[str, ...]]] = {
    "exact": (),
    "context cap 8": ("--context_cap", "8"),
    "best of 4": ("--best_of", "4"),
    "local gain": ("--local_gain",),
    "local gain, best of 4": ("--local_gain", "--best_of", "4"),
    "3 passes of local gain": ("--local_gain", "--passes", "3"),
}
COSTS: Final = ("asked", "tokens_sent", "tokens_computed", "seconds")


def row_of(document: dict[str, Any]) -> dict[str, float]:
    """Agreement and costs of one finished run."""
    result, cost = document["result"], document["cost"]
    counts = [result["icm"], *(counts for by, counts in result["predicted"].items() if by != "many-shot")]
    return {
        "agreeing": sum(a for a, _ in counts),
        "compared": sum(n for _, n in counts),
        "iterations": result["iterations"],
        "U": result["U"],
        **{key: cost[key] for key in COSTS},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table, write it with --json."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = FlagParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(given[:cut])
    icm = given[cut + 1 :]
    args = ICM.build_parser().parse_args(icm)
    table: dict[str, list[dict[str, float]]] = {name: [] for name in options.variants}
    for seed in options.seeds:  # seed by seed, so that an unfinished table can be compared
        for name in options.variants:
            runs = args.runs_dir / "variants" / name.replace(" ", "-").replace(",", "")
            run = f"{args.testbed}-N{args.batch_size}-seed{seed}"
            command = [*icm, *VARIANTS[name], "--seed", str(seed), "--run", run, "--runs_dir", str(runs)]
            code = ICM.main(command)
            if code != 0:
                return code
            table[name].append(row_of(json.loads((runs / run / "run.json").read_text())))
    print(f"\n{args.testbed}, pool of {args.batch_size}, {len(options.seeds)} seeds: {options.seeds}")
    print(
        f"{'':<26}{'agreement (95% interval)':<30}{'iterations':>10}{'questions':>11}{'sent':>12}{'seconds':>9}{'U':>9}"
    )
    base = table.get("exact")
    for name, rows in table.items():
        print(_line(name, rows, base))
    if options.json:
        places = {"runs_dir", "data_dir", "data"}
        flags = {k: v for k, v in vars(args).items() if k not in places}
        options.json.write_text(json.dumps({"flags": flags, "seeds": options.seeds, "rows": table}) + "\n")
    return 0


def _line(name: str, rows: Sequence[dict[str, float]], base: Sequence[dict[str, float]] | None) -> str:
    agreeing, compared = (sum(row[key] for row in rows) for key in ("agreeing", "compared"))
    low, high = wilson_interval(agreeing, int(compared))
    share = f"{agreeing / compared:.3f} ({low:.3f} to {high:.3f})" if compared else "-"
    asked, sent, seconds, iterations = (
        sum(row[key] for row in rows) for key in ("asked", "tokens_sent", "seconds", "iterations")
    )
    if base is None or name == "exact":
        shown = f"{asked:>11,.0f}{sent:>12,.0f}{seconds:>9.0f}"
    else:
        ratios = [
            value / sum(row[key] for row in base)
            for value, key in ((asked, "asked"), (sent, "tokens_sent"), (seconds, "seconds"))
        ]
        shown = f"{ratios[0]:>11.2f}{ratios[1]:>12.2f}{ratios[2]:>9.2f}"
    utility = sum(row["U"] for row in rows) / len(rows)
    return f"{name:<26}{share:<30}{iterations:>10.0f}{shown}{utility:>9.1f}"


if __name__ == "__main__":
    sys.exit(main())
