"""A model in this process without asyncio: chats, completions and embeddings for scripts and notebooks.

    if __name__ == "__main__":  # vLLM starts further processes
        with LocalModel("models/gemma-3-270m", cpu=True, max_model_len=2048) as model:
            [one, two] = model.completion(["The capital of France is", "Water is"], max_tokens=8)

The engine is DirectEngine behind a ModelAPI; this runs its event loop in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from core.llm_api.engines.direct import DirectEngine, DirectOptions
from core.llm_api.http.gather import all_or_cancel
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import Embeddings, Generation, Message, SamplingOptions, StreamEvent

T = TypeVar("T")


class LocalModel:
    """Loaded when the block is entered (or by `open`), for as long as it lasts. One a process; see DirectEngine.

    model: a path or a name on Hugging Face. gpu_memory_utilization: share of the GPU's memory, 0 to 1. max_model_len:
    tokens of prompt and answer together. cpu: run on the CPU, which needs a vLLM for it. trust_remote_code: run code
    that comes with the model. chat_template: a Jinja template or the path of one, for models that have none. options:
    all else, in place of these.
    """

    def __init__(
        self,
        model: str,
        *,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
        cpu: bool = False,
        chat_template: str | None = None,
        options: DirectOptions | None = None,
    ) -> None:
        self._options = options or DirectOptions(
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            trust_remote_code=trust_remote_code,
            cpu=cpu,
            chat_template=chat_template,
        )
        self._api = ModelAPI(DirectEngine(model, self._options), scores=False)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> Self:
        """Load the model, which takes seconds to minutes. Raises an APIError that says what to do."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="local model", daemon=True)
            self._thread.start()
            try:
                self._run(self._api.start())
            except BaseException:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Give the model's memory back; idempotent."""
        if self._loop is not None:
            try:
                self._run(self._api.aclose())
            finally:
                loop, self._loop = self._loop, None
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join()

    def chat_completion(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 256,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | tuple[str, ...] = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
    ) -> Generation:
        """The next turn of one conversation. The options are those of SamplingOptions."""
        options = SamplingOptions(max_tokens, temperature, top_p, seed, stop, frequency_penalty, presence_penalty)
        return self._run(self._api.chat(messages, options))

    def chat_completions(
        self, conversations: Sequence[Sequence[Message]], options: SamplingOptions | None = None
    ) -> list[Generation]:
        """The next turn of each conversation, in order, as one batch."""
        return self._run(self._chats(conversations, options or SamplingOptions()))

    def completion(
        self,
        prompts: Sequence[str],
        *,
        temperature: float = 0.0,
        max_tokens: int = 256,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | tuple[str, ...] = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
    ) -> list[Generation]:
        """The continuation of every prompt, in order, as one batch. The options are those of SamplingOptions."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts; for one text give a list of one")
        options = SamplingOptions(max_tokens, temperature, top_p, seed, stop, frequency_penalty, presence_penalty)
        return self._run(self._api.complete(prompts, options))

    def stream_chat(self, messages: Sequence[Message], options: SamplingOptions | None = None) -> Iterator[StreamEvent]:
        """The events of ModelAPI.stream_chat; leaving the loop early stops the model."""
        events = self._api.stream_chat(messages, options or SamplingOptions())
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._run(_close(events))

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One vector a text; needs options=DirectOptions(runner="pooling", ...)."""
        return self._run(self._api.embed(texts))

    async def _chats(self, conversations: Sequence[Sequence[Message]], options: SamplingOptions) -> list[Generation]:
        return await all_or_cancel(self._api.chat(messages, options) for messages in conversations)

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            call.close()
            raise RuntimeError("LocalModel was not opened; use `with`")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:  # the loop runs in another thread, which Ctrl-C does not reach
            future.cancel()
            raise


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, and clear it away."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()


async def _next(events: AsyncGenerator[StreamEvent, None]) -> StreamEvent | None:
    return await anext(events, None)


async def _close(events: AsyncGenerator[StreamEvent, None]) -> None:
    await events.aclose()
