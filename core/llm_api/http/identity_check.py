"""Whether the same vLLM server still answers: a fixed prompt, asked at start and whenever it may have been replaced.

An answer counts if it came between two passed checks: one before it was asked for, and one that began after it came. So
the connection may end during a check: a server that closes it after every answer costs one check an answer, no more.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from core.errors import APIError, ConfigurationError, MissingLabel, RequestRejected, ServerChanged
from core.llm_api.http.completions import (
    LOGPROBS_MODE,
    TOP_LOGPROBS,
    Answers,
    token_body,
    token_key,
    token_logprobs,
    vllm_fields,
)
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpTransport
from core.llm_api.http.vllm_questions import VLLMQuestions
from core.llm_api.tokens import CANARY_TEXT
from core.llm_api.types import EngineIdentity, Prompt, Segment, known_to_differ

log = logging.getLogger(__name__)

BACK_HINT: Final = "Start that one again, then go on; or use another --run."
SAME_WEIGHTS: Final = 0.25
"""Nats by which the canary's log-probabilities may differ when one server is asked twice, beside other requests.
Measured differences between kernels are below 0.1 nat; other weights differ by more in some of the first tokens."""
WHOLE: Final = 1.01
"""The most that the probabilities of one prompt's listed tokens add up to, rounding included."""
LEAST_GREEDY: Final = -22 * math.log(2)
"""Nats: the most probable of 2**22 tokens has a log-probability above this, and no model knows as many."""


def two_ids(token_ids: Sequence[int]) -> tuple[int, int]:
    """Two different token ids that the model has: of the prompt, or where it repeats one, that and its neighbour."""
    ids = sorted(set(token_ids))
    return (ids[-2], ids[-1]) if len(ids) > 1 else (ids[0], ids[0] - 1 if ids[0] else 1)


@dataclass(frozen=True, slots=True)
class Counting:
    """Prompt tokens that a server counts beyond those that it was sent: per request, and per prompt."""

    request: int = 0
    prompt: int = 0

    def beyond(self, prompts: int) -> int:
        """Tokens counted beyond those sent, for one request of so many prompts."""
        return self.request + prompts * self.prompt


@dataclass(slots=True)
class Canary:
    """The fixed prompt, how it is asked, and the first answer to it: nats by token.

    exact: whether the server lists tokens that are asked for by id. top: how many it lists otherwise.
    """

    questions: VLLMQuestions
    url: str
    model: str
    exact: bool = False
    top: int = TOP_LOGPROBS
    counting: Counting = field(default_factory=Counting)
    tokens: Sequence[int] = ()
    answer: Mapping[str, float] = field(default_factory=dict)
    _fields: Mapping[str, object] = field(default_factory=dict)

    async def meet(self) -> None:
        """Ask it for the first time. Raises ConfigurationError where the server's answers cannot be used."""
        [self.tokens] = await self.questions.tokenize([CANARY_TEXT], special=True)
        prompt = _prompt(self.tokens)
        self.exact = await self._probe_exact(prompt)
        answers = await self._first_answer(prompt)
        self.answer = answers.top[0]
        self.counting = Counting()
        if answers.prompt_tokens not in (0, prompt.num_tokens):
            self.counting = await self._find_counting(prompt)

    async def differs(self, retry: RetryPolicy | None) -> bool:
        """Whether the answer is now different from the first one."""
        [tokens] = await self.questions.tokenize([CANARY_TEXT], special=True, retry=retry)
        prompt = _prompt(tokens)
        body, extra = token_body(self._fields, [prompt]), self.counting.beyond(1)
        return not _same_weights((await self.questions.listed(body, [prompt], retry, extra=extra)).top[0], self.answer)

    async def _first_answer(self, prompt: Prompt) -> Answers:
        """Ask for fewer log-probabilities where the server was started with a lower --max-logprobs.

        Asks for tokens by id where the server takes ids: vLLM (0.32) answers a request for the top ones with only the
        sampled token while it computes a pool in the same step, and would then seem to be another server.
        """
        attempts = [vllm_fields(self.model, None, top=top) for top in (TOP_LOGPROBS, 5, 1)]
        if self.exact:
            tokens = sorted(set(prompt.token_ids))
            attempts = [
                {**vllm_fields(self.model, None, top=1), "logprob_token_ids": tokens[-count:]} for count in (5, 2)
            ]
        for fields in attempts:
            try:
                answers = await self._listed(token_body(fields, [prompt]), [prompt])
            except RequestRejected as error:
                if error.status not in (400, 422) or fields is attempts[-1]:
                    raise
            else:
                self._fields = fields
                if not self.exact:
                    self.top = int(str(fields["logprobs"]))
                return answers
        raise AssertionError("unreachable")

    async def _probe_exact(self, prompt: Prompt) -> bool:
        """Ask for two arbitrary tokens by id. A server that ignores the field lists one token; others list both."""
        a, b = two_ids(prompt.token_ids)
        body = token_body(vllm_fields(self.model, (a, b)), [prompt])
        try:
            top = (await self._listed(body, [prompt])).top[0]
            token_logprobs(top, (token_key(a), token_key(b)), missing="error", name="canary")
        except MissingLabel:
            return False
        except RequestRejected as error:
            if error.status in (400, 422):
                return False
            raise
        return True

    async def _listed(self, body: bytes, prompts: Sequence[Prompt]) -> Answers:
        """The answer, with any count of tokens. Raises ConfigurationError where it lists no log-probabilities."""
        answers = await self.questions.listed(body, prompts, extra=None)
        for top in answers.top:
            self._check_probabilities(top)
        return answers

    def _check_probabilities(self, top: Mapping[str, float]) -> None:
        total, highest = sum(math.exp(value) for value in top.values()), max(top.values(), default=0.0)
        if total > WHOLE or highest < LEAST_GREEDY:
            raise ConfigurationError(
                f"{self.url}: the log-probabilities of {len(top)} tokens, {highest:.4g} the highest, add up to a "
                f"probability of {total:.3g}: these are no log-probabilities.",
                hint=LOGPROBS_MODE,
            )

    async def _find_counting(self, prompt: Prompt) -> Counting:
        """How the server counts tokens, where it does not count those that were sent.

        A gateway that counts in another way is taken as it is; one that sends on other tokens than it was given is not.
        """
        one, two = [
            (await self._listed(token_body(self._fields, [prompt] * count), [prompt] * count)).prompt_tokens
            for count in (1, 2)
        ]
        sent = prompt.num_tokens
        if one == sent:  # only the first count was wrong
            return Counting()
        each = two - one - sent
        counting = Counting(one - sent - each, each)
        if (abs(counting.request), abs(counting.prompt)) not in ((0, 1), (1, 0)):
            raise ConfigurationError(
                f"{self.url} counts {one} tokens for a prompt of {sent}: it is sent on as something else.",
                hint="Have the gateway pass token ids on as they are, without a chat template; or ask vLLM itself.",
            )
        body = orjson.dumps({**self._fields, "prompt": CANARY_TEXT, "add_special_tokens": True})
        text = Prompt((Segment(CANARY_TEXT),), name="canary")
        if not _same_weights((await self._listed(body, [text])).top[0], self.answer):
            raise ConfigurationError(
                f"{self.url} counts {one} tokens for a prompt of {sent}, and answers otherwise than to its text: it "
                "adds a token.",
                hint="Have the gateway add none to prompts of token ids (add_special_tokens: false), or ask vLLM.",
            )
        log.warning(
            "%s counts %d tokens for a prompt of %d; its answers show that it got the right prompt, so this count is "
            "accepted",
            self.url,
            one,
            sent,
        )
        return counting


