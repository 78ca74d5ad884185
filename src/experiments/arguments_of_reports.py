"""What the command lines that read runs share: their parser and how runs are named."""

from __future__ import annotations

import argparse
from pathlib import Path

from src.experiments.arguments import command_parser


def parser_of(program: str, docstring: str | None) -> argparse.ArgumentParser:
    """A command's parser, without defaults behind its flags."""
    return command_parser(program, docstring, argparse.RawDescriptionHelpFormatter)


def run_folders(parser: argparse.ArgumentParser, least: int = 1) -> None:
    """Add the positional RUN RUN ... . least: how many there must be; only the help says so."""
    what = "folders of runs, as in runs/NAME" if least == 1 else f"at least {least} folders of runs"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=what)
