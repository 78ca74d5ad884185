"""What is a label worth? Agreement with gold against how many labels are known, drawn at random or chosen.

    python scripts/with_server.py -- python benchmarks/known_labels.py --testbed builtin --model gemma-3-270m \\
        --batch_size 64 --alpha 50 --calibrate mean --search ascent --test_size 64 --out known.json
    VLLM_BASE_URL=... python benchmarks/known_labels.py --testbed gsm8k --data_dir data --model NAME --use_vllm \\
        --batch_size 64 --alpha 50 --calibrate mean --search ascent --test_size 128 --at_once 8 --out known.json

For every seed's pool and every number of --labels: the search, bootstrapping, gold and the known labels alone as
demonstrations, each by `icm baselines`, whose flags these are too. Known labels are gold ones: of claims drawn at
random (--gold_seeds), and of those that `icm ask` names in the run without known labels (--by, one claim of a group
before a second). The answers about other claims are compared: in the pool those whose label is not known, and of these
the ones in groups without a known label, of which constraints say nothing; and held-out claims, the same for every
number. Tables are kept in --runs_dir: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.files import write_atomically
from core.flags import FlagParser
from core.settings import REPO_ROOT
from src.experiments.baseline_table import TableFolder
from src.icm.consistency import Consistency
from src.icm.label_names import written_label
from src.pipeline.baselines import BASELINES
from src.pipeline.baselines.row_result import Answer, RowResult
from src.pipeline.known import compatible
from src.results.asking import By, choose, doubts_of
from src.results.run_reader import read_run
from src.results.run_record import RunRecord

ROWS: Final = ("zero-shot-calibrated", "few-shot-known", "bootstrap-consistent", "icm", "many-shot-gold")
SETS: Final = {
    "others": "claims of the pool whose label is not known",
    "apart": "of these the ones in groups without a known label",
    "held_out": "held-out claims, the same for every number",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One table. how: "none", "random" or "chosen"."""

    seed: int
    how: str
    labels: int

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.labels} labels known ({self.how})"

    def run(self, prefix: str) -> str:
        """The name of its folder."""
        return f"{prefix}-seed{self.seed}-{self.how}{self.labels}"


def cells_of(seeds: Sequence[int], counts: Sequence[int], hows: Sequence[str]) -> Iterator[Cell]:
    """First those that others are chosen by."""
    yield from (Cell(seed, "none", 0) for seed in seeds)
    yield from (Cell(seed, how, count) for count in counts if count for how in hows for seed in seeds)


class Bench:
    """Tables of `icm baselines`, several at once. flags: of that command, the same for all."""

    def __init__(self, args: argparse.Namespace, flags: Sequence[str]) -> None:
        self._args = args
        self._flags = flags
        self._turns = asyncio.Semaphore(args.at_once)
        self._base = {seed: asyncio.Event() for seed in args.seeds}

    def folder(self, cell: Cell) -> TableFolder:
        return TableFolder(self._args.runs_dir / cell.run(self._args.name))

    def searched(self, cell: Cell) -> RunRecord:
        """The search of a cell."""
        return read_run(self.folder(cell).seed_path(cell.seed))

    async def make(self, cell: Cell) -> None:
        """One table. Raises RuntimeError with the error that the command named, where it failed."""
        if cell.how == "chosen":
            await self._base[cell.seed].wait()
        rows = [row for row in self._args.rows if cell.labels or not BASELINES[row].needs_known]
        async with self._turns:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "src.experiments.commands", "baselines", *self._flags, *self._known(cell)),
                *("--seeds", str(cell.seed), "--rows", *rows, "--quiet"),
                *("--runs_dir", str(self._args.runs_dir), "--run", cell.run(self._args.name)),
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO_ROOT), os.environ.get("PYTHONPATH")))),
                },
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                _, said = await process.communicate()
            finally:
                if process.returncode is None:
                    process.terminate()
        if process.returncode:
            lines = said.decode(errors="replace").strip().splitlines()
            errors = [line for line in lines if line.startswith("error:")]
            said_last = (errors or lines or ["it was stopped"])[-1]
            raise RuntimeError(f"{cell}: {said_last.removeprefix('error: ')}")
        if cell.how == "none":
            self._base[cell.seed].set()
        print(f"{cell}: {self._line(cell)}", file=sys.stderr, flush=True)

    def _known(self, cell: Cell) -> list[str]:
        if cell.how == "random":
            return ["--gold_seeds", str(cell.labels)]
        if cell.how == "none":
            return []
        run = self.searched(Cell(cell.seed, "none", 0))
        asked = choose(doubts_of(run).found, len(run.pool), self._args.by)
        places = {claim.row: at for at, claim in enumerate(run.pool)}
        order = [places[one.claim.row] for one in asked]
        # A gold label that contradicts those before it is passed over, as by --gold_seeds.
        chosen = compatible(order, run.gold, Consistency(run.constraints or ()))[: cell.labels]
        path = self._args.runs_dir / f"{cell.run(self._args.name)}.jsonl"
        answers = [{"row": run.pool[at].row, "label": written_label(run.gold[at], run.names)} for at in chosen]
        write_atomically(path, "".join(json.dumps(answer) + "\n" for answer in answers).encode())
        return ["--known", str(path)]

    def _line(self, cell: Cell) -> str:
        found = self.counts(cell)
        return ", ".join(f"{row['row']} {row['held_out'][0]} of {row['held_out'][1]}" for row in found)

    def counts(self, cell: Cell) -> list[dict[str, Any]]:
        """One entry a row: (agreeing, compared) on each of SETS, U and the questions."""
        folder = self.folder(cell)
        known = {claim.group for claim in self.searched(cell).pool if claim.is_known}
        found = []
        for row in self._args.rows:
            result = folder.read_row(row, cell.seed)
            if result is not None:
                found.append(asdict(cell) | {"row": row} | counts_of(result, known))
        return found