class IdentityCheck:
    """Checks that the server is still the one of start().

    known: its identity then, in transport epoch `epoch`.
    """

    def __init__(self, http: HttpTransport, canary: Canary, known: EngineIdentity, epoch: int) -> None:
        self._http = http
        self._canary = canary
        self.known = known
        self._passed = epoch  # a check that began in this epoch was passed
        self._checking = asyncio.Lock()

    async def pass_answers_of(self, epoch: int, retry: RetryPolicy | None = None) -> None:
        """Return once a check has passed that began in `epoch`, in which an answer came, or later.

        Answers wait for this, so that those of other weights or kernels are never mixed in. One check serves all
        answers that came before it began. Raises ServerChanged.
        """
        async with self._checking:
            if epoch > self._passed:
                began = self._http.epoch
                await self._check(retry)
                self._passed = began

    async def _check(self, retry: RetryPolicy | None) -> None:
        questions, known = self._canary.questions, self.known
        try:
            card = await questions.model_card(retry)
            version = await questions.version(retry)
            changed = [
                f"{name} {now!r}, not {before!r}"
                for name, now, before in (
                    ("root", str(card.get("root") or ""), known.root),
                    ("version", version, known.version),
                )
                if now != before
            ]
            if await self._canary.differs(retry):
                changed.append("other answers to a fixed prompt")
        except ConfigurationError as error:
            raise ServerChanged(str(error.args[0]), hint=BACK_HINT) from None
        if known.dtype or known.config:  # the canary may be too short to show another
            said = await self._extension()
            dtype = str(said.get("dtype", ""))
            if known_to_differ(dtype, known.dtype):
                changed.append(f"dtype {dtype!r}, not {known.dtype!r}")
            if known_to_differ(str(said.get("config", "")), known.config):
                changed.append("another configuration of the model")
        if changed:
            raise ServerChanged(
                f"the server at {self._http.base_url} is not the one asked at first: {', '.join(changed)}.",
                hint=BACK_HINT,
            )

    async def _extension(self) -> dict[str, Any]:
        """What the server's extension says about it; {} where it no longer has one."""
        try:
            return await self._canary.questions.extension()
        except APIError:
            return {}


def _prompt(tokens: Sequence[int]) -> Prompt:
    return Prompt((Segment(CANARY_TEXT, tokens),), name="canary")


def _same_weights(top: Mapping[str, float], known: Mapping[str, float]) -> bool:
    """Whether two answers to the canary agree on the most probable tokens; the rest of the list may change order."""
    first = sorted(known, key=lambda token: -known[token])[:5]
    lowest = min(top.values(), default=0.0)
    return all(abs(top.get(token, lowest) - known[token]) <= SAME_WEIGHTS for token in first)
