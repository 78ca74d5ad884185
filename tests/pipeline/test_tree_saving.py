"""What whole blocks of a cache find of prompts that are asked in order, by hand and by a cache that keeps blocks."""

from __future__ import annotations

from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.tokens import spell_labels
from fakes.vllm_server import FakeVLLM
from src.pipeline.tree_saving import CLAIMS, Saving, cold_pool, found_in_blocks, tree_saving

WORDS = ["north", "river", "copper", "seven", "lamp", "window", "garden"]


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        ([[1, 2, 3, 4, 5]], 0),
        ([[1, 2, 3, 4, 5]] * 3, 8),
        ([[1, 2, 3, 4]] * 2, 2),  # the last token is computed: its block is not found
        ([[1, 2, 3, 4, 5], [1, 2, 9, 4, 5]], 2),
        ([[1, 2, 3, 4, 5], [9, 2, 3, 4, 5]], 0),  # the same block after another beginning is another
        ([[1], []], 0),
    ],
)
def test_whole_blocks_by_hand(prompts: list[list[int]], found: int) -> None:
    assert found_in_blocks(prompts, 2) == found


@given(st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=8), st.integers(1, 5))
def test_no_block_is_found_that_no_prompt_before_had(prompts: list[list[int]], block: int) -> None:
    def shared(one: list[int], other: list[int]) -> int:
        return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905

    expected = 0
    for at, prompt in enumerate(prompts):
        longest = max((shared(prompt, before) for before in prompts[:at]), default=0)
        expected += min(longest, max(0, len(prompt) - 1)) // block * block
    assert found_in_blocks(prompts, block) == expected


async def test_a_pool_is_a_cold_tree_of_what_a_search_asks() -> None:
    async with FakeVLLM() as server, aclosing(VLLMClient(server.url, server.model)) as client:
        await client.start()
        labels = await spell_labels(client)
        pools = [await cold_pool(client, labels, WORDS, seed) for seed in (1, 1, 2)]
        assert [p.token_ids for p in pools[0]] == [p.token_ids for p in pools[1]]
        assert {tuple(p.token_ids[:16]) for p in pools[0]}.isdisjoint(tuple(p.token_ids[:16]) for p in pools[2])
        assert len(pools[0]) == CLAIMS
        assert {len(p.segments) for p in pools[0]} == {1 + CLAIMS}
        first = await tree_saving(client, labels, WORDS, 3)
        assert first is not None
        # N demonstrations and N questions a level of the tree are computed, and what blocks round up.
        assert 0.5 * first.asked < first.saved == first.possible == first.at_best
        again = await tree_saving(client, labels, WORDS, 3)
        assert again is not None
        assert again.saved > first.saved, "not cold any more"


def test_what_is_enough() -> None:
    assert Saving(asked=100, saved=90, possible=100, at_best=100, block=16).enough
    assert not Saving(asked=100, saved=89, possible=100, at_best=100, block=16).enough
    assert Saving(asked=100, saved=0, possible=0, at_best=80, block=528).enough
    assert Saving(asked=100, saved=0, possible=71, at_best=80, block=528).in_large_blocks
    assert not Saving(asked=100, saved=0, possible=72, at_best=80, block=32).in_large_blocks


async def test_a_short_context_gets_a_shorter_pool() -> None:
    async with FakeVLLM(max_model_len=400) as server, aclosing(VLLMClient(server.url, server.model)) as client:
        await client.start()
        saving = await tree_saving(client, await spell_labels(client), WORDS, 1, 400)
        assert saving is not None
        assert 300 * CLAIMS < saving.asked < 400 * CLAIMS
        assert saving.saved == saving.possible > 0
