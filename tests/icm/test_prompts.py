"""Prompts are paths of segments, tokenized once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.engines.vllm import VLLMClient
from fakes.vllm_server import BOS, FakeVLLM, encode
from src.icm.prompts import PromptBook
from tests.core.two_labels import IN_TEXT, two

LABELS = two(1, 2)


def book() -> PromptBook:
    return PromptBook.build(
        ["q0", "q1", "q2"],
        LABELS,
        tokens=[[10, 11], [20], [30, 31, 32]],
        prefix_tokens=[99],
        separator_tokens=[7, 7],
    )


def test_a_prompt_is_prefix_demonstrations_question() -> None:
    prompt = book().prompt(1, (2, 0), (True, None, False))
    assert prompt.token_ids == [99, 30, 31, 32, 2, 7, 7, 10, 11, 1, 7, 7, 20]
    assert prompt.text == "q2 False\n\nq0 True\n\nq1"
    assert prompt.json == b"[99,30,31,32,2,7,7,10,11,1,7,7,20]"
    assert prompt.num_tokens == 13


def test_a_place_is_no_part_of_what_is_asked() -> None:
    here, there = (book().prompt(1, (0,), (True, True, True), place) for place in (0.0, 0.5))
    assert (here.place, there.place) == (0.0, 0.5)
    assert here == there
    assert (here.digest, here.json, hash(here)) == (there.digest, there.json, hash(there))


def test_segments_are_shared_between_prompts() -> None:
    b = book()
    first, second = b.prompt(1, (0,), (True, True, True)), b.prompt(2, (0,), (True, True, True))
    assert first.segments[1] is second.segments[1]


def test_unlabelled_demonstrations_are_refused() -> None:
    with pytest.raises(ValueError, match="no label"):
        book().prompt(1, (0,), (None, None, None))


def test_prompts_in_text_have_no_tokens_but_their_own_digest() -> None:
    b = PromptBook.build(["q0", "q1"], IN_TEXT)
    prompt = b.prompt(0, (1,), (None, True))
    assert prompt.text == "q1 True\n\nq0"
    assert prompt.num_tokens == 0
    assert prompt.digest != b.prompt(0, (1,), (None, False)).digest


def test_longest_prompt_by_hand() -> None:
    # demonstrations: 5, 4, 6 tokens; questions: 2, 1, 3; prefix 1
    assert book().longest_prompt(3) == max(1 + 15 - 5 + 2, 1 + 15 - 4 + 1, 1 + 15 - 6 + 3)
    assert book().longest_prompt(2) == 1 + 5 + 4 + 3  # claim 2 is asked, not demonstrated


def test_longest_prompt_with_a_cap_by_hand() -> None:
    # demonstrations: 5, 4, 6 tokens; questions: 2, 1, 3; prefix 1
    assert book().longest_prompt(3, 1) == max(1 + 6 + 2, 1 + 6 + 1, 1 + 5 + 3)
    assert book().longest_prompt(2, 1) == max(1 + 4 + 2, 1 + 5 + 1, 1 + 5 + 3)
    assert book().longest_prompt(3, 2) == book().longest_prompt(3, 9) == book().longest_prompt(3)


@given(st.data(), st.integers(1, 8), st.integers(1, 8))
def test_the_longest_prompt_is_the_longest_that_can_be_asked(data: st.DataObject, size: int, cap: int) -> None:
    tokens = data.draw(st.lists(st.lists(st.just(3), max_size=9), min_size=size, max_size=size + 2))
    b = PromptBook.build([""] * len(tokens), LABELS, tokens=tokens, prefix_tokens=[99], separator_tokens=[7])
    labels = (True,) * size
    longest = max(
        b.prompt(claim, shown, labels).num_tokens
        for claim in range(len(tokens))
        for count in range(cap + 1)
        for shown in itertools.combinations([other for other in range(size) if other != claim], count)
    )
    assert b.longest_prompt(size, cap) == longest


def test_cap_that_fits() -> None:
    assert book().cap_that_fits(1 + 3 + 6 + 5, 3) == 2
    assert book().cap_that_fits(1 + 3 + 6 + 4, 3) == 1
    assert book().cap_that_fits(1 + 3, 3) == 0


def test_claims_that_fit() -> None:
    assert book().claims_that_fit(1 + 3 + 5 + 4, 3) == 3
    assert book().claims_that_fit(1 + 3 + 5, 3) == 2
    assert book().claims_that_fit(1 + 3, 3) == 1
    assert book().claims_that_fit(1000, 3) == 3


async def test_a_gateway_without_tokenize_gives_the_same_prompts() -> None:
    texts = ["Question: Is 1 even?\nI think this claim is", "\nReview: Good.\nPositive:"]
    books = []
    for tokenizes in (True, False):
        async with FakeVLLM(tokenizes=tokenizes) as server:
            engine = VLLMClient(server.url, server.model)
            books.append(await PromptBook.open(engine, texts))
            await engine.aclose()
    assert books[0] == books[1]
    assert books[0].prompt(1, (0,), (True, None)).token_ids == [BOS, *encode(f"{texts[0]} True\n\n{texts[1]}")]
