"""Texts of a real small model on the CPU: through the shared server, and in a process of their own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest

from core.errors import ConfigurationError, RequestRejected
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.vllm_metrics import requests_in_work
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import End, Message, Metrics, SamplingOptions, Token, collect
from tests.conftest import RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]
LONG = SamplingOptions(max_tokens=2000, temperature=1.0, seed=1)
COUNT = "Count from one to ten thousand: one, two, three,"


@pytest.fixture
async def api(vllm_server: RunningServer) -> AsyncIterator[ModelAPI]:
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model), scores=False) as opened:
        yield opened


async def in_work(server: RunningServer) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as answer:
        return requests_in_work(await answer.text())


async def test_completions_and_streams_say_the_same(api: ModelAPI) -> None:
    options = SamplingOptions(max_tokens=12)
    [whole, other] = await api.complete([COUNT, "Monday, Tuesday, Wednesday,"], options)
    assert "four, five" in whole.text
    assert "Thursday" in other.text
    assert (whole.finish_reason, whole.completion_tokens) == ("length", 12)
    events = [event async for event in api.stream_complete(COUNT, options)]
    assert "".join(event.text for event in events if isinstance(event, Token)) == whole.text
    metrics = events[-2]
    assert isinstance(metrics, Metrics)
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (whole.prompt_tokens, 12)
    assert metrics.time_to_first_token is not None
    assert 0 < metrics.time_to_first_token < metrics.seconds
    assert events[-1] == End("length")


async def test_sampling_options_act(api: ModelAPI) -> None:
    drawn = SamplingOptions(max_tokens=16, temperature=1.0, top_p=0.9, seed=7)
    prompts = ["My favourite animals are"]
    assert await api.complete(prompts, drawn) == await api.complete(prompts, drawn)
    [stopped] = await api.complete([COUNT], SamplingOptions(max_tokens=40, stop=("six",)))
    assert "five" in stopped.text
    assert "six" not in stopped.text
    assert stopped.finish_reason == "stop"
    no = ["no no no no no no no"]
    [flat] = await api.complete(no, SamplingOptions(max_tokens=16))
    [spread] = await api.complete(no, SamplingOptions(max_tokens=16, frequency_penalty=2.0, presence_penalty=2.0))
    assert len(set(spread.text.split())) > len(set(flat.text.split()))


async def test_a_base_model_has_no_chat_template_and_that_is_said(api: ModelAPI, vllm_server: RunningServer) -> None:
    if "gemma" not in vllm_server.model:
        pytest.skip("this model has one")
    with pytest.raises(ConfigurationError, match="--chat-template"):
        await api.chat([Message("user", "Hello")])


async def test_what_the_server_refuses_is_told(api: ModelAPI) -> None:
    with pytest.raises(RequestRejected, match="context length"):
        await api.complete(["word " * 9000])
    with pytest.raises(ConfigurationError, match="--runner pooling"):
        await api.embed(["x"])
    assert await api.models() == [api.identity.model]
    assert await api.ready() > 0


@pytest.mark.parametrize("way", ["closed", "task", "whole answer"])
async def test_a_cancelled_request_is_gone_within_two_seconds(
    api: ModelAPI, vllm_server: RunningServer, way: str
) -> None:
    if way == "closed":
        async with aclosing(api.stream_complete(COUNT, LONG)) as events:
            async for event in events:
                if isinstance(event, Token) and event.index == 3:
                    break
            assert await in_work(vllm_server) == 1
    else:
        call = collect(api.stream_complete(COUNT, LONG)) if way == "task" else api.complete([COUNT], LONG)
        task = asyncio.ensure_future(call)
        async with asyncio.timeout(30):
            while not await in_work(vllm_server):
                await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    began = time.monotonic()
    while await in_work(vllm_server):
        await asyncio.sleep(0.02)
    assert time.monotonic() - began < 2


def test_check_direct_passes_on_the_cpu() -> None:
    command = [sys.executable, "-m", "src.experiments.commands", "check-direct", "--cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("pass", "FAIL"))]
    assert [line[6:22].strip() for line in lines] == [
        "initialisation", "chat", "completion", "sampling", "topic extraction",
    ]  # fmt: skip
