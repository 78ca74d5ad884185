"""The fake server as a llama-server with its own routes (recorded/llama_server_native.json): slots, any n_probs.

async with FakeLlama() as server:
    engine = LlamaServer(server.url, server.model)
"""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

from aiohttp import web

from fakes.vllm_server import BOS, FakeVLLM


class FakeLlama(FakeVLLM):
    """slots: of /props. Each holds its last prompt: `by_slot` has those that it was asked about, `clashes` counts those
    that came while it was busy. size: bytes of the GGUF file. hidden_below: labels are listed from so many alternatives
    on."""

    def __init__(self, *, slots: int = 1, hidden_below: int = 0, **rest: Any) -> None:
        super().__init__(max_logprobs=10**9, **rest)
        self.slots, self.hidden_below, self.size = slots, hidden_below, 96_576_768
        self.by_slot: list[list[list[int]]] = [[] for _ in range(slots)]
        self.clashes = 0
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._busy = [False] * slots

    def more_routes(self, app: web.Application) -> None:
        app.router.add_get("/props", self._props)
        app.router.add_post("/completion", self._completion)
        app.router.add_post("/apply-template", self._apply)

    async def _models(self, _: web.Request) -> web.Response:
        meta = {"n_vocab": 49152, "n_ctx": 4096, "n_params": 134_515_008, "size": self.size, "ftype": "Q4_1"}
        card = {"id": self.model, "aliases": [self.model], "owned_by": "llamacpp", "meta": meta}
        return web.json_response({"object": "list", "data": [card]})

    async def _props(self, _: web.Request) -> web.Response:
        settings = {"n_ctx": self.max_model_len}
        return web.json_response(
            {"default_generation_settings": settings, "total_slots": self.slots, "model_path": self.root}
            | {"build_info": self.version}
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        special = {"add_special_tokens": body["add_special"]}
        return web.json_response({"tokens": self._encoded(body["content"], special)})

    async def _detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"content": "".join(self._known[token] for token in (await request.json())["tokens"])})

    async def _apply(self, request: web.Request) -> web.Response:
        assert self.chat_template is not None
        content = (await request.json())["messages"][0]["content"]
        return web.json_response({"prompt": self.chat_template.format(content)})

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        slot = body["id_slot"]
        self.clashes += self._busy[slot]
        self._busy[slot] = True
        try:
            body |= {"model": self.model, "logprobs": body["n_probs"], "return_tokens_as_token_ids": True}
            return await self._serve(request, body)
        finally:
            self._busy[slot] = False

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, slot = body["prompt"], body["id_slot"]
        (choice,) = super()._complete(body)["choices"]
        held = self._held[slot] if body["cache_prompt"] else []
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt, strict=False))
        cached = min(len(list(alike)), len(prompt) - 1)
        self._held[slot] = prompt
        if prompt[0] != BOS or len(prompt) > 6:  # not the canary
            self.by_slot[slot].append(prompt)
        (top,) = choice["logprobs"]["top_logprobs"]
        listed = [{"id": int(name.removeprefix("token_id:")), "logprob": value} for name, value in top.items()]
        if body["n_probs"] < self.hidden_below:
            listed = [each for each in listed if each["id"] >= 200_000]
        return {
            "content": "?",
            "id_slot": slot,
            "tokens_evaluated": len(prompt),
            "truncated": False,
            "timings": {"cache_n": cached, "prompt_n": len(prompt) - cached},
            "completion_probabilities": [{**listed[0], "top_logprobs": listed}],
        }
