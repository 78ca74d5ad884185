"""Command lines: a flag that there is not is told with the nearest one, a value that is no number in plain words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn

ALIKE: Final = 0.6
"""How much of a mistyped flag must be right, from 0 to 1."""


def number(text: str) -> float:
    """A number as Python reads it."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None


def whole_number(text: str) -> int:
    """A whole number as Python reads it."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None


def port_number(text: str) -> int:
    """A port to listen at."""
    found = int(text) if text.isdecimal() else -1
    if not 0 <= found <= 65535:  # getaddrinfo would take it modulo 65536
        raise argparse.ArgumentTypeError(f"must be between 0 (any that is free) and 65535, not {text}")
    return found


class FlagParser(argparse.ArgumentParser):
    """As argparse's. also: flags that another parser of the same command line takes, which can be meant as well."""

    also: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line and exit code 2."""
        self.exit(2, f"error: {message} (see --help)\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse does; a mistyped flag is told with the nearest one. Ends the program by `error`."""
        parsed: argparse.Namespace
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed

    def _meant(self, unknown: Sequence[str]) -> str:
        flags = [*_flags_of(self), *self.also]
        given = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [close[0] for each in given if (close := get_close_matches(each, flags, n=1, cutoff=ALIKE))]
        return f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""


def _flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The long flags of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _flags_of(command)
        yield from (flag for flag in action.option_strings if flag.startswith("--"))
