"""Text from an OpenAI-compatible server: /completions, /chat/completions, /embeddings and /models, whole or streamed.

Every HTTP engine has one of these beside its scoring; connections, keys, slots and retries are the transport's. A
stream is retried only until its headers have come: after that its text may have been shown. Silence ends it as it ends
any other answer, and comments that only keep the connection open count as silence.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

import numpy as np
import orjson

from core.errors import APIError, ConfigurationError, RequestRejected, TransientError
from core.llm_api.http.rate_limit import RateLimiter, Turns
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.server_errors import malformed_is_transient, server_message
from core.llm_api.http.transport import HttpTransport
from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest
from core.llm_api.text.sse import EventTooLong, SSEParser

NO_TEMPLATE_HINT: Final = (
    "Pass one: start the server with --chat-template FILE (configs/chat_template.jinja is a simple one), or ask for a "
    "completion instead."
)
EMBED_HINT: Final = "Start a server for them: scripts/launch_vllm_server.sh MODEL --runner pooling --convert embed"
TEXTS_PER_REQUEST: Final = 256
CHARACTERS_PER_TOKEN: Final = 4
"""A usual ratio for English text."""
_DONE: Final = b"[DONE]"


class HttpText:
    """Texts from one server. `prefix` comes before /completions: "/v1" or nothing."""

    def __init__(
        self, http: HttpTransport, model: str, *, prefix: str = "/v1", limiter: RateLimiter | None = None
    ) -> None:
        self._http = http
        self._model = model
        self._prefix = prefix
        self._limiter = limiter or RateLimiter()

    async def generate(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> Generation:
        """The whole answer. retry: in place of the transport's policy."""
        path, body = self._path(request), self._body(request, stream=False)
        turns = Turns(self._limiter, lambda: _tokens_of(request))

        async def attempt() -> Generation:
            answer = _generation(await self._http.send("POST", path, body, request_id=request.request_id))
            _settle(turns, answer)
            return answer

        try:
            return (await self._http.call(attempt, admitted=turns.take, retry=retry))[0]
        except RequestRejected as error:
            raise self._explained(error) from None

    async def stream(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream. Holds one slot and one connection until it is closed. retry: as in `generate`."""
        path, body = self._path(request), self._body(request, stream=True)
        turns = Turns(self._limiter, lambda: _tokens_of(request))
        admitted = turns.take
        try:
            async with (
                self._http.stream(path, body, request_id=request.request_id, admitted=admitted, retry=retry) as chunks,
                aclosing(_pieces(chunks, self._http.read_timeout)) as pieces,
            ):
                async for piece in pieces:
                    _settle(turns, piece)
                    yield piece
        except RequestRejected as error:
            raise self._explained(error) from None

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed; TEXTS_PER_REQUEST texts a request, which vLLM batches well."""
        parts = [texts[start : start + TEXTS_PER_REQUEST] for start in range(0, len(texts), TEXTS_PER_REQUEST)]
        rows = [await self._embed_some(list(part)) for part in parts]
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    async def _embed_some(self, texts: list[str]) -> Embeddings:
        body = orjson.dumps({"model": self._model, "input": texts, "encoding_format": "float"})

        async def attempt() -> Embeddings:
            return _vectors(await self._http.send("POST", f"{self._prefix}/embeddings", body), len(texts))

        turns = Turns(self._limiter, lambda: sum(map(_tokens_in, texts)))
        try:
            return (await self._http.call(attempt, admitted=turns.take))[0]
        except RequestRejected as error:
            if error.status in (400, 404, 405, 501):
                raise ConfigurationError(
                    f"{self._http.base_url} gives no embeddings of {self._model!r}: {error.args[0]}",
                    hint=EMBED_HINT,
                ) from None
            raise

    async def models(self) -> list[str]:
        """The names that GET /models lists, by one attempt: it is the liveness probe."""
        body = await self._http.send("GET", f"{self._prefix}/models")
        try:
            return [str(card["id"]) for card in orjson.loads(body)["data"]]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            raise ConfigurationError(
                f"{self._http.base_url} answers, but lists no models.", hint="Is this an OpenAI-compatible server?"
            ) from None

    def _path(self, request: TextRequest) -> str:
        return f"{self._prefix}/chat/completions" if request.messages else f"{self._prefix}/completions"

    def _body(self, request: TextRequest, *, stream: bool) -> bytes:
        fields: dict[str, object] = {"model": self._model, **request.options.as_dict()}
        if request.messages:
            fields["messages"] = [{"role": turn.role, "content": turn.content} for turn in request.messages]
        else:
            fields["prompt"] = request.prompt
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return orjson.dumps(fields)

    def _explained(self, error: RequestRejected) -> APIError:
        if "chat template" not in str(error).lower():
            return error
        return ConfigurationError(f"{self._model!r} has no chat template.", hint=NO_TEMPLATE_HINT)


def _tokens_in(text: str) -> int:
    """An estimate; the limiter learns the real count afterwards."""
    return len(text) // CHARACTERS_PER_TOKEN + 1


def _tokens_of(request: TextRequest) -> int:
    texts = [request.prompt, *(message.content for message in request.messages)]
    return sum(map(_tokens_in, texts)) + request.options.max_tokens


def _settle(turns: Turns, counted: Generation | Piece) -> None:
    if counted.prompt_tokens:
        turns.settle(counted.prompt_tokens + counted.completion_tokens)


async def _pieces(chunks: AsyncGenerator[bytes, None], silence: float) -> AsyncGenerator[Piece, None]:
    """The pieces of a stream of chunks; the last one only after [DONE], with the counts that came before that.

    silence: most seconds of chunks without an event. Raises TransientError after that, and where the stream ends early
    or cannot be read; raises the error of an error event.
    """
    loop = asyncio.get_running_loop()
    last_event = loop.time()
    parser = SSEParser()
    finish_reason: str | None = None
    counts = (0, 0)
    async for chunk in chunks:
        try:
            events = parser.feed(chunk)
        except EventTooLong as error:
            raise TransientError(f"the stream cannot be read: {error}.") from None
        for data in events:
            if data == _DONE:
                if finish_reason is None:
                    raise TransientError("the stream ended without a reason to finish.")
                yield Piece("", finish_reason, *counts)
                return
            piece = read_piece(data)
            finish_reason = piece.finish_reason or finish_reason
            if piece.prompt_tokens:
                counts = (piece.prompt_tokens, piece.completion_tokens)
            if piece.text:
                yield Piece(piece.text)
        if events:
            last_event = loop.time()
        elif loop.time() - last_event >= silence:
            raise TransientError(
                f"the stream held no event for {silence:g} s.", hint="Raise read_timeout if the model is slow."
            )
    raise TransientError("the stream broke off before its end.")


def read_piece(data: bytes) -> Piece:
    """One event of a stream. Raises what an error event says, and TransientError for what cannot be read."""
    try:
        event = orjson.loads(data)
        if "error" in event:
            raise _stream_error(event["error"], data)
        usage = event.get("usage") or {}
        text, finish_reason = "", None
        for choice in event["choices"]:
            text += _text(choice["delta"].get("content") if "delta" in choice else choice["text"])
            finish_reason = _text(choice.get("finish_reason")) or finish_reason
        return Piece(
            text, finish_reason, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        )
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TransientError(f"the stream holds an event that cannot be read ({type(error).__name__}).") from None


def _text(value: object) -> str:
    """Of a field that may be null. Raises TypeError."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected a string, not {type(value).__name__}")
    return value or ""


def _stream_error(said: object, data: bytes) -> APIError:
    code = said.get("code") if isinstance(said, dict) else None
    message = f"the server ended the stream: {server_message(data)}"
    if isinstance(code, int) and 400 <= code < 500:
        return RequestRejected(message, status=code)
    return TransientError(message)


def _generation(body: bytes) -> Generation:
    with malformed_is_transient():
        answer = orjson.loads(body)
        (choice,) = answer["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = answer.get("usage") or {}
        return Generation(
            _text(text),
            _text(choice.get("finish_reason")) or "stop",
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )


def _vectors(body: bytes, count: int) -> Embeddings:
    with malformed_is_transient():
        rows: list[Any] = sorted(orjson.loads(body)["data"], key=lambda row: int(row["index"]))
        with np.errstate(over="ignore"):
            vectors = np.array([row["embedding"] for row in rows], dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != count:
        raise TransientError(f"asked for {count} vectors and got an array of shape {vectors.shape}.")
    if not np.isfinite(vectors).all():
        raise TransientError("a vector holds a number that is not finite, or is too large for 32 bits.")
    return vectors
