"""Run an experiment that a file describes, or check the file.

    icm run experiments/builtin-cpu.yaml                       # what the file says
    icm run experiments/truthfulqa-8b.yaml --seeds 1 2 3       # flags of its command win over the file
    icm run --check_only experiments/*.yaml                    # are all keys and values valid? asks no model

A file with a `sweep` is run for every combination of its values, each a run in RUNS/NAME/CELL/, and ends in one table
(table.txt, table.csv, table.json) and one page (index.html) in RUNS/NAME. The same command again runs only what is
missing (docs/experiments.md).

The folder gets an experiment.json: the file's name, its digest, and the figures of the paper it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import orjson

from core.errors import StorageFailed
from core.files import write_atomically
from src.experiments.arguments import Parser, at_least, command_parser
from src.experiments.commands import COMMANDS
from src.experiments.experiment_file import Loaded, load_experiment, parser_of
from src.experiments.resumable import run_resumable
from src.experiments.sweep_cells import sweep_of
from src.icm.testbeds import BadInput


def build_parser() -> argparse.ArgumentParser:
    """Files, and whether only to check them; all other flags go to the experiment's command."""
    parser = command_parser("icm run", __doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE", help="an experiment; several with --check_only")
    parser.add_argument("--check_only", action="store_true", help="check the files and print their command lines")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print the cells with the questions they will ask, and the tokens where a server answers; run none",
    )
    parser.add_argument(
        "--at_once",
        type=at_least(1),
        metavar="N",
        help="of a sweep: cells at the same time on each engine, in place of the file's number; what they find does "
        "not depend on it. Without a sweep, the flag of the experiment's command",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the experiment's command; 2 where the file is not valid."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    switches = [text for text in given if text in _SWITCHES]
    given = [text for text in given if text not in _SWITCHES]
    first_flag = next((i for i, text in enumerate(given) if text.startswith("--") and text != "--help"), len(given))
    parser = build_parser()
    if first_flag == 0 and len(given) > 1:
        parser.error(f"name the file first, and then flags of its command such as {given[0]}")
    options = parser.parse_args([*given[:first_flag], *switches])
    more = given[first_flag:]
    if options.check_only:
        return max([_check(path, more) for path in options.file])
    try:
        loaded = [load_experiment(path) for path in options.file]
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(loaded) > 1:
        print("error: one experiment at a time (several only with --check_only)", file=sys.stderr)
        return 2
    if options.dry_run:
        return _run_cells(loaded[0], more, dry=True)
    try:
        return _run(loaded[0], options.file[0], more)
    except StorageFailed as error:  # the results of the experiment's command are kept
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(path: Path, more: Sequence[str]) -> int:
    """Print the command lines of a file, or what is wrong with it. Returns the exit code."""
    try:
        loaded = load_experiment(path)
        cells = sweep_of(loaded, more if loaded.experiment.sweep is not None else ()).cells
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for cell in cells:
        print(shlex.join(["icm", loaded.experiment.command, *cell.arguments]))
    return 0


_SWITCHES = ("--check_only", "--dry_run")


def _run(loaded: Loaded, path: Path, more: Sequence[str]) -> int:
    experiment = loaded.experiment
    if experiment.sweep is not None:
        return _run_cells(loaded, more)
    arguments = [*loaded.arguments, *more]
    args = parser_of(experiment.command).parse_args(arguments)
    if args.run is None:  # experiment.json goes into the run's folder, so its name must be known here
        arguments += ["--run", path.stem]
    command: Callable[[Sequence[str]], int] = import_module(COMMANDS[experiment.command][0]).main
    print(f"{experiment.title}\n  {shlex.join(['icm', experiment.command, *arguments])}", file=sys.stderr)
    code = command(arguments)
    _record(loaded, args.runs_dir / (args.run or path.stem), more)
    if experiment.paper is not None and code == 0:
        _print_paper(loaded)
    return code


def _run_cells(loaded: Loaded, more: Sequence[str], *, dry: bool = False) -> int:
    """Every cell of a sweep; dry: only what each will ask."""
    from src.experiments.sweep import run_sweep  # what both commands need: not imported for a single run
    from src.experiments.sweep_estimate import dry_run

    own = Parser(prog="icm run", add_help=False, allow_abbrev=False)
    own.add_argument("--at_once", type=at_least(1))
    options, others = own.parse_known_args(more)
    try:
        sweep = sweep_of(loaded, others)
        args = parser_of(loaded.experiment.command).parse_args(sweep.cells[0].arguments)
        print(loaded.experiment.title, file=sys.stderr)
        resume = shlex.join(["icm", "run", str(loaded.path), *more])
        if dry:
            return run_resumable(dry_run(sweep, options.at_once), resume)
        code = run_resumable(run_sweep(sweep, at_once=options.at_once, quiet=args.quiet), resume)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _record(loaded, args.runs_dir / (args.run or loaded.path.stem), more)
    if loaded.experiment.paper is not None and code == 0:
        _print_paper(loaded)
    return code


def _record(loaded: Loaded, folder: Path, more: Sequence[str]) -> None:
    """Write where the results in `folder` come from."""
    path, paper = loaded.path, loaded.experiment.paper
    if folder.is_dir():
        record = {
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "changed": list(more),
            "paper": None if paper is None else paper.model_dump(),
        }
        write_atomically(folder / "experiment.json", orjson.dumps(record, option=orjson.OPT_INDENT_2))


def _print_paper(loaded: Loaded) -> None:
    paper = loaded.experiment.paper
    assert paper is not None
    print(f"  the paper ({paper.source}; {paper.read}):")
    for method, value in paper.accuracy.items():
        yours = loaded.experiment.yours.get(method)
        print(f"    {method:<28}{'not given' if value is None else f'{value:.2f}':<12}yours {yours or '-'}")


if __name__ == "__main__":
    sys.exit(main())
