"""A real vLLM server that embeds, with the small model on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from core.errors import RequestRejected
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from core.vllm_server import VLLMServer
from icm_vllm.prompt_tree import PATH
from tests.conftest import MODEL, RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]

CATS = ["The cat sleeps on the warm sofa.", "A kitten is napping on the couch."]
RATES = ["The central bank raised interest rates.", "Interest rates went up again, says the bank."]


@pytest.fixture(scope="module")
def embedding_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    log: Path = tmp_path_factory.mktemp("vllm") / "embedding.log"
    with VLLMServer(model=MODEL, log=log, options=("--runner", "pooling", "--convert", "embed")) as server:
        yield RunningServer(server.url, server.model)


async def test_what_means_the_same_is_near(embedding_server: RunningServer) -> None:
    async with ModelAPI(VLLMClient(embedding_server.url, embedding_server.model), scores=False) as api:
        vectors = await api.embed([*CATS, *RATES])
        again = await api.embed(RATES[::-1])
        nothing = await api.embed([])
    assert (vectors.shape, vectors.dtype) == ((4, 640), np.float32)
    assert len(nothing) == 0
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3)
    np.testing.assert_allclose(again[::-1], vectors[2:], atol=0.02)  # in bfloat16, in another batch
    near = vectors @ vectors.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:].max() + 0.02


async def test_a_server_that_embeds_is_asked_for_nothing_else_and_lives_on(embedding_server: RunningServer) -> None:
    pool = {"labels": [1, 2], "tree": {"segments": [[5]], "parents": [-1], "pieces": [0], "ends": [0]}}
    async with aiohttp.ClientSession(embedding_server.url) as session, session.post(PATH, json=pool) as response:
        assert response.status == 400
        assert "embeds" in (await response.json())["error"]["message"]
    async with ModelAPI(VLLMClient(embedding_server.url, embedding_server.model), scores=False) as api:
        with pytest.raises(RequestRejected, match="404"):
            await api.complete(["Hello"])
        assert (await api.embed(CATS)).shape == (2, 640)
