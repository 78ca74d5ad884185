"""The progress of a search: pool size, U, acceptance, accuracy where known, cache hit rate, time left.

A bar that changes on a terminal and in a notebook; lines every 15 seconds anywhere else.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, TextIO

from tqdm import tqdm

from src.icm.objective import accuracy
from src.icm.searches.ascent import most_questions
from src.icm.searches.seam import Record, Standing
from src.pipeline.labelling import Pool
from src.results.messages import collapse_warning


class Progress(Protocol):
    """What shows how a search goes; used as a context manager."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: object) -> None: ...

    def update(self, state: Standing, record: Record) -> None:
        """Show where the search stands after one journal record."""


GROWTH: Final = 2.5
"""A search that has labelled a share x of its pool has taken about x ** GROWTH of its time: each claim costs more than
the one before it. From searches over 16, 32 and 64 built-in claims (docs/lab-log.md, 2026-11-27)."""
ON_A_TERMINAL: Final = 0.5
ELSEWHERE: Final = 15.0
"""Seconds between two updates of what is shown."""


class Lines:
    """The file of a bar without a terminal: every state of the bar becomes one line, none is repeated."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line and line != self._last:
            self._out.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._out.flush()


def bar_of(total: int | None, unit: str, quiet: bool, behind: str, initial: int = 0) -> tqdm[NoReturn]:
    """A bar in a notebook or a terminal, lines on standard error elsewhere. behind: tqdm's fields after the count.
    initial: what was counted before."""
    bar = _widget_bar()
    drawn = bar is not None or sys.stderr.isatty()
    count = "{n_fmt}/{total_fmt} " + unit
    return (bar or tqdm)(
        total=total,
        initial=initial,
        unit=unit.removesuffix("s"),
        file=None if bar else sys.stderr if drawn else Lines(sys.stderr),
        disable=quiet,
        dynamic_ncols=bar is None,
        smoothing=0.1,
        mininterval=_interval(),
        bar_format="{l_bar}{bar}| " + count + behind if drawn else count + behind,
    )


def _interval() -> float:
    return ON_A_TERMINAL if sys.stderr.isatty() or _widget_bar() is not None else ELSEWHERE


def _widget_bar() -> type[tqdm[NoReturn]] | None:
    """tqdm's bar of widgets, where it finds that this is a notebook that shows them; None anywhere else."""
    if "IPython" not in sys.modules:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that ipywidgets is not installed
        from tqdm.autonotebook import tqdm as found
    return None if found is tqdm else found


