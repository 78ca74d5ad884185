from __future__ import annotations

import json
import math

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigurationError, MissingLabel, TransientError
from core.llm_api.http.completions import (
    PIECE,
    Answers,
    read_answers,
    read_tree_answer,
    token_body,
    token_logprobs,
    token_pieces,
    vllm_fields,
)
from core.llm_api.types import Prompt, Segment, TokenLogprobs

LABELS = (7, 9)


def prompts(n: int) -> list[Prompt]:
    return [Prompt((Segment("x", [i, 1]), Segment("", []), Segment("y", [2])), name=f"claim {i}") for i in range(n)]


def body(n: int, **changes: object) -> dict:
    choices = [{"index": i, "logprobs": {"top_logprobs": [{"a": -float(i), "b": -2}]}} for i in range(n)]
    return {"choices": choices, "usage": {"prompt_tokens": 3 * n}} | changes


def test_body_is_joined_from_the_prompts_own_json() -> None:
    sent = orjson.loads(token_body(vllm_fields("m", LABELS), prompts(2)))
    assert sent == {
        "model": "m", "max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True,
        "logprob_token_ids": [7, 9], "prompt": [[0, 1, 2], [1, 1, 2]],
    }  # fmt: skip


def test_a_large_body_comes_in_pieces() -> None:
    shared = Segment("d", list(range(100_000, 101_000)))
    pool = [Prompt((shared, Segment("q", [i]))) for i in range(100)]
    pieces = token_pieces(vllm_fields("m", LABELS), pool)
    made = list(pieces.make())
    assert sum(map(len, made)) == len(pieces) == pieces.size
    assert max(map(len, made)) < PIECE + pool[0].json_size + 2
    assert len(made) > 8
    assert b"".join(pieces.make()) == b"".join(made), "a retry sends the same"
    assert orjson.loads(b"".join(made))["prompt"] == [prompt.token_ids for prompt in pool]


def test_body_for_top_logprobs() -> None:
    sent = orjson.loads(token_body(vllm_fields("m", None), prompts(1)))
    assert sent["logprobs"] == 20
    assert "logprob_token_ids" not in sent


def test_prompt_without_tokens_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="claim q"):
        token_body(vllm_fields("m", None), [*prompts(1), Prompt((Segment("text"),), name="claim q")])


@given(st.permutations(range(6)))
def test_choices_are_put_in_the_prompts_order(order: list[int]) -> None:
    answer = body(6)
    answer["choices"] = [answer["choices"][i] for i in order]
    read = read_answers(orjson.dumps(answer), prompts(6))
    assert [top["a"] for top in read.top] == [-0.0, -1, -2, -3, -4, -5]
    assert read.prompt_tokens == 18


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        orjson.dumps(body(2))[:-20],
        orjson.dumps(body(1)),
        orjson.dumps(body(3)),
        orjson.dumps(body(2, choices=[body(2)["choices"][0]] * 2)),
        orjson.dumps(body(2, choices=[{"index": "x"}, {"index": 0}])),
        orjson.dumps(body(2, choices=None)),
        orjson.dumps(body(2, choices=[{"index": 0, "logprobs": {"top_logprobs": []}}, {"index": 1, "logprobs": {}}])),
        orjson.dumps(body(2, choices=[{"index": i, "logprobs": {"top_logprobs": [None]}} for i in (0, 1)])),
        json.dumps(body(2)).replace("-2", "NaN").encode(),
        *(
            orjson.dumps(body(2, choices=[{"index": i, "logprobs": logprobs} for i in (0, 1)]))
            for logprobs in (
                [],
                {"content": None},
                {"content": []},
                {"content": [None]},
                {"content": [{"token": "a"}]},
                {"content": [{"token": "a", "logprob": -1, "top_logprobs": [{"token": "a"}]}]},
                {"content": [{"token": "a", "logprob": -1, "top_logprobs": [[]]}]},
                {"content": [{"token": [], "logprob": -1}]},
                {"content": [{"token": None, "logprob": -1}]},
                {"top_logprobs": None},
                {"top_logprobs": None, "tokens": [], "token_logprobs": []},
                {"top_logprobs": None, "tokens": ["a"], "token_logprobs": [0.5]},
            )
        ),
    ],
)
def test_unusable_bodies_may_be_asked_for_again(answer: bytes) -> None:
    with pytest.raises(TransientError):
        read_answers(answer, prompts(2))


def test_an_answer_without_logprobs_is_final() -> None:
    with pytest.raises(ConfigurationError, match="no logprobs"):
        read_answers(orjson.dumps(body(1, choices=[{"index": 0, "logprobs": None}])), prompts(1))


def answered(logprobs: object, **changes: object) -> Answers:
    return read_answers(orjson.dumps(body(1, choices=[{"index": 0, "logprobs": logprobs}], **changes)), prompts(1))


