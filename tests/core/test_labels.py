"""Label spaces, their tries, and what the answers at the nodes make of a label."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigurationError
from core.llm_api.labels import TRUE_FALSE, LabelSpace, SpelledLabels
from core.llm_api.types import NextTokens, Prompt, Segment, TokenLogprobs

PROMPT = Prompt((Segment("", [1]), Segment("q", [50, 51])), name="claim 0", place=0.25)


def space(*names: str) -> LabelSpace:
    return LabelSpace(names, tuple(f" {name}" for name in names))


def asked_of(labels: SpelledLabels) -> list[tuple[list[int], tuple[int, ...]]]:
    """What is put after the prompt, and what is asked for there."""
    queries = labels.queries([PROMPT])
    return [(query.prompt.token_ids[PROMPT.num_tokens :], query.tokens.ids) for query in queries]


def test_true_and_false_are_one_query_true_first() -> None:
    """As requests and cache keys were before there were others."""
    labels = SpelledLabels(TRUE_FALSE, ((9,), (7,)))
    [query] = labels.queries([PROMPT])
    assert query.prompt is PROMPT
    assert query.tokens == NextTokens((" True", " False"), (7, 9))
    scores = labels.logprobs([TokenLogprobs((-0.5, -1.25))])
    assert scores.tolist() == [[-1.25, -0.5]]
    assert (TRUE_FALSE.names[False], TRUE_FALSE.names[True]) == ("False", "True")
    assert labels.record() == {" True": 7, " False": 9}
    assert list(labels.record()) == [" True", " False"]


def test_labels_are_equal_where_they_are_spelled_alike() -> None:
    labels = SpelledLabels(TRUE_FALSE, ((9,), (7,)))
    assert labels == SpelledLabels(TRUE_FALSE, ((9,), (7,)))
    assert labels != SpelledLabels(TRUE_FALSE, ((7,), (9,)))
    assert len(labels) == len(TRUE_FALSE) == 2
    assert "Node" not in repr(labels)
    assert "paths" not in repr(labels)


@pytest.mark.parametrize("size", [3, 4, 20])
def test_labels_of_one_token_are_one_query(size: int) -> None:
    labels = SpelledLabels(space(*map(str, range(size))), tuple((100 + label,) for label in range(size)))
    queries = labels.queries([PROMPT, PROMPT])
    assert [query.prompt for query in queries] == [PROMPT, PROMPT]
    assert queries[0].tokens.ids == tuple(reversed(range(100, 100 + size)))
    answers = [TokenLogprobs(tuple(-float(n) for n in range(size))), TokenLogprobs((-1.0,) * size)]
    scores = labels.logprobs(answers)
    assert (scores.shape, scores.dtype) == ((2, size), np.float64)
    assert scores[0].tolist() == [-float(size - 1 - label) for label in range(size)]
    assert labels.longest_beginning == 0


def test_shared_beginnings_are_asked_once_and_right_after_their_prompt() -> None:
    labels = SpelledLabels(space("very good", "very bad", "good"), ((3, 4), (3, 5), (4,)))
    assert asked_of(labels) == [([], (4, 3)), ([3], (5, 4))]
    first, beginning = labels.queries([PROMPT])
    assert (beginning.prompt.name, beginning.prompt.place) == (first.prompt.name, first.prompt.place)
    assert beginning.prompt.segments == (*first.prompt.segments, Segment("", [3]))
    assert first.tokens.texts == (" good", "")
    assert labels.longest_beginning == 1
    scores = labels.logprobs([TokenLogprobs((-3.0, -0.5)), TokenLogprobs((-0.25, -2.0))])
    assert scores.tolist() == [[-2.5, -0.75, -3.0]]
    assert labels.record() == {" good": 4, " very bad": [3, 5], " very good": [3, 4]}


def test_each_token_of_a_label_that_shares_none_is_asked_for() -> None:
    labels = SpelledLabels(space("yes", "not at all"), ((3,), (4, 5, 6)))
    assert asked_of(labels) == [([], (4, 3)), ([4], (5,)), ([4, 5], (6,))]
    scores = labels.logprobs([TokenLogprobs((-1.0, -2.0)), TokenLogprobs((-0.5,)), TokenLogprobs((-0.25,))])
    assert scores.tolist() == [[-2.0, -1.75]]


def test_a_label_that_another_begins_with_ends_with_the_separator() -> None:
    labels = SpelledLabels(space("good", "good enough"), ((3,), (3, 4)), end=10)
    assert asked_of(labels) == [([], (3,)), ([3], (4, 10))]
    scores = labels.logprobs([TokenLogprobs((-1.0,)), TokenLogprobs((-0.5, -2.0))])
    assert scores.tolist() == [[-3.0, -1.5]]
    assert labels.tokens == ((3,), (3, 4)), "its demonstrations have the separator anyway"


@pytest.mark.parametrize(
    ("tokens", "end", "told"),
    [
        (((3,), (3, 4)), None, "' b' begins with the tokens of ' a', and nothing follows a label:"),
        (((3,), (3, 10)), 10, "goes on as a demonstration does after its label:"),
        (((3, 4), (3,)), None, "' a' begins with the tokens of ' b'"),
        (((3, 4), (3, 4)), 10, "' a' and ' b' are the same tokens"),
    ],
)
def test_labels_that_cannot_be_told_apart(tokens: tuple[tuple[int, ...], ...], end: int | None, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as refused:
        SpelledLabels(space("a", "b"), tokens, end=end)
    assert refused.value.hint


def test_an_engine_asked_in_text_hears_the_texts() -> None:
    labels = SpelledLabels(space("A", "B", "C"))
    [query] = labels.queries([Prompt((Segment("q"),))])
    assert query.tokens == NextTokens((" C", " B", " A"))
    assert labels.logprobs([TokenLogprobs((-3.0, -2.0, -1.0))]).tolist() == [[-1.0, -2.0, -3.0]]
    assert list(labels.record().items()) == [(" C", None), (" B", None), (" A", None)]


@pytest.mark.parametrize(
    ("names", "texts", "told"),
    [
        (("a",), (" a",), "1 names and 1 texts"),
        (("a", "b"), (" a",), "2 names and 1 texts"),
        (tuple(map(str, range(21))), tuple(map(str, range(21))), "21 names"),
        (("a", "a"), (" a", " b"), "the label name 'a' is there twice"),
        (("a", "b"), (" x", " x"), "the label text ' x' is there twice"),
        (("a", " "), (" a", " b"), "the label name ' ' is blank"),
        (("a", "b"), (" a", ""), "the label text '' is blank"),
    ],
)
def test_spaces_that_are_none(names: tuple[str, ...], texts: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as refused:
        LabelSpace(names, texts)
    assert refused.value.hint


def next_logprob(given_tokens: tuple[int, ...], token: int) -> float:
    """Of a model whose answer depends on all that stands before."""
    weights = [1 + (7 * sum(given_tokens) + 3 * each + len(given_tokens)) % 11 for each in range(5)]
    return math.log(weights[token] / sum(weights))


LABELS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=2, max_size=8, unique=True)


@given(LABELS)
def test_log_p_of_a_label_is_that_of_its_tokens_one_after_the_other(tokens: list[tuple[int, ...]]) -> None:
    """Whatever they share. Where another label goes on, that of the end (4) after it, too."""
    labels = SpelledLabels(space(*map(str, range(len(tokens)))), tuple(tokens), end=4)
    answers = []
    for query in labels.queries([PROMPT]):
        before = tuple(query.prompt.token_ids[PROMPT.num_tokens :])
        answers.append(TokenLogprobs(tuple(next_logprob(before, token) for token in query.tokens.ids)))
    [scores] = labels.logprobs(answers).tolist()
    for label, ids in enumerate(tokens):
        goes_on = any(other != ids and other[: len(ids)] == ids for other in tokens)
        whole = (*ids, 4) if goes_on else ids
        expected = sum(next_logprob(whole[:at], token) for at, token in enumerate(whole))
        assert scores[label] == pytest.approx(expected)
    begun = [query.prompt.token_ids for query in labels.queries([PROMPT])]
    assert len({tuple(ids) for ids in begun}) == len(begun), "no beginning is asked twice"
    assert sum(map(math.exp, scores)) <= 1 + 1e-9, "labels exclude each other"
