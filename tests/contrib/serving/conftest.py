"""The application on a real port, in front of a fake vLLM that writes texts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from contrib.serving.app import build
from contrib.serving.documents import Library
from contrib.serving.guard import Guard
from contrib.serving.options import Limits
from contrib.serving.web_server import WebServer
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM

TEXTS = {
    "bees.md": "# Bees\n\nBees make honey from nectar. In winter they live on it.\n\nA hive holds some 30,000 bees.\n",
    "rivers/danube.txt": "The Danube flows through ten countries.\n\nIt ends in the Black Sea.\n",
    "empty.txt": "",
}


class WritingVLLM(FakeVLLM):
    """Says `topics` after "Topics:" and `reply` after "Answer:"; keeps the prompts that it was to continue."""

    def __init__(self, **rest: Any) -> None:
        super().__init__(**rest)
        self.topics, self.reply = "Danube, rivers", "Through ten countries."
        self.prompts: list[str] = []

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("logprobs") is not None:
            return super()._complete(body)
        prompt = body["prompt"] if isinstance(body["prompt"], str) else body["prompt"][0]
        self.prompts.append(prompt)
        text = f" {self.topics if prompt.endswith('Topics:') else self.reply}"
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return {"model": self.model, "choices": [{"index": 0, "text": text, "finish_reason": "stop"}], "usage": usage}


@dataclass(frozen=True)
class Site:
    """A running application and a client session for it."""

    url: str
    port: int
    web: aiohttp.ClientSession
    guard: Guard
    server: WebServer

    async def post(self, path: str, body: object, **options: Any) -> tuple[int, Any]:
        async with self.web.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, str]:
        async with self.web.get(self.url + path, **options) as response:
            return response.status, await response.text()

    async def until_ready(self) -> None:
        async with asyncio.timeout(20):
            while (await self.get("/ready"))[0] != 200:
                await asyncio.sleep(0.02)


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Site]]


@pytest.fixture
async def model() -> AsyncIterator[WritingVLLM]:
    async with WritingVLLM() as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "texts"


@pytest.fixture
def serve(model: WritingVLLM, folder: Path) -> Serve:
    """serve(limits=..., token=...): the application, ready unless ready=False."""

    @contextlib.asynccontextmanager
    async def run(
        limits: Limits | None = None,
        token: str | None = None,
        ready: bool = True,
        alive: Callable[[], bool] = lambda: True,
        url: str | None = None,
    ) -> AsyncIterator[Site]:
        limits = limits or Limits()

        async def open_api() -> ModelAPI:
            options = HttpOptions(retry=RetryPolicy(max_attempts=2, base=0.01))
            return ModelAPI(VLLMClient(url or model.url, model.model, options=options))

        secret = None if token is None else SecretStr(token)
        guard = build(open_api, Library.read(folder), limits, token=secret, alive=alive)
        server = WebServer(guard, limits)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            try:
                async with aiohttp.ClientSession() as web:
                    site = Site(f"http://127.0.0.1:{port}", port, web, guard, server)
                    if ready:
                        await site.until_ready()
                    yield site
            finally:
                server.should_exit = True
                async with asyncio.timeout(limits.shutdown_seconds + 10):
                    await serving

    return run