def test_lists_as_chats_have_them() -> None:
    told = [("a", -0.5), ("\ufffd", -2.0), ("\ufffd", -1.5), ("b", None)]
    top = [{"id": i, "token": token, "bytes": [], "logprob": lp} for i, (token, lp) in enumerate(told)]
    assert answered({"content": [top[0] | {"top_logprobs": top}]}).top == [{"a": -0.5, "\ufffd": -1.5, "b": -math.inf}]


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": [" Paris"], "token_logprobs": [-0.25], "top_logprobs": None},
        {"content": [{"token": " Paris", "logprob": -0.25, "top_logprobs": []}]},
        {"content": [{"token": " Paris", "logprob": -0.25, "top_logprobs": None}]},
        {"content": [{"token": " Paris", "logprob": -0.25}]},
    ],
)
def test_without_alternatives_the_chosen_token_is_all_that_is_listed(logprobs: object) -> None:
    assert answered(logprobs).top == [{" Paris": -0.25}]


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 2}, 2), ({"cached_tokens": 0}, 0), ({"cached_tokens": None}, None), ({}, None), (None, None),
     ([], None), ({"cached_tokens": "2"}, None), ({"cached_tokens": -1}, None)],
)  # fmt: skip
def test_what_one_prompt_had_cached(details: object, cached: int | None) -> None:
    usage = {"prompt_tokens": 3, "prompt_tokens_details": details}
    assert read_answers(orjson.dumps(body(1, usage=usage)), prompts(1)).cached_tokens == cached
    two = orjson.dumps(body(2, usage=usage | {"prompt_tokens": 6}))
    assert read_answers(two, prompts(2)).cached_tokens is None, "vLLM's count is of the last prompt of several"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"prompt_tokens": "7"}])
def test_usage_may_be_missing(usage: object) -> None:
    assert read_answers(orjson.dumps(body(1, usage=usage)), prompts(1)).prompt_tokens == 0


def read(top: dict[str, float], missing: str = "error"):
    return token_logprobs(top, ("T", "F"), missing=missing, name="claim 3")


def test_both_labels() -> None:
    answer = read({"T": -1.0, "F": -3.0, "x": -9.0})
    assert answer == TokenLogprobs((-1, -3))


@pytest.mark.parametrize("absent", [{}, {"T": -math.inf}, {"T": -9999.0}])
def test_a_missing_label_is_an_error_that_names_the_prompt(absent: dict[str, float]) -> None:
    with pytest.raises(MissingLabel, match=r"'claim 3'.*'T'"):
        read({"F": -1.0, "x": -2.0} | absent)


@pytest.mark.parametrize("absent", [{}, {"T": -math.inf}, {"T": -9999.0}])
def test_floor_is_the_lowest_listed(absent: dict[str, float]) -> None:
    answer = read({"F": -1.0, "x": -2.5, "y": -2.0} | absent, missing="floor")
    assert answer == TokenLogprobs((-2.5, -1.0), floored=True)


@pytest.mark.parametrize("missing", ["error", "floor"])
@pytest.mark.parametrize("top", [{}, {"x": -1.0}, {"T": -math.inf, "F": -9999.0, "x": -1.0}])
def test_both_labels_missing_is_never_a_score(top: dict[str, float], missing: str) -> None:
    with pytest.raises(MissingLabel, match="'T' and 'F'"):
        read(top, missing)


@pytest.mark.parametrize("missing", ["error", "floor"])
def test_nan_is_never_floored(missing: str) -> None:
    with pytest.raises(MissingLabel, match="NaN"):
        read({"T": math.nan, "F": -1.0, "x": -2.0}, missing)


@given(
    st.dictionaries(st.sampled_from(["T", "F", "x", "y"]), st.floats(allow_nan=True, allow_infinity=True)),
    st.sampled_from(["error", "floor"]),
)
def test_whatever_is_listed_a_score_is_finite_or_an_error(top: dict[str, float], missing: str) -> None:
    try:
        answer = read(top, missing)
    except MissingLabel:
        return
    assert len(answer.values) == 2
    assert all(map(math.isfinite, answer.values))
    assert answer.floored == (not {"T", "F"} <= {k for k, v in top.items() if math.isfinite(v) and v > -9999})


@pytest.mark.parametrize("value", [0.01, 3.5, "-1", True, [], {}])
def test_what_is_no_log_probability_is_refused(value: object) -> None:
    answer = body(2)
    answer["choices"][1]["logprobs"]["top_logprobs"][0]["b"] = value
    with pytest.raises(TransientError, match="claim 1"):
        read_answers(orjson.dumps(answer), prompts(2))
    pairs = {"logprobs": [[-1, -2], [-1, value]], "prompt_tokens": 6, "cached_tokens": 0}
    with pytest.raises(TransientError):
        read_tree_answer(orjson.dumps(pairs), LABELS, prompts(2))


def test_rounding_above_zero_is_a_log_probability_of_zero() -> None:
    answer = body(1)
    answer["choices"][0]["logprobs"]["top_logprobs"][0]["b"] = 1e-6
    assert read_answers(orjson.dumps(answer), prompts(1)).top[0]["b"] == pytest.approx(0, abs=1e-5)


def test_an_answer_that_counts_other_tokens_is_to_other_prompts() -> None:
    with pytest.raises(TransientError, match="counts 7 prompt tokens and 6 were sent"):
        read_answers(orjson.dumps(body(2, usage={"prompt_tokens": 7})), prompts(2))
    pairs = {"logprobs": [[-1, -2]] * 2, "prompt_tokens": 7, "cached_tokens": 0}
    with pytest.raises(TransientError, match="other prompts"):
        read_tree_answer(orjson.dumps(pairs), LABELS, prompts(2))
