"""What a determinism check asks: leave-one-out questions like a search's, about the built-in claims."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from core.determinism.matrix import SUFFIXES, Material
from core.llm_api.types import Engine
from src.icm.prompts import PromptBook
from src.icm.testbeds import BadInput
from src.pipeline.datafiles import load_testbed

SEED: Final = 0
"""Of the demonstrations: what is asked is always the same, so that two checks of an engine can be compared."""
OTHER_TOKENS: Final = 18
"""Tokens compared besides the two labels; vLLM lists at most 20 by default."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is asked. prompts: how many are compared. demonstrations: in each. long, short: how many unrelated
    prompts of each kind are asked with them. long_tokens: of all long ones together."""

    prompts: int
    demonstrations: int
    long_tokens: int
    long: int = 4
    short: int = 16


async def material_for(engine: Engine, amount: Amount, *, context: int | None, block: int | None) -> Material:
    """The material for one engine. context: its longest prompt and answer, tokens; block: tokens of a cache block.

    Raises BadInput where the engine's context is too short for it, or its cache blocks too long.
    """
    _, claims, _ = load_testbed("builtin", Path())
    book = await PromptBook.open(engine, [claim.text for claim in claims])
    if book.prefix.tokens is None:
        raise BadInput("an engine that is asked in text cannot be checked: it has no token ids")
    true, false = book.labels.asked.ids
    rng = random.Random(SEED)
    marks = [rng.random() < 0.5 for _ in claims]
    asked = range(min(amount.prompts, len(claims)))
    shared = rng.sample(range(len(claims)), amount.demonstrations // 2)
    prompts = []
    for claim in asked:
        drawn = rng.sample(range(len(claims)), amount.demonstrations - len(shared))
        demonstrations = [other for other in (*shared, *drawn) if other != claim]
        prompts.append(tuple(book.prompt(claim, demonstrations, marks).token_ids))
    longest = max(map(len, prompts))
    room = (context or 2 * longest) - 1
    if longest > room:
        raise BadInput(f"the check asks up to {longest} tokens, and the model's context is {room + 1}")
    least, size = min(map(len, prompts)), block or 16
    if least < (needed := size + max(SUFFIXES)):
        enough = -(-needed * amount.demonstrations // least) + 2
        raise BadInput(
            f"prompts of {least} tokens are too short for cache blocks of {size}, of which one must fit: more "
            f"demonstrations make them longer (--demonstrations {enough})"
        )
    words = sorted({token for question in book.questions for token in question.tokens or ()})
    length = min(amount.long_tokens // amount.long, room)
    return Material(
        prompts=tuple(prompts),
        labels=(true, false),
        others=tuple(_spread([word for word in words if word not in (true, false)], OTHER_TOKENS)),
        long=tuple(tuple(rng.choices(words, k=length)) for _ in range(amount.long)),
        short=tuple(tuple(rng.choices(words, k=3 + at)) for at in range(amount.short)),
        block=size,
    )


def _spread(values: list[int], count: int) -> list[int]:
    """`count` of the sorted values, evenly spread."""
    bounds = [at * len(values) // count for at in range(count + 1)]
    return [values[start] for start, _ in pairwise(bounds)]
