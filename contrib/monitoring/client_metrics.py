"""What a ModelAPI counted, for Prometheus: requests, retries, queues, cache hits, label misses, tokens, texts.

    registry = CollectorRegistry()
    registry.register(ClientMetrics(api, pool_id="default"))

Everything is read when it is asked for; a request does nothing more than count. docs/monitoring.md lists the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from contrib.monitoring.exposition import counter, gauge, histogram
from core.llm_api.llm import ModelAPI

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class ClientMetrics:
    """A prometheus_client collector over a started ModelAPI. pool_id: the name of this group of servers."""

    def __init__(self, api: ModelAPI, *, pool_id: str = "default") -> None:
        self._api = api
        identity = api.identity
        self._labels = {
            "engine": identity.kind,
            "engine_version": identity.version,
            "pool_id": pool_id,
            "model_id": identity.model,
        }

    def collect(self) -> Iterator[Metric]:
        """All families, as a prometheus_client registry asks for them."""
        yield from self._requests()
        yield from self._scores()
        yield from self._texts()

    def _requests(self) -> Iterator[Metric]:
        servers = [(self._labels | {"server": counted.server}, counted) for counted in self._api.requests]
        yield counter(
            "icm_client_requests",
            "Attempts of requests, by how they ended.",
            [
                (labels | {"outcome": outcome}, count)
                for labels, counted in servers
                for outcome, count in list(counted.outcomes.items())
            ],
        )
        yield counter(
            "icm_client_retries",
            "Attempts after a request's first one.",
            [(labels, counted.retries) for labels, counted in servers],
        )
        yield gauge(
            "icm_client_requests_in_flight",
            "Attempts that are at the server.",
            [(labels, counted.in_flight) for labels, counted in servers],
        )
        yield gauge(
            "icm_client_requests_waiting",
            "Attempts that wait for a slot, or for their turn under the rate limits.",
            [(labels, counted.waiting) for labels, counted in servers],
        )
        yield histogram(
            "icm_client_queue_seconds",
            "Seconds that an attempt waited for its slot.",
            [(labels, counted.queue) for labels, counted in servers],
        )
        yield histogram(
            "icm_client_limited_seconds",
            "Seconds that an attempt with a slot waited for its turn under the rate limits.",
            [(labels, counted.limited) for labels, counted in servers],
        )
        yield histogram(
            "icm_client_latency_seconds",
            "Seconds from an attempt's turn to its end; of a stream, to its last byte.",
            [(labels, counted.latency) for labels, counted in servers],
        )

    def _scores(self) -> Iterator[Metric]:
        stats = self._api.stats
        yield self._counters(
            "icm_client_prompts",
            "Prompts that were scored, by where the score came from.",
            "source",
            {"cache": stats.cache_hits, "in_flight": stats.in_flight_hits, "engine": stats.engine_prompts},
        )
        yield self._counters(
            "icm_client_label_misses",
            "Answers that lacked a label: refused, or given the lowest listed log-probability.",
            "handled",
            {"error": stats.label_misses, "floored": stats.floored},
        )
        known = stats.prompt_tokens - stats.untold_tokens
        yield self._counters(
            "icm_client_prompt_tokens",
            "Prompt tokens of scores, by whether the engine had them in its prefix cache; untold: it does not say.",
            "state",
            {"cached": stats.cached_tokens, "computed": known - stats.cached_tokens, "untold": stats.untold_tokens},
        )

    def _texts(self) -> Iterator[Metric]:
        texts = self._api.texts
        yield self._counters(
            "icm_client_texts", "Texts, whole or streamed, by how they ended.", "outcome", texts.outcomes
        )
        yield gauge(
            "icm_client_texts_in_flight",
            "Texts that are being written.",
            [(self._labels, texts.in_flight)],
        )
        yield self._counters(
            "icm_client_text_tokens",
            "Tokens of texts.",
            "direction",
            {"prompt": texts.prompt_tokens, "completion": texts.completion_tokens},
        )
        yield histogram(
            "icm_client_text_seconds", "Seconds of a text, queue included.", [(self._labels, texts.seconds)]
        )
        yield histogram(
            "icm_client_first_token_seconds",
            "Seconds from the call of a stream to its first token.",
            [(self._labels, texts.first_token)],
        )

    def _counters(self, name: str, about: str, label: str, values: Mapping[str, int]) -> Metric:
        rows = [(self._labels | {label: value}, count) for value, count in list(values.items())]
        return counter(name, about, rows)
