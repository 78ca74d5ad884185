"""What a client counts about itself, in plain numbers; contrib/monitoring shows them to Prometheus.

Counting is always on: it costs a microsecond a request, and needs no package.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
"""Upper bounds of the buckets, seconds, each inclusive; from a single label to a whole pool on a slow machine."""


class Histogram:
    """Seconds by bucket, as in Prometheus: `counts[i]` counts values up to BOUNDS[i] and above the bound before."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # the last one counts values above all bounds
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, values up to it), ending with infinity and the number of all values."""
        below = 0
        for bound, count in zip((*BOUNDS, float("inf")), self.counts, strict=True):
            below += count
            yield bound, below


@dataclass(slots=True)
class RequestTelemetry:
    """Counts of one server's requests. queue: seconds until an attempt has its slot; limited: from then to its turn
    under the rate limits; latency: from then to its end, of attempts that got a turn.

    outcomes: attempts by "ok", "cancelled" or the name of the error. retries: attempts after a request's first one.
    """

    server: str
    in_flight: int = 0
    waiting: int = 0
    retries: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    queue: Histogram = field(default_factory=Histogram)
    limited: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)

    @contextmanager
    def waits(self, histogram: Histogram) -> Iterator[None]:
        """Around the wait for a slot (`queue`) or for a turn (`limited`)."""
        began = time.perf_counter()
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            histogram.observe(time.perf_counter() - began)

    def begin(self) -> float:
        """An attempt has its slot and its turn; returns what `end` takes."""
        self.in_flight += 1
        return time.perf_counter()

    def end(self, began: float | None, outcome: str) -> None:
        """An attempt is over. began: from `begin`; None for one that never got its turn."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if began is not None:
            self.in_flight -= 1
            self.latency.observe(time.perf_counter() - began)


@runtime_checkable
class HasTelemetry(Protocol):
    """An engine that sends requests."""

    @property
    def telemetry(self) -> Sequence[RequestTelemetry]:
        """What was counted about the requests to each server."""
        ...


@dataclass(slots=True)
class TextTelemetry:
    """Counts of a ModelAPI's texts, whole and streamed. outcomes: as in RequestTelemetry; seconds: of each text.

    first_token: seconds from the call to the first token of a stream.
    """

    in_flight: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    @contextmanager
    def text(self) -> Iterator[TextCount]:
        """Around one text."""
        count = TextCount()
        began = time.perf_counter()
        self.in_flight += 1
        try:
            yield count
        except BaseException as error:
            count.outcome = outcome_of(error)
            raise
        finally:
            self.in_flight -= 1
            self.outcomes[count.outcome] = self.outcomes.get(count.outcome, 0) + 1
            self.prompt_tokens += count.prompt_tokens
            self.completion_tokens += count.completion_tokens
            self.seconds.observe(time.perf_counter() - began)


@dataclass(slots=True)
class TextCount:
    """How one text ended; filled in by the caller of TextTelemetry.text."""

    outcome: str = "ok"
    prompt_tokens: int = 0
    completion_tokens: int = 0


def outcome_of(error: BaseException) -> str:
    """How an attempt ended, as a label's value; a closed generator and a cancelled task are "cancelled"."""
    return type(error).__name__ if isinstance(error, Exception) else "cancelled"
