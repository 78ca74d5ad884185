"""The /v1/completions body and what its answer means; shared by both HTTP engines.

Bodies are joined from bytes that the prompts already hold, and answers are read by orjson: a pool of 256
prompts is 18 MB of JSON, and the client must not be the slow part of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import orjson

from core.errors import ConfigurationError, MissingLabel, NotLogprobs, TransientError
from core.llm_api.http.server_errors import malformed_is_transient
from core.llm_api.http.transport import Pieces
from core.llm_api.types import EngineAnswer, NextTokens, OnAnswer, Prompt, Query, TokenLogprobs
from core.settings import MissingLabelPolicy

PARSER_VERSION: Final = 1
"""Raise when the same answer would be read as other numbers; part of every cache key."""

ROUNDING: Final = 1e-3
"""Nats above 0 that rounding may give a log-probability; a number further above is not one."""

VLLM_MINUS_INFINITY: Final = -9999.0
"""vLLM writes log-probabilities of -inf, which JSON cannot hold, as this number."""

TOP_LOGPROBS: Final = 20
"""Alternatives asked for where tokens cannot be asked for by name; vLLM's default --max-logprobs."""

PIECE: Final = 2**16
"""Bytes of a body that are collected before they are written."""

EMPTY: Final = len(b"[]")
"""Bytes of a prompt's JSON that holds no token."""

LOGPROBS_MODE: Final = (
    "A vLLM server started with --logprobs-mode raw_logits or processed_logits answers so: start it with "
    "--logprobs-mode raw_logprobs, which is the default."
)

PROMPT_END: Final = "End the prompt right before the label."

