"""A client of a self-hosted vLLM server: whole pools of token ids, exact label log-probabilities, no rate limit.

Facts about vLLM that this file relies on, checked with 0.26 and 0.32: /v1/completions takes at most 1,024 prompts of
token ids and keeps their order; one bad prompt fails the whole request; `logprob_token_ids` returns the logprobs of
just those tokens, whatever their rank; closing the connection aborts every prompt of the request. A server started by
our launcher also takes a pool as a tree of segments (core/vllm_extension), which start() finds out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
    vllm_fields,
)
from core.llm_api.errors import APIError, ConfigurationError, MissingLabel, RequestRejected, TransientError
from core.llm_api.prompt_tree import FORMAT, PATH, PromptTree
from core.llm_api.retry import RetryPolicy
from core.llm_api.tokens import CANARY_TEXT, fingerprint
from core.llm_api.transport import HttpOptions, HttpTransport, all_or_cancel
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    LabelTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Segment,
    sum_known,
)
from core.llm_api.vllm_metrics import kv_block_size, kv_cache_capacity, prefix_cache_counters
from core.settings import MAX_PROMPTS_PER_REQUEST, MissingLabelPolicy

log = logging.getLogger(__name__)

START_HINT: Final = "Start one with: scripts/launch_vllm_server.sh local"


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
            base_url, key=api_key, key_name="VLLM_API_KEY", options=options or HttpOptions(), absent=START_HINT
        )
        self._model = model
        self._revision = revision
        self._prompts_per_request = min(prompts_per_request or MAX_PROMPTS_PER_REQUEST, MAX_PROMPTS_PER_REQUEST)
        self._missing = missing_label
        self._exact: bool | None = None
        self._use_extension = use_extension
        self._takes_trees = False
        self._fast_prefixes = False
        self._kernels = ""
        self._top = TOP_LOGPROBS

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
    def takes_trees(self) -> bool:
        """Whether pools travel as trees of segments: the server runs our extension, and exact_labels holds."""
        return self._takes_trees and self.exact_labels

    @property
    def fast_prefixes(self) -> bool:
        """Whether the server says that it does work on shared prefixes once (core/vllm_extension)."""
        return self._fast_prefixes

    @property
    def bytes_sent(self) -> int:
        """Bytes of request bodies sent so far; see HttpTransport."""
        return self._http.bytes_sent

    async def start(self) -> EngineIdentity:
        """Find the model, ask the canary, and see whether labels can be asked for by id."""
        card = await self._model_card()
        try:
            version = str((await self._get_json("/version")).get("version", ""))
        except RequestRejected:
            version = ""  # a proxy that passes only /v1
        tokens = await self._tokenize_one({"prompt": CANARY_TEXT, "add_special_tokens": True})
        canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
        top = await self._ask_canary(canary)
        self._exact = await self._probe_exact(canary)
        if not self._exact:
            log.warning("%s does not return chosen logprobs; using its top %d", self._http.base_url, self._top)
        self._takes_trees = await self._probe_trees() and self._use_extension
        length = card.get("max_model_len")
        return EngineIdentity(
            kind="vllm",
            model=self._model,
            root=str(card.get("root") or ""),
            revision=self._revision,
            version=version,
            determinism=self._kernels,
            fingerprint=fingerprint(tokens, top),
            max_model_len=length if isinstance(length, int) else None,
        )

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
        parts = await all_or_cancel(
            self._score_request(start, prompts[start : start + size], labels, fields, on_answer, retry)
            for start in range(0, len(prompts), size)
        )
        return EngineAnswer(
            [logprobs for part in parts for logprobs in part.logprobs],
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            requests=len(parts),
            retries=sum(part.retries for part in parts),
            cached_tokens=sum_known(part.cached_tokens for part in parts),
        )

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
    ) -> EngineAnswer:
        true, false = map(token_key, labels.ids)

        async def attempt() -> EngineAnswer:
            # The body is joined in the slot, so that of many waiting requests only those in flight hold one.
            answers = await self._ask_tree(prompts, labels) if self.takes_trees else None
            if answers is None:
                answers = read_answers(await self._post("/v1/completions", token_body(fields, prompts)), prompts)
            logprobs = [
                label_logprobs(top, true, false, missing=self._missing, name=prompt.name)
                for top, prompt in zip(answers.top, prompts, strict=True)
            ]
            counted = answers.prompt_tokens or sum(p.num_tokens for p in prompts)
            return EngineAnswer(logprobs, counted, cached_tokens=answers.cached_tokens)

        answer, retries = await self._http.call(attempt, retry=retry)
        answer = replace(answer, retries=retries)
        if on_answer is not None:
            on_answer(range(start, start + len(prompts)), answer)
        return answer

    async def _model_card(self) -> dict[str, Any]:
        listed = (await self._get_json("/v1/models")).get("data")
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
        """The top logprobs after the canary; fewer where the server was started with a lower --max-logprobs."""
        for top in (TOP_LOGPROBS, 5, 1):
            body = token_body(vllm_fields(self._model, None, top=top), [canary])
            try:
                answers = await self._read(body, canary)
            except RequestRejected as error:
                if error.status != 400 or top == 1:
                    raise
            else:
                self._top = top
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
        try:
            said = _json_object(await self._http.send("GET", PATH), PATH)  # once: to do without it costs only time
        except APIError:
            return False
        self._fast_prefixes = said.get("fast_prefixes") is True
        self._kernels = str(said.get("kernels", ""))
        models = said.get("models")
        return said.get("format") == FORMAT and isinstance(models, list) and self._model in models

    async def _ask_tree(self, prompts: Sequence[Prompt], labels: LabelTokens) -> Answers | None:
        """None where the server has lost its extension, which a restart by other means can do."""
        body = orjson.dumps({"labels": labels.ids, "tree": PromptTree.of(prompts)})
        try:
            return read_tree_answer(await self._post(PATH, body), labels, prompts)
        except RequestRejected as error:
            if error.status not in (404, 405):
                raise
        log.warning("%s no longer takes pools as trees; sending whole prompts", self._http.base_url)
        self._takes_trees = False
        return None

    async def _read(self, body: bytes, prompt: Prompt) -> dict[str, float]:
        async def attempt() -> dict[str, float]:
            return read_answers(await self._post("/v1/completions", body), [prompt]).top[0]

        return (await self._http.call(attempt))[0]

    async def _tokenize_one(self, text: Mapping[str, Any]) -> list[int]:
        body = orjson.dumps({"model": self._model, **text})

        async def attempt() -> list[int]:
            tokens = _json_object(await self._post("/tokenize", body), "/tokenize").get("tokens")
            if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
                raise TransientError("/tokenize did not answer with token ids.")
            return tokens

        return (await self._http.call(attempt))[0]

    async def _metrics(self) -> str | None:
        try:
            return (await self._http.call(lambda: self._http.send("GET", "/metrics")))[0].decode(errors="replace")
        except RequestRejected:
            return None

    async def _get_json(self, path: str) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            return _json_object(await self._http.send("GET", path), path)

        return (await self._http.call(attempt))[0]

    async def _post(self, path: str, body: bytes) -> bytes:
        return await self._http.send("POST", path, body)


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
