"""What /metrics shows, by prometheus_client. One registry an application, so that several can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from contrib.monitoring.client_metrics import ClientMetrics
from core.llm_api.llm import ModelAPI

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SECONDS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServingMetrics:
    """Counted by route and status; a route is one of ours or "other", so that no visitor can make new series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "icm_serving_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "icm_serving_request_seconds",
            "Seconds from the request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge("icm_serving_requests_in_flight", "Requests at work.", registry=self.registry)
        self.refused = Counter(
            "icm_serving_requests_refused",
            "Requests that were not begun or not finished, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.claims = Counter("icm_serving_claims_scored", "Claims scored.", registry=self.registry)
        self.prompt_tokens = Counter(
            "icm_serving_score_prompt_tokens", "Prompt tokens sent to the model for scores.", registry=self.registry
        )
        self.unanswered = Counter(
            "icm_serving_questions_without_passages", "Questions that no passage was found for.", registry=self.registry
        )
        self.passages = Gauge("icm_serving_passages", "Passages of the texts.", registry=self.registry)
        self.ready = Gauge("icm_serving_ready", "1 if the model answered the last canary.", registry=self.registry)

    def add_client(self, api: Callable[[], ModelAPI | None]) -> None:
        """Show the metrics of the client of the model too (docs/monitoring.md), while there is one."""
        self.registry.register(_Client(api))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Client:
    """A collector of whatever ModelAPI is connected when it is asked."""

    def __init__(self, api: Callable[[], ModelAPI | None]) -> None:
        self._api = api

    def collect(self) -> Iterator[Metric]:
        api = self._api()
        if api is not None:
            yield from ClientMetrics(api).collect()
