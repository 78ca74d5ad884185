"""Follow a run in the terminal: how many claims are labelled, U, acceptance, cache hits, seconds a step.

    icm watch runs/NAME
    icm watch runs/NAME --once

Waits for a run to begin in the folder (--wait) and for its first step, and ends with the run (exit code 0) or by Ctrl-C
(130). It only reads files, so it never disturbs a run. In a pipe it prints a line whenever something changed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from core.flags import number
from src.experiments.arguments_of_reports import parser_of
from src.icm.consistency import Label
from src.icm.label_names import Names, names_of, read_label
from src.results.curves import Curves, curves_of
from src.results.run_reader import a_cell_of
from src.results.run_record import IN_POOL, KNOWN
from src.results.tail import JournalTail, is_finished, run_document, searches_in
from src.results.text import duration, one_line

BLOCKS = "▁▂▃▄▅▆▇█"
QUIET_AFTER = 60.0  # seconds (and at least ten steps' time) without a new line until a run may have stopped


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm watch", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/NAME")
    parser.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between looks (default: 1)"
    )
    parser.add_argument(
        "--wait",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="seconds to wait for a run that has not begun in the folder (default: 600)",
    )
    parser.add_argument("--once", action="store_true", help="show where the run stands and end")
    return parser


def _seconds(text: str) -> float:
    value = number(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be between 0.05 and 3600 seconds, not {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 the run is finished (or --once), 2 no such folder or no run in it for --wait, 130 interrupted."""
    args = build_parser().parse_args(arguments)
    if not args.run.is_dir():
        what = (
            "is not a run's folder"
            if args.run.exists()
            else "there is no such folder; a run makes its own when it starts"
        )
        print(f"error: {args.run}: {what}", file=sys.stderr)
        return 2
    if (args.run / "landscape.json").exists() and not (args.run / "run.json").exists():
        print(f"error: {args.run}: holds a landscape, which has no steps to watch", file=sys.stderr)
        return 2
    if cell := a_cell_of(args.run):
        print(f"error: {args.run}: is a sweep; name one of its cells, as in {cell}", file=sys.stderr)
        return 2
    watch = Watch(args.run)
    screen = Screen(live=sys.stdout.isatty() and not args.once)
    since = time.monotonic()
    try:
        while True:
            changed, over = watch.poll(), is_finished(args.run)
            screen.show(watch.lines(over), changed or over)
            if over or args.once:
                return 0
            if not watch.begun and time.monotonic() - since >= args.wait:
                print(f"error: {args.run}: no run has begun in it for {duration(args.wait)} (--wait)", file=sys.stderr)
                return 2
            time.sleep(args.interval)
    except KeyboardInterrupt:
        print("\nno longer watching; the run goes on" if sys.stdout.isatty() else "")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more, of which Python would complain at its end
        return 0


class Screen:
    """Lines that replace each other on a terminal, and follow each other anywhere else."""

    def __init__(self, live: bool) -> None:
        self._live = live
        self._shown = 0

    def show(self, lines: Sequence[str], changed: bool) -> None:
        if not self._live:
            if changed or not self._shown:
                print(" | ".join(lines), flush=True)
                self._shown = 1
            return
        width, height = shutil.get_terminal_size()
        cut = [line[: max(1, width - 1)] for line in lines[: max(1, height - 1)]]
        up = f"\x1b[{self._shown}A" if self._shown else ""
        # Clears what an earlier, longer frame left below.
        print(up + "".join(f"\r{line}\x1b[K\n" for line in cut) + "\x1b[J", end="", flush=True)
        self._shown = len(cut)