K = TypeVar("K", str, int)


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer, in the prompts' order: the listed log-probabilities of each prompt's next token, nats, by token.

    prompt_tokens: what the server counted for the whole request; 0 where it does not say. cached_tokens: how many of
    them it had in its prefix cache; None where it does not say for all prompts.
    """

    top: list[dict[str, float]]
    prompt_tokens: int
    cached_tokens: int | None = None


def token_key(token_id: int) -> str:
    """How vLLM names a token under return_tokens_as_token_ids; by id, because tokens may decode alike."""
    return f"token_id:{token_id}"


def vllm_fields(model: str, token_ids: Sequence[int] | None, *, top: int = TOP_LOGPROBS) -> dict[str, object]:
    """The fields of a vLLM request, less its prompt: exactly these tokens' logprobs, or the top ones if there are none.

    logprob_token_ids needs `logprobs` to be set, to any number.
    """
    fields: dict[str, object] = {
        "model": model,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": top if token_ids is None else 1,
        "return_tokens_as_token_ids": True,
    }
    if token_ids is not None:
        fields["logprob_token_ids"] = list(token_ids)
    return fields


def token_body(fields: Mapping[str, object], prompts: Sequence[Prompt]) -> bytes:
    """The body of token_pieces as one `bytes`."""
    return b"".join(token_pieces(fields, prompts).make())


def token_pieces(fields: Mapping[str, object], prompts: Sequence[Prompt]) -> Pieces:
    """One request for many prompts of token ids, joined from their segments' JSON without serializing a token.

    A pool's body has the size of all its prompts, N^2 demonstrations; a piece has that of one of them, or PIECE bytes
    if that is more. Raises ValueError for a prompt without tokens, which was laid out for an engine asked in text.
    """
    sizes = [prompt.json_size for prompt in prompts]
    if EMPTY in sizes:
        raise ValueError(f"prompt {prompts[sizes.index(EMPTY)].name!r} has no token ids")
    head, end = orjson.dumps(fields)[:-1] + b',"prompt":[', b"]}"

    def make() -> Iterator[bytes]:
        piece = bytearray(head)
        for position, prompt in enumerate(prompts):
            if position:
                piece += b","
            piece += prompt.json
            if len(piece) >= PIECE:
                yield bytes(piece)
                piece.clear()
        yield bytes(piece + end)

    return Pieces(len(head) + sum(sizes) + max(len(sizes) - 1, 0) + len(end), make)


def text_body(fields: Mapping[str, object], prompt: Prompt) -> bytes:
    """One request for one prompt of text."""
    return orjson.dumps({**fields, "prompt": prompt.text})


def read_answers(body: bytes, prompts: Sequence[Prompt], *, extra: int | None = 0) -> Answers:
    """Check a 2xx body against the prompts it answers, and put its choices in their order.

    extra: prompt tokens that the server counts beside those that were sent; None: whatever it counts is right.
    Raises TransientError for a body that is truncated or malformed, has other choices than were asked for or answers
    another request, and ConfigurationError where the server returns no logprobs.
    """
    with malformed_is_transient():
        parsed = orjson.loads(body)
        choices = sorted(parsed["choices"], key=lambda choice: int(choice["index"]))
        indexes = [choice["index"] for choice in choices]
    if indexes != list(range(len(prompts))):
        raise TransientError(f"asked for {len(prompts)} choices, one a prompt, and got {len(indexes)} or other ones.")
    top = [_first_token(choice, prompt.name) for choice, prompt in zip(choices, prompts, strict=True)]
    usage = parsed.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    counted = counted if isinstance(counted, int) else 0
    if counted and extra is not None:
        counted -= extra
        _check_count(counted, prompts)
    return Answers(top, counted, _cached(usage) if len(prompts) == 1 else None)


def read_generated(body: bytes, count: int) -> list[tuple[list[str], list[float]]]:
    """The tokens generated after each of `count` prompts, by name, and their log-probabilities, nats, in prompt order.

    Raises TransientError for a body that is truncated, malformed or holds other choices than were asked for.
    """
    with malformed_is_transient():
        choices = sorted(orjson.loads(body)["choices"], key=lambda choice: int(choice["index"]))
        if [choice["index"] for choice in choices] != list(range(count)):
            raise TransientError(f"asked for {count} choices, one a prompt, and got {len(choices)} or other ones.")
        return [
            (list(choice["logprobs"]["tokens"]), [float(value) for value in choice["logprobs"]["token_logprobs"]])
            for choice in choices
        ]


def read_tree_answer(body: bytes, token_ids: Sequence[int], prompts: Sequence[Prompt]) -> Answers:
    """Check our extension's answer to a PromptTree; a token with null, which stands for -inf and NaN, is left out.

    Raises TransientError for a body that is truncated, malformed, answers another number of prompts or another request.
    """
    keys = list(map(token_key, token_ids))
    with malformed_is_transient():
        parsed = orjson.loads(body)
        top = [
            {
                key: checked_logprob(value, "of a tree")
                for key, value in zip(keys, row, strict=True)
                if value is not None
            }
            for row in parsed["logprobs"]
        ]
        counted, cached = int(parsed["prompt_tokens"]), parsed["cached_tokens"]
    if len(top) != len(prompts):
        raise TransientError(f"asked about {len(prompts)} prompts and got {len(top)} answers.")
    _check_count(counted, prompts)
    return Answers(top, counted, cached if isinstance(cached, int) else None)


@contextmanager
def of_an_answer() -> Iterator[None]:
    """Give a TransientError status 200: an answer came, but its content is wrong."""
    try:
        yield
    except TransientError as error:
        error.status = 200
        raise


def found_or_missing(
    tops: Sequence[Mapping[K, float]],
    queries: Sequence[Query],
    names: Callable[[NextTokens], Sequence[K]],
    *,
    missing: MissingLabelPolicy,
    hint: str = PROMPT_END,
) -> list[TokenLogprobs | MissingLabel]:
    """For every query, in order: its token_logprobs, or the MissingLabel that this raises.

    names: the keys of `tops` for given tokens.
    """
    found: list[TokenLogprobs | MissingLabel] = []
    tokens, keys = None, names(NextTokens((), ()))
    for top, query in zip(tops, queries, strict=True):
        if query.tokens is not tokens:  # mostly they are the same object
            tokens, keys = query.tokens, names(query.tokens)
        try:
            found.append(token_logprobs(top, keys, missing=missing, name=query.prompt.name, hint=hint))
        except MissingLabel as error:
            found.append(error)
    return found


def keep_the_good(
    found: Sequence[TokenLogprobs | MissingLabel], answer: EngineAnswer, on_answer: OnAnswer | None, *, start: int = 0
) -> EngineAnswer:
    """`answer` with the logprobs `found`, which it lacks so far; calls `on_answer` with them, at start + position.

    Raises the first MissingLabel after that, so that the other answers, which are paid for, are kept.
    """
    good = {start + at: each for at, each in enumerate(found) if not isinstance(each, MissingLabel)}
    answer = replace(answer, logprobs=list(good.values()))
    if on_answer is not None and good:
        on_answer(list(good), answer)
    for each in found:
        if isinstance(each, MissingLabel):
            raise each
    return answer


def token_logprobs(
    top: Mapping[K, float], tokens: Sequence[K], *, missing: MissingLabelPolicy, name: str, hint: str = PROMPT_END
) -> TokenLogprobs:
    """The log-probabilities of `tokens` among those that one prompt's answer lists, nats.

    missing="floor" gives a token that is not listed the lowest listed log-probability: an upper bound, since the server
    lists the most probable tokens. Where all are missing their log-odds would come out as 0 nats without any evidence;
    that is always an error, as is a NaN. Raises MissingLabel naming the prompt.
    hint: what to do about a token that is not listed.
    """
    good = [value for key in tokens if (value := top.get(key)) is not None and VLLM_MINUS_INFINITY < value < math.inf]
    if len(good) == len(tokens):
        return TokenLogprobs(tuple(good))
    for key in tokens:
        value = top.get(key)
        if value is not None and math.isnan(value):
            raise MissingLabel(f"prompt {name!r}: the logprob of {key!r} is NaN.", hint="Check the model's dtype.")
    finite = {key: value for key, value in top.items() if math.isfinite(value) and value > VLLM_MINUS_INFINITY}
    absent = [key for key in tokens if key not in finite]
    some = len(absent) < len(tokens)
    if missing == "error" or not some:
        names = " and ".join(map(repr, absent))
        raise MissingLabel(
            f"prompt {name!r}: no finite log-probability for {names} among the {len(top)} that the answer lists.",
            hint=hint + (" Or set missing_label to floor." if some else ""),
        )
    floor = min(finite.values())
    return TokenLogprobs(tuple([finite.get(key, floor) for key in tokens]), floored=True)


def _first_token(choice: dict[str, Any], name: str) -> dict[str, float]:
    logprobs = choice.get("logprobs")
    if logprobs is None:
        raise ConfigurationError("the server returns no logprobs, which ICM's scores are made of.")
    try:
        return _listed(logprobs, name)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise TransientError(f"prompt {name!r}: no logprobs of its next token ({type(error).__name__}).") from None


def _listed(logprobs: dict[str, Any], name: str) -> dict[str, float]:
    """The first token's list, as completions have it or, from llama-server, as chats do.

    A server without alternatives lists the token that it chose. Of tokens with equal texts the most probable counts:
    llama-server drops bytes that are not a whole character.
    """
    if "content" in logprobs:
        first = logprobs["content"][0]
        pairs = [(each["token"], each["logprob"]) for each in first.get("top_logprobs") or [first]]
    elif logprobs["top_logprobs"] is None:
        pairs = [(logprobs["tokens"][0], logprobs["token_logprobs"][0])]
    else:
        pairs = list(logprobs["top_logprobs"][0].items())
    listed: dict[str, float] = {}
    for token, value in pairs:
        if not isinstance(token, str):
            raise TypeError
        # Some servers write null for -inf.
        logprob = -math.inf if value is None else checked_logprob(value, name)
        listed[token] = max(logprob, listed.get(token, -math.inf))
    return listed


def _cached(usage: object) -> int | None:
    """How many of one prompt's tokens the server had cached; None where it does not say."""
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if isinstance(cached, int) and cached >= 0 else None


def checked_logprob(value: object, name: str, *, hint: str = LOGPROBS_MODE) -> float:
    """`value`, from the answer to the prompt of that name, as a float.

    Raises NotLogprobs for a number that cannot be a log-probability, and TypeError for anything but a number.
    """
    if not isinstance(value, float | int):
        raise TypeError
    if value > ROUNDING:
        message = f"prompt {name!r}: the answer lists {value:g} as a log-probability, which is above 0."
        raise NotLogprobs(message, hint=hint)
    return float(value)


def _check_count(counted: int, prompts: Sequence[Prompt]) -> None:
    """Raises TransientError where the counts differ: the answer is to another request. Texts are not counted."""
    sent = sum(prompt.num_tokens for prompt in prompts)
    if sent and counted != sent:
        raise TransientError(f"the answer counts {counted} prompt tokens and {sent} were sent: it is to other prompts.")
