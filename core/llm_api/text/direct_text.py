"""The texts and embeddings of a vLLM in this process, written in its one thread."""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from core.errors import APIError, ConfigurationError
from core.llm_api.in_process.vllm_process import Loaded
from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest


class DirectText:
    """template: a Jinja template for chats, None for the model's. explained: an APIError for what vLLM raises."""

    def __init__(
        self, model: str, loaded: Loaded, template: str | None, explained: Callable[[Exception], APIError]
    ) -> None:
        self._model = model
        self._loaded = loaded
        self._template = template
        self._explained = explained

    async def generate(self, request: TextRequest) -> Generation:
        """See TextEngine.generate."""
        last = Piece()
        async for piece in self._write(request, "FINAL_ONLY"):
            last = piece
        return Generation(last.text, last.finish_reason or "stop", last.prompt_tokens, last.completion_tokens)

    def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream."""
        return self._write(request, "DELTA")

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed."""
        call = functools.partial(self._embed, texts)
        return await asyncio.wrap_future(self._loaded.thread.call(call, exclusive=True))

    async def _write(self, request: TextRequest, kind: str) -> AsyncGenerator[Piece, None]:
        """Pieces of a text. kind: which outputs vLLM gives (RequestOutputKind)."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        thread = self._loaded.thread

        def deliver(output: Any) -> None:
            with suppress(RuntimeError):  # the caller's event loop has ended
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        thread.write(request.request_id, functools.partial(self._prepare, request, kind), deliver)
        finished = False
        completion_tokens = 0
        try:
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    finished = True
                    raise self._explained(output)
                finished = output.finished
                (choice,) = output.outputs
                completion_tokens += len(choice.token_ids)
                prompt_tokens = len(output.prompt_token_ids or ())
                yield Piece(choice.text, choice.finish_reason, prompt_tokens, completion_tokens)
        finally:
            if not finished:
                thread.abort(request.request_id)

    # What follows runs in the one thread.

    def _prepare(self, request: TextRequest, kind: str) -> tuple[dict[str, object], Any]:
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        parameters = self._loaded.vllm.SamplingParams(**request.options.as_dict(), output_kind=kinds[kind])
        if request.messages:
            text, special = self._render(request), False
        else:
            text, special = request.prompt, True
        tokens = self._loaded.llm.get_tokenizer().encode(text, add_special_tokens=special)
        return {"prompt_token_ids": list(tokens)}, parameters

    def _render(self, request: TextRequest) -> str:
        tokenizer = self._loaded.llm.get_tokenizer()
        if self._template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f"{self._model!r} has no chat template.",
                hint="Pass one: DirectOptions(chat_template=FILE), configs/chat_template.jinja being a simple one; or "
                "ask for a completion instead.",
            )
        turns = [{"role": turn.role, "content": turn.content} for turn in request.messages]
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        )

    def _embed(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.zeros((0, 0), np.float32)
        try:
            outputs = self._loaded.llm.embed(list(texts), use_tqdm=False)
        except Exception as error:
            raise self._explained(error) from error
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)
