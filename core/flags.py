"""Command lines: a flag or name that there is not is told with the nearest one, what is no number in plain words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn

ALIKE: Final = 0.6
"""How much of a mistyped flag or name must be right, from 0 to 1."""


def meant(name: str, names: Iterable[str]) -> str:
    """`; did you mean NAME?`: the one of `names` that is nearest to a mistyped one, in small letters or capitals; ""
    where none is near."""
    by_small = {each.casefold(): each for each in names}
    near = get_close_matches(name.casefold(), by_small, n=1, cutoff=ALIKE)
    return f"; did you mean {by_small[near[0]]}?" if near else ""


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
    _given: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line and exit code 2."""
        if message.startswith("the following arguments are required"):  # perhaps one that was mistyped
            flags = list(_flags_of(self))
            given = [word.partition("=")[0] for word in self._given]
            message += self._meant([word for word in given if not any(flag.startswith(word) for flag in flags)])
        self.exit(2, f"error: {message} (see --help)\n")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse does; a mistyped flag is told with the nearest one. Ends the program by `error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        parsed: argparse.Namespace
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return parsed

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            nearest = meant(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, error.message.replace(" (choose", f"{nearest} (choose", 1)) from None

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
