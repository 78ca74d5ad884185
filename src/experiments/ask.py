"""Say which claims of a run a human should be asked about: those whose label the search is least sure of.

    icm ask runs/NAME -n 10
    icm ask runs/NAME runs/OTHER -n 20 --by disagreement -o answers.csv

Writes a CSV file to fill in, and beside it a page to click the same answers (one file, no network, every key on the
keyboard), and prints the claims. No question is asked of a model. The run may be finished or stopped; OTHER are runs
that labelled the same claims. Labels that were known already are not asked for; they stand at the end of the file.

The column label takes a label's name, or unsure; what stays empty stays unknown. With --continue_from RUN --known FILE
and its own flags the run goes on with the answers. docs/asking.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import itertools
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import orjson

from core.errors import StorageFailed
from core.files import write_atomically
from src.experiments.arguments import at_least
from src.experiments.arguments_of_reports import RUN_FILES, check_keeps, parser_of, print_error
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.results.asking import By, Doubts, choose, doubts_of
from src.results.asking_view import grid_of, sheet_of
from src.results.page import render_asking
from src.results.run_reader import is_baselines, read_run
from src.results.run_record import RunRecord
from src.results.side_by_side import as_text
from src.results.text import counted, one_line

DEFAULT: Final[By] = "margin"
NAME: Final = "answers.csv"
TITLE: Final = "What is right?"
OF_THE_RUN: Final = ("run", "continue_from", "known", "gold_seeds", "check", "is_complete")
"""Flags of `icm label` that the next command gets anew."""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm ask", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/NAME")
    parser.add_argument(
        "others",
        nargs="*",
        type=Path,
        default=[],  # else argparse names OTHER as required, too
        metavar="OTHER",
        help="folders of other runs of the same claims: do they agree?",
    )
    parser.add_argument(
        "-n", "--count", type=at_least(1), default=10, metavar="N", help="how many claims (default: 10)"
    )
    parser.add_argument(
        "--by",
        choices=get_args(By),
        default=DEFAULT,
        help="margin: of the label found; disagreement: of the journal's answers and of other runs; leverage: what "
        f"another label would do to U; all: the mean of the three ranks; random (default: {DEFAULT})",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of --by random")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the CSV file; the page has its name, with .html (default: {NAME} in RUN)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 no such run, nothing to ask, or a file that cannot be written."""
    args = build_parser().parse_args(arguments)
    path = args.output or args.run / NAME
    try:
        _ask(args, path)
    except (BadInput, StorageFailed, OSError) as error:
        return print_error(error, path)
    return 0


def _ask(args: argparse.Namespace, path: Path) -> None:
    for folder in (args.run, *args.others):
        if is_baselines(folder):
            raise BadInput(f"{folder}: is a table of baselines; name one of its runs, as in {folder}/seed-1")
    run = read_run(args.run)
    doubts = doubts_of(run, _others(args.run, run, args.others))
    if all(doubt.claim.label is None for doubt in doubts.found):
        found = "every label is known" if doubts.known else "it has no labels yet"
        raise BadInput(f"{args.run}: there is nothing to ask: {found}")
    _check_output(path)
    for file in (path, path.with_suffix(".html")):
        check_keeps(file, [args.run], [run], files=[name for name in RUN_FILES if name != NAME])
    chosen = choose(doubts.found, args.count, args.by, args.seed)
    sheet = sheet_of(run, chosen, doubts.found, doubts.known)
    then = _next_command(args.run, run, path)
    subject = f"{counted(len(chosen), 'claim')} of {run.testbed}, labelled by {run.model} ({run.name}); by {args.by}"
    page_path = path.with_suffix(".html")
    page = render_asking(sheet, TITLE, subject, path.name, then)
    write_atomically(path, sheet.content.encode("utf-8-sig"))
    write_atomically(page_path, page.encode("utf-8", "replace"))
    print(as_text([grid_of(run, chosen, args.by)], 64))
    for line in _notes(run, doubts, len(chosen), args.count):
        print(f"  {line}")
    print(f"\n  file  {path}\n  page  {page_path}\n  then  {then}")


