"""Raw questions to an engine, with control over what they share: log-probabilities and text, by HTTP or in process.

`salt` names a separate prefix cache (vLLM's cache_salt): prompts asked with a new salt find nothing cached, prompts
asked with the same salt find what was computed under it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.llm_api.engines.direct import DirectEngine
from core.llm_api.http.completions import TOP_LOGPROBS, read_answers, read_generated, token_body, vllm_fields
from core.llm_api.http.gather import all_or_cancel
from core.llm_api.http.identity_check import Counting
from core.llm_api.http.transport import HttpTransport
from core.llm_api.http.vllm_metrics import prefix_cache_counters
from core.llm_api.types import PrefixCacheCounters, Prompt, Segment

Tokens = tuple[int, ...]
Listed = dict[int, float]
"""Log-probabilities after one prompt, nats, by token id."""


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts that are sent as one list, under one salt."""

    prompts: tuple[Tokens, ...]
    salt: str


@dataclass(frozen=True, slots=True)
class Generated:
    """Tokens that a model went on with after one prompt, and the log-probability of each, nats."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text is generated. temperature 0 is greedy; every prompt is sampled with the same seed."""

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None


class Asker(Protocol):
    """An engine that can be asked: by HTTP or in this process."""

    async def listed(
        self, requests: Sequence[Request], chosen: Sequence[int] | None, *, at_once: int
    ) -> list[list[Listed]]:
        """Logprobs of `chosen` tokens, or of the 20 most probable ones, after every prompt of every request.

        at_once: how many requests may be in flight together.
        """
        ...

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generated]]:
        """Text after every prompt of every request, all requests in flight together."""
        ...

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """The engine's prefix-cache counters; None where it has none to show."""
        ...


class HttpAsker:
    """Asks a vLLM server by /v1/completions. Does not close `http`. counting: how a gateway before it counts tokens."""

    def __init__(self, http: HttpTransport, model: str, counting: Counting | None = None) -> None:
        self._counting = counting or Counting()
        self._http = http
        self._model = model

    async def listed(
        self, requests: Sequence[Request], chosen: Sequence[int] | None, *, at_once: int
    ) -> list[list[Listed]]:
        """See Asker.listed."""
        fields = vllm_fields(self._model, None)
        if chosen is not None:
            fields |= {"logprobs": 1, "logprob_token_ids": list(chosen)}
        slots = asyncio.Semaphore(at_once)

        async def ask(request: Request) -> list[Listed]:
            prompts = _prompts(request)
            body = token_body({**fields, "cache_salt": request.salt}, prompts)

            async def attempt() -> list[Listed]:
                answer = await self._http.send("POST", "/v1/completions", body)
                top = read_answers(answer, prompts, extra=self._counting.beyond(len(prompts))).top
                return [{_token_id(name): value for name, value in listed.items()} for listed in top]

            async with slots:
                return (await self._http.call(attempt))[0]

        return await all_or_cancel(ask(request) for request in requests)

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generated]]:
        """See Asker.generate."""
        fields: dict[str, object] = {
            "model": self._model,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "logprobs": 1,
            "return_tokens_as_token_ids": True,
            "ignore_eos": True,
        }
        if sampling.seed is not None:
            fields["seed"] = sampling.seed

        async def ask(request: Request) -> list[Generated]:
            body = token_body({**fields, "cache_salt": request.salt}, _prompts(request))

            async def attempt() -> list[Generated]:
                answer = await self._http.send("POST", "/v1/completions", body)
                return [
                    Generated(tuple(map(_token_id, names)), tuple(logprobs))
                    for names, logprobs in read_generated(answer, len(request.prompts))
                ]

            return (await self._http.call(attempt))[0]

        return await all_or_cancel(ask(request) for request in requests)

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """From /metrics."""
        text, _ = await self._http.call(lambda: self._http.send("GET", "/metrics"))
        return prefix_cache_counters(text.decode(errors="replace"))


class DirectAsker:
    """Asks vLLM in this process. Requests in flight together become one call, beside which nothing else runs."""

    def __init__(self, engine: DirectEngine) -> None:
        self._engine = engine

    async def listed(
        self, requests: Sequence[Request], chosen: Sequence[int] | None, *, at_once: int
    ) -> list[list[Listed]]:
        """See Asker.listed."""
        answers: list[list[Listed]] = []
        for start in range(0, len(requests), at_once):
            together = requests[start : start + at_once]
            flat = [(prompt, request.salt) for request in together for prompt in request.prompts]
            tops = iter(await self._engine.listed_logprobs(flat, chosen, top=TOP_LOGPROBS))
            answers += [[next(tops) for _ in request.prompts] for request in together]
        return answers

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generated]]:
        """See Asker.generate."""
        flat = [(prompt, request.salt) for request in requests for prompt in request.prompts]
        written = iter(
            await self._engine.continuations(
                flat, max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed
            )
        )
        return [[Generated(*next(written)) for _ in request.prompts] for request in requests]

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """From vLLM's own metrics."""
        return await self._engine.prefix_cache()


def _prompts(request: Request) -> list[Prompt]:
    return [Prompt((Segment("", tokens),), name=f"prompt {at}") for at, tokens in enumerate(request.prompts)]


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))
