"""What the command lines that read runs share: their parser, how runs are named, and how errors are printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final

from src.experiments.arguments import command_parser
from src.icm.testbeds import BadInput
from src.results.run_record import RunRecord

RUN_FILES: Final = (
    *("run.json", "log.jsonl", "labels.jsonl", "claims.jsonl", "layout.json", "prompt.txt", "answers.csv"),
    *("gone.jsonl", "known.jsonl"),
)
"""What a run's folder holds that no command may write over."""


def parser_of(program: str, docstring: str | None) -> argparse.ArgumentParser:
    """A command's parser, without defaults behind its flags."""
    return command_parser(program, docstring, argparse.RawDescriptionHelpFormatter)


def run_folders(parser: argparse.ArgumentParser, least: int = 1) -> None:
    """Add the positional RUN RUN ... . least: how many there must be; only the help says so."""
    what = "folders of runs, as in runs/NAME" if least == 1 else f"at least {least} folders of runs"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)


def check_keeps(
    path: Path, folders: Iterable[Path], runs: Iterable[RunRecord], files: Collection[str] = RUN_FILES
) -> None:
    """Raises BadInput where `path` is one of these files of a run's folder, or holds the claims that a run labelled."""
    if not path.is_file():
        return
    if path.name in files and any(path.resolve().parent == folder.resolve() for folder in folders):
        raise BadInput(f"{path}: is a file of the run itself, which is not written over; choose another -o")
    content = sha256(path.read_bytes()).hexdigest()
    if any(run.settings.get("data_sha256") == content for run in runs):
        raise BadInput(f"{path}: holds the claims that the run labelled, and is not written over; choose another -o")


def print_error(error: Exception, output: Path | None) -> int:
    """Print one line on what went wrong; output: what could not be written, for an OSError. Exit code 2."""
    what = f"{output}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
    print(f"error: {what}", file=sys.stderr)
    return 2
