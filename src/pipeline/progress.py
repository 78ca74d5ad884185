"""The progress bar of a search: pool size, U, acceptance, accuracy where known, cache hit rate, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Protocol

from tqdm import tqdm

from src.icm.annealing import SearchState
from src.icm.journal import Record
from src.icm.objective import accuracy
from src.icm.report import collapse_warning
from src.pipeline.labelling import Pool


class Progress(Protocol):
    """What shows how a search goes; used as a context manager."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, state: SearchState, record: Record) -> None:
        """Show where the search stands after one journal record."""
        ...


GROWTH: Final = 2.5
"""A search that has labelled a share x of its pool has taken some x ** GROWTH of its time: each claim costs more than
the one before it. From searches over 16, 32 and 64 built-in claims (docs/lab-log.md, 2026-11-27)."""


class SearchProgress:
    """A tqdm bar over labelled claims (--stop labelled) or iterations (--stop K), fed journal records.

    clock: monotonic seconds.
    """

    def __init__(self, pool: Pool, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._by_iteration = pool.problem.settings.stop == "K"
        total = self._total = pool.problem.settings.K if self._by_iteration else pool.problem.size
        self._first = 0
        # With a cap a question is as long at the end as at the beginning.
        self._growth = GROWTH if pool.problem.settings.context_cap is None else 1.0
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total,
            unit="step" if self._by_iteration else "claim",
            disable=quiet,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=interval,
            # tqdm takes all claims to cost the same; what is left is told behind the bar instead.
            bar_format=None if self._by_iteration else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._interval = interval
        self._clock = clock
        self._begun = self._shown = clock()
        self._started = False
        self._warned = False
        self._cached = self._computed = 0

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def update(self, state: SearchState, record: Record) -> None:
        """Show where the search stands after one journal record."""
        done = state.iteration if self._by_iteration else len(state.labelled)
        if not self._started:  # a resumed run's earlier part must not count as speed
            self._bar.initial = self._bar.n = self._first = done
            self._started = True
            self._begun = self._clock()
        self._cached += record.get("tokens_cached", 0)
        self._computed += record.get("tokens_computed", 0)
        left = self._left(done)
        shown = {} if left is None else {"left": tqdm.format_interval(left)}
        shown |= {
            "iteration": str(state.iteration),
            "U": f"{state.evaluation.utility:.1f}",
            "accepted": f"{state.accepted}/{state.iteration}",
        }
        agreeing, compared = accuracy(state.labels, self._pool.gold)
        if compared:
            shown["accuracy"] = f"{agreeing / compared:.2f}"
        if self._computed:
            shown["hits"] = f"{self._cached / (self._cached + self._computed):.2f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)
        if self._clock() - self._shown >= self._interval:  # update() shows nothing while the count stands still
            self._bar.refresh()
            self._shown = self._clock()
        warning = None if self._warned else collapse_warning(state.labels, self._pool.problem.objective.prior)
        if warning:
            self._warned = True
            self._bar.write(f"warning: {warning}")

    def _left(self, done: int) -> float | None:
        """Seconds that the search will still take, once it has labelled something in this session; tqdm tells it of
        iterations."""
        if self._by_iteration:
            return None
        before, now = ((claims / self._total) ** self._growth for claims in (self._first, done))
        return (1 - now) / (now - before) * (self._clock() - self._begun) if now > before else None


class PartsProgress:
    """One bar over the labelled claims of several searches that run at once, and a line for each that ends."""

    def __init__(self, claims: int, parts: int, quiet: bool) -> None:
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=claims, unit="claim", disable=quiet, dynamic_ncols=True, mininterval=interval)
        self._parts = parts
        self._finished = self._claims_finished = 0
        self._labelled: dict[str, int] = {}

    def __enter__(self) -> PartsProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def of(self, part: str) -> PartProgress:
        """What one of the searches reports to."""
        return PartProgress(self, part)

    def show(self, part: str, labelled: int) -> None:
        """One part's labelled claims so far."""
        self._labelled[part] = labelled
        self._draw()

    def finish(self, part: str, claims: int, line: str) -> None:
        """A part has ended, in this session or before; line: what it came to."""
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


class PartProgress:
    """One part's view of a PartsProgress."""

    def __init__(self, whole: PartsProgress, part: str) -> None:
        self._whole = whole
        self._part = part

    def __enter__(self) -> PartProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, state: SearchState, record: Record) -> None:
        """Show where the search stands after one journal record."""
        self._whole.show(self._part, len(state.labelled))
