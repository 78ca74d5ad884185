"""What the command lines that read runs share: how they explain themselves, complain, and name runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from src.experiments.arguments import Parser


def parser_of(program: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser that says what its module says: the first line as what it does, the rest below the flags."""
    first, _, rest = (docstring or "").partition("\n\n")
    return Parser(prog=program, description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_folders(parser: argparse.ArgumentParser, least: int = 1) -> None:
    """Add the positional RUN RUN ... . least: how many there must be, told in the help only."""
    what = "folders of runs, as in runs/NAME" if least == 1 else f"at least {least} folders of runs"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
