"""What the command lines that read runs share: their parser, how runs are named, and how errors are printed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from src.experiments.arguments import command_parser


def parser_of(program: str, docstring: str | None) -> argparse.ArgumentParser:
    """A command's parser, without defaults behind its flags."""
    return command_parser(program, docstring, argparse.RawDescriptionHelpFormatter)


def run_folders(parser: argparse.ArgumentParser, least: int = 1) -> None:
    """Add the positional RUN RUN ... . least: how many there must be; only the help says so."""
    what = "folders of runs, as in runs/NAME" if least == 1 else f"at least {least} folders of runs"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)


def print_error(error: Exception, output: Path | None) -> int:
    """Print one line on what went wrong; output: what could not be written, for an OSError. Exit code 2."""
    what = f"{output}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
    print(f"error: {what}", file=sys.stderr)
    return 2
