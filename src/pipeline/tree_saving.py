"""What the prefix tree saves on a server, by a small pool asked cold, and what whole blocks of its cache would allow.

The pool's claims are random words, so that no server has seen them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.labels import SpelledLabels
from core.llm_api.types import Prompt
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook

CLAIMS: Final = 16
WORDS_EACH: Final = 80
"""Of a claim. Fifteen claims are 1,200 tokens and more: beyond the windows of 512 and 1,024 tokens that Gemma 3 has."""
SMALLEST_BLOCK: Final = 16
"""Tokens; what launch_vllm_server.sh starts GPU servers with."""
ENOUGH: Final = 0.9
"""Of what is possible. A server that keeps all blocks saves all of it, one that does not 0.55 (docs/servers.md)."""


@dataclass(frozen=True, slots=True)
class Saving:
    """Tokens. asked: of all prompts; saved: found in the cache, by the server's counters.

    block: of the server's cache, None where it does not say; possible: found if it kept every block of that size;
    at_best: found if it kept every block of SMALLEST_BLOCK.
    """

    asked: int
    saved: int
    possible: int
    at_best: int
    block: int | None

    @property
    def enough(self) -> bool:
        """Whether the server saves about what its blocks allow."""
        return self.saved >= ENOUGH * self.possible

    @property
    def in_large_blocks(self) -> bool:
        """Whether it is the size of the blocks that costs most of the saving."""
        return self.possible < ENOUGH * self.at_best


async def tree_saving(
    client: VLLMClient, labels: SpelledLabels, words: Sequence[str], seed: int, context: int | None = None
) -> Saving | None:
    """Ask `client` a pool that `seed` draws from `words`; None where the server shows no counters of its cache.

    context: the longest prompt and answer, tokens; None: long enough. On a server that others use, their prompts are
    counted, too. Raises APIError as VLLMClient.score does.
    """
    prompts = await cold_pool(client, labels, words, seed, context)
    before = await client.prefix_cache()
    await client.score(labels.queries(prompts))
    after = await client.prefix_cache()
    if before is None or after is None:
        return None
    asked = [prompt.token_ids for prompt in prompts]
    block = await client.kv_block_size()
    return Saving(
        asked=sum(map(len, asked)),
        saved=(after - before).hits,
        possible=found_in_blocks(asked, block or SMALLEST_BLOCK),
        at_best=found_in_blocks(asked, SMALLEST_BLOCK),
        block=block,
    )


async def cold_pool(
    client: VLLMClient, labels: SpelledLabels, words: Sequence[str], seed: int, context: int | None = None
) -> list[Prompt]:
    """One leave-one-out question a claim, in the order of a tree, of random words."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=WORDS_EACH)) for _ in range(CLAIMS)]
    room = None if context is None else (context - 1) // CLAIMS - 1
    book = PromptBook.build(texts, labels, tokens=[tokens[:room] for tokens in await client.tokenize(texts)])
    layout = TreeLayout.build(range(CLAIMS), [str(i) for i in range(CLAIMS)], np.random.default_rng(seed))
    marks = [rng.random() < 0.5 for _ in range(CLAIMS)]
    return [book.prompt(claim, layout.context(claim), marks, layout.place(claim)) for claim in layout.questions]


def found_in_blocks(prompts: Sequence[Sequence[int]], block: int) -> int:
    """Tokens of `prompts`, asked in order, that a cache finds which keeps all whole blocks of `block` tokens.

    A block is found where its prompt was the same up to the block's end before, and never the prompt's last token,
    from which the answer is computed.
    """
    known: set[tuple[int, ...]] = set()
    found = 0
    for prompt in prompts:
        ends = range(block, len(prompt) + 1, block)
        beginnings = [tuple(prompt[:end]) for end in ends]
        found += block * sum(end < len(prompt) and start in known for end, start in zip(ends, beginnings, strict=True))
        known.update(beginnings)
    return found
