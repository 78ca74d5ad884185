"""A client of a self-hosted vLLM server: whole pools of token ids, exact label log-probabilities, no rate limit.

Facts about vLLM that this file relies on, checked with 0.26 and 0.32: /v1/completions takes at most 1,024 prompts of
token ids and keeps their order; one bad prompt fails the whole request; `logprob_token_ids` returns the logprobs of
just those tokens, whatever their rank; closing the connection aborts every prompt of the request. A server started by
our launcher also takes a pool as a tree of segments (icm_vllm), which start() finds out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import orjson
from pydantic import SecretStr

from core.llm_api.completions import (
    TOP_LOGPROBS,
    Answers,
    label_logprobs,
    read_answers,
    read_tree_answer,
    token_body,
    token_key,
    token_pieces,
    vllm_fields,
)
from core.llm_api.errors import (
    APIError,
    ConfigurationError,
    MissingLabel,
    RequestRejected,
    ServerChanged,
    TransientError,
)
from core.llm_api.generation import Embeddings, Generation, Piece, TextRequest
from core.llm_api.http_text import HttpText
from core.llm_api.pool_tree import tree_of
from core.llm_api.retry import RetryPolicy
from core.llm_api.telemetry import RequestTelemetry
from core.llm_api.tokens import CANARY_TEXT, fingerprint
from core.llm_api.transport import HttpOptions, HttpTransport, Pieces, all_or_cancel, all_or_settle
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    LabelLogprobs,
    LabelTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Segment,
    other_type,
    sum_known,
)
from core.llm_api.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
from core.settings import MissingLabelPolicy
from icm_vllm.prompt_tree import FORMAT, MAX_PROMPTS_PER_REQUEST, PATH

log = logging.getLogger(__name__)

CANARY: Final = {"prompt": CANARY_TEXT, "add_special_tokens": True}
START_HINT: Final = "Start one with: scripts/launch_vllm_server.sh local"
ALIVE: Final = "/health"
TREES_AGAIN: Final = 60.0
"""Seconds until a server that lost our extension, or could not say whether it has it, is asked about it again."""
BACK_HINT: Final = "Start that one again, then go on; or use another --run."
SAME_WEIGHTS: Final = 0.25
"""Nats by which the canary's log-probabilities may differ between two askings of one server, among other requests.
Measured differences that kernels make are below 0.1 nat; other weights differ by more in some of the first tokens."""


class VLLMClient:
    """An Engine over HTTP. `base_url` without /v1; `model` as the server names it; `revision` as the user states it.

    prompts_per_request: None sends a pool as one request (or as few as vLLM's limit allows). use_extension: whether to
    send pools as trees to servers that take them; False sends whole prompts to every server.
    """

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
        self._text = HttpText(self._http, model)
        self._model = model
        self._revision = revision
        self._prompts_per_request = min(prompts_per_request or MAX_PROMPTS_PER_REQUEST, MAX_PROMPTS_PER_REQUEST)
        self._missing = missing_label
        self._exact: bool | None = None
        self._use_extension = use_extension
        self._takes_trees = False
        self._trees_again: float | None = None  # when to ask about it again, monotonic seconds; None: no need
        self._fast_prefixes = False
        self._kernels = ""
        self._dtype = ""
        self._top = TOP_LOGPROBS
        self._identity: EngineIdentity | None = None
        self._canary: dict[str, float] = {}
        self._canary_fields: dict[str, object] = {}
        self._known_era = -1  # the transport's era in which the server was last found to be the one of start()
        self._checking = asyncio.Lock()

    @property
    def base_url(self) -> str:
        """Where the server is, without /v1."""
        return self._http.base_url

    @property
    def exact_labels(self) -> bool:
        """Whether the server returns the labels' logprobs whatever their rank; if not, only among its top ones.

        Raises RuntimeError before start().
        """
        if self._exact is None:
            raise RuntimeError("VLLMClient was not started")
        return self._exact

    @property
    def top_logprobs(self) -> int:
        """How many alternatives of a token the server lists, of the 20 that are asked for; known after start()."""
        return self._top

    @property
    def takes_trees(self) -> bool:
        """Whether pools travel as trees of segments: the server runs our extension, and exact_labels holds."""
        return self._takes_trees and self.exact_labels

    @property
    def fast_prefixes(self) -> bool:
        """Whether the server says that it does work on shared prefixes once (icm_vllm)."""
        return self._fast_prefixes

    @property
    def bytes_sent(self) -> int:
        """Bytes of request bodies sent so far; see HttpTransport."""
        return self._http.bytes_sent

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect: GET /v1/models, and the version where the server tells it."""
        return await self._identify(await self._model_card())

    async def start(self) -> EngineIdentity:
        """Find the model, ask the canary, and see whether labels can be asked for by id."""
        card = await self._model_card()
        era = self._http.era
        identity = await self._identify(card)
        tokens = await self._tokenize_one(CANARY)
        canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
        self._exact = await self._probe_exact(canary)
        self._canary = await self._ask_canary(canary)
        if not self._exact:
            log.warning("%s does not return chosen logprobs; using its top %d", self._http.base_url, self._top)
        self._takes_trees = await self._probe_trees() and self._use_extension
        self._identity = replace(
            identity, determinism=self._kernels, dtype=self._dtype, fingerprint=fingerprint(tokens, self._canary)
        )
        self._known_era = era
        return self._identity

    async def answers(self) -> bool:
        """Whether something answers there at all, by one attempt; start() says whether it is what we need."""
        try:
            await self._http.send("GET", "/v1/models")
        except APIError:
            return False
        return True

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text, from the server's own tokenizer."""
        return await all_or_cancel(
            self._tokenize_one({"prompt": text, "add_special_tokens": special}) for text in texts
        )

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat; the server applies its model's template."""
        try:
            return await all_or_cancel(
                self._tokenize_one({"messages": [{"role": "user", "content": text}], "add_generation_prompt": True})
                for text in messages
            )
        except RequestRejected as error:
            if "chat template" not in str(error).lower():
                raise
            return None

    async def score(
        self,
        prompts: Sequence[Prompt],
        labels: LabelTokens,
        *,
        on_answer: OnAnswer | None = None,
        retry: RetryPolicy | None = None,
    ) -> EngineAnswer:
        """See Engine.score. Requests start in the prompts' order: a tree's shared prefixes are computed first.

        retry: how patient to be with each request, in place of the options' policy.
        """
        fields = vllm_fields(self._model, labels if self.exact_labels else None, top=self._top)
        size = self._prompts_per_request
        failed: list[APIError] = []

        async def part(start: int) -> EngineAnswer:
            some = prompts[start : start + size]
            try:
                return await self._score_request(start, some, labels, fields, on_answer, retry, failed)
            except APIError as error:
                failed.append(error)
                raise

        parts = await all_or_settle(part(start) for start in range(0, len(prompts), size))
        return EngineAnswer(
            [logprobs for part in parts for logprobs in part.logprobs],
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            requests=len(parts),
            retries=sum(part.retries for part in parts),
            cached_tokens=sum_known(part.cached_tokens for part in parts),
        )

    async def generate(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> Generation:
        """See TextEngine.generate. retry: in place of the options' policy."""
        return await self._text.generate(request, retry=retry)

    def stream(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream. retry: in place of the options' policy."""
        return self._text.stream(request, retry=retry)

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
        """Summed over the server's engines; None where it shows no metrics."""
        text = await self._metrics()
        return None if text is None else prefix_cache_counters(text)

    async def kv_cache_tokens(self) -> int | None:
        """See vllm_metrics.kv_cache_capacity."""
        text = await self._metrics()
        return None if text is None else kv_cache_capacity(text)

    async def kv_block_size(self) -> int | None:
        """See vllm_metrics.kv_block_size."""
        text = await self._metrics()
        return None if text is None else kv_block_size(text)

    async def aclose(self) -> None:
        """Close the connections, which aborts what is still being computed; idempotent."""
        await self._http.aclose()

    async def _score_request(
        self,
        start: int,
        prompts: Sequence[Prompt],
        labels: LabelTokens,
        fields: dict[str, object],
        on_answer: OnAnswer | None,
        retry: RetryPolicy | None,
        failed: Sequence[APIError],
    ) -> EngineAnswer:
        """One request of a batch; nothing new is sent once another one has `failed`."""
        true, false = map(token_key, labels.ids)

        async def attempt() -> tuple[list[LabelLogprobs | MissingLabel], Answers, int]:
            if failed:
                raise failed[0]
            # The body is made in the slot, so that of many waiting requests only those in flight hold (a piece of) one.
            await self._look_for_trees()
            answers = await self._ask_tree(prompts, labels) if self.takes_trees else None
            if answers is None:
                answers = read_answers(await self._post("/v1/completions", token_pieces(fields, prompts)), prompts)
            found: list[LabelLogprobs | MissingLabel] = []
            for top, prompt in zip(answers.top, prompts, strict=True):
                try:
                    found.append(label_logprobs(top, true, false, missing=self._missing, name=prompt.name))
                except MissingLabel as error:
                    found.append(error)
            return found, answers, self._http.era

        (found, answers, era), retries = await self._http.call(attempt, retry=retry)
        if era != self._known_era:
            await self._check_same(retry)
        good = [position for position, each in enumerate(found) if not isinstance(each, MissingLabel)]
        answer = EngineAnswer(
            [each for each in found if not isinstance(each, MissingLabel)],
            answers.prompt_tokens or sum(p.num_tokens for p in prompts),
            retries=retries,
            cached_tokens=answers.cached_tokens,
        )
        if on_answer is not None and good:
            on_answer([start + position for position in good], answer)
        for each in found:
            if isinstance(each, MissingLabel):  # the others of its request are paid for and kept
                raise each
        return answer

    async def _identify(self, card: dict[str, Any]) -> EngineIdentity:
        length = card.get("max_model_len")
        return EngineIdentity(
            kind="vllm",
            model=self._model,
            root=str(card.get("root") or ""),
            revision=self._revision,
            version=await self._version(),
            max_model_len=length if isinstance(length, int) else None,
        )

    async def _check_same(self, retry: RetryPolicy | None) -> None:
        """See that the server, which may have been restarted, is still the one of start().

        Answers wait for this: those of other weights or kernels must not mix with what is known. Raises ServerChanged.
        """
        known = self._identity
        assert known is not None
        async with self._checking:
            while self._known_era != self._http.era:
                try:
                    card = await self._model_card(retry)
                except ConfigurationError as error:
                    raise ServerChanged(str(error.args[0]), hint=BACK_HINT) from None
                era = self._http.era
                now = replace(known, root=str(card.get("root") or ""), version=await self._version(retry))
                tokens = await self._tokenize_one(CANARY, retry=retry)
                canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
                changed = [
                    f"{name} {getattr(now, name)!r}, not {getattr(known, name)!r}"
                    for name in ("root", "version")
                    if getattr(now, name) != getattr(known, name)
                ]
                top = await self._read(token_body(self._canary_fields, [canary]), canary, retry)
                if not _same_weights(top, self._canary):
                    changed.append("other answers to a fixed prompt")
                if known.dtype:  # the canary may be too short to show another type
                    await self._probe_trees()
                    if other_type(self._dtype, known.dtype):
                        changed.append(f"dtype {self._dtype!r}, not {known.dtype!r}")
                if changed:
                    told = ", ".join(changed)
                    raise ServerChanged(
                        f"the server at {self._http.base_url} is not the one asked at first: {told}.", hint=BACK_HINT
                    )
                self._known_era = era

    async def _version(self, retry: RetryPolicy | None = None) -> str:
        try:
            return str((await self._get_json("/version", retry)).get("version", ""))
        except RequestRejected:
            return ""  # a proxy that passes only /v1

    async def _model_card(self, retry: RetryPolicy | None = None) -> dict[str, Any]:
        listed = (await self._get_json("/v1/models", retry)).get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        for card in cards:
            if card.get("id") == self._model:
                return card
        served = ", ".join(repr(card.get("id")) for card in cards) or "no model"
        raise ConfigurationError(
            f"the server at {self._http.base_url} serves {served}, not {self._model!r}.",
            hint="Ask for what it serves, or start it with this model.",
        )

    async def _ask_canary(self, canary: Prompt) -> dict[str, float]:
        """Log-probabilities after the canary; fewer where the server was started with a lower --max-logprobs.

        Of tokens named by id where the server takes ids: to a request for top ones, vLLM (0.32) answers with the
        sampled token alone while another's pool is computed with it, and the server would seem to be another one.
        """
        attempts = [vllm_fields(self._model, None, top=top) for top in (TOP_LOGPROBS, 5, 1)]
        if self._exact:
            tokens = sorted(set(canary.token_ids))
            attempts = [
                {**vllm_fields(self._model, None, top=1), "logprob_token_ids": tokens[-count:]} for count in (5, 2)
            ]
        for fields in attempts:
            try:
                answers = await self._read(token_body(fields, [canary]), canary)
            except RequestRejected as error:
                if error.status not in (400, 422) or fields is attempts[-1]:
                    raise
            else:
                self._canary_fields = fields
                if not self._exact:
                    self._top = int(str(fields["logprobs"]))
                return answers
        raise AssertionError("unreachable")

    async def _probe_exact(self, canary: Prompt) -> bool:
        """Ask for two arbitrary tokens by id. A server that ignores the field lists one token, else both are there."""
        a, b = sorted(set(canary.token_ids))[-2:]
        body = token_body(vllm_fields(self._model, LabelTokens(true_id=a, false_id=b)), [canary])
        try:
            top = await self._read(body, canary)
            label_logprobs(top, token_key(a), token_key(b), missing="error", name="canary")
        except MissingLabel:
            return False
        except RequestRejected as error:
            if error.status in (400, 422):
                return False
            raise
        return True

    async def _probe_trees(self) -> bool:
        """Whether the server has our extension, in our format and for our model (not for a LoRA adapter of it).

        Also takes note of what else the extension says of the server.
        """
        self._trees_again = None
        try:
            said = _json_object(await self._http.send("GET", PATH), PATH)  # once: to do without it costs only time
        except RequestRejected:
            return False
        except APIError:
            self._trees_again = time.monotonic() + TREES_AGAIN
            return False
        self._fast_prefixes = said.get("fast_prefixes") is True
        self._kernels = str(said.get("kernels", ""))
        self._dtype = str(said.get("dtype", ""))
        models = said.get("models")
        return said.get("format") == FORMAT and isinstance(models, list) and self._model in models

    async def _look_for_trees(self) -> None:
        """Whether the extension that was lost is back."""
        if self._trees_again is not None and time.monotonic() >= self._trees_again:
            self._trees_again = time.monotonic() + TREES_AGAIN  # others need not ask meanwhile
            again = self._trees_again
            self._takes_trees = await self._probe_trees() and self._use_extension
            if self._takes_trees:
                log.warning("%s takes pools as trees again", self._http.base_url)
            else:
                self._trees_again = again

    async def _ask_tree(self, prompts: Sequence[Prompt], labels: LabelTokens) -> Answers | None:
        """None where the server has lost its extension, which a restart by other means can do."""
        body = orjson.dumps({"labels": labels.ids, "tree": tree_of(prompts)})
        try:
            return read_tree_answer(await self._post(PATH, body), labels, prompts)
        except RequestRejected as error:
            if error.status not in (404, 405):
                raise
        log.warning("%s no longer takes pools as trees; sending whole prompts", self._http.base_url)
        self._takes_trees = False
        self._trees_again = time.monotonic() + TREES_AGAIN
        return None

    async def _read(self, body: bytes, prompt: Prompt, retry: RetryPolicy | None = None) -> dict[str, float]:
        async def attempt() -> dict[str, float]:
            return read_answers(await self._post("/v1/completions", body), [prompt]).top[0]

        return (await self._http.call(attempt, retry=retry))[0]

    async def _tokenize_one(self, text: Mapping[str, Any], *, retry: RetryPolicy | None = None) -> list[int]:
        body = orjson.dumps({"model": self._model, **text})

        async def attempt() -> list[int]:
            tokens = _json_object(await self._post("/tokenize", body), "/tokenize").get("tokens")
            if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
                raise TransientError("/tokenize did not answer with token ids.")
            return tokens

        return (await self._http.call(attempt, retry=retry))[0]

    async def _metrics(self) -> str | None:
        try:
            return (await self._http.call(lambda: self._http.send("GET", "/metrics")))[0].decode(errors="replace")
        except RequestRejected:
            return None

    async def _get_json(self, path: str, retry: RetryPolicy | None = None) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            return _json_object(await self._http.send("GET", path), path)

        return (await self._http.call(attempt, retry=retry))[0]

    async def _post(self, path: str, body: bytes | Pieces) -> bytes:
        return await self._http.send("POST", path, body)


def _same_weights(top: Mapping[str, float], known: Mapping[str, float]) -> bool:
    """Whether two askings of the canary agree on its most probable tokens; the tail of the list may change places."""
    first = sorted(known, key=lambda token: -known[token])[:5]
    lowest = min(top.values(), default=0.0)
    return all(abs(top.get(token, lowest) - known[token]) <= SAME_WEIGHTS for token in first)


def _json_object(body: bytes, path: str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise _not_vllm(path)
    return parsed


def _not_vllm(path: str) -> APIError:
    return TransientError(f"{path} did not answer with a JSON object.", hint="Is this a vLLM server?")
