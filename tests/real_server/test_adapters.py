"""LoRA adapters on a real vLLM server: their pools travel as trees, and are kept apart from their base model's."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from core.errors import RequestRejected
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.types import EngineAnswer, NextTokens, Prompt, Query, Segment
from core.vllm_server import LAUNCHER, VLLMServer
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from src.pipeline.tree_saving import found_in_blocks
from tests.conftest import RunningServer
from tests.core.two_labels import two

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).resolve().parents[2]
LABELS = (40, 41)
ASKED = NextTokens(("", ""), LABELS)


@pytest.fixture(scope="module")
def adapter_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    """A server of a tiny random model, `base`, with an adapter, `tuned`; and a folder with another, `later`."""
    folder = tmp_path_factory.mktemp("adapters") / "shape"
    made = [sys.executable, "benchmarks/make_shape.py", "tiny", str(folder), "--weights", "--adapter"]
    subprocess.run(made, cwd=REPOSITORY, check=True, capture_output=True)
    shutil.copytree(folder / "adapter", folder / "later")
    for name, scale in (("adapter", 20), ("later", -20)):  # as large as the layers, and the same subtracted
        config = folder / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": scale * 16}))
    with VLLMServer(
        model=str(folder),
        log=folder.parent / "server.log",
        options=(
            *("--served-model-name", "base", "--max-model-len", "2048", "--enable-lora", "--max-lora-rank", "16"),
            *("--lora-modules", f"tuned={folder / 'adapter'}"),
        ),
        launcher=("env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", str(LAUNCHER)),
    ) as server:
        yield RunningServer(server.url, "base", server.pid), folder / "later"


@asynccontextmanager
async def clients(url: str, *names: str, trees: bool = True) -> AsyncIterator[list[VLLMClient]]:
    async with AsyncExitStack() as closing:
        found = []
        for name in names:
            client = VLLMClient(url, name, use_extension=trees)
            closing.push_async_callback(client.aclose)
            await client.start()
            assert client.takes_trees == trees
            found.append(client)
        yield found


def pool_of(seed: int, size: int = 24) -> list[Query]:
    """Questions of a tree, of random words."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(100, 4000, 12).tolist() for _ in range(size)]
    book = PromptBook.build([str(at) for at in range(size)], two(*LABELS), tokens=tokens, separator_tokens=[2])
    layout = TreeLayout.build(range(size), [str(at) for at in range(size)], rng)
    labels = rng.integers(0, 2, size).astype(bool).tolist()
    prompts = [book.prompt(claim, layout.context(claim), labels, layout.place(claim)) for claim in layout.questions]
    return [Query(Prompt((Segment("", [0]), *prompt.segments), name=prompt.name), ASKED) for prompt in prompts]


def values(answer: EngineAnswer) -> np.ndarray:
    return np.array([found.values for found in answer.logprobs])


async def scores(client: VLLMClient, pool: list[Query]) -> np.ndarray:
    return values(await client.score(pool))


async def load(url: str, what: str, **body: str) -> None:
    async with aiohttp.ClientSession(url) as web, web.post(f"/v1/{what}_lora_adapter", json=body) as response:
        assert response.status == 200, await response.text()


@pytest.mark.parametrize("first", ["trees", "whole prompts"])
async def test_an_adapters_tree_scores_as_whole_prompts_do_and_finds_what_they_find(
    adapter_server: tuple[RunningServer, Path], first: str
) -> None:
    """To the last bit; and of the cache it finds what a pool of the base model would, and nothing of that pool."""
    url = adapter_server[0].url
    async with clients(url, "base", "tuned") as (base, tuned), clients(url, "tuned", trees=False) as (plain,):
        pool = pool_of(len(first))
        prompts = [query.prompt.token_ids for query in pool]
        block = await base.kv_block_size()
        assert block is not None
        once = found_in_blocks(prompts, block)
        twice = found_in_blocks(prompts * 2, block) - once
        assert 0 < once < twice
        whole = await scores(plain, pool) if first == "whole prompts" else None
        of_base, of_tuned = await base.score(pool), await tuned.score(pool)
        assert of_base.cached_tokens == once
        assert of_tuned.cached_tokens == (once if whole is None else twice)
        if whole is None:
            whole = await scores(plain, pool)
        assert (values(of_tuned) == whole).all()
        again = await tuned.score(pool)
        assert again.cached_tokens == twice
        assert again.logprobs == of_tuned.logprobs
        assert np.median(np.abs(whole - values(of_base))) > 0.1, "the adapter is too small to be told apart"


async def test_pools_of_a_model_and_its_adapters_at_once_are_answered_as_alone(
    adapter_server: tuple[RunningServer, Path],
) -> None:
    """One of the adapters was loaded while the server ran; the server has room for one at a time."""
    server, folder = adapter_server
    await load(server.url, "load", lora_name="second", lora_path=str(folder))
    names = ("base", "tuned", "second")
    async with clients(server.url, *names) as trees, clients(server.url, *names, trees=False) as whole:
        pools = [pool_of(seed) for seed in (3, 4)]
        alone = {
            (name, at): await scores(client, pools[at])
            for name, client in zip(names, whole, strict=True)
            for at in (0, 1)
        }
        asked = [(name, at) for at in (0, 1, 0, 1) for name in names]
        answers = await asyncio.gather(*(scores(trees[names.index(name)], pools[at]) for name, at in asked))
        for key, found in zip(asked, answers, strict=True):
            assert (found == alone[key]).all(), key
        for at in (0, 1):
            for one, other in (("base", "tuned"), ("base", "second"), ("tuned", "second")):
                assert np.median(np.abs(alone[one, at] - alone[other, at])) > 0.1
    await load(server.url, "unload", lora_name="second")


async def test_an_adapter_that_was_unloaded_is_missed_in_vllms_words(
    adapter_server: tuple[RunningServer, Path],
) -> None:
    server, folder = adapter_server
    await load(server.url, "load", lora_name="later", lora_path=str(folder))
    async with clients(server.url, "later", "tuned") as (later, tuned):
        pool = pool_of(5, 4)
        assert len(await scores(later, pool)) == len(await scores(tuned, pool))
        await load(server.url, "unload", lora_name="later")
        with pytest.raises(RequestRejected, match="The model `later` does not exist"):
            await scores(later, pool)
        assert len(await scores(tuned, pool)) == 4
