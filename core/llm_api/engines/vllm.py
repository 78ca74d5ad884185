"""A client of a self-hosted vLLM server: whole pools of token ids, exact log-probabilities, no rate limit.

Facts about vLLM that this file relies on, checked with 0.26 and 0.32: /v1/completions takes at most 1,024 prompts of
token ids and keeps their order; one bad prompt fails the whole request; `logprob_token_ids` returns the logprobs of
just those tokens, whatever their rank; closing the connection aborts every prompt of the request. A server started by
our launcher also takes a pool as a tree of segments (icm_vllm), which start() finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import SecretStr

from core.errors import APIError, RequestRejected, RetriesExhausted
from core.llm_api.engines.http_texts import HttpTexts
from core.llm_api.http.completions import (
    Answers,
    found_or_missing,
    keep_the_good,
    of_an_answer,
    read_answers,
    token_key,
    token_pieces,
    vllm_fields,
)
from core.llm_api.http.gather import all_or_settle
from core.llm_api.http.halving import ask_in_halves, may_be_one_prompt
from core.llm_api.http.identity_check import Canary, Counting, IdentityCheck
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.together import by_tokens
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.llm_api.http.vllm_extension import VLLMExtension
from core.llm_api.http.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
from core.llm_api.http.vllm_questions import VLLMQuestions
from core.llm_api.tokens import fingerprint
from core.llm_api.types import (
    Capabilities,
    EngineAnswer,
    EngineIdentity,
    NextTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Query,
    TokenLogprobs,
)
from core.settings import MissingLabelPolicy
from icm_vllm.prompt_tree import MAX_PROMPTS_PER_REQUEST

log = logging.getLogger(__name__)

START_HINT: Final = "Start one with: scripts/launch_vllm_server.sh local"
ALIVE: Final = "/health"
EXACT_SINCE: Final = "vLLM 0.26 and newer list labels whatever their rank."
NO_NUMBER: Final = "It came out as -inf or NaN: check the model's dtype."
HALVES_ATTEMPTS: Final = 2
HALVES_DEADLINE: Final = 60.0  # seconds; halves of a request are retried less than the whole was


@dataclass(frozen=True, slots=True)
class _Batch:
    """Queries of one call of `score` that ask for the same tokens. failed: errors of the call's requests so far;
    nothing new is sent after the first."""

    token_ids: tuple[int, ...]
    fields: dict[str, object]
    on_answer: OnAnswer | None
    retry: RetryPolicy | None
    search: bool
    failed: list[APIError]

    def worth_a_search(self, error: APIError) -> bool:
        searched = self.search or isinstance(error, RequestRejected)
        return searched and may_be_one_prompt(error) and error not in self.failed


class VLLMClient(HttpTexts):
    """An Engine over HTTP. `base_url` without /v1; `model` as the server names it; `revision` as the user states it.

    prompts_per_request: None sends a pool as one request (or as few as vLLM's limit allows). use_extension: whether to
    send pools as trees to servers that take them; False sends whole prompts to every server.
    """

    capabilities: Final = Capabilities()

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: SecretStr | None = None,
        revision: str = "",
        prompts_per_request: int | None = None,
        use_extension: bool = True,
        missing_label: MissingLabelPolicy = "error",
        options: HttpOptions | None = None,
    ) -> None:
        self._http = HttpTransport(
            base_url,
            key=api_key,
            key_name="VLLM_API_KEY",
            options=options or HttpOptions(),
            absent=START_HINT,
            alive=ALIVE,
        )
        self._questions = VLLMQuestions(self._http, model)
        self._canary = Canary(self._questions, base_url, model)
        self._check: IdentityCheck | None = None
        self._model = model
        self._revision = revision
        self._prompts_per_request = min(prompts_per_request or MAX_PROMPTS_PER_REQUEST, MAX_PROMPTS_PER_REQUEST)
        self._body_limit: int | None = None  # bytes; larger requests of several prompts are not sent
        self._missing = missing_label
        self._retry = (options or HttpOptions()).retry
        self._extension = VLLMExtension(self._http, self._questions, model, used=use_extension)

    @property
    def base_url(self) -> str:
        """Where the server is, without /v1."""
        return self._http.base_url

    @property
    def exact_labels(self) -> bool:
        """Whether the server returns the labels' logprobs whatever their rank; if not, only among its top ones.

        Raises RuntimeError before start().
        """
        if self._check is None:
            raise RuntimeError("VLLMClient was not started")
        return self._canary.exact

    @property
    def top_logprobs(self) -> int:
        """How many alternatives of a token the server lists, of the 20 that are asked for; known after start()."""
        return self._canary.top

    @property
    def takes_trees(self) -> bool:
        """Whether pools travel as trees of segments: the server runs our extension, and exact_labels holds."""
        return self._extension.takes_trees and self.exact_labels

    @property
    def fast_prefixes(self) -> bool:
        """Whether the server says that it does work on shared prefixes once (icm_vllm)."""
        return self._extension.fast_prefixes

    @property
    def counting(self) -> Counting:
        """How the server counts prompt tokens; known after start()."""
        return self._canary.counting

    @property
    def bytes_sent(self) -> int:
        """Bytes of request bodies sent so far; see HttpTransport."""
        return self._http.bytes_sent

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect: GET /v1/models, and the version where the server states it."""
        return await self._identify(await self._questions.model_card())

    async def start(self) -> EngineIdentity:
        """Find the model, ask the canary, and see whether labels can be asked for by id."""
        card = await self._questions.model_card()
        epoch = self._http.epoch
        identity = await self._identify(card)
        canary = Canary(self._questions, self._http.base_url, self._model)
        await canary.meet()
        if not canary.exact:
            log.warning(
                "%s (vLLM %s) does not return the log-probabilities of tokens that are asked for by id; using its top "
                "%d. %s",
                self._http.base_url,
                identity.version or "of unknown version",
                canary.top,
                EXACT_SINCE,
            )
        await self._extension.probe()
        identity = replace(
            identity,
            determinism=self._extension.kernels,
            dtype=self._extension.dtype,
            config=self._extension.config,
            fingerprint=fingerprint(canary.tokens, canary.answer),
        )
        self._canary, self._check = canary, IdentityCheck(self._http, canary, identity, epoch)
        return identity

    async def answers(self) -> bool:
        """Whether anything answers at the URL, by one attempt; start() checks what it is."""
        try:
            await self._http.send("GET", "/v1/models")
        except APIError:
            return False
        return True

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text, from the server's own tokenizer."""
        return await self._questions.tokenize(texts, special=special)

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """See Engine.detokenize; None where the server, or a proxy before it, does not offer it."""
        return await self._questions.detokenize(tokens)

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat; the server applies its model's template."""
        try:
            return await self._questions.tokenize_chat(messages)
        except RequestRejected as error:
            if "chat template" not in str(error).lower():
                raise
            return None

    async def score(
        self,
        queries: Sequence[Query],
        *,
        on_answer: OnAnswer | None = None,
        retry: RetryPolicy | None = None,
        search: bool = True,
    ) -> EngineAnswer:
        """See Engine.score. Requests start in the queries' order: a tree's shared prefixes are computed first.

        retry: in place of the options' policy. search: where a request fails, look for the prompt that it fails for,
        even if this server may be at fault and not the prompt.
        """
        answers: dict[int, TokenLogprobs] = {}
        failed: list[APIError] = []

        def parts(token_ids: tuple[int, ...], positions: Sequence[int]) -> Iterator[Coroutine[Any, Any, EngineAnswer]]:
            def keep(found: Sequence[int], answer: EngineAnswer) -> None:
                found = [positions[at] for at in found]
                answers.update(zip(found, answer.logprobs, strict=True))
                if on_answer is not None:
                    on_answer(found, answer)

            fields = vllm_fields(self._model, token_ids if self.exact_labels else None, top=self.top_logprobs)
            batch = _Batch(token_ids, fields, keep, retry, search, failed)
            size = self._prompts_per_request
            for start in range(0, len(positions), size):
                yield self._score_part(batch, start, [queries[at] for at in positions[start : start + size]])

        whole = EngineAnswer.joined(
            await all_or_settle(
                part for together in by_tokens(queries) for part in parts(together.token_ids, together.positions)
            )
        )
        return replace(whole, logprobs=[answers[position] for position in range(len(queries))])

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """Summed over the server's engines; None where it shows no metrics."""
        text = await self._questions.metrics()
        return None if text is None else prefix_cache_counters(text)

    async def kv_cache_tokens(self) -> int | None:
        """See vllm_metrics.kv_cache_capacity."""
        text = await self._questions.metrics()
        return None if text is None else kv_cache_capacity(text)

    async def kv_block_size(self) -> int | None:
        """See vllm_metrics.kv_block_size."""
        text = await self._questions.metrics()
        return None if text is None else kv_block_size(text)

    async def _score_part(self, batch: _Batch, start: int, queries: Sequence[Query]) -> EngineAnswer:
        """Score as one request, or as several where a proxy before the server refuses one of that size."""
        if len(queries) == 1 or self._fits(batch, queries):
            try:
                return await self._score_or_search(batch, start, queries)
            except RequestRejected as error:
                if error.status != 413 or error in batch.failed:
                    batch.failed.append(error)
                    raise
                size = self._body_size(batch, queries)
                if len(queries) == 1:
                    batch.failed.append(_too_large(error, queries[0].prompt, size))
                    raise batch.failed[-1] from None
                self._lower_body_limit(size)
            except APIError as error:
                batch.failed.append(error)
                raise
        middle = len(queries) // 2
        halves = ((start, queries[:middle]), (start + middle, queries[middle:]))
        return EngineAnswer.joined(await all_or_settle(self._score_part(batch, *half) for half in halves))

    def _fits(self, batch: _Batch, queries: Sequence[Query]) -> bool:
        return self._body_limit is None or self._body_size(batch, queries) <= self._body_limit

    def _body_size(self, batch: _Batch, queries: Sequence[Query]) -> int:
        """Bytes of the request. A tree's has to be made to be measured."""
        prompts = _prompts(queries)
        if self._sends_trees(batch.token_ids):
            return len(self._extension.body(prompts, batch.token_ids))
        return len(token_pieces(batch.fields, prompts))

    def _sends_trees(self, token_ids: Sequence[int]) -> bool:
        return self.exact_labels and self._extension.takes(token_ids)

    def _lower_body_limit(self, refused: int) -> None:
        """Lower it for good, so that not every pool is refused once.

        Lowered by a quarter: halves of the refused request fit easily, and few further ones are refused.
        """
        limit = refused * 3 // 4
        if self._body_limit is None or limit < self._body_limit:
            log.warning(
                "%s takes no request of %s bytes (HTTP 413); pools are sent in parts of at most %s from here on",
                self._http.base_url,
                f"{refused:,}",
                f"{limit:,}",
            )
            self._body_limit = limit

    async def _score_or_search(self, batch: _Batch, start: int, queries: Sequence[Query]) -> EngineAnswer:
        """Where one prompt may be why the request fails: ask in halves, keep what is answered, and name the prompt."""
        try:
            return await self._score_request(batch, start, queries)
        except APIError as error:
            if not batch.worth_a_search(error):
                raise
            if len(queries) == 1:
                name = queries[0].prompt.name
                raise _failed(error, f"prompt {name!r}: {error.args[0]}", error.hint) from error.__cause__
            log.warning("%s: looking for a prompt that it fails for, among %d: %s", self.base_url, len(queries), error)
            whole = error
        parts: dict[int, EngineAnswer] = {}
        patience = batch.retry or self._retry
        brief = replace(
            batch,
            retry=replace(
                patience,
                max_attempts=min(HALVES_ATTEMPTS, patience.max_attempts),
                deadline=min(HALVES_DEADLINE, patience.deadline),
            ),
        )

        async def ask(begin: int, end: int) -> None:
            parts[begin] = await self._score_request(brief, start + begin, queries[begin:end])

        failed = await ask_in_halves(ask, len(queries), whole, ours=batch.worth_a_search)
        if failed:
            first = next(iter(failed.values()))
            raise self._named([queries[at].prompt.name for at in failed], first) from first.__cause__
        return EngineAnswer.joined(parts[at] for at in sorted(parts))

    def _named(self, names: list[str], error: APIError) -> APIError:
        said = str((error.__cause__ or error).args[0]).rstrip(".")
        return _failed(
            error,
            f"{self.base_url} fails for {', '.join(map(repr, names))}, also when asked alone: {said}.",
            "The others' answers are kept. Leave that claim out, or see what the server's log says of it.",
        )

    async def _score_request(self, batch: _Batch, start: int, queries: Sequence[Query]) -> EngineAnswer:
        """One request of a batch; nothing new is sent once another one has failed."""
        prompts = _prompts(queries)

        async def attempt() -> tuple[Answers, int]:
            if batch.failed:
                raise batch.failed[0]
            # Made in the slot, so that only requests in flight hold (a piece of) a body, not all that wait.
            await self._extension.look_again()
            answers = (
                await self._extension.ask(prompts, batch.token_ids) if self._sends_trees(batch.token_ids) else None
            )
            if answers is None:
                answers = await self._ask_whole(prompts, batch.fields)
            return answers, self._http.epoch

        assert self._check is not None
        (answers, epoch), retries = await self._http.call(attempt, retry=batch.retry)
        await self._check.pass_answers_of(epoch, batch.retry)
        hint = NO_NUMBER
        if not self.exact_labels:
            version = self._check.known.version or "of unknown version"
            hint = f"This server (vLLM {version}) lists only its top {self.top_logprobs}; {EXACT_SINCE}"
        answer = EngineAnswer(
            [],
            answers.prompt_tokens or sum(p.num_tokens for p in prompts),
            retries=retries,
            cached_tokens=answers.cached_tokens,
        )
        found = found_or_missing(answers.top, queries, _token_keys, missing=self._missing, hint=hint)
        return keep_the_good(found, answer, batch.on_answer, start=start)

    async def _ask_whole(self, prompts: Sequence[Prompt], fields: dict[str, object]) -> Answers:
        said = await self._http.send("POST", "/v1/completions", token_pieces(fields, prompts))
        with of_an_answer():
            return read_answers(said, prompts, extra=self._canary.counting.beyond(len(prompts)))

    async def _identify(self, card: dict[str, Any]) -> EngineIdentity:
        length = card.get("max_model_len")
        return EngineIdentity(
            kind="vllm",
            model=self._model,
            root=str(card.get("root") or ""),
            revision=self._revision,
            version=await self._questions.version(),
            max_model_len=length if isinstance(length, int) else None,
        )


def _failed(error: APIError, message: str, hint: str) -> APIError:
    """`error` with another message. Unless rejected: RetriesExhausted, after which a group asks another server."""
    if isinstance(error, RequestRejected):
        return RequestRejected(message, status=error.status, hint=hint)
    return RetriesExhausted(message, hint=hint)


def _too_large(error: RequestRejected, prompt: Prompt, size: int) -> RequestRejected:
    return RequestRejected(
        f"prompt {prompt.name!r} alone is a request of {size:,} bytes: {error.args[0]}",
        status=error.status,
        hint=f"{error.hint} Or use a smaller pool.",
    )


def _prompts(queries: Sequence[Query]) -> list[Prompt]:
    return [query.prompt for query in queries]


def _token_keys(tokens: NextTokens) -> list[str]:
    return list(map(token_key, tokens.ids))
