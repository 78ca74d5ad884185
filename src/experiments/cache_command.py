"""Look after the response cache that all runs share: show its size, check it, remove what is not needed.

    icm cache stats
    icm cache verify
    icm cache prune --older_than 90

Answers are keyed by everything that determines them, so none is ever out of date: pruning only saves space. Runs may go
on meanwhile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from core.errors import APIError
from core.flags import FlagParser, number
from core.llm_api.response_cache import FORMAT_VERSION, CacheState, ResponseCache
from core.settings import KEPT_IN

DEFAULT = KEPT_IN / "runs" / "responses.sqlite"


def build_parser() -> argparse.ArgumentParser:
    """stats, verify and prune."""
    parser = FlagParser(prog="icm cache", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (
        ("stats", "rows, bytes and age"),
        ("verify", "check every row and the file itself; exit code 1 if anything is damaged"),
        ("prune", "remove damaged rows, and with --older_than old ones"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("--cache", type=Path, default=DEFAULT, metavar="FILE", help="(default: %(default)s)")
        if name == "prune":
            command.add_argument(
                "--older_than", type=_days, default=None, metavar="DAYS", help="also answers stored before that"
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 something is damaged, 2 no such cache or one that cannot be used."""
    args = build_parser().parse_args(arguments)
    if not args.cache.is_file():
        print(f"error: {args.cache}: no such cache; name one with --cache", file=sys.stderr)
        return 2
    try:
        with ResponseCache(args.cache) as cache:
            if args.command == "prune":
                before = None if args.older_than is None else time.time() - 86_400 * args.older_than
                print(f"{args.cache}: {cache.prune(before=before, damaged=True):,} answers removed")
            state = cache.state()
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(args.cache, state))
    for fault in state.faults:
        print(f"error: {args.cache}: {fault}", file=sys.stderr)
    if args.command == "verify" and (state.damaged or state.faults):
        print("error: damaged answers are asked for again; remove them with: icm cache prune", file=sys.stderr)
        return 1
    return 0


def _table(path: Path, state: CacheState) -> str:
    since = "".join(
        f"\n  {name:<8} {datetime.fromtimestamp(stored, UTC):%Y-%m-%d %H:%M} UTC"
        for name, stored in (("oldest", state.oldest), ("newest", state.newest))
        if stored is not None
    )
    return (
        f"{path} (format {FORMAT_VERSION})\n  answers  {state.rows:,}\n  damaged  {state.damaged:,}\n"
        f"  floored  {state.floored:,}\n  bytes    {state.bytes:,}{since}"
    )


def _days(text: str) -> float:
    days = number(text)
    if not 0 <= days < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of days from 0 on, not {text}")
    return days


if __name__ == "__main__":
    sys.exit(main())
