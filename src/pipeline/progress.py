"""The progress bar of a search: pool size, U, acceptance, accuracy where known, cache hit rate, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol

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


class SearchProgress:
    """A tqdm bar over labelled claims (--stop labelled) or iterations (--stop K), fed journal records."""

    def __init__(self, pool: Pool, quiet: bool) -> None:
        self._pool = pool
        self._by_iteration = pool.problem.settings.stop == "K"
        total = pool.problem.settings.K if self._by_iteration else pool.problem.size
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total,
            unit="step" if self._by_iteration else "claim",
            disable=quiet,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=interval,
        )
        self._interval = interval
        self._shown = time.monotonic()
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
            self._bar.initial = self._bar.n = done
            self._started = True
        self._cached += record.get("tokens_cached", 0)
        self._computed += record.get("tokens_computed", 0)
        shown = {
            "iteration": state.iteration,
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
        if time.monotonic() - self._shown >= self._interval:  # update() shows nothing while the count stands still
            self._bar.refresh()
            self._shown = time.monotonic()
        warning = None if self._warned else collapse_warning(state.labels)
        if warning:
            self._warned = True
            self._bar.write(f"warning: {warning}")


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
