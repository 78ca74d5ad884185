"""The texts of a ModelAPI: continuations, chats, streams and embeddings, straight from the engine and counted."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Final

from core.errors import APIError, ConfigurationError
from core.llm_api.http.gather import all_or_cancel
from core.llm_api.telemetry import TextTelemetry, outcome_of
from core.llm_api.text.generation import (
    GREEDY,
    Embeddings,
    End,
    Failed,
    Generation,
    Message,
    Metrics,
    Piece,
    SamplingOptions,
    Started,
    StreamEvent,
    TextEngine,
    TextRequest,
    Token,
)
from core.llm_api.tokens import CANARY_TEXT

_ONE_TOKEN: Final = SamplingOptions(max_tokens=1)


class TextWriter:
    """telemetry: where texts are counted. model: called for the name in a stream's first event.

    options: how a text is continued; None is greedy. Raises ConfigurationError for an engine that writes no texts.
    """

    def __init__(self, engine: object, telemetry: TextTelemetry, model: Callable[[], str]) -> None:
        if not isinstance(engine, TextEngine):
            raise ConfigurationError(f"{type(engine).__name__} writes no texts.", hint="Use another engine.")
        self.engine: TextEngine = engine
        self._telemetry = telemetry
        self._model = model

    async def complete(self, prompts: Sequence[str], options: SamplingOptions | None = None) -> list[Generation]:
        """The continuation of every prompt, in order; all at once, as far as the engine takes them.

        All or none: the first APIError stops the rest.
        """
        return await all_or_cancel(self._write(_request(options, prompt=prompt)) for prompt in prompts)

    async def chat(self, messages: Sequence[Message], options: SamplingOptions | None = None) -> Generation:
        """The next turn of a conversation. Raises ConfigurationError where the model has no chat template."""
        return await self._write(_request(options, messages))

    def stream_complete(self, prompt: str, options: SamplingOptions | None = None) -> AsyncGenerator[StreamEvent, None]:
        """The continuation of a prompt as it is written; see `stream_chat`."""
        return self._stream(_request(options, prompt=prompt))

    def stream_chat(
        self, messages: Sequence[Message], options: SamplingOptions | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """The next turn as it is written: Started, Tokens, Metrics, and then exactly one of End and Failed.

        No APIError is raised out of a stream: it is the Failed event. Closing the generator (contextlib.aclosing), or
        cancelling the task, closes the connection and stops the computation.
        """
        return self._stream(_request(options, messages))

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """One vector a text, float32, shape [number of texts, dimensions], as the engine gives them."""
        return await self.engine.embed(texts)

    async def models(self) -> list[str]:
        """The names of the models that are served. Liveness: one attempt, nothing is computed."""
        return await self.engine.models()

    async def ready(self) -> float:
        """Readiness: write one token. Returns the seconds it took; raises an APIError where it fails.

        Retries like any request; put a readiness probe under asyncio.timeout.
        """
        started = time.perf_counter()
        await self.engine.generate(_request(_ONE_TOKEN, prompt=CANARY_TEXT))
        return time.perf_counter() - started

    async def _write(self, request: TextRequest) -> Generation:
        with self._telemetry.text() as count:
            generation = await self.engine.generate(request)
            count.prompt_tokens, count.completion_tokens = generation.prompt_tokens, generation.completion_tokens
        return generation

    def _stream(self, request: TextRequest) -> AsyncGenerator[StreamEvent, None]:
        return _events(self.engine.stream(request), request.request_id, self._model(), self._telemetry)


def _request(
    options: SamplingOptions | None, messages: Sequence[Message] | None = None, *, prompt: str = ""
) -> TextRequest:
    if messages is not None and not messages:
        raise ValueError("a conversation needs at least one message")
    if messages is None and not prompt:
        raise ValueError("a prompt must not be empty")
    return TextRequest(f"icm-{uuid.uuid4().hex}", options or GREEDY, prompt, tuple(messages or ()))


async def _events(
    pieces: AsyncGenerator[Piece, None], request_id: str, model: str, telemetry: TextTelemetry
) -> AsyncGenerator[StreamEvent, None]:
    """An engine's pieces as the events of ModelAPI.stream_chat, with the times at which they came."""
    called = time.perf_counter()
    first = latest = 0.0
    index = 0
    last = Piece()
    failure: APIError | None = None
    with telemetry.text() as count:
        async with aclosing(pieces):
            yield Started(request_id, model)
            try:
                async for last in pieces:
                    if last.text:
                        latest = time.perf_counter()
                        if index == 0:
                            first = latest
                            telemetry.first_token.observe(first - called)
                        yield Token(index, last.text)
                        index += 1
            except APIError as error:
                failure, count.outcome = error, outcome_of(error)
        tokens = last.completion_tokens or index
        count.prompt_tokens, count.completion_tokens = last.prompt_tokens, tokens
    yield Metrics(
        seconds=time.perf_counter() - called,
        time_to_first_token=first - called if index else None,
        tokens_per_second=(tokens - 1) / (latest - first) if latest > first else None,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=tokens,
    )
    yield End(last.finish_reason or "stop") if failure is None else Failed(failure)
