"""What prompts, labels and engines are made of, down to the digest that cache keys are made from."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api import types
from core.llm_api.types import EngineIdentity, NextTokens, PoolScores, Prompt, Segment, digests
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from tests.core.two_labels import IN_TEXT, two


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_segment_of_tokens_knows_their_decimal_form() -> None:
    segment = Segment("True or", [12, 5, 901])
    assert (segment.text, segment.tokens, segment.json, len(segment)) == ("True or", (12, 5, 901), b"12,5,901", 3)
    assert repr(segment) == "Segment('True or', 3 tokens)"


def test_a_segment_of_text_has_no_tokens_and_one_of_no_tokens_is_another() -> None:
    text, empty = Segment("x"), Segment("x", [])
    assert (text.tokens, text.json, len(text)) == (None, b"", 0)
    assert (empty.tokens, empty.json, len(empty)) == ((), b"", 0)
    assert text != empty


def test_segments_are_equal_by_what_they_hold() -> None:
    assert Segment("x", [1]) == Segment("x", (1,))
    assert Segment("x", [1]) != Segment("x", [2])
    assert Segment("x", [1]) != Segment("y", [1])
    assert Segment("x") != "x"
    assert len({Segment("x", [1]), Segment("x", [1]), Segment("y", [1])}) == 2
    assert len({hash(Segment(str(i), [i])) for i in range(50)}) == 50


def test_a_segment_takes_no_other_attributes() -> None:
    with pytest.raises(AttributeError):
        Segment("x").more = 1  # type: ignore[attr-defined]


def test_a_prompt_of_tokens_is_sent_as_their_json() -> None:
    prompt = Prompt((Segment("a", [1, 2]), Segment("b", []), Segment("c", [3])))
    assert prompt.num_tokens == 3
    assert prompt.token_ids == [1, 2, 3]
    assert prompt.text == "abc"
    assert prompt.json == prompt.content == b"[1,2,3]"
    assert prompt.digest == digest_of(b"[1,2,3]")


def test_a_prompt_of_text_is_sent_as_it_is() -> None:
    prompt = Prompt((Segment("é "), Segment("b")))
    assert (prompt.num_tokens, prompt.token_ids) == (0, [])
    assert prompt.content == "é b".encode()
    assert prompt.digest == digest_of("é b".encode())
    assert Prompt(()).content == b""


def test_the_digest_does_not_know_how_a_prompt_is_cut_what_it_is_called_or_where_it_stands() -> None:
    prompt = Prompt((Segment("a", [1]), Segment("b", [2])))
    assert (prompt.name, prompt.place) == ("", 0.0)
    assert Prompt((Segment("ab", [1, 2]),), name="claim 3", place=0.5).digest == prompt.digest
    assert Prompt((Segment("a", [12]),)).digest != prompt.digest
    assert Prompt(prompt.segments, place=0.5) == prompt
    assert Prompt(prompt.segments, name="claim 3") != prompt


def test_tokens_give_their_ids_where_they_have_any() -> None:
    assert IN_TEXT.asked == NextTokens((" True", " False"))
    assert two(7, 9).asked.ids == (7, 9)
    with pytest.raises(ValueError, match="no token ids"):
        _ = IN_TEXT.asked.ids


def test_log_odds_are_of_two_labels() -> None:
    scores = PoolScores(np.array([[-3.0, -1.0], [-0.5, -0.75]]))
    assert scores.log_odds == [2.0, -0.25]
    with pytest.raises(ValueError, match="these scores have 3"):
        _ = PoolScores(np.zeros((2, 3))).log_odds


def test_an_engine_is_described_in_a_line() -> None:
    known = EngineIdentity("vllm", "gemma", version="0.32", fingerprint="0123456789abcdef")
    assert known.describe() == "gemma on vllm 0.32 (fingerprint 0123456789ab)"
    plain = EngineIdentity("external", "gpt")
    assert plain.describe() == "gpt on external (fingerprint none)"
    assert (plain.root, plain.revision, plain.version, plain.determinism, plain.fingerprint) == ("",) * 5
    assert plain.max_model_len is None


# Prompts by the thousand: what they cost to name, and what they keep

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
