"""The progress bar of a search: pool size, U, acceptance, accuracy where known, cache hit rate, time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from src.icm.annealing import SearchState
from src.icm.journal import Record
from src.icm.objective import accuracy
from src.icm.report import collapse_warning
from src.pipeline.labelling import Pool


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
