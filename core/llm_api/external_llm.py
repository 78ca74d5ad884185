"""Any OpenAI-compatible /v1/completions, asked in text, one prompt a request, under the endpoint's rate limits.

Labels are matched by the exact text of the listed tokens, space included. Leaving the space out as a second choice
would be unsafe: where the list holds `True` but not ` True`, it holds another token, whose probability says little of
the one that the demonstrations use. Only spellings of the same token are brought together: SentencePiece's and
byte-level BPE's marks for a leading space.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final

from pydantic import SecretStr

from core.llm_api.completions import Answers, label_logprobs, read_answers, text_body
from core.llm_api.errors import APIError, ConfigurationError, RateLimited, RequestRejected, ServerUnreachable
from core.llm_api.generation import Embeddings, Generation, Piece, TextRequest
from core.llm_api.http_text import HttpText
from core.llm_api.rate_limit import RateLimiter
from core.llm_api.telemetry import RequestTelemetry
from core.llm_api.tokens import CANARY_TEXT
from core.llm_api.transport import HttpOptions, HttpTransport, all_or_cancel
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    LabelLogprobs,
    LabelTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Segment,
)
from core.settings import MissingLabelPolicy

log = logging.getLogger(__name__)

_SPACE_MARKS: Final = ("\u2581", "\u0120")  # SentencePiece's and byte-level BPE's leading space
_TOP_CHOICES: Final = (20, 5)
_SLOW_DOWN: Final = 5.0
"""Seconds that everyone waits after a 429 that names no time."""


class ExternalAPI:
    """An Engine over a hosted API. `api_base` is what /completions is appended to, usually ending in /v1."""

    def __init__(
        self,
        api_base: str,
        model: str,
        *,
        api_key: SecretStr | None = None,
        limiter: RateLimiter | None = None,
        missing_label: MissingLabelPolicy = "error",
        options: HttpOptions | None = None,
    ) -> None:
        self._http = HttpTransport(
            api_base, key=api_key, key_name="API_KEY", options=options or HttpOptions(), absent="Check LLAMA_API_BASE."
        )
        self._model = model
        self._limiter = limiter or RateLimiter()
        self._text = HttpText(self._http, model, prefix="", limiter=self._limiter)
        self._missing = missing_label
        self._top = _TOP_CHOICES[0]
        # Tokens and characters of what was answered so far; the start is a usual ratio for English text.
        self._tokens, self._characters = 1, 4

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect. Asks nothing: not every hosted API lists its models, and the first answer tells."""
        return EngineIdentity(kind="openai-compatible", model=self._model, root=self._http.base_url)

    async def start(self) -> EngineIdentity:
        """Ask the canary, with as many logprobs as the endpoint allows.

        The identity carries no fingerprint: a hosted model's numbers change from call to call, and a cache keyed by
        them would never hit. Raises ConfigurationError where the endpoint gives no logprobs.
        """
        canary = Prompt((Segment(CANARY_TEXT),), name="canary")
        for top in _TOP_CHOICES:
            self._top = top
            try:
                await self._ask(canary)
                break
            except ConfigurationError:
                raise self._no_logprobs() from None
            except RequestRejected as error:
                if error.status not in (400, 422):
                    raise
                if top == _TOP_CHOICES[-1]:
                    raise self._no_logprobs(str(error)) from None
        if self._top < _TOP_CHOICES[0]:
            log.warning("%s lists only the top %d logprobs; labels may be missing", self._http.base_url, self._top)
        return await self.connect()

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """None: the endpoint is asked in text."""
        return None

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """None: the endpoint is asked in text."""
        return None

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """None: the endpoint is asked in text."""
        return None

    async def score(
        self, prompts: Sequence[Prompt], labels: LabelTokens, *, on_answer: OnAnswer | None = None
    ) -> EngineAnswer:
        """See Engine.score. One request a prompt."""
        parts = await all_or_cancel(
            self._score_one(position, prompt, labels, on_answer) for position, prompt in enumerate(prompts)
        )
        return EngineAnswer(
            [part.logprobs[0] for part in parts],
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            requests=len(parts),
            retries=sum(part.retries for part in parts),
        )

    async def generate(self, request: TextRequest) -> Generation:
        """See TextEngine.generate."""
        return await self._text.generate(request)

    def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream."""
        return self._text.stream(request)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed."""
        return await self._text.embed(texts)

    async def models(self) -> list[str]:
        """See TextEngine.models."""
        return await self._text.models()

    @property
    def telemetry(self) -> list[RequestTelemetry]:
        """What was counted about the requests to the server."""
        return [self._http.telemetry]

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """None: hosted APIs do not show it."""
        return None

    async def kv_cache_tokens(self) -> int | None:
        """None: hosted APIs do not show it."""
        return None

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        await self._http.aclose()

    async def _score_one(
        self, position: int, prompt: Prompt, labels: LabelTokens, on_answer: OnAnswer | None
    ) -> EngineAnswer:
        answers, retries = await self._ask(prompt)
        logprobs = self._labels_of(answers.top[0], labels, prompt.name)
        answer = EngineAnswer([logprobs], answers.prompt_tokens, requests=1, retries=retries)
        if on_answer is not None:
            on_answer([position], answer)
        return answer

    def _labels_of(self, top: Mapping[str, float], labels: LabelTokens, name: str) -> LabelLogprobs:
        return label_logprobs(_by_plain_text(top), labels.true, labels.false, missing=self._missing, name=name)

    async def _ask(self, prompt: Prompt) -> tuple[Answers, int]:
        fields = {"model": self._model, "max_tokens": 1, "temperature": 0, "logprobs": self._top}
        characters = sum(len(segment.text) for segment in prompt.segments)

        async def attempt() -> Answers:
            reservation = await self._limiter.acquire(math.ceil(characters * self._tokens / self._characters) + 1)
            try:
                # The body is made in the slot: thousands of prompts may wait for a minute's tokens.
                answer = await self._http.send("POST", "/completions", text_body(fields, prompt))
            except ServerUnreachable:
                reservation.refund()
                raise
            except RateLimited as error:
                self._limiter.slow_down(_SLOW_DOWN if error.retry_after is None else error.retry_after)
                raise
            answers = read_answers(answer, [prompt])
            if answers.prompt_tokens:
                reservation.settle(answers.prompt_tokens + 1)
                self._tokens += answers.prompt_tokens
                self._characters += characters
            return answers

        return await self._http.call(attempt)

    def _no_logprobs(self, said: str = "") -> APIError:
        return ConfigurationError(
            f"{self._model!r} at {self._http.base_url} gives no logprobs for completions"
            + (f" ({said})." if said else "."),
            hint="Use a base model behind /v1/completions with logprobs, such as a vLLM server.",
        )


def _by_plain_text(top: Mapping[str, float]) -> dict[str, float]:
    """Listed tokens by their text; of two spellings of one text the more probable."""
    plain: dict[str, float] = {}
    for token, logprob in top.items():
        text = " " + token[1:] if token.startswith(_SPACE_MARKS) else token
        plain[text] = max(logprob, plain.get(text, -math.inf))
    return plain