def counts_of(result: RowResult, known_groups: set[str]) -> dict[str, Any]:
    """(agreeing, compared) on each of SETS. known_groups: those with a known label."""
    apart = [answer for answer in result.pool if answer.group not in known_groups]
    return {
        "others": _agreement(result.pool),
        "apart": _agreement(apart),
        "held_out": _agreement(result.test),
        "U": result.utility,
        "questions": result.cost.asked,
    }


def _agreement(answers: Sequence[Answer]) -> tuple[int, int]:
    compared = [answer for answer in answers if answer.gold is not None]
    return sum(answer.label == answer.gold for answer in compared), len(compared)


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds ± standard deviation, by number of known labels; a table for each of SETS."""
    counts = sorted({row["labels"] for row in rows})
    lines = []
    for name, what in SETS.items():
        lines += [f"{what}:", f"  {'known labels':<34}" + "".join(f"{count:>16}" for count in counts)]
        for method in dict.fromkeys(row["row"] for row in rows):
            for how in [each for each in dict.fromkeys(row["how"] for row in rows) if each != "none"] or ["none"]:
                of_line = [row for row in rows if row["row"] == method and row["how"] in (how, "none") and row[name][1]]
                cells = [_spread([row[name] for row in of_line if row["labels"] == count]) for count in counts]
                lines.append(f"  {f'{BASELINES[method].title}, {how}':<34}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _spread(counted: Sequence[Sequence[int]]) -> str:
    shares = [agreeing / compared for agreeing, compared in counted]
    if not shares:
        return "-"
    return f"{fmean(shares):.3f}" + (f" ± {stdev(shares):.3f}" if len(shares) > 1 else "")


async def measure(bench: Bench, cells: Sequence[Cell]) -> None:
    """All tables; the first failure stops the others, which lose nothing."""
    async with asyncio.TaskGroup() as group:
        for cell in cells:
            group.create_task(bench.make(cell))


def build_parser() -> FlagParser:
    """The flags of the experiment; all others go to `icm baselines`."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="one pool each")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 4, 8, 16, 32], help="how many are known")
    parser.add_argument("--how", nargs="+", choices=("random", "chosen"), default=["random", "chosen"])
    parser.add_argument("--by", choices=get_args(By), default="margin", help="as in icm ask")
    parser.add_argument("--rows", nargs="+", choices=list(BASELINES), default=list(ROWS))
    parser.add_argument("--at_once", type=int, default=1, help="tables that are made at the same time")
    parser.add_argument("--name", default="known", help="what the tables' folders begin with")
    parser.add_argument("--runs_dir", type=Path, default=REPO_ROOT / "runs")
    parser.add_argument("--out", type=Path, help="write the counts here, as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a table failed (the same command goes on), 2 wrong arguments, 130 interrupted."""
    parser = build_parser()
    args, flags = parser.parse_known_args(arguments)
    if min(args.labels) < 0:
        parser.error("--labels must be at least 0")
    if args.at_once < 1:
        parser.error("--at_once must be at least 1")
    cells = list(cells_of(args.seeds, args.labels, args.how))

    async def run() -> Bench:
        bench = Bench(args, flags)
        await measure(bench, cells)
        return bench

    try:
        bench = asyncio.run(run())
    except BaseExceptionGroup as failures:
        print(f"error: {failures.exceptions[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    rows = [row for cell in cells for row in bench.counts(cell)]
    if args.out is not None:
        settings = bench.searched(cells[0]).settings
        document = {"settings": settings, "engine": bench.searched(cells[0]).engine, "by": args.by, "rows": rows}
        write_atomically(args.out, (json.dumps(document, indent=1) + "\n").encode())
    print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
