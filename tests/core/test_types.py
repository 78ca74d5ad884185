"""What prompts, labels and engines are made of, down to the digest that cache keys are made from."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from core.llm_api.types import EngineIdentity, NextTokens, PoolScores, Prompt, Segment
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
