"""Queries for different tokens that travel together."""

from __future__ import annotations

import pytest

from core.llm_api.http.together import by_tokens
from core.llm_api.types import NextTokens, Prompt, Query, Segment


def query(*token_ids: int) -> Query:
    return Query(Prompt((Segment("q", [1]),)), NextTokens(("",) * len(token_ids), token_ids))


def test_queries_for_the_same_tokens_keep_those_in_order() -> None:
    [one] = by_tokens([query(9, 7), query(9, 7)])
    assert (one.token_ids, one.positions) == ((9, 7), [0, 1])


def test_others_join_and_stay_in_the_prompts_order() -> None:
    [one] = by_tokens([query(9, 7), query(7, 5), query(9, 7), query(7, 5)])
    assert (one.token_ids, one.positions) == ((9, 7, 5), [0, 1, 2, 3])


def test_no_more_tokens_are_asked_for_than_a_request_may() -> None:
    first, second = by_tokens([query(*range(15)), query(*range(15, 30)), query(0, 30, 31), query(16, 40)])
    assert (first.token_ids, first.positions) == ((*range(15), 30, 31, 16, 40), [0, 2, 3])
    assert (second.token_ids, second.positions) == (tuple(range(15, 30)), [1])


def test_nothing_is_asked_together_with_nothing() -> None:
    assert by_tokens([]) == []


def test_queries_in_text_are_for_other_engines() -> None:
    with pytest.raises(ValueError, match="no token ids"):
        by_tokens([Query(Prompt((Segment("q"),)), NextTokens((" True",)))])