class SearchProgress:
    """A tqdm bar over labelled claims (--stop labelled), questions (ascent, which says how many there are at most) or
    iterations (--stop K, and other searches that label all claims at once), fed journal records.

    clock: monotonic seconds.
    """

    def __init__(self, pool: Pool, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        settings, total = pool.problem.settings, None
        self._by_iteration = settings.stop == "K" or settings.search != "annealing"
        self._by_question = settings.search == "ascent"
        if settings.search == "annealing":
            total = settings.K if self._by_iteration else pool.problem.size
        elif self._by_question:
            total = most_questions(pool.problem)
        self._total = total or 1
        self._first = 0
        # With a cap a question is as long at the end as at the beginning.
        self._growth = GROWTH if pool.problem.settings.context_cap is None else 1.0
        # tqdm assumes that all claims cost the same, so `left` is shown in place of its time left.
        behind = " [{elapsed}<{remaining}, {rate_fmt}{postfix}]" if self._by_iteration else " [{elapsed}{postfix}]"
        unit = "steps" if self._by_iteration else "claims"
        if self._by_question:  # most searches end well before their last question
            unit, behind = "questions at most", " [{elapsed}{postfix}]"
        self._bar = bar_of(total, unit, quiet, behind)
        self._interval = _interval()
        self._clock = clock
        self._begun = self._shown = clock()
        self._started = False
        self._warned = False
        self._cached = self._computed = self._asked = 0

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def update(self, state: Standing, record: Record) -> None:
        """Show where the search stands after one journal record."""
        self._asked += record.get("asked", 0)
        done = state.iteration if self._by_iteration else len(state.labelled)
        if self._by_question:
            done = self._asked
            if self._bar.total is not None:  # a search that was stopped can ask some questions again
                self._bar.total = max(self._bar.total, done)
        if not self._started:  # a resumed run's earlier part must not count as speed
            self._bar.initial = self._bar.n = self._first = done
            self._started = True
            self._begun = self._clock()
        self._cached += record.get("tokens_cached", 0)
        self._computed += record.get("tokens_computed", 0)
        left = self._left(done)
        shown = {} if left is None else {"left": tqdm.format_interval(left)}
        shown["iteration"] = str(state.iteration)
        if state.labelled:  # an ascent has no labels of its own before its first evaluation
            shown |= {"U": f"{state.evaluation.utility:.1f}", "accepted": f"{state.accepted}/{state.iteration}"}
        agreeing, compared = accuracy(state.labels, self._pool.gold_to_find)
        if compared:
            shown["accuracy"] = f"{agreeing / compared:.2f}"
        if self._computed:
            shown["hits"] = f"{self._cached / (self._cached + self._computed):.2f}"
        now = state.asks_next(self._pool.problem)
        if now:
            shown["now"] = now
        self._bar.set_postfix(shown, refresh=False)
        shown_now = self._bar.update(done - self._bar.n)
        # update() shows nothing while the count is the same
        if not shown_now and (now or self._clock() - self._shown >= self._interval):
            self._bar.refresh()
            shown_now = True
        if shown_now:
            self._shown = self._clock()
        objective = self._pool.problem.objective
        if self._warned:
            return
        calibrated = objective.calibration != "none"
        warning = collapse_warning(state.labels, objective.prior, self._pool.names, calibrated=calibrated)
        if warning:
            self._warned = True
            self._bar.write(f"warning: {warning}", file=sys.stderr)

    def _left(self, done: int) -> float | None:
        """Seconds that the search will still take, once it has labelled something in this process; tqdm shows it
        for iterations."""
        if self._by_iteration:
            return None
        before, now = ((claims / self._total) ** self._growth for claims in (self._first, done))
        return (1 - now) / (now - before) * (self._clock() - self._begun) if now > before else None


class PartsProgress:
    """One bar over the labelled claims of several searches that run at once, and a line for each that ends."""

    def __init__(self, claims: int, parts: int, quiet: bool) -> None:
        self._bar = bar_of(claims, "claims", quiet, " [{elapsed}<{remaining}, {rate_fmt}{postfix}]")
        self._parts = parts
        self._finished = self._claims_finished = 0
        self._labelled: dict[str, int] = {}

    def __enter__(self) -> PartsProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def of(self, part: str) -> PartProgress:
        """What one of the searches reports to."""
        return PartProgress(self, part)

    def show(self, part: str, labelled: int) -> None:
        """One part's labelled claims so far."""
        self._labelled[part] = labelled
        self._draw()

    def finish(self, part: str, claims: int, line: str) -> None:
        """A part has ended, in this process or before; line: its result."""
        self._labelled.pop(part, None)
        self._finished += 1
        self._claims_finished += claims
        if not self._bar.disable:
            self._bar.write(f"{part}: {line}", file=sys.stderr)
        self._draw()

    def _draw(self) -> None:
        running = " ".join(f"{name}:{count}" for name, count in self._labelled.items())
        self._bar.set_postfix_str(f"{self._finished}/{self._parts} finished {running}", refresh=False)
        self._bar.update(sum(self._labelled.values()) + self._claims_finished - self._bar.n)


class Searches(Protocol):
    """What shows several searches; used as a context manager."""

    def __enter__(self) -> Searches: ...

    def __exit__(self, *error: object) -> None: ...

    def of(self, part: str) -> PartProgress:
        """What one of the searches reports to."""

    def show(self, part: str, labelled: int) -> None:
        """One part's labelled claims so far."""

    def finish(self, part: str, claims: int, line: str) -> None:
        """A part has ended, in this process or before; line: its result."""


class SweepProgress:
    """One bar over the cells of a sweep, and a line for each that ends. finished: cells of earlier processes.

    A cell that runs counts as the part of its claims that is labelled. clock: monotonic seconds.
    """

    def __init__(self, cells: int, finished: int, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar = bar_of(cells, "cells", quiet, " [{elapsed}<{remaining}{postfix}]", finished)
        self._finished = finished
        self._shares: dict[str, float] = {}
        self._clock = clock
        self._shown = clock()

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw(now=True)
        self._bar.close()

    def of(self, cell: str) -> CellProgress:
        """What one cell reports to."""
        return CellProgress(self, cell)

    def show(self, cell: str, share: float) -> None:
        """share: of a cell's claims that are labelled, 0 to 1."""
        self._shares[cell] = min(1.0, share)
        self._draw()

    def finish(self, cell: str, line: str | None) -> None:
        """A cell has ended; line: its result, None where it did not succeed."""
        self._shares.pop(cell, None)
        self._finished += line is not None
        if line is not None and not self._bar.disable:
            self._bar.write(f"{cell}: {line}", file=sys.stderr)
        self._draw()

    def _draw(self, *, now: bool = False) -> None:
        if not now and self._clock() - self._shown < _interval():
            return
        done = round(self._finished + sum(self._shares.values(), start=0.0), 1)
        self._bar.n = int(done) if done.is_integer() else done
        running = " ".join(f"{cell}:{100 * share:.0f}%" for cell, share in self._shares.items())
        self._bar.set_postfix_str(running, refresh=False)
        self._bar.refresh()
        self._shown = self._clock()


class CellProgress:
    """The searches of one cell: one, a data set's batches, or one for each seed of a comparison."""

    def __init__(self, whole: SweepProgress, cell: str) -> None:
        self._whole = whole
        self._cell = cell
        self._claims = self._done = 0
        self._labelled: dict[str, int] = {}

    def __enter__(self) -> CellProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, claims: int) -> CellProgress:
        """claims: that all its searches will label."""
        self._claims = claims
        self._draw()
        return self

    def of(self, part: str) -> PartProgress:
        """What one of its searches reports to."""
        return PartProgress(self, part)

    def show(self, part: str, labelled: int) -> None:
        """One search's labelled claims so far."""
        self._labelled[part] = labelled
        self._draw()

    def finish(self, part: str, claims: int, line: str) -> None:
        """One search has ended. Its result is not shown."""
        self._labelled.pop(part, None)
        self._done += claims
        self._draw()

    def _draw(self) -> None:
        self._whole.show(self._cell, (self._done + sum(self._labelled.values())) / max(1, self._claims))


class PartProgress:
    """One part's view of what shows several searches."""

    def __init__(self, whole: Searches, part: str) -> None:
        self._whole = whole
        self._part = part

    def __enter__(self) -> PartProgress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, state: Standing, record: Record) -> None:
        """Show where the search stands after one journal record."""
        self._whole.show(self._part, len(state.labelled))