def _others(folder: Path, run: RunRecord, others: Sequence[Path]) -> list[RunRecord]:
    """The other runs. Raises BadInput where one labelled no claim of this one."""
    found = []
    for path in others:
        other = read_run(path)
        if path.resolve() == folder.resolve():
            raise BadInput(f"{path}: is the run itself; OTHER are other runs of the same claims")
        if other.settings.get("data_sha256") != run.settings.get("data_sha256") or other.names != run.names:
            raise BadInput(f"{path}: labels other data than {folder}, or other labels")
        rows = {claim.row for claim in run.pool}
        if not any(claim.row in rows and claim.label is not None for claim in other.claims):
            raise BadInput(f"{path}: labelled no claim of {folder}")
        found.append(other)
    return found


def _check_output(path: Path) -> None:
    """Raises BadInput where that file cannot be written, or holds answers, which would be lost."""
    if path.suffix.lower() != ".csv":
        raise BadInput(f"{path}: name a file that ends in .csv; the page has its name, with .html")
    if path.is_dir():
        raise BadInput(f"{path}: is a folder; name a file")
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    answered = sum(bool((row.get("label") or "").strip()) and row.get("reason") != "known" for row in rows)
    if answered:
        raise BadInput(f"{path}: holds {counted(answered, 'answer')} already; name another file with -o")


def _notes(run: RunRecord, doubts: Doubts, chosen: int, asked: int) -> list[str]:
    lines = []
    if chosen < asked:
        lines.append(f"only {counted(chosen, 'claim')} can be asked about")
    if doubts.known:
        lines.append(f"{counted(len(doubts.known), 'known label')} not asked for; they stand at the end of the file")
    if doubts.settled:
        lines.append(f"{counted(len(doubts.settled), 'claim')} left out whose label follows from known ones")
    unlabelled = sum(doubt.claim.label is None for doubt in doubts.found)
    if unlabelled:
        lines.append(f"{counted(unlabelled, 'claim')} without a label yet, asked about last")
    for name, share in doubts.unlike:
        lines.append(
            f"{one_line(name)} agrees on {share:.0%} of the claims only: it follows another labeling, and its labels "
            "do not count here"
        )
    return lines


def _next_command(folder: Path, run: RunRecord, path: Path) -> str:
    """The command of the run with the answers, as far as its run.json has its flags."""
    flags = orjson.loads((folder / "run.json").read_bytes()).get("flags")
    known = isinstance(flags, dict) and "testbed" in flags
    words = _words({"search": run.search, **flags}) if known else ["FLAGS-OF-THE-RUN"]
    on = [] if run.parts else ["--continue_from", str(folder)]
    return shlex.join(["icm", "label", *words, *on, "--known", str(path), "--run", _next_name(folder.resolve())])


def _next_name(folder: Path) -> str:
    """Of the run that goes on: mine-known after mine, then mine-known2, and so on; one that no folder beside it has."""
    before = re.fullmatch(r"(.*-known)(\d*)", folder.name)
    stem, number = (before[1], int(before[2] or 1) + 1) if before else (f"{folder.name}-known", 1)
    names = (stem if count == 1 else f"{stem}{count}" for count in itertools.count(number))
    return next(name for name in names if not (folder.parent / name).exists())


def _words(flags: Mapping[str, Any]) -> list[str]:
    """The flags of `icm label` that are not at their defaults, as they were given."""
    from src.experiments.ICM import build_parser as label_parser

    words, settings = [], SearchSettings()
    for action in label_parser()._actions:
        # A flag without a default of its own is recorded with the one that it stands for.
        default = getattr(settings, action.dest, None) if action.default is None else action.default
        if action.dest == "search":  # which one is meant without a name depends on the version and on other flags
            default = None
        value = flags.get(action.dest)
        plain = default if isinstance(default, str | int | float | bool | None) else str(default)
        if action.dest in OF_THE_RUN or value is None or value == plain:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{action.dest}")
        elif action.nargs == "+":
            words += [flag, *map(str, ast.literal_eval(value))]
        else:
            whole = isinstance(value, float) and value.is_integer()
            words += [flag, str(int(value) if whole else value)]
    return words


if __name__ == "__main__":
    sys.exit(main())
