"""The fake vLLM server with texts: completions and chats, whole and streamed, and embeddings.

    async with FakeTextServer() as server:
        api = ModelAPI(VLLMClient(server.url, server.model), scores=False)

What it writes to a prompt P is " P0 P1 P2 ..." where P is the prompt's last word: a lost, doubled or misplaced token
shows. It counts the streams that it is writing, and notices when a client has left.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from fakes.vllm_server import FakeVLLM, encode


@dataclass
class Manner:
    """How streams are written. Each of the last eight breaks them.

    delay: seconds before each token; cut: turns the bytes of an event into those that are written at a time; line_end;
    comments: one before each event. silent_after, broken_after, error_after: tokens until it stops without a word,
    drops the connection, or sends an error event; stalls_after, comments_after, gone_after: until nothing comes on a
    connection that stands, comments alone, or nothing on any connection. done and finish: whether [DONE] and a finish
    reason are sent.
    """

    delay: float = 0.0
    cut: Callable[[bytes], list[bytes]] = lambda event: [event]
    line_end: str = "\n"
    comments: bool = False
    silent_after: int | None = None
    broken_after: int | None = None
    error_after: int | None = None
    stalls_after: int | None = None
    comments_after: int | None = None
    gone_after: int | None = None
    done: bool = True
    finish: bool = True


def written(prompt: str, index: int) -> str:
    """The token that the server writes at `index`."""
    return f" {prompt.split()[-1]}{index}"


class FakeTextServer(FakeVLLM):
    """streaming, max_streaming: streams in work; left: streams whose client closed the connection before the end."""

    def __init__(
        self, *, template: bool = True, embeds: bool = True, manner: Manner | None = None, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.template, self.embeds = template, embeds
        self.manner = manner or Manner()
        self.streaming = self.max_streaming = self.left = 0
        self.gone = False  # answers nothing more, /health included; its connections stand
        self.request_ids: list[str | None] = []

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.gone:
            self.requests.append(request.path)
            await asyncio.Event().wait()
        return await super()._middleware(request, handler)

    def more_routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/embeddings", self._embed)

    async def _metrics(self, request: web.Request) -> web.Response:
        shown = await super()._metrics(request)
        running = f'vllm:num_requests_running{{engine="0"}} {self.streaming}.0'
        return web.Response(text=f'{shown.text}\n{running}\nvllm:num_requests_waiting{{engine="0"}} 0.0\n')

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, json.loads(await request.read()))

    async def _embed(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not self.embeds:
            raise web.HTTPNotFound
        vectors = [[float(len(text)), float(index), 0.5] for index, text in enumerate(body["input"])]
        rows = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        return web.json_response({"data": rows[1::2] + rows[0::2], "usage": {"prompt_tokens": len(rows)}})

    def _refusal(self, body: dict[str, Any]) -> str:
        if "messages" in body and not self.template:
            return "As of transformers v4.44, default chat template is no longer allowed, so you must provide one."
        if "messages" in body:
            return "" if body["model"] == self.model else f"The model `{body['model']}` does not exist."
        return super()._refusal(body)

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if body.get("stream"):
            return await self._write_stream(request, body)
        return await super()._answer(request, body)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("logprobs") is not None:
            return super()._complete(body)
        prompt = _last(body)
        text = "".join(written(prompt, index) for index in range(body["max_tokens"]))
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        return {"model": self.model, "choices": [choice], "usage": _usage(prompt, body["max_tokens"])}

    async def _write_stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.request_ids.append(request.headers.get("X-Request-Id"))
        fault = self._next_fault(body)
        await asyncio.sleep(fault.delay)
        if fault.status is not None:
            return web.json_response(fault.body, status=fault.status, headers=fault.headers)
        if refusal := self._refusal(body):
            return web.json_response({"error": {"message": refusal, "code": 400}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        self.streaming += 1
        self.max_streaming = max(self.max_streaming, self.streaming)
        try:
            await response.prepare(request)
            await self._write_tokens(request, response, body)
        except (asyncio.CancelledError, ConnectionResetError):
            self.left += 1
            raise
        finally:
            self.streaming -= 1
        return response

    async def _write_tokens(self, request: web.Request, response: web.StreamResponse, body: dict[str, Any]) -> None:
        manner, prompt = self.manner, _last(body)
        chat = "messages" in body

        async def event(data: str) -> None:
            lead = f": a comment{manner.line_end}" if manner.comments else ""
            for piece in manner.cut(f"{lead}data: {data}{manner.line_end * 2}".encode()):
                await response.write(piece)

        for index in range(body["max_tokens"]):
            await asyncio.sleep(manner.delay)
            if index == manner.silent_after:
                return None
            if index == manner.broken_after:
                assert request.transport is not None
                request.transport.abort()
                return None
            if index == manner.error_after:
                return await event(json.dumps({"error": {"message": "the engine died", "code": 500}}))
            if index in (manner.stalls_after, manner.gone_after):
                self.gone = index == manner.gone_after
                await asyncio.Event().wait()
            while index == manner.comments_after:
                await response.write(b": still here\n\n")
                await asyncio.sleep(0.05)
            text = written(prompt, index)
            last = manner.finish and index == body["max_tokens"] - 1
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if last else None}
            choice |= {"delta": {"content": text}} if chat else {"text": text}
            await event(json.dumps({"choices": [choice]}))
        await event(json.dumps({"choices": [], "usage": _usage(prompt, body["max_tokens"])}))
        if manner.done:
            await event("[DONE]")
        return None


def _last(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


def _usage(prompt: str, completion_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": len(encode(prompt)), "completion_tokens": completion_tokens}
