"""The web application in front of a real model: it is ready, answers from texts, and scores claims sensibly."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from contrib.serving.app import build
from contrib.serving.documents import Library
from contrib.serving.options import Limits
from contrib.serving.web_server import WebServer
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from src.pipeline.datafiles import load_testbed
from tests.conftest import RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]
DOCUMENTS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
async def site(vllm_server: RunningServer) -> AsyncIterator[str]:
    async def open_api() -> ModelAPI:
        return ModelAPI(VLLMClient(vllm_server.url, vllm_server.model))

    limits = Limits(request_seconds=300, canary_seconds=60)
    server = WebServer(build(open_api, Library.read(DOCUMENTS), limits), limits)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def post(url: str, body: object) -> Any:
    async with aiohttp.ClientSession() as web, web.post(url, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def until_ready(site: str) -> Any:
    async with asyncio.timeout(120), aiohttp.ClientSession() as web:
        while True:
            try:
                async with web.get(f"{site}/ready") as response:
                    if response.status == 200:
                        return await response.json()
            except aiohttp.ClientConnectionError:
                pass  # it does not listen yet
            await asyncio.sleep(0.1)


async def test_a_question_is_answered_from_the_documents(site: str, vllm_server: RunningServer) -> None:
    assert (await until_ready(site))["model"] == vllm_server.model
    first = await post(f"{site}/query", {"question": "Which columns does a data file of my own have?"})
    assert first["topics"]
    assert first["answer"]
    assert "installing.md" in [source["path"] for source in first["sources"]]
    assert first["model"] == vllm_server.model
    print(first["topics"], first["answer"], first["seconds"])
    again = await post(f"{site}/query", {"question": "Which columns does a data file of my own have?"})
    assert again["topics"] == first["topics"], "greedy"


async def test_demonstrations_teach_the_model_what_is_asked(site: str) -> None:
    """Reviews with gold demonstrations: the scores rank positive ones above negative ones."""
    await until_ready(site)
    claims = load_testbed("builtin", Path())[1][:48]
    rows = [{"question": claim.question, "choice": claim.choice} for claim in claims]
    shown = [{**row, "label": claim.gold} for row, claim in zip(rows[:32], claims[:32], strict=True)]
    answer = await post(f"{site}/score", {"testbed": "builtin", "claims": rows[32:], "demonstrations": shown})
    odds = {True: [], False: []}
    for score, claim in zip(answer["scores"], claims[32:], strict=True):
        odds[bool(claim.gold)].append(score["log_odds"])
    wins = [high > low for high in odds[True] for low in odds[False]]
    print(f"AUC {sum(wins) / len(wins):.2f} over {len(answer['scores'])} claims")
    assert sum(wins) / len(wins) > 0.8
