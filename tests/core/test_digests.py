"""Prompts by the thousand: what they cost to name, and what they keep."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api import types
from core.llm_api.types import Prompt, Segment, digests
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from tests.core.two_labels import two

SEGMENTS = [Segment("", []), *(Segment(str(i), list(range(i, i + 1 + i % 3))) for i in range(5)), Segment("text")]


@given(st.lists(st.lists(st.integers(0, len(SEGMENTS) - 1), max_size=6), max_size=12))
def test_the_digest_is_that_of_the_content_whoever_the_neighbours_are(paths: list[list[int]]) -> None:
    prompts = [Prompt(tuple(SEGMENTS[i] for i in path)) for path in paths]
    expected = [hashlib.sha256(prompt.content).hexdigest() for prompt in prompts]
    assert digests(prompts) == expected
    assert [prompt.digest for prompt in prompts] == expected
    assert digests(prompts[::-1]) == expected[::-1]
    assert [prompt.json_size for prompt in prompts] == [len(prompt.json) for prompt in prompts]


def pool(count: int, tokens: int = 40) -> list[Prompt]:
    rng = np.random.default_rng(count)
    ids = rng.integers(10_000, 99_999, (count, tokens)).tolist()
    names = [str(i) for i in range(count)]
    book = PromptBook.build(names, two(1, 2), tokens=ids, separator_tokens=[3])
    layout = TreeLayout.build(range(count), names, rng)
    return [book.prompt(claim, layout.context(claim), [True] * count) for claim in layout.questions]


def test_a_prompt_that_was_sent_and_named_keeps_no_body() -> None:
    """256 prompts of 256 demonstrations are 16 MB; 64 searches of them were a gigabyte."""
    (prompt, *_) = prompts = pool(16)
    assert len(digests(prompts)) == 16
    assert prompt.json
    assert set(vars(prompt)) == {"segments", "name", "place", "digest"}


def test_what_neighbours_share_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = 0
    real = hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"", *, inner: Any = None) -> None:
            self.inner = inner or real(data)

        def update(self, data: bytes) -> None:
            nonlocal hashed
            hashed += len(data)
            self.inner.update(data)

        def copy(self) -> Counting:
            return Counting(inner=self.inner.copy())

        def hexdigest(self) -> str:
            return str(self.inner.hexdigest())

    prompts = pool(128)
    expected = [hashlib.sha256(prompt.content).hexdigest() for prompt in prompts]
    monkeypatch.setattr(types.hashlib, "sha256", Counting)
    found = digests(prompts)
    monkeypatch.undo()
    assert found == expected
    a_demonstration = prompts[0].json_size / len(prompts[0].segments)
    assert hashed < 128 * (np.log2(128) + 2) * a_demonstration
