"""Any OpenAI-compatible /v1/completions, asked in text, one prompt a request, under the endpoint's rate limits.

Listed tokens are matched by their exact text, space included. Accepting `True` where ` True` is not listed would be
wrong: it is another token, whose probability says little about the one that the demonstrations use. Only the marks
that SentencePiece and byte-level BPE write for a leading space are read as that space.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from core.errors import (
    APIError,
    ConfigurationError,
    MissingLabel,
    RequestRejected,
)
from core.llm_api.engines.http_texts import HttpTexts
from core.llm_api.http.completions import PROMPT_END, Answers, read_answers, text_body, token_logprobs
from core.llm_api.http.llama_card import digest_of_file, llama_card
from core.llm_api.http.one_by_one import score_each
from core.llm_api.http.rate_limit import RateLimiter, Turns
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.llm_api.tokens import CANARY_TEXT
from core.llm_api.types import (
    Capabilities,
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Query,
    Segment,
    sum_known,
)
from core.settings import MissingLabelPolicy, Settings

if TYPE_CHECKING:
    from core.llm_api.text.http_text import HttpText

log = logging.getLogger(__name__)

_SPACE_MARKS: Final = ("\u2581", "\u0120")  # SentencePiece's and byte-level BPE's leading space
_TOP_CHOICES: Final = (20, 5)
_LEAST: Final = 2
"""Fewer listed tokens could never score a prompt: there are at least two labels."""
_LLAMA_TOPS: Final = (200, 2**20)
"""For a llama-server: enough for nearly every prompt, then more than any vocabulary, where a label was not listed."""
_LLAMA_FIELDS: Final = {"post_sampling_probs": False, "n_cache_reuse": 0}
"""Whatever the server's options: the model's own probabilities, with no cached keys moved to other positions."""
_MODELS_TIMEOUT: Final = 10.0
"""Seconds."""
_ONE_TOKEN: Final = f"{PROMPT_END} Where a model is asked in text, each label must be one of its tokens."
_FIT_HINT: Final = (
    "Use a base model behind /v1/completions with logprobs, such as vLLM or llama-server (docs/servers.md)."
)


class ExternalAPI(HttpTexts):
    """An Engine over a hosted API. `api_base` is what /completions is appended to, usually ending in /v1.

    check_continuation: refuse an endpoint that does not go on with the text that it is sent (continuation.py).
    """

    capabilities: Final = Capabilities(billed=True, checkable=False)

    def __init__(
        self,
        api_base: str,
        model: str,
        *,
        api_key: SecretStr | None = None,
        limiter: RateLimiter | None = None,
        missing_label: MissingLabelPolicy = "error",
        check_continuation: bool = True,
        options: HttpOptions | None = None,
    ) -> None:
        self._http = HttpTransport(
            api_base, key=api_key, key_name="API_KEY", options=options or HttpOptions(), absent="Check LLAMA_API_BASE."
        )
        self._model = model
        self._limiter = limiter or RateLimiter()
        self._missing = missing_label
        self._check_continuation = check_continuation
        self._tops: tuple[int, ...] = (_TOP_CHOICES[0],)  # alternatives to ask for, the next where a label is missing
        self._fingerprint = ""
        self._more_fields: Mapping[str, object] = {}
        # Tokens and characters of the prompts answered so far, starting from a usual ratio for English text.
        self._tokens, self._characters = 1, 4

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect. Asks nothing: not every hosted API lists its models."""
        return EngineIdentity(
            kind="openai-compatible", model=self._model, root=self._http.base_url, fingerprint=self._fingerprint
        )

    async def start(self) -> EngineIdentity:
        """Ask the canary, with as many logprobs as the endpoint allows, and check that the endpoint continues texts.

        The identity of a hosted model carries no fingerprint: its numbers change from call to call, and a cache keyed
        by them would never hit. Raises ConfigurationError, saying what was seen, where the endpoint gives no logprobs
        or too few, wraps prompts, or is a llama-server with another model.
        """
        listed = await self._find_top()
        card = await self._llama_card()
        if card is not None:
            self._tops, self._more_fields = _LLAMA_TOPS, _LLAMA_FIELDS
            self._fingerprint = digest_of_file(card)
        elif listed < _LEAST:
            raise self._unfit(
                f"lists the log-probability of {listed} token where {self._tops[0]} were asked for: "
                f"scores need at least {_LEAST}, those of all labels, and better {_TOP_CHOICES[0]}."
            )
        elif listed < _TOP_CHOICES[0]:
            log.warning(
                "%s lists only the top %d logprobs; a run stops at the first label that is not among them, unless "
                "missing_label is floor",
                self._http.base_url,
                listed,
            )
        if self._check_continuation:
            from core.llm_api.text.continuation import COUNTING, GOES_ON, wrapping_seen
            from core.llm_api.text.generation import TextRequest

            seen = wrapping_seen(await self._text.generate(TextRequest("", GOES_ON, COUNTING)))
            if seen:
                raise ConfigurationError(
                    f"{self._model!r} at {self._http.base_url} does not continue texts as they are: {seen}.",
                    hint="Prompts are probably wrapped in a chat template; use an endpoint that leaves them alone, or "
                    "set ICM_CHECK_CONTINUATION=false where you know better (docs/servers.md).",
                )
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

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        """See Engine.score and score_each."""
        return await score_each(queries, self._score_one, on_answer)

    @cached_property
    def _text(self) -> HttpText:
        from core.llm_api.text.http_text import HttpText  # not imported where nobody asks for texts

        return HttpText(self._http, self._model, prefix="", limiter=self._limiter)

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """None: hosted APIs do not show it."""
        return None

    async def kv_cache_tokens(self) -> int | None:
        """None: hosted APIs do not show it."""
        return None

    async def _score_one(self, query: Query, failed: Sequence[APIError]) -> EngineAnswer:
        asked: list[tuple[Answers, int]] = []

        async def among(top: int, missing: MissingLabelPolicy) -> EngineAnswer:
            asked.append(await self._ask(query.prompt, top, failed))
            listed = _by_plain_text(asked[-1][0].top[0])
            return EngineAnswer(
                [token_logprobs(listed, query.tokens.texts, missing=missing, name=query.prompt.name, hint=_ONE_TOKEN)],
                sum(answers.prompt_tokens for answers, _ in asked),
                requests=len(asked),
                retries=sum(retries for _, retries in asked),
                cached_tokens=sum_known(answers.cached_tokens for answers, _ in asked),
            )

        for top in self._tops[:-1]:
            with suppress(MissingLabel):
                return await among(top, "error")
        return await among(self._tops[-1], self._missing)

    async def _ask(self, prompt: Prompt, top: int, failed: Sequence[APIError] = ()) -> tuple[Answers, int]:
        """The answer to one prompt, and retries. Once another has `failed`, sends nothing and ends as cancelled."""
        fields = {"model": self._model, "max_tokens": 1, "temperature": 0, "logprobs": top, **self._more_fields}
        characters = sum(len(segment.text) for segment in prompt.segments)
        turns = Turns(self._limiter, lambda: math.ceil(characters * self._tokens / self._characters) + 1)

        @asynccontextmanager
        async def admitted() -> AsyncIterator[None]:
            async with turns.take():
                if failed:
                    turns.refund()
                    raise asyncio.CancelledError
                yield

        async def attempt() -> Answers:
            # The body is made only now: thousands of prompts may be waiting for the rate limit.
            answers = read_answers(await self._http.send("POST", "/completions", text_body(fields, prompt)), [prompt])
            if answers.prompt_tokens:
                turns.settle(answers.prompt_tokens + 1)
                self._tokens += answers.prompt_tokens
                self._characters += characters
            return answers

        return await self._http.call(attempt, admitted=admitted)

    async def _find_top(self) -> int:
        """Ask the canary for fewer and fewer alternatives until it is answered: how many the answer lists."""
        canary = Prompt((Segment(CANARY_TEXT),), name="canary")
        refused = ""
        for top in _TOP_CHOICES:
            self._tops = (top,)
            try:
                answers, _ = await self._ask(canary, top)
                return len(answers.top[0])
            except ConfigurationError:
                raise self._unfit("gives no logprobs for completions.") from None
            except RequestRejected as error:
                if error.status in (404, 405):
                    raise RequestRejected(
                        error.args[0],
                        status=error.status,
                        hint="Check the model's name, and LLAMA_API_BASE: /completions is appended to it, so that it "
                        "usually ends in /v1.",
                    ) from None
                if error.status not in (400, 422):
                    raise
                refused = error.args[0]
        raise self._unfit(f"gives no logprobs for completions, or fewer than {_TOP_CHOICES[-1]}: {refused}")

    async def _llama_card(self) -> dict[str, Any] | None:
        """See llama_card; None also where the endpoint does not list its models."""
        try:
            async with asyncio.timeout(_MODELS_TIMEOUT):
                return await llama_card(self._http, "/models", self._model)
        except ConfigurationError:
            raise
        except (APIError, TimeoutError):
            return None

    def _unfit(self, lacks: str) -> APIError:
        return ConfigurationError(f"{self._model!r} at {self._http.base_url} {lacks}", hint=_FIT_HINT)


def open_engine(settings: Settings, model: str, _: object) -> ExternalAPI:
    """The endpoint at LLAMA_API_BASE, under the user's rate limits. Raises ConfigurationError where it is not set."""
    if settings.llama_api_base is None:
        raise ConfigurationError("vLLM is ruled out and LLAMA_API_BASE is not set.", hint="Set it, or allow vLLM.")
    return ExternalAPI(
        settings.llama_api_base,
        model,
        api_key=settings.api_key,
        limiter=RateLimiter(settings.requests_per_minute, settings.tokens_per_minute),
        missing_label=settings.missing_label,
        check_continuation=settings.check_continuation,
        options=HttpOptions.of(settings),
    )


def _by_plain_text(top: Mapping[str, float]) -> dict[str, float]:
    """Listed tokens by their text; of two spellings of one text the more probable."""
    plain: dict[str, float] = {}
    for token, logprob in top.items():
        text = " " + token[1:] if token.startswith(_SPACE_MARKS) else token
        plain[text] = max(logprob, plain.get(text, -math.inf))
    return plain
