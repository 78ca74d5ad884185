"""What are answers worth: agreement with gold after 0, 10, 20 and 40 of them, of chosen claims against random ones.

    VLLM_BASE_URL=http://localhost:8000 python benchmarks/asking.py --json asking.json --use_vllm --model NAME \\
        --data_dir DIR --testbed gsm8k --batch_size 64 --calibrate mean --alpha 50 --search ascent

Every flag that is not one of this file's goes to `icm label`. For each seed a pool is labelled; then, for each way to
choose, round after round: `icm ask RUN --by WAY` names the claims, gold answers them, and `icm label --continue_from
RUN --known FILE` goes on. All of it is done by the project's own commands, in folders under --runs_dir; started
again, it goes on where it was stopped. At random several draws are made of each seed; the table shows their mean. Gold
that contradicts a constraint and the answers before it, as some of GSM8K's does, is answered "unsure".

Of each round three figures: agreement over all claims of the first pool (an answered one is right), over those that
were not answered, and over all if the first labels were kept and only the answers put in ("alone"): what the search
makes of the answers is the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Final, get_args

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from core.packages import OF_FILES, need_packages

    need_packages(OF_FILES)

from core.files import write_atomically
from core.flags import FlagParser
from src.experiments.ask import main as ask
from src.icm.consistency import Consistency, Label
from src.results.asking import By
from src.results.asking_view import UNSURE
from src.results.run_reader import read_run
from src.results.run_record import RunRecord

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
RANDOM: Final = "random"


@dataclass(frozen=True, slots=True)
class Round:
    """One run. draw: of "random". agreeing of compared claims with gold; rest: those not answered; alone: see above.
    asked: questions of the search, of which from_cache were answered before; tokens: computed."""

    seed: int
    by: str
    draw: int
    answers: int
    run: str
    agreeing: int
    compared: int
    rest_agreeing: int
    rest_compared: int
    alone: int
    asked: int
    from_cache: int
    tokens: int
    seconds: float


class Failed(Exception):
    """A command of the product failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and the searches that may run at the same time."""

    flags: Sequence[str]
    runs_dir: Path
    counts: Sequence[int]
    at_once: asyncio.Semaphore

    async def label(self, name: str, seed: int, *more: str) -> Path:
        """`icm label` in a process of its own; a finished run is only read. Raises Failed."""
        folder = self.runs_dir / name
        words = ["label", *self.flags, "--seed", str(seed), "--runs_dir", str(self.runs_dir), "--run", name, "--quiet"]
        async with self.at_once:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "src.experiments.commands", *words, *more),
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(REPO_ROOT), os.environ.get("PYTHONPATH")))),
                },
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            _, err = await process.communicate()
        if process.returncode:
            raise Failed(f"{name}: exit code {process.returncode}\n{err.decode(errors='replace')[-2000:]}")
        return folder

    async def chain(self, first: Path, seed: int, by: str, draw: int) -> list[Round]:
        """The rounds of one seed and one way to choose."""
        base, before, rounds = read_run(first), first, []
        for done, count in zip([0, *self.counts], self.counts, strict=False):
            name = f"{first.name}-{by}{f'-{draw}' if by == RANDOM else ''}-{count}"
            file = self.runs_dir / f"{name}.csv"
            if not file.exists():
                answer(before, count - done, by, 1000 * seed + draw, file)
            more = ("--continue_from", str(before), "--known", str(file))
            before = await self.label(name, seed, *more)
            rounds.append(round_of(read_run(before), base, seed, by, draw, count))
            print(line_of(rounds[-1]), flush=True)
        return rounds

    async def measure(self, seed: int, ways: Sequence[str], draws: int) -> list[Round]:
        """All rounds of one seed."""
        first = await self.label(f"asking-{seed}", seed)
        base = read_run(first)
        chains = [(by, draw) for by in ways for draw in range(draws if by == RANDOM else 1)]
        found = await asyncio.gather(*(self.chain(first, seed, by, draw) for by, draw in chains))
        zero = [round_of(base, base, seed, by, draw, 0) for by, draw in chains]
        return [*zero, *(each for rounds in found for each in rounds)]


def answer(run: Path, count: int, by: str, seed: int, file: Path) -> None:
    """Have `icm ask` name claims, and answer them with gold. Raises Failed."""
    told = io.StringIO()
    asked = file.with_name(f"{file.stem}-asked.csv")
    asked.unlink(missing_ok=True)
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        drawn = ["--seed", str(seed)] if by == RANDOM else []
        code = ask([str(run), "-n", str(count), "--by", by, *drawn, "-o", str(asked)])
    if code:
        raise Failed(told.getvalue())
    content = asked.read_bytes().decode("utf-8-sig")
    reader = csv.DictReader(io.StringIO(content, newline=""))
    listed = list(reader)
    gold = answers_of(read_run(run), [int(row["row"]) for row in listed if not row["label"]])
    rows = [{**row, "label": row["label"] or gold[int(row["row"])]} for row in listed]
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, reader.fieldnames or [], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, written.getvalue().encode("utf-8-sig"))


def answers_of(run: RunRecord, rows: Sequence[int]) -> dict[int, str]:
    """Gold's answers to these claims, by row, after those that are known: label names. "unsure" where there is no gold,
    and where it contradicts a constraint and the labels before it: `icm label` would refuse the file."""
    place = {claim.row: at for at, claim in enumerate(run.pool)}
    known: list[Label] = [claim.label if claim.is_known else None for claim in run.pool]
    consistency = Consistency(run.constraints or ())
    found = {}
    for row in rows:
        gold = run.pool[place[row]].gold
        tried = tuple(gold if at == place[row] else label for at, label in enumerate(known))
        nearest = consistency.nearest([(0.0,) * run.num_labels] * len(tried), tried)
        fits = gold is not None and not consistency.count(nearest)
        found[row] = run.name_of(gold) if fits else UNSURE
        if fits:
            known[place[row]] = gold
    return found


def round_of(run: RunRecord, base: RunRecord, seed: int, by: str, draw: int, answers: int) -> Round:
    """The figures of one run. base: the run without an answer, whose pool is compared."""
    first = {claim.row: claim for claim in base.pool if claim.gold is not None}
    now = {claim.row: claim for claim in run.claims if claim.row in first}
    known = {row for row, claim in now.items() if claim.is_known}
    right = {row for row, claim in now.items() if claim.label == claim.gold}
    cost = run.cost
    return Round(
        seed=seed,
        by=by,
        draw=draw,
        answers=answers,
        run=run.name,
        agreeing=len(right),
        compared=len(first),
        rest_agreeing=len(right - known),
        rest_compared=len(first) - len(known),
        alone=sum(row in known or bool(claim.agrees) for row, claim in first.items()),
        asked=int(cost.get("asked", 0)),
        from_cache=int(cost.get("from_cache", 0)),
        tokens=int(cost.get("tokens_computed", 0)),
        seconds=round(cost.get("seconds", 0.0), 2),
    )


def line_of(one: Round) -> str:
    """For the terminal, as soon as it is known."""
    return (
        f"seed {one.seed}  {one.by:<12}  {one.answers:>3} answers  all {one.agreeing}/{one.compared}  "
        f"rest {one.rest_agreeing}/{one.rest_compared}  alone {one.alone}  asked {one.asked} ({one.from_cache} cached)"
    )


def share(rounds: Sequence[Round], what: str) -> dict[int, float]:
    """By seed, the mean over draws of a figure: "all", "rest" or "alone"."""
    parts = {
        "all": ("agreeing", "compared"),
        "rest": ("rest_agreeing", "rest_compared"),
        "alone": ("alone", "compared"),
    }
    over, under = parts[what]
    seeds = sorted({one.seed for one in rounds})
    of_seed = {
        seed: [getattr(one, over) / max(1, getattr(one, under)) for one in rounds if one.seed == seed] for seed in seeds
    }
    return {seed: mean(values) for seed, values in of_seed.items()}


def summary(rounds: Sequence[Round]) -> list[dict[str, object]]:
    """A row for each way and number of answers: means over seeds; above_random: seeds with a higher agreement (all)."""
    rows: list[dict[str, object]] = []
    for by in dict.fromkeys(one.by for one in rounds):
        for count in sorted({one.answers for one in rounds}):
            here = [one for one in rounds if (one.by, one.answers) == (by, count)]
            chance = share([one for one in rounds if (one.by, one.answers) == (RANDOM, count)], "all")
            shares = {what: share(here, what) for what in ("all", "rest", "alone")}
            values = list(shares["all"].values())
            rows.append(
                {
                    "by": by,
                    "answers": count,
                    **{what: round(mean(found.values()), 4) for what, found in shares.items()},
                    "sd": round(stdev(values), 4) if len(values) > 1 else None,
                    "above_random": sum(
                        value > chance[seed] for seed, value in shares["all"].items() if seed in chance
                    ),
                    "seeds": len(values),
                    "asked": round(mean(one.asked for one in here), 1),
                    "new": round(mean(one.asked - one.from_cache for one in here), 1),
                    "tokens": round(mean(one.tokens for one in here)),
                    "seconds": round(mean(one.seconds for one in here), 1),
                }
            )
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    """The summary as text."""
    columns = list(rows[0])
    cells = [columns, *([("" if row[name] is None else str(row[name])) for name in columns] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(wide) for cell, wide in zip(row, widths, strict=True)) for row in cells)


async def measured(args: argparse.Namespace, flags: Sequence[str]) -> list[Round]:
    """All rounds of all seeds."""
    bench = Bench(flags, args.runs_dir, args.counts, asyncio.Semaphore(args.at_once))
    found = await asyncio.gather(*(bench.measure(seed, args.by, args.draws) for seed in args.seeds))
    return [each for rounds in found for each in rounds]


def main() -> int:
    """Print every round and the table; with --json also write them."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 20, 40], help="answers in all, after each round")
    parser.add_argument("--by", nargs="+", choices=get_args(By), default=list(get_args(By)), help="ways to choose")
    parser.add_argument("--draws", type=int, default=3, help="random choices of each seed")
    parser.add_argument("--at_once", type=int, default=6, help="searches at the same time")
    parser.add_argument("--runs_dir", type=Path, default=REPO_ROOT / "runs")
    parser.add_argument("--json", type=Path, default=None)
    args, flags = parser.parse_known_args()
    if sorted(set(args.counts)) != args.counts or args.counts[0] < 1:
        parser.error("--counts must rise, from 1 on")
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        rounds = asyncio.run(measured(args, flags))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = summary(rounds)
    print(table(rows))
    if args.json is not None:
        content = {"flags": flags, "summary": rows, "rounds": [asdict(one) for one in rounds]}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
