"""Small questions to one vLLM server: its model, version, metrics and extension, token ids, and what follows a prompt.

Each is retried by the transport's policy, or `retry`. A gateway before the server may pass on only /v1: texts are then
tokenized by having them completed (`return_token_ids`), and the other questions are skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import orjson

from core.errors import ConfigurationError, NotLogprobs, RequestRejected, TransientError
from core.flags import meant
from core.llm_api.http.completions import Answers, read_answers
from core.llm_api.http.gather import all_or_cancel
from core.llm_api.http.llama_card import OWNER as LLAMA_SERVER
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.server_errors import malformed_is_transient
from core.llm_api.http.transport import HttpTransport
from core.llm_api.types import Prompt
from icm_vllm.prompt_tree import MAX_PROMPTS_PER_REQUEST, PATH

log = logging.getLogger(__name__)

NO_ROUTE: Final = (403, 404, 405, 501)
"""What gateways answer to a path that they do not pass on."""
TEXTS: Final = 2**18
"""Most characters of text that one request tokenizes, where the server's gateway has no /tokenize."""


class VLLMQuestions:
    """Does not close `http`. model: as the server names it."""

    def __init__(self, http: HttpTransport, model: str) -> None:
        self._http = http
        self._model = model
        self._tokenize_passes = True

    async def model_card(self, retry: RetryPolicy | None = None) -> dict[str, Any]:
        """What /v1/models says about the model. Raises ConfigurationError where the server does not have it."""
        listed = (await self._get_json("/v1/models", retry)).get("data")
        cards = [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []
        if any(card.get("owned_by") == LLAMA_SERVER for card in cards):
            url = self._http.base_url
            raise ConfigurationError(f"{url} is a llama-server, not vLLM.", hint=f"Set LLAMA_SERVER_URL={url} for it.")
        for card in cards:
            if card.get("id") == self._model:
                return card
        served = ", ".join(repr(card.get("id")) for card in cards) or "no model"
        nearest = meant(self._model, [str(card.get("id")) for card in cards])
        raise ConfigurationError(
            f"the server at {self._http.base_url} serves {served}, not {self._model!r}{nearest or '.'}",
            hint="Ask for what it serves, or start it with this model.",
        )

    async def version(self, retry: RetryPolicy | None = None) -> str:
        """vLLM's version; "" behind a gateway that passes only /v1."""
        try:
            return str((await self._get_json("/version", retry)).get("version", ""))
        except RequestRejected:
            return ""

    async def metrics(self) -> str | None:
        """The text of /metrics; None where the server shows none."""
        try:
            return (await self._http.call(lambda: self._http.send("GET", "/metrics")))[0].decode(errors="replace")
        except RequestRejected:
            return None

    async def extension(self) -> dict[str, Any]:
        """What our extension says about the server. One attempt: going without it costs only time."""
        return _json_object(await self._http.send("GET", PATH), PATH)

    async def tokenize(
        self, texts: Sequence[str], *, special: bool, retry: RetryPolicy | None = None
    ) -> list[list[int]]:
        """Token ids of each text. Raises ConfigurationError where the server offers no way to get them."""
        if self._tokenize_passes:
            try:
                return await all_or_cancel(
                    self._tokenize_one({"prompt": text, "add_special_tokens": special}, retry) for text in texts
                )
            except RequestRejected as error:
                self._do_without_tokenize(error)
        ids: list[list[int]] = []
        for some in _portions(texts):
            ids += await self._tokenize_by_completing(some, special, retry)
        return ids

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]]:
        """Token ids of each user message in the model's chat template, up to where its answer begins."""
        asked: list[dict[str, Any]] = [
            {"messages": [{"role": "user", "content": text}], "add_generation_prompt": True} for text in messages
        ]
        if self._tokenize_passes:
            try:
                return await all_or_cancel(self._tokenize_one(body, None) for body in asked)
            except RequestRejected as error:
                self._do_without_tokenize(error)
        return await all_or_cancel(self._tokenize_by_chatting(body) for body in asked)

    async def listed(
        self,
        body: bytes,
        prompts: Sequence[Prompt],
        retry: RetryPolicy | None = None,
        *,
        extra: int | None = 0,
    ) -> Answers:
        """The answer to a request for log-probabilities after `prompts`. extra: see read_answers.

        Raises ConfigurationError for a server that lists numbers that are no log-probabilities twice.
        """
        before = False

        async def attempt() -> Answers:
            nonlocal before
            try:
                return read_answers(await self._http.send("POST", "/v1/completions", body), prompts, extra=extra)
            except NotLogprobs as error:
                if before:
                    raise ConfigurationError(f"{self._http.base_url}: {error.args[0]}", hint=error.hint) from None
                before = True
                raise

        return (await self._http.call(attempt, retry=retry))[0]

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """The text of each list of token ids; None where the server, or a gateway before it, does not offer it."""
        try:
            return await all_or_cancel(map(self._detokenize_one, tokens))
        except RequestRejected as error:
            if error.status not in NO_ROUTE:
                raise
            return None

    def _do_without_tokenize(self, error: RequestRejected) -> None:
        if error.status not in NO_ROUTE:
            raise error
        if self._tokenize_passes:
            log.warning(
                "%s passes no /tokenize on (HTTP %d); texts are tokenized by having them completed",
                self._http.base_url,
                error.status,
            )
        self._tokenize_passes = False

    async def _tokenize_one(self, text: Mapping[str, Any], retry: RetryPolicy | None) -> list[int]:
        body = orjson.dumps({"model": self._model, **text})

        async def attempt() -> list[int]:
            answer = _json_object(await self._http.send("POST", "/tokenize", body), "/tokenize")
            tokens = _ids(answer.get("tokens"))
            if tokens is None:
                raise TransientError("/tokenize did not answer with token ids.")
            return tokens

        return (await self._http.call(attempt, retry=retry))[0]

    async def _detokenize_one(self, tokens: Sequence[int]) -> str:
        body = orjson.dumps({"model": self._model, "tokens": list(tokens)})

        async def attempt() -> str:
            text = _json_object(await self._http.send("POST", "/detokenize", body), "/detokenize").get("prompt")
            if not isinstance(text, str):
                raise TransientError("/detokenize did not answer with a text.")
            return text

        return (await self._http.call(attempt))[0]

    async def _tokenize_by_completing(
        self, texts: Sequence[str], special: bool, retry: RetryPolicy | None
    ) -> list[list[int]]:
        if not special and "" in texts:  # vLLM completes no empty prompt
            rest = iter(await self._tokenize_by_completing([text for text in texts if text], special, retry))
            return [next(rest) if text else [] for text in texts]
        if not texts:
            return []
        path = "/v1/completions"
        fields = {"max_tokens": 1, "temperature": 0, "add_special_tokens": special, "return_token_ids": True}
        body = orjson.dumps({"model": self._model, **fields, "prompt": list(texts)})

        async def attempt() -> list[list[int]]:
            answer = _json_object(await self._http.send("POST", path, body), path)
            with malformed_is_transient():
                choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
                indexes = [choice["index"] for choice in choices]
            if indexes != list(range(len(texts))):
                raise TransientError(f"asked for {len(texts)} choices, one a text, and got {len(indexes)}.")
            return [self._prompt_ids(choice) for choice in choices]

        return (await self._http.call(attempt, retry=retry))[0]

    async def _tokenize_by_chatting(self, messages: Mapping[str, Any]) -> list[int]:
        path = "/v1/chat/completions"
        body = orjson.dumps({"model": self._model, "max_tokens": 1, "return_token_ids": True, **messages})

        async def attempt() -> list[int]:
            return self._prompt_ids(_json_object(await self._http.send("POST", path, body), path))

        return (await self._http.call(attempt))[0]

    def _prompt_ids(self, answer: Mapping[str, Any]) -> list[int]:
        tokens = _ids(answer.get("prompt_token_ids"))
        if tokens is None:
            url = self._http.base_url
            raise ConfigurationError(
                f"{url} passes no /tokenize on, and its answers name no token ids (return_token_ids).",
                hint=f"Let /tokenize through; or ask it in text: USE_VLLM=false and LLAMA_API_BASE={url}/v1.",
            )
        return tokens

    async def _get_json(self, path: str, retry: RetryPolicy | None = None) -> dict[str, Any]:
        async def attempt() -> dict[str, Any]:
            return _json_object(await self._http.send("GET", path), path)

        return (await self._http.call(attempt, retry=retry))[0]


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """As many texts as one request may hold, and no more than TEXTS characters unless one text has more."""
    some: list[str] = []
    size = 0
    for text in texts:
        if some and (size + len(text) > TEXTS or len(some) == MAX_PROMPTS_PER_REQUEST):
            yield some
            some, size = [], 0
        some.append(text)
        size += len(text)
    if some:
        yield some


def _ids(value: object) -> list[int] | None:
    return value if isinstance(value, list) and all(isinstance(token, int) for token in value) else None


def _json_object(body: bytes, path: str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise TransientError(f"{path} did not answer with a JSON object.", hint="Is this a vLLM server?")
    return parsed
