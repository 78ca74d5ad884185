"""Which tokens the labels are, and what tells one engine from another that goes by the same name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import orjson

from core.llm_api.errors import ConfigurationError
from core.llm_api.types import LabelTokens

CANARY_TEXT: Final = "The capital of France is"
"""Asked of every engine at start. Shorter than a block of 16 tokens, so that no prefix cache can answer it."""


class Tokenizer(Protocol):
    """Whatever turns texts into token ids; every Engine does."""

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """See Engine.tokenize."""
        ...


async def resolve_label_tokens(engine: Tokenizer, true: str = " True", false: str = " False") -> LabelTokens:
    """The labels as single tokens of the served model.

    Tries the texts as given, then both without their leading space (tokenizers in SentencePiece's manner put it there
    themselves); never one of each, which would compare unlike things. The texts in the result are the ones that worked,
    and demonstrations must spell their labels the same way. An engine that is asked in text gets the texts as given.
    Raises ConfigurationError where neither spelling is one token for each label.
    """
    tried: list[str] = []
    for a, b in dict.fromkeys([(true, false), (true.lstrip(" "), false.lstrip(" "))]):
        ids = await engine.tokenize([a, b], special=False)
        if ids is None:
            return LabelTokens(a, b)
        if len(ids[0]) == len(ids[1]) == 1 and ids[0] != ids[1]:
            return LabelTokens(a, b, ids[0][0], ids[1][0])
        tried.append(f"{a!r} is {len(ids[0])} and {b!r} is {len(ids[1])} tokens")
    raise ConfigurationError(
        f"the labels must be one token each, and different ones: {'; '.join(tried)}.",
        hint="Use another model, or labels that are single tokens of this one.",
    )


def fingerprint(tokens: Sequence[int], top: Mapping[str, float]) -> str:
    """SHA-256 of how an engine continued the canary: its token ids and the top log-probabilities to 1e-4 nat.

    Other weights, another precision or another kernel change it; a restart of the same server does not.
    """
    answer = sorted((token, f"{logprob:.4f}") for token, logprob in top.items())
    return hashlib.sha256(orjson.dumps([list(tokens), answer])).hexdigest()
