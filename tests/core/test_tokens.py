from __future__ import annotations

from collections.abc import Sequence

import pytest

from core.llm_api.errors import ConfigurationError
from core.llm_api.tokens import fingerprint, resolve_label_tokens
from core.llm_api.types import LabelTokens


class Vocabulary:
    def __init__(self, tokens: dict[str, list[int]]) -> None:
        self.tokens = tokens

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        assert not special
        return [self.tokens[text] for text in texts]


class Textual:
    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        return None


async def test_labels_with_their_space() -> None:
    engine = Vocabulary({" True": [5], " False": [6], "True": [1], "False": [2]})
    assert await resolve_label_tokens(engine) == LabelTokens(" True", " False", 5, 6)


async def test_both_lose_the_space_if_one_must() -> None:
    engine = Vocabulary({" True": [5], " False": [3, 6], "True": [7], "False": [8]})
    assert await resolve_label_tokens(engine) == LabelTokens("True", "False", 7, 8)


@pytest.mark.parametrize("false", [[3, 6], [], [7]])
async def test_labels_that_are_no_single_tokens(false: list[int]) -> None:
    engine = Vocabulary({" True": [5], " False": [3, 6], "True": [7], "False": false})
    with pytest.raises(ConfigurationError, match=r"one token each.*' False' is 2"):
        await resolve_label_tokens(engine)


async def test_an_engine_asked_in_text_gets_the_texts() -> None:
    labels = await resolve_label_tokens(Textual())
    assert labels == LabelTokens(" True", " False")
    with pytest.raises(ValueError, match="no token ids"):
        _ = labels.ids


def test_fingerprint_ignores_order_and_noise_below_1e_4() -> None:
    base = fingerprint([1, 2], {"a": -1.0, "b": -2.0})
    assert base == fingerprint([1, 2], {"b": -2.00001, "a": -1.0})
    assert base != fingerprint([1, 2], {"a": -1.001, "b": -2.0})
    assert base != fingerprint([1, 3], {"a": -1.0, "b": -2.0})
