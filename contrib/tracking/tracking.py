"""Logging runs while they are searched, and afterwards: trackers work in a thread of their own, and none that fails
stops a search."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from typing import Final

from tqdm import tqdm

from contrib.tracking.tracker import (
    TOOLS,
    Point,
    Points,
    TrackedRun,
    Tracker,
    Values,
    check_installed,
    results_as_values,
    searches_of,
)
from src.icm.searches.seam import Record, Standing
from src.results.run_reader import read_run
from src.results.run_record import RunRecord

WAIT_S: Final = 300.0
"""Seconds after a search until a tracker that has not taken in everything is left behind."""
WAIT_INTERRUPTED_S: Final = 10.0
"""The same after a search that was stopped."""
SAY_S: Final = 2.0
"""Seconds until it is said what is waited for."""
POLL_S: Final = 0.02
LONGEST_REASON: Final = 160
"""Characters of a tool's error that are shown."""


class Tracking:
    """The trackers of one run, from its files on.

    It reads what the run's folder holds when the first line comes, so that a run that goes on is sent whole; each
    tracker leaves out what it has.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, place: Path | None = None) -> None:
        """names: of TOOLS. name: the run's. place: as in Tool.open. Raises BadInput where a package is missing."""
        check_installed(names)
        self._names = list(dict.fromkeys(names))
        self._folder = folder
        self._name = name
        self._place = place
        self._points: Points | None = None
        self._workers: list[_Worker] = []
        self._open_workers: list[_Worker] = []
        self._said = False

    def update(self, state: Standing, record: Record) -> None:
        """Take in one new line of the journal, which is on disk already: it is an OnRecord."""
        if self._points is None:
            self._open()
        else:
            self._send(self._points.of([record]))

    def finish(self) -> None:
        """Send what the run's folder holds when its search has ended, with the results if it is finished."""
        if self._points is None:
            self._open()
        run = read_run(self._folder)
        if run.finished:
            for worker in self._workers:
                worker.finish(results_as_values(run), self._folder / "curves.png")
        self._close(finished=run.finished is not None)

    def stop(self) -> None:
        """Leave a run that will go on another time."""
        self._close(finished=False)
        self.wait(WAIT_INTERRUPTED_S)

    def wait(self, seconds: float = WAIT_S) -> None:
        """Until all trackers have everything, at most so many seconds; says so when it takes long."""
        begun = time.monotonic()
        while self._wait_on(time.monotonic() - begun, seconds):
            time.sleep(POLL_S)

    async def settle(self, seconds: float = WAIT_S) -> None:
        """The same in an event loop."""
        begun = time.monotonic()
        while self._wait_on(time.monotonic() - begun, seconds):  # noqa: ASYNC110  the end of a thread is no event
            await asyncio.sleep(POLL_S)

    def _wait_on(self, waited: float, seconds: float) -> bool:
        """Whether to go on waiting."""
        busy = [worker for worker in self._workers if worker.busy]
        if busy and waited > SAY_S and not self._said:
            self._said = True
            _say(f"waiting until {', '.join(worker.title for worker in busy)} took in the run")
        if waited <= seconds:
            return bool(busy)
        for worker in busy:
            worker.abandon(seconds)
        return False

    @property
    def where(self) -> list[str]:
        """Where to look at the run, of each tracker that did not fail."""
        return [worker.where for worker in self._workers if worker.where]

    def _open(self) -> None:
        run = read_run(self._folder)
        told = TrackedRun.of(replace(run, name=self._name), self._folder)
        self._workers = [_Worker(name, told, self._place) for name in self._names]
        self._open_workers = list(self._workers)
        self._points = Points(run)
        self._send(self._points.of(run.journal))

    def _send(self, points: Iterable[Point]) -> None:
        for point in points:
            for worker in self._workers:
                if worker.busy:  # else it failed
                    worker.log(point)

    def _close(self, *, finished: bool) -> None:
        workers, self._open_workers = self._open_workers, []
        for worker in workers:
            worker.close(finished=finished)


class _Worker:
    """One tracker in a thread of its own, so that a search never waits for it."""

    def __init__(self, name: str, run: TrackedRun, place: Path | None) -> None:
        self.where = ""
        self.title = TOOLS[name].title
        self._name = name
        self._run = run
        self._place = place
        self._tracker: Tracker | None = None
        self._abandoned = False
        self._jobs: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracking {name}", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        self._jobs.put(lambda tracker: None if point.step < tracker.held else tracker.log(point))

    def finish(self, results: Values, curves: Path) -> None:
        self._jobs.put(lambda tracker: tracker.finish(results, curves))

    def close(self, *, finished: bool) -> None:
        self._jobs.put(lambda tracker: tracker.close(finished=finished))
        self._jobs.put(None)

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def abandon(self, seconds: float) -> None:
        """Say that it is waited for no longer."""
        self.where, self._abandoned = "", True
        _say(f"warning: {self.title} did not take in everything in {seconds:g} s and is left behind{self._again}")

    def _work(self) -> None:
        try:
            self._tracker = TOOLS[self._name].open(self._run, self._place)
            while (job := self._jobs.get()) is not None:
                job(self._tracker)
            if not self._abandoned:
                self.where = self._tracker.where
        except Exception as error:  # noqa: BLE001  a tool's own errors are of any type, and none may stop a search
            if self._abandoned:
                return  # it was said that the tool is left behind
            what = shorten(" ".join(str(error).split()) or "no reason given", LONGEST_REASON)
            _say(f"warning: {self.title} failed, and is told no more of this run: "
                 f"{type(error).__name__}: {what}{self._again}")  # fmt: skip

    @property
    def _again(self) -> str:
        return f". Later: icm export {self._run.folder} --format {self._name}"


@contextmanager
def tracked(names: Sequence[str], folder: Path, runs_dir: Path) -> Iterator[Tracking]:
    """Track the search of a run in `folder` while the block lasts, which ends with `finish`.

    Raises BadInput where a package is missing.
    """
    name = folder.relative_to(runs_dir).as_posix() if folder.is_relative_to(runs_dir) else folder.name
    tracking = Tracking(names, folder, name)
    try:
        yield tracking
    except BaseException:
        tracking.stop()
        raise


def track_files(name: str, folder: Path, run: RunRecord, place: Path | None) -> list[str]:
    """Send a run that is in `folder` to one tool, or each of its parts; returns where to look at them.

    Raises BadInput where the tool's package is missing.
    """
    places = []
    for part, within in searches_of(run, folder):
        tracking = Tracking([name], within, part.name, place)
        tracking.finish()
        tracking.wait()
        places += tracking.where
    return places


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
