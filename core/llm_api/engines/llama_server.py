"""llama.cpp's llama-server by its own routes: prompts as token ids, one a request, each slot with its part of a pool.

    LLAMA_SERVER_URL=http://localhost:8080 python src/experiments/ICM.py --model my-model --testbed builtin

A slot holds the keys and values of the last prompt that it answered, and computes of the next one only what follows
their common beginning. So each slot gets the prompts of one part of [0, 1) (Prompt.place), always the same part, one
after the other in the tree's order.

Facts about llama-server that this file relies on, checked with xllamacpp 2026.10: /completion takes a prompt of token
ids and adds none to it; with post_sampling_probs false it lists the model's own log-probabilities, over the whole
vocabulary, by token id; n_probs may be as large as the vocabulary; id_slot waits for that slot where it is busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson
from pydantic import SecretStr

from core.errors import APIError, ConfigurationError, MissingLabel, ServerChanged, TransientError
from core.llm_api.engines.http_texts import HttpTexts
from core.llm_api.http.completions import checked_logprob, token_logprobs
from core.llm_api.http.gather import all_or_cancel
from core.llm_api.http.llama_card import digest_of_file, llama_card
from core.llm_api.http.one_by_one import score_each
from core.llm_api.http.server_errors import malformed_is_transient
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.llm_api.tokens import CANARY_TEXT, fingerprint
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

START_HINT: Final = "Start one with: llama-server -m MODEL.gguf --alias NAME -np 1 -c 8192 -fa off"
_LISTED: Final = (200, 2**20)
"""Alternatives to ask for: enough for nearly every prompt, then more than any vocabulary has."""
_FIELDS: Final[Mapping[str, object]] = {
    "n_predict": 1,
    "temperature": 0,
    "post_sampling_probs": False,
    "n_cache_reuse": 0,  # no cached keys moved to other positions, whatever the server was started with
}


@dataclass(frozen=True, slots=True)
class _Listed:
    """What follows one prompt: nats by token id. cached: how many of its tokens the slot held, None if unknown."""

    logprobs: dict[int, float]
    cached: int | None


class LlamaServer(HttpTexts):
    """An Engine and a TextEngine over HTTP. `base_url` without /v1; `model` as the server names it."""

    capabilities: Final = Capabilities(checkable=False)

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: SecretStr | None = None,
        revision: str = "",
        missing_label: MissingLabelPolicy = "error",
        options: HttpOptions | None = None,
    ) -> None:
        self._http = HttpTransport(
            base_url,
            key=api_key,
            key_name="API_KEY",
            options=options or HttpOptions(),
            absent=START_HINT,
            alive="/health",
        )
        self._model = model
        self._revision = revision
        self._missing = missing_label
        self._slots = [asyncio.Lock()]
        self._known: EngineIdentity | None = None  # without its fingerprint
        self._checked = 0  # the transport's epoch in which the server was last seen to be the known one
        self._checking = asyncio.Lock()

    async def connect(self) -> EngineIdentity:
        """See TextEngine.connect."""
        return await self._identify()

    async def start(self) -> EngineIdentity:
        """Find the model and how many slots there are, and ask the canary."""
        epoch = self._http.epoch
        identity = await self._identify()
        [tokens] = await self.tokenize([CANARY_TEXT], special=True)
        canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
        listed, _ = await self._ask(canary, 0, {"n_probs": 20, "cache_prompt": False})
        self._known, self._checked = identity, epoch
        named = {str(token): logprob for token, logprob in listed.logprobs.items()}
        return replace(identity, fingerprint=fingerprint(tokens, named))

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text. A text that spells a special token is not read as that token."""
        return await all_or_cancel(
            self._tokenize({"content": text, "add_special": special, "parse_special": False}) for text in texts
        )

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize."""
        return await all_or_cancel(self._string("/detokenize", {"tokens": list(ids)}, "content") for ids in tokens)

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]]:
        """See Engine.tokenize_chat. A model without a template gets llama.cpp's (ChatML)."""

        async def one(text: str) -> list[int]:
            turns = {"messages": [{"role": "user", "content": text}]}
            whole = await self._string("/apply-template", turns, "prompt")
            return await self._tokenize({"content": whole, "add_special": True, "parse_special": True})

        return await all_or_cancel(map(one, messages))

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        """See Engine.score and score_each. A slot's queries wait for each other, in their order."""
        return await score_each(queries, self._score_one, on_answer)

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """None: each answer says how many of its tokens were cached (EngineAnswer.cached_tokens)."""
        return None

    async def kv_cache_tokens(self) -> int | None:
        """None: a slot keeps one prompt, whatever its size, and a tree needs no more."""
        return None

    async def _score_one(self, query: Query, failed: Sequence[APIError]) -> EngineAnswer:
        slot = min(int(query.prompt.place * len(self._slots)), len(self._slots) - 1)
        async with self._slots[slot]:
            if failed:
                raise asyncio.CancelledError
            asked: list[tuple[_Listed, int]] = []
            with suppress(MissingLabel):
                return await self._labels(query, slot, _LISTED[0], "error", asked)
            return await self._labels(query, slot, _LISTED[1], self._missing, asked)

    async def _labels(
        self, query: Query, slot: int, top: int, missing: MissingLabelPolicy, asked: list[tuple[_Listed, int]]
    ) -> EngineAnswer:
        """asked: the lists so far for this query, each with its retries; this one is appended."""
        asked.append(await self._ask(query.prompt, slot, {"n_probs": top, "cache_prompt": True}))
        listed = asked[-1][0].logprobs
        return EngineAnswer(
            [token_logprobs(listed, query.tokens.ids, missing=missing, name=query.prompt.name)],
            query.prompt.num_tokens * len(asked),
            requests=len(asked),
            retries=sum(retries for _, retries in asked),
            cached_tokens=sum_known(each.cached for each, _ in asked),
        )

    async def _ask(self, prompt: Prompt, slot: int, fields: Mapping[str, object]) -> tuple[_Listed, int]:
        """What follows a prompt, and retries. The answer counts only if the server is still the one of start()."""
        head = orjson.dumps({**_FIELDS, **fields, "id_slot": slot})[:-1]

        async def attempt() -> tuple[_Listed, int]:
            body = b"".join((head, b',"prompt":', prompt.json, b"}"))
            return _read(await self._http.send("POST", "/completion", body), prompt), self._http.epoch

        (listed, epoch), retries = await self._http.call(attempt)
        if self._known is not None:
            await self._check(epoch)
        return listed, retries

    async def _check(self, epoch: int) -> None:
        """Return once the server was seen to be the known one in `epoch` or later. Raises ServerChanged.

        No prompt is asked for this check: it would overwrite the keys and values of a slot.
        """
        async with self._checking:
            if epoch > self._checked:
                began = self._http.epoch
                now = await self._identify()
                if now != self._known:
                    raise ServerChanged(
                        f"the llama-server at {self._http.base_url} now runs another model or version, or with "
                        "another context.",
                        hint="Start the first one again, then go on; or use another --run.",
                    )
                self._checked = began

    async def _identify(self) -> EngineIdentity:
        card, _ = await self._http.call(lambda: llama_card(self._http, "/v1/models", self._model))
        if card is None:
            raise ConfigurationError(f"no llama-server answers at {self._http.base_url}.", hint=START_HINT)
        props = await self._json("/props")
        count = props.get("total_slots")
        if self._known is None and isinstance(count, int) and count > 0:
            self._slots = [asyncio.Lock() for _ in range(count)]
        settings = props.get("default_generation_settings")
        length = settings.get("n_ctx") if isinstance(settings, dict) else None
        return EngineIdentity(
            kind="llama-server",
            model=self._model,
            root=str(props.get("model_path", "")),
            revision=self._revision,
            version=str(props.get("build_info", "")),
            max_model_len=length if isinstance(length, int) and length > 0 else None,
            config=digest_of_file(card),
        )

    async def _tokenize(self, fields: Mapping[str, object]) -> list[int]:
        tokens = (await self._json("/tokenize", fields)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise TransientError("/tokenize did not answer with token ids.")
        return tokens

    async def _string(self, path: str, fields: Mapping[str, object], name: str) -> str:
        found = (await self._json(path, fields)).get(name)
        if not isinstance(found, str):
            raise TransientError(f"{path} did not answer with a text.")
        return found

    async def _json(self, path: str, fields: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The answer to a GET, or to a POST of `fields`."""
        method, body = ("GET", None) if fields is None else ("POST", orjson.dumps(fields))

        async def attempt() -> dict[str, Any]:
            try:
                parsed = orjson.loads(await self._http.send(method, path, body))
            except orjson.JSONDecodeError:
                parsed = None
            if not isinstance(parsed, dict):
                raise TransientError(f"{path} did not answer with a JSON object.", hint="Is this a llama-server?")
            return parsed

        return (await self._http.call(attempt))[0]


def _read(body: bytes, prompt: Prompt) -> _Listed:
    """Raises TransientError for a malformed answer, and ConfigurationError for one without log-probabilities."""
    with malformed_is_transient():
        answer = orjson.loads(body)
        counted, first = answer["tokens_evaluated"], answer.get("completion_probabilities")
        if not first or "top_logprobs" not in first[0]:
            raise ConfigurationError(
                "the llama-server lists no log-probabilities by token id.", hint="Use a newer llama.cpp."
            )
        listed = {
            int(each["id"]): checked_logprob(each["logprob"], prompt.name, hint="") for each in first[0]["top_logprobs"]
        }
        cached = (answer.get("timings") or {}).get("cache_n")
    if counted != prompt.num_tokens or answer.get("truncated"):
        raise TransientError(
            f"prompt {prompt.name!r}: the answer is to {counted} prompt tokens, and {prompt.num_tokens} were sent."
        )
    return _Listed(listed, cached if isinstance(cached, int) and cached >= 0 else None)


def open_engine(settings: Settings, model: str, _: object) -> LlamaServer:
    """The server at LLAMA_SERVER_URL. Raises ConfigurationError where none is named."""
    if settings.llama_server_url is None:
        raise ConfigurationError("LLAMA_SERVER_URL is not set.", hint=START_HINT)
    return LlamaServer(
        settings.llama_server_url,
        model,
        api_key=settings.api_key,
        revision=settings.model_revision or "",
        missing_label=settings.missing_label,
        options=HttpOptions.of(settings),
    )
