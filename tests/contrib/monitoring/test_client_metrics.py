"""What a ModelAPI counted, as Prometheus reads it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from contrib.monitoring.client_metrics import ClientMetrics
from core.errors import APIError
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import ResponseCache
from core.llm_api.telemetry import BOUNDS, Histogram
from core.llm_api.text.generation import Message, SamplingOptions, collect
from core.llm_api.types import Prompt, Segment
from fakes.text_server import FakeTextServer, Manner
from fakes.vllm_server import FALSE, TRUE, Fault
from tests.core.two_labels import two

QUICK = HttpOptions(retry=RetryPolicy(max_attempts=2, base=0.01, cap=0.01), max_concurrent_requests=2)
LABELS = two(TRUE, FALSE)
QUESTION = [Message("user", "Name a river")]


def shown(api: ModelAPI) -> dict[tuple[str, str], float]:
    """(sample, value of the label that tells it apart) -> value, through the text that Prometheus would get."""
    registry = CollectorRegistry()
    registry.register(ClientMetrics(api, pool_id="a pool"))
    samples: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            assert sample.labels["pool_id"] == "a pool"
            assert sample.labels["model_id"] == "fake-8b"
            assert {"engine", "engine_version"} <= sample.labels.keys()
            told = next((sample.labels[name] for name in TELLING if name in sample.labels), "")
            samples[sample.name, told] = sample.value
    return samples


TELLING = ("outcome", "source", "handled", "state", "direction", "le")


def prompts(n: int) -> list[Prompt]:
    return [Prompt((Segment("q", [5, i]),), name=f"claim {i}") for i in range(n)]


async def test_scores_texts_and_failures_are_all_there(tmp_path: Any) -> None:
    async with FakeTextServer() as server:
        client = VLLMClient(server.url, server.model, options=QUICK, prompts_per_request=1)
        async with ModelAPI(client, cache=ResponseCache(tmp_path / "c")) as api:
            before = shown(api)
            await api.score(prompts(4), LABELS)
            await api.score(prompts(6), LABELS)
            server.drop = {TRUE}
            with pytest.raises(APIError):
                await api.score([Prompt((Segment("x", [9]),), name="m")], LABELS)
            server.faults = [Fault(status=503, body={}, times=1)]
            await api.chat(QUESTION, SamplingOptions(max_tokens=3))
            await collect(api.stream_chat(QUESTION, SamplingOptions(max_tokens=4)))
            server.manner = Manner(broken_after=1)
            with pytest.raises(APIError):
                await collect(api.stream_chat(QUESTION))
            server.manner = Manner(delay=0.01)
            async with aclosing(api.stream_chat(QUESTION)) as events:
                async for event in events:
                    if event.kind == "token":
                        assert shown(api)["icm_client_texts_in_flight", ""] == 1
                        break
            now = shown(api)
    assert before["icm_client_prompts_total", "engine"] == 0
    assert now["icm_client_prompts_total", "engine"] == 6
    assert now["icm_client_prompts_total", "cache"] == 4
    assert now["icm_client_label_misses_total", "error"] == 1
    assert now["icm_client_prompt_tokens_total", "untold"] == 12
    assert now["icm_client_retries_total", ""] == 1
    assert now["icm_client_requests_total", "TransientError"] == 2
    assert now["icm_client_requests_total", "cancelled"] == 1
    assert now["icm_client_texts_total", "ok"] == 2
    assert now["icm_client_texts_total", "cancelled"] == 1
    assert now["icm_client_texts_total", "TransientError"] == 1
    assert now["icm_client_text_tokens_total", "completion"] == 3 + 4 + 1
    assert now["icm_client_requests_in_flight", ""] == now["icm_client_requests_waiting", ""] == 0
    assert now["icm_client_first_token_seconds_count", ""] == 3
    assert now["icm_client_text_seconds_count", ""] == 4
    attempts = sum(value for (name, _), value in now.items() if name == "icm_client_requests_total")
    assert now["icm_client_latency_seconds_count", ""] == now["icm_client_queue_seconds_count", ""] == attempts
    assert now["icm_client_latency_seconds_bucket", "+Inf"] == attempts
    assert now["icm_client_limited_seconds_bucket", "0.05"] == attempts, "no rate limits, no waiting"


async def test_waiting_requests_show() -> None:
    async with FakeTextServer() as server:
        server.latency = 0.2
        async with ModelAPI(VLLMClient(server.url, server.model, options=QUICK), scores=False) as api:
            texts = asyncio.create_task(api.complete(["a", "b", "c", "d", "e"], SamplingOptions(max_tokens=1)))
            await asyncio.sleep(0.1)
            now = shown(api)
            await texts
            assert now["icm_client_requests_in_flight", ""] == 2
            assert now["icm_client_requests_waiting", ""] == 3
            assert api.requests[0].queue.total > 0.3


def test_a_histogram_counts_each_value_once_with_its_bound_included() -> None:
    counted = Histogram()
    for value in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, 10**6):
        counted.observe(value)
    cumulative = list(counted.cumulative())
    assert cumulative[0] == (BOUNDS[0], 2)
    assert cumulative[1] == (BOUNDS[1], 3)
    assert cumulative[-1] == (float("inf"), 4)
    assert counted.total == pytest.approx(10**6 + BOUNDS[0] * 2.01)
