"""ModelAPI: one call scores a whole pool. Every query goes to the cache, to an equal query in flight, to the engine.

async with open_model_api(settings, model="meta-llama/Llama-3.1-8B") as api:
    labels = await api.spell_labels()
    scores = await api.score(prompts, labels)
    answer = await api.chat([Message("user", "Name a river.")])

Texts, chats and embeddings (docs/generation.md) go straight to the engine: they are not cached.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from core.errors import ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.answer_store import AnswerStore
from core.llm_api.engines import open_engine
from core.llm_api.labels import TRUE_FALSE, LabelSpace, SpelledLabels
from core.llm_api.response_cache import ResponseCache, cache_keys, can_be_made, earlier_keys
from core.llm_api.telemetry import HasTelemetry, RequestTelemetry, TextTelemetry
from core.llm_api.tokens import QUESTION, spell_labels
from core.llm_api.types import (
    Capabilities,
    Engine,
    EngineAnswer,
    EngineIdentity,
    NextTokens,
    PoolScores,
    PrefixCacheCounters,
    Prompt,
    Query,
    ScoreStats,
    TokenLogprobs,
    digests,
)
from core.settings import Settings

if TYPE_CHECKING:
    from core.llm_api.engines.direct import DirectOptions
    from core.llm_api.text.generation import Embeddings, Generation, Message, SamplingOptions, StreamEvent
    from core.llm_api.text.writer import TextWriter


class ModelAPI:
    """An engine behind a cache. Queries are never sent twice at once, and finished answers outlive a failure.

    cache: where a path is given, the file is made once the engine has answered, so that a start that fails leaves none.
    accept_floored: whether cached answers that lacked a token and were floored count (see missing_label). scores: False
    only connects: nothing is asked of the model at start, and `score` raises. For engines without logprobs.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        cache: ResponseCache | Path | None = None,
        accept_floored: bool = False,
        scores: bool = True,
    ) -> None:
        self.stats = ScoreStats()
        self.texts = TextTelemetry()
        self._engine = engine
        self._answers = AnswerStore(cache) if isinstance(cache, ResponseCache) else None
        self._cache_to_make = cache if isinstance(cache, Path) else None
        self._accept_floored = accept_floored
        self._scores = scores
        self._identity: EngineIdentity | None = None
        self._exclusive = True
        # A future is set to None where its owner failed or was cancelled: those who wait for it then ask themselves.
        self._in_flight: dict[bytes, asyncio.Future[TokenLogprobs | None]] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> EngineIdentity:
        """Connect and check the model. Raises an APIError that says what to do, and closes everything.

        Raises ConfigurationError for a server without the routes that are needed (404).
        """
        try:
            self._identity = await (self._engine.start() if self._scores else self._writer.engine.connect())
            if self._cache_to_make is not None:
                self._answers, self._cache_to_make = AnswerStore(ResponseCache(self._cache_to_make)), None
        except RequestRejected as error:
            await self.aclose()
            if error.status != 404:  # a refused key, for example, can be set, and the same command works
                raise
            raise ConfigurationError(*error.args, hint=error.hint) from error
        except BaseException:
            await self.aclose()
            raise
        return self._identity

    async def aclose(self) -> None:
        """Close the engine and the cache; idempotent."""
        try:
            await self._engine.aclose()
        finally:
            if self._answers is not None:
                await self._answers.aclose()

    def share(self, *, exclusive: bool = True) -> ModelAPI:
        """The same engine, cache and queries in flight, with separate counts. Close only the one that was opened.

        exclusive: nobody else asks meanwhile, so that the engine's counters show what these queries cost. What is
        shared by several stays so in what is shared from it.
        """
        sharing = copy(self)
        sharing.stats = ScoreStats()
        sharing._exclusive = exclusive and self._exclusive
        return sharing

    @property
    def capabilities(self) -> Capabilities:
        """What sets this engine apart from others."""
        return self._engine.capabilities

    @property
    def identity(self) -> EngineIdentity:
        """The engine's identity. Raises RuntimeError before start()."""
        if self._identity is None:
            raise RuntimeError("ModelAPI was not started; use `async with`")
        return self._identity

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """Token ids of each text; None where the engine is asked in text."""
        return await self._engine.tokenize(texts, special=special)

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """See Engine.detokenize."""
        return await self._engine.detokenize(tokens)

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat."""
        return await self._engine.tokenize_chat(messages)

    async def spell_labels(self, space: LabelSpace = TRUE_FALSE, *, after: str = QUESTION) -> SpelledLabels:
        """The labels in tokens of this model, as they follow a text. See tokens.spell_labels."""
        return await spell_labels(self._engine, space, after=after)

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """The engine's prefix-cache counters since it started; None where it has none, or others ask it, too."""
        return await self._engine.prefix_cache() if self._exclusive else None

    async def kv_cache_tokens(self) -> int | None:
        """How many tokens the engine's KV cache holds; None where it does not say."""
        return await self._engine.kv_cache_tokens()

    async def are_cached(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> bool:
        """Whether `score` would send nothing to the engine for these prompts."""
        queries = labels.queries(prompts)
        wanted = dict(zip(self._keys(queries), queries, strict=True))
        return len(await self._cached(wanted)) == len(wanted)

    async def score(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> PoolScores:
        """Log-probabilities of all labels after every prompt, in order.

        PoolScores.prompt_tokens counts the tokens that this call sent to the engine; cached answers cost none. Raises
        an APIError if any prompt fails; what was answered before that is in the cache.
        """
        answers, prompt_tokens = await self._answers_to(labels.queries(prompts))
        return PoolScores(labels.logprobs(answers), prompt_tokens)

    async def complete(self, prompts: Sequence[str], options: SamplingOptions | None = None) -> list[Generation]:
        """See TextWriter.complete."""
        return await self._writer.complete(prompts, options)

    async def chat(self, messages: Sequence[Message], options: SamplingOptions | None = None) -> Generation:
        """See TextWriter.chat."""
        return await self._writer.chat(messages, options)

    def stream_complete(self, prompt: str, options: SamplingOptions | None = None) -> AsyncGenerator[StreamEvent, None]:
        """See TextWriter.stream_complete."""
        return self._writer.stream_complete(prompt, options)

    def stream_chat(
        self, messages: Sequence[Message], options: SamplingOptions | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """See TextWriter.stream_chat."""
        return self._writer.stream_chat(messages, options)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextWriter.embed."""
        return await self._writer.embed(texts)

    async def models(self) -> list[str]:
        """See TextWriter.models."""
        return await self._writer.models()

    async def ready(self) -> float:
        """See TextWriter.ready."""
        return await self._writer.ready()

    @property
    def requests(self) -> Sequence[RequestTelemetry]:
        """What was counted about the requests to each server."""
        return self._engine.telemetry if isinstance(self._engine, HasTelemetry) else ()

    @property
    def _writer(self) -> TextWriter:
        from core.llm_api.text.writer import TextWriter  # not imported where nobody asks for texts

        return TextWriter(self._engine, self.texts, lambda: self.identity.model)

    async def _answers_to(self, queries: Sequence[Query]) -> tuple[list[TokenLogprobs], int]:
        """The answer to each query, in order, and the prompt tokens that were sent for them."""
        if not self._scores:
            raise ConfigurationError("this ModelAPI was opened only for texts.", hint="Open it with scores=True.")
        self._check_lengths(queries)
        keys = self._keys(queries)
        wanted = dict(zip(keys, queries, strict=True))  # of equal queries the first keeps its place
        self.stats.asked += len(queries)
        self.stats.in_flight_hits += len(queries) - len(wanted)
        answers = await self._cached(wanted)
        self.stats.cache_hits += len(answers)
        prompt_tokens = 0
        while missing := [key for key in wanted if key not in answers]:
            awaited = {key: self._in_flight[key] for key in missing if key in self._in_flight}
            unasked = {key: wanted[key] for key in missing if key not in awaited}
            if unasked:
                fresh, tokens = await self._ask(unasked)
                answers.update(fresh)
                prompt_tokens += tokens
            if awaited:
                # asyncio.wait, because awaiting a future directly would cancel it for its owner when we are cancelled.
                await asyncio.wait(awaited.values())
                theirs = {key: answer for key, future in awaited.items() if (answer := future.result()) is not None}
                self.stats.in_flight_hits += len(theirs)
                answers.update(theirs)
        found = [answers[key] for key in keys]
        self.stats.floored += sum(answer.floored for answer in found)
        return found, prompt_tokens

    def _keys(self, queries: Sequence[Query]) -> list[bytes]:
        return _keys_by(cache_keys, self.identity, queries)

    async def _ask(self, unasked: dict[bytes, Query]) -> tuple[dict[bytes, TokenLogprobs], int]:
        """Send queries that nobody else has in flight: (answers, prompt tokens)."""
        keys = list(unasked)
        loop = asyncio.get_running_loop()
        futures: dict[bytes, asyncio.Future[TokenLogprobs | None]] = {key: loop.create_future() for key in keys}
        self._in_flight.update(futures)
        answers: dict[bytes, TokenLogprobs] = {}

        def settle(positions: Sequence[int], answer: EngineAnswer) -> None:
            part = {keys[at]: logprobs for at, logprobs in zip(positions, answer.logprobs, strict=True)}
            self._count(answer)
            if self._answers is not None:
                self._answers.keep(part)
            answers.update(part)
            for key, logprobs in part.items():
                futures[key].set_result(logprobs)

        try:
            whole = await self._engine.score(list(unasked.values()), on_answer=settle)
        except MissingLabel:
            self.stats.label_misses += 1
            raise
        finally:
            for key, future in futures.items():
                del self._in_flight[key]
                if not future.done():
                    future.set_result(None)
        if self._answers is not None:
            await self._answers.stored()
        return answers, whole.prompt_tokens

    async def _cached(self, wanted: Mapping[bytes, Query]) -> dict[bytes, TokenLogprobs]:
        store = self._answers
        if store is None:
            return {}
        found = await store.get_many(list(wanted))
        if store.has_earlier and self.identity.fingerprint and len(found) < len(wanted):
            missing = [key for key in wanted if key not in found]
            keys = _keys_by(earlier_keys, self.identity, [wanted[key] for key in missing])
            earlier = await store.get_many(keys)
            moved = {new: earlier[old] for new, old in zip(missing, keys, strict=True) if old in earlier}
            if moved:
                store.keep(moved)
                found |= moved
        self.stats.damaged_rows = store.damaged
        return {key: answer for key, answer in found.items() if self._accept_floored or not answer.floored}

    def _count(self, answer: EngineAnswer) -> None:
        self.stats.engine_prompts += len(answer.logprobs)
        self.stats.prompt_tokens += answer.prompt_tokens
        if answer.cached_tokens is None:
            self.stats.untold_tokens += answer.prompt_tokens
        else:
            self.stats.cached_tokens += answer.cached_tokens
        self.stats.requests += answer.requests
        self.stats.retries += answer.retries

    def _check_lengths(self, queries: Sequence[Query]) -> None:
        """One prompt that is too long would fail its whole request, with a message that does not name it."""
        limit = self.identity.max_model_len
        if limit is None:
            return
        for query in queries:
            prompt = query.prompt
            if prompt.num_tokens >= limit:  # the answer needs one token
                raise ConfigurationError(
                    f"prompt {prompt.name!r} has {prompt.num_tokens} tokens; {self.identity.model} takes {limit - 1}.",
                    hint="Use a smaller pool, shorter claims, or a server with a larger --max-model-len.",
                )


def _keys_by(
    make: Callable[[EngineIdentity, NextTokens, Sequence[str]], list[bytes]],
    identity: EngineIdentity,
    queries: Sequence[Query],
) -> list[bytes]:
    """The key of each query, in order; those that ask for the same tokens are made together."""
    hashes = digests([query.prompt for query in queries])
    if len({id(query.tokens) for query in queries}) == 1:
        return make(identity, queries[0].tokens, hashes)
    places: dict[NextTokens, list[int]] = {}
    for place, query in enumerate(queries):
        places.setdefault(query.tokens, []).append(place)
    keys = [b""] * len(queries)
    for tokens, some in places.items():
        for place, key in zip(some, make(identity, tokens, [hashes[place] for place in some]), strict=True):
            keys[place] = key
    return keys


def open_model_api(
    settings: Settings,
    *,
    model: str,
    use_vllm: bool | None = None,
    direct: bool = False,
    direct_options: DirectOptions | None = None,
    scores: bool = True,
) -> ModelAPI:
    """The ModelAPI for these flags and settings; not yet started.

    direct: vLLM in this process. Else a vLLM server where use_vllm (the flag) says so, or if that is None USE_VLLM, or
    if neither is given where VLLM_BASE_URL is set. Else LLAMA_SERVER_URL, then LLAMA_API_BASE. scores: see ModelAPI.
    Raises ConfigurationError where nothing is set.
    """
    if direct and use_vllm is False:
        raise ConfigurationError("vLLM in this process was asked for and vLLM was ruled out.", hint="Drop one flag.")
    name = "direct" if direct else _engine_of(settings, use_vllm)
    engine = open_engine(name, settings, model, direct_options if direct else None)
    path = settings.cache_path
    # One that is there, or that cannot be made, is opened now: what is wrong with it is told before a model loads.
    cache = path if path is None or can_be_made(path) else ResponseCache(path)
    return ModelAPI(engine, cache=cache, accept_floored=settings.missing_label == "floor", scores=scores)


def _engine_of(settings: Settings, use_vllm: bool | None) -> str:
    """The name of the engine outside of this process that flag and settings ask for."""
    chosen = use_vllm if use_vllm is not None else settings.use_vllm
    if chosen or (chosen is None and settings.vllm_configured):
        return "vllm"
    if settings.llama_server_url is not None:
        return "llama_server"
    if chosen is None and settings.llama_api_base is None:
        raise ConfigurationError(
            "no model server is configured.",
            hint="Set VLLM_BASE_URL (your own vLLM server), LLAMA_SERVER_URL (llama.cpp's) or LLAMA_API_BASE (an "
            "OpenAI-compatible API), in the environment or in SECRETS.",
        )
    return "external"