class Watch:
    """One run, or its parts, read from its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._searches: dict[Path, Search] = {}

    def poll(self) -> bool:
        """Read every file; returns whether anything changed."""
        changed = False
        for path in searches_in(self.folder):
            if path not in self._searches:
                self._searches[path] = Search(path)
                changed = True
            changed |= self._searches[path].poll()
        return changed

    @property
    def begun(self) -> bool:
        """Whether there is a run in the folder, or anything of one."""
        return bool(run_document(self.folder)) or any(search.tail.records for search in self._searches.values())

    def lines(self, over: bool) -> list[str]:
        """The lines to show. over: whether the run is finished."""
        document = run_document(self.folder)
        started = [search for search in self._searches.values() if search.tail.records]
        if not started:
            state = "waiting for its first step" if self.begun else "waiting for a run to begin in it: no run.json yet"
            return [f"{one_line(self.folder.name)}: {state}"]
        settings = (document or {}).get("settings")
        settings = settings if isinstance(settings, dict) else {}
        named = [str(settings[name]) for name in ("testbed", "model") if name in settings]
        named += [f"{name} {settings[name]}" for name in ("alpha", "seed") if name in settings]
        head = f"{one_line(self.folder.name)}: {one_line(', '.join(named))}"
        if len(self._searches) == 1:
            return [f"{head}; {'finished' if over else started[0].state()}", *started[0].lines()]
        done = sum(search.finished for search in started)
        lines = [f"{head}; {'finished' if over else f'{done} of {len(self._searches)} searches finished'}"]
        # Those in progress first: there may be more parts than lines.
        in_order = sorted(started, key=lambda search: search.finished)
        return lines + [f"  {search.folder.name:<14} {search.brief()}" for search in in_order]


@dataclass
class Search:
    """One journal and its curves."""

    folder: Path

    def __post_init__(self) -> None:
        self.tail = JournalTail(self.folder / "log.jsonl")
        self.curves = Curves()
        self.finished = False
        self._gold: list[Label] = []

    def poll(self) -> bool:
        changed = self.tail.poll()
        if changed:
            if not self._gold:
                self._gold = _gold(self.folder)
            self.curves = curves_of(self.tail.records, self._gold)
        if not self.finished and is_finished(self.folder):
            self.finished = changed = True
        return changed

    def state(self) -> str:
        """ "running", or for how long nothing was written."""
        try:
            silent = time.time() - self.tail.path.stat().st_mtime
        except OSError:
            return "running"
        step = self.curves.seconds[-1] if self.curves.seconds else None
        if silent > max(QUIET_AFTER, 10 * (step or 0.0)):
            return f"nothing new for {duration(silent)}: stopped?"
        return "running"

    def lines(self) -> list[str]:
        """Three lines of figures."""
        curves, last = self.curves, self.tail.records[-1]
        size = max(len(self._gold), curves.labelled[-1])
        total = sum(record.get("seconds") or 0.0 for record in self.tail.records)
        names = _names(self.folder)
        balance = one_line(names[1], 20) if len(names) == 2 else "the commonest label"
        return [
            f"  labelled {_bar(curves.labelled[-1], size)} {curves.labelled[-1]} of {size}, "
            f"{_figure(curves.balance[-1])} {balance}; iteration {curves.iteration[-1]}",
            f"  U {last['U']:.2f} {_sparkline(curves.utility)}; agreement with gold {_figure(curves.accuracy[-1])}; "
            f"accepted {_figure(curves.acceptance[-1])} of the last 50; T {_figure(_latest(curves.temperature))}",
            f"  cache hits {_figure(curves.hit_rate[-1])}; {_figure(curves.seconds[-1])} s a step; "
            f"{duration(total)} so far",
        ]

    def brief(self) -> str:
        """The same in one line."""
        curves = self.curves
        size = max(len(self._gold), curves.labelled[-1])
        state = "finished" if self.finished else self.state()
        return (
            f"{_bar(curves.labelled[-1], size, 16)} {curves.labelled[-1]} of {size}, U {curves.utility[-1]:.1f}, "
            f"gold {_figure(curves.accuracy[-1])}, iteration {curves.iteration[-1]}, {state}"
        )


def _names(folder: Path) -> Names:
    settings = (run_document(folder) or {}).get("settings")
    return names_of(settings if isinstance(settings, dict) else {})


def _gold(folder: Path) -> list[Label]:
    """Gold labels by pool position, from claims.jsonl or else labels.jsonl, None where the label is known; empty where
    neither can be read."""
    names = _names(folder)
    for name in ("claims.jsonl", "labels.jsonl"):
        try:
            rows: list[Any] = [orjson.loads(line) for line in (folder / name).read_bytes().splitlines()]
        except (OSError, orjson.JSONDecodeError):
            continue
        if all(isinstance(row, dict) for row in rows):
            pool = [row for row in rows if row.get("by", "icm") in IN_POOL and not row.get("outside")]
            known = [row.get("by") == KNOWN or row.get("known") is not None for row in pool]
            return [
                None if given else read_label(row.get("gold"), names) for row, given in zip(pool, known, strict=True)
            ]
    return []


def _bar(done: int, of: int, width: int = 24) -> str:
    filled = round(width * done / of) if of else 0
    return "[" + "#" * filled + "-" * (width - filled) + "]"


def _sparkline(values: Sequence[float], width: int = 32) -> str:
    picked = [values[at * len(values) // min(width, len(values))] for at in range(min(width, len(values)))]
    low, high = min(picked), max(picked)
    if low == high:
        return BLOCKS[0] * len(picked)
    return "".join(BLOCKS[int((value - low) / (high - low) * (len(BLOCKS) - 1))] for value in picked)


def _latest(values: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(values) if value is not None), None)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
