"""The fake server with the manners of other people's: llama-server, hosted APIs, gateways and proxies before them.

    async with FakeEndpoint(style="llama") as server:
        engine = ExternalAPI(server.url + "/v1", server.model)

It is asked in text, one prompt a request. Its wire format as llama-server's is that of a real one, recorded in
recorded/llama_server.json.
"""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from fakes.vllm_server import FakeVLLM, encode


class FakeEndpoint(FakeVLLM):
    """style: "completions" or "llama" (lists as chats have them, any number of alternatives, other names answered).

    hidden_below: its labels are listed only where so many alternatives are asked for. at_most: alternatives that it
    lists, whatever is asked for; 0 lists none (`top_logprobs: null`). template: what it puts around a prompt before
    the model sees it; counts_on: what the model then says to COUNTING. miscount: what usage says too much; None: it
    says nothing. mounted_at: what is before /completions. body_limit: bytes; a larger one is answered 413.
    """

    def __init__(
        self,
        *,
        style: str = "completions",
        at_most: int | None = None,
        hidden_below: int = 0,
        template: str = "{}",
        counts_on: str = FakeVLLM.counts_on,
        miscount: int | None = 0,
        mounted_at: str = "/v1",
        body_limit: int | None = None,
        lists_models: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(max_logprobs=10**9 if style == "llama" else 20, **rest)
        self.style, self.at_most, self.template, self.counts_on = style, at_most, template, counts_on
        self.miscount, self.mounted_at, self.body_limit, self.lists_models = (
            miscount,
            mounted_at,
            body_limit,
            lists_models,
        )
        self.hidden_below = hidden_below
        self.size = 96_576_768  # bytes of the GGUF file
        self.cached = 0  # tokens of every prompt that it says it had

    def more_routes(self, app: web.Application) -> None:
        if self.mounted_at != "/v1":
            app.router.add_post(self.mounted_at + "/completions", self._completions)
            app.router.add_get(self.mounted_at + "/models", self._models)

    async def _models(self, request: web.Request) -> web.Response:
        if not self.lists_models:
            raise web.HTTPNotFound
        if self.style != "llama":
            return await super()._models(request)
        meta = {"n_vocab": 49152, "n_ctx": 4096, "n_params": 134_515_008, "size": self.size, "ftype": "Q4_1"}
        card = {"id": self.model, "aliases": [self.model], "owned_by": "llamacpp", "meta": meta}
        return web.json_response({"object": "list", "data": [card]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if self.body_limit is not None and len(body) > self.body_limit:
            page = "<html><head><title>413 Request Entity Too Large</title></head></html>"
            return web.Response(text=page, status=413, content_type="text/html")
        return await self._serve(request, json.loads(body))

    def _refusal(self, body: dict[str, Any]) -> str:
        return "" if self.style == "llama" else super()._refusal(body)

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = self.template.format(body["prompt"])
        answer = super()._complete(body | {"prompt": asked})
        (choice,) = answer["choices"]
        if self.miscount is None:
            del answer["usage"]
        else:
            answer["usage"]["prompt_tokens"] = len(encode(asked)) + self.miscount
            if self.style == "llama":
                answer["usage"]["prompt_tokens_details"] = {"cached_tokens": self.cached}
        if choice["logprobs"] is not None:
            self._dress(choice, hide=body["logprobs"] < self.hidden_below)
        return answer

    def _dress(self, choice: dict[str, Any], *, hide: bool) -> None:
        listed = choice["logprobs"]["top_logprobs"][0].items()
        top = [(token, lp) for token, lp in listed if not (hide and token in (" True", " False"))][: self.at_most]
        if self.style == "llama":
            told = [{"id": 0, "token": token, "bytes": list(token.encode()), "logprob": lp} for token, lp in top]
            choice["logprobs"] = {"content": [{**told[0], "top_logprobs": told}]}
        elif self.at_most == 0:
            choice["logprobs"] = {"tokens": ["?"], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}
        else:
            choice["logprobs"]["top_logprobs"] = [dict(top)]
