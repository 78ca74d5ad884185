"""A server that behaves like vLLM, inside the test process, with knobs for everything that can go wrong.

    async with FakeVLLM() as server:
        client = VLLMClient(server.url, server.model)

Its log-odds are a function of the prompt's tokens alone (`log_odds`, replaceable), so that whole ICM searches can run
on it and repeat. Tokens: one for each word with the space before it, each mark and each newline; ids by hash, so that
tokenizing pieces that start at spaces equals tokenizing the whole. It counts a prefix cache of blocks of 16 tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from core.llm_api.text import continuation
from core.llm_api.tokens import CANARY_TEXT
from icm_vllm import prompt_tree

BOS = 1
TRUE, FALSE = 5852, 7983
BLOCK = 16
MAX_LOGPROB_TOKEN_IDS = 128  # vLLM's
_PIECE = re.compile(r" ?\w+| ?[^\w\s]|\s")
_SPLIT_PIECE = re.compile(r"\w+|[^\w\s]|\s")
_FIXED = {" True": TRUE, " False": FALSE}


def encode(text: str, *, split: bool = False) -> list[int]:
    """split: the space before a word is a token of its own."""
    found = (_SPLIT_PIECE if split else _PIECE).findall(text)
    return [_FIXED.get(piece, 10_000 + zlib.crc32(piece.encode()) % 100_000) for piece in found]


def hashed_log_odds(tokens: Sequence[int]) -> float:
    """Between -4 and 4 nats, evenly spread, from SHA-256 of the tokens."""
    digest = hashlib.sha256(",".join(map(str, tokens)).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 * 8 - 4


def label_distribution(log_odds: float) -> tuple[float, float]:
    """Log P(True) and log P(False), which share 0.9 of the probability."""
    share = math.log(0.9)
    return share - math.log1p(math.exp(-log_odds)), share - math.log1p(math.exp(log_odds))


@dataclass
class Fault:
    """What to do to a completion request instead of answering it well. Only the fields that are set act.

    status with body and headers; delay in seconds; disconnect before any byte; truncate after half the body; patch
    changes the answer; times: how many requests suffer it (None: all); only: for which requests.
    """

    status: int | None = None
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    disconnect: bool = False
    truncate: bool = False
    patch: Callable[[dict[str, Any]], object] | None = None
    times: int | None = 1
    only: Callable[[dict[str, Any]], bool] | None = None


class FakeVLLM:
    """Counts what it sees: `requests` (paths), `completions` (bodies, the canary's included), `max_in_flight`."""

    counts_on = " 6 7"
    """How the model goes on from "1 2 3 4 5"."""

    def __init__(
        self,
        *,
        model: str = "fake-8b",
        log_odds: Callable[[Sequence[int]], float] = hashed_log_odds,
        block: int = BLOCK,  # tokens of a block of its cache
        keeps: str = "all",  # of a prompt's blocks; nothing; window: its last four, as some caches of window layers do
        api_key: str | None = None,
        max_model_len: int = 8192,
        max_logprobs: int = 20,
        exact_labels: str = "yes",  # yes, ignored, rejected
        metrics: bool = True,
        logprobs: bool = True,
        root: str = "/models/fake",
        salt: str = "",  # another salt is another model: the canary answers differently
        split_labels: bool = False,  # ' True' is two tokens, 'True' is one
        detokenizes: bool = True,  # offers /detokenize
        trees: bool = False,  # runs our extension
        fast_prefixes: bool = False,  # and says that its engine does, too
        kernels: str = "",  # and which kernels answer
        dtype: str = "",  # in which type
        config: str = "",  # and how the model is configured
        chat_template: str | None = None,  # one user message in braces
        prefix: str = "",  # of every path, as behind a gateway
        tokenizes: bool = True,  # /tokenize is let through
        tells_token_ids: bool = True,  # those of a text that is completed (return_token_ids)
        max_body: int | None = None,  # bytes; larger ones get 413 unread, as from nginx
        miscounts: tuple[int, int] = (0, 0),  # prompt tokens too many in usage: a request, a prompt
        adds_bos: bool = False,  # to prompts of token ids, whatever they begin with
        logits: float | None = None,  # answers with logits, which lie so far above log-probabilities
        drops_connections: bool = False,  # after every answer, and without a word about it
        distribution: Callable[[Sequence[int]], dict[int, float]] | None = None,  # in place of log_odds: log P by token
        tree_labels: int | None = prompt_tree.MAX_LABELS,  # of a tree; None: two, and says nothing, as at first
        adapters: Mapping[str, Callable[[Sequence[int]], float]] | None = None,  # LoRA, by name: their log-odds
        adapter_trees: bool = True,  # our extension takes trees for them; it did not at first
    ) -> None:
        self.adapters, self.adapter_trees = dict(adapters or {}), adapter_trees
        self.distribution, self.tree_labels = distribution, tree_labels
        self.chat_template = chat_template
        self.prefix, self.tokenizes, self.tells_token_ids = prefix, tokenizes, tells_token_ids
        self.max_body, self.miscounts, self.adds_bos = max_body, miscounts, adds_bos
        self.logits, self.drops_connections = logits, drops_connections
        self.model, self.root, self.salt = model, root, salt
        self.version = "0.26.0+fake"
        self.log_odds, self.block, self.keeps = log_odds, block, keeps
        self.api_key = api_key
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.exact_labels, self.metrics, self.logprobs = exact_labels, metrics, logprobs
        self.split_labels, self.trees, self.fast_prefixes = split_labels, trees, fast_prefixes
        self.kernels, self.dtype, self.config = kernels, dtype, config
        self.faults: list[Fault] = []
        self.shuffle = False
        self.drop: set[int] = set()  # token ids never listed
        self.latency = 0.0
        self.requests: list[str] = []
        self.completions: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.in_flight = self.max_in_flight = self.aborted = 0
        self.queries = self.hits = 0
        self.detokenizes = detokenizes
        self._known = {BOS: "<bos>"}  # every token that was made here
        self._blocks: set[int] = set()
        self._in_window: set[int] = set()
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**30, middlewares=[self._middleware])
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get(prompt_tree.PATH, self._describe)
        app.router.add_post(prompt_tree.PATH, self._label_logprobs)
        app.router.add_post(prompt_tree.ADAPTER_PATH, self._label_logprobs)
        self.more_routes(app)
        if self.prefix:
            inner, app = app, web.Application(client_max_size=2**30)
            app.add_subapp(self.prefix, inner)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        server = site._server
        assert isinstance(server, asyncio.Server)
        self.port = server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def more_routes(self, app: web.Application) -> None:
        """For servers that do more (text_server.py)."""

    @property
    def pools(self) -> list[dict[str, Any]]:
        """Completion bodies other than the fixed prompt, which a client may ask whenever it likes, and texts that it
        has tokenized so."""
        fixed = (CANARY_TEXT, [BOS, *encode(CANARY_TEXT)])
        return [
            body
            for body in self.completions
            if not body.get("return_token_ids")
            and body["prompt"] != CANARY_TEXT
            and not all(prompt in fixed for prompt in body["prompt"])
        ]

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> web.StreamResponse:
        path = request.path.removeprefix(self.prefix)
        self.requests.append(path)
        self.authorizations.append(request.headers.get("Authorization"))
        wanted = f"Bearer {self.api_key}"
        if self.api_key and path.startswith("/v1") and request.headers.get("Authorization") != wanted:
            sent = request.headers.get("Authorization", "nothing")
            return web.json_response({"error": f"Unauthorized: {sent}"}, status=401)  # as tactless as servers get
        if self.max_body is not None and (request.content_length or 0) > self.max_body:
            html = "<html><head><title>413 Request Entity Too Large</title></head></html>"
            return web.Response(status=413, text=html, content_type="text/html")
        response: web.StreamResponse = await handler(request)
        if self.drops_connections and request.transport is not None:
            await response.prepare(request)
            await response.write_eof()
            request.transport.close()
        return response

    async def _models(self, _: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "root": self.root, "max_model_len": self.max_model_len}
        of_adapters = [card | {"id": name, "root": f"/adapters/{name}", "parent": self.model} for name in self.adapters]
        return web.json_response({"object": "list", "data": [card, *of_adapters]})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _metrics(self, _: web.Request) -> web.Response:
        if not self.metrics:
            raise web.HTTPNotFound
        lines = []
        # Two engines, as under data parallelism: their counters are to be summed.
        for name, total in (("queries", self.queries), ("hits", self.hits)):
            lines += [f"# TYPE vllm:prefix_cache_{name}_total counter"]
            for engine, share in ((0, total // 3), (1, total - total // 3)):
                lines += [f'vllm:prefix_cache_{name}_total{{engine="{engine}",model_name="{self.model}"}} {share:.1f}']
            lines += [f'vllm:prefix_cache_{name}_created{{engine="0"}} 1.79e+09']
        config = f'block_size="{self.block}",cache_dtype="auto",num_gpu_blocks="4096",sliding_window="None"'
        lines += [f'vllm:cache_config_info{{{config},engine="0"}} 1.0', f"vllm:cache_config_info{{{config}}} 1.0"]
        return web.Response(text="\n".join(lines))

    async def _tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            raise web.HTTPNotFound
        body = await request.json()
        if "messages" in body:
            if self.chat_template is None:
                return _no_template()
            body = {"prompt": self.chat_template.format(body["messages"][0]["content"])}
        tokens = self._encoded(body["prompt"], body)
        return web.json_response({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens})

    async def _detokenize(self, request: web.Request) -> web.Response:
        if not self.detokenizes:
            raise web.HTTPNotFound
        return web.json_response({"prompt": "".join(self._known[token] for token in (await request.json())["tokens"])})

    def _encoded(self, text: str, body: dict[str, Any]) -> list[int]:
        tokens = encode(text, split=self.split_labels)
        self._known.update(zip(tokens, (_SPLIT_PIECE if self.split_labels else _PIECE).findall(text), strict=True))
        return [BOS, *tokens] if body.get("add_special_tokens", True) else tokens

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """As much of a chat as says which token ids its prompt has."""
        if self.chat_template is None:
            return _no_template()
        body = await request.json()
        tokens = self._encoded(self.chat_template.format(body["messages"][0]["content"]), {})
        message = {"role": "assistant", "content": "?"}
        told = {"prompt_token_ids": tokens} if body.get("return_token_ids") and self.tells_token_ids else {}
        return web.json_response({"choices": [{"index": 0, "message": message}], **told})

    async def _describe(self, _: web.Request) -> web.Response:
        if not self.trees:
            raise web.HTTPNotFound
        return web.json_response(
            {
                "format": prompt_tree.FORMAT,
                "models": [self.model],
                "fast_prefixes": self.fast_prefixes,
                "kernels": self.kernels,
                "dtype": self.dtype,
                "config": self.config,
            }
            | ({} if self.tree_labels is None else {"max_labels": self.tree_labels})
            | ({"adapters": list(self.adapters)} if self.adapter_trees else {})
        )

    async def _label_logprobs(self, request: web.Request) -> web.StreamResponse:
        """The same prompts by another way: what a test knows of a completion holds for it, faults included."""
        for_adapters = request.path.endswith(prompt_tree.ADAPTER_PATH)
        if not self.trees or (for_adapters and not self.adapter_trees):
            raise web.HTTPNotFound
        tree, labels, adapter = prompt_tree.read_request(await request.read())
        if self.tree_labels is None and len(labels) != 2:
            return web.json_response({"error": {"message": "labels must be two token ids"}}, status=400)
        prompts = [ids for ids, _ in tree.prompts()]
        model = adapter if adapter is not None and self.adapter_trees else self.model
        body = {"model": model, "prompt": prompts, "logprobs": 2, "logprob_token_ids": labels, "tree": True}
        return await self._serve(request, {**body, "return_tokens_as_token_ids": True})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, json.loads(await request.read()))

    async def _serve(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.completions.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        fault = self._next_fault(body)
        await asyncio.sleep(self.latency + fault.delay)
        if fault.disconnect:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault.status is not None:
            return web.json_response(fault.body, status=fault.status, headers=fault.headers)
        error = self._refusal(body)
        if error:
            status, kind = (404, "NotFoundError") if "does not exist" in error else (400, "BadRequestError")
            said = {"error": {"message": error, "type": kind, "code": status}}
            return web.json_response(said, status=status)
        hits = self.hits
        answer: Any = self._complete(body)
        if body.get("prompt") == continuation.COUNTING:
            answer["choices"][0]["text"] = self.counts_on
        if "tree" in body:
            answer = _as_pairs(answer, body["logprob_token_ids"]) | {"cached_tokens": self.hits - hits}
        if fault.patch is not None:
            answer = fault.patch(answer) or answer
        text = json.dumps(answer)
        return web.Response(text=text[: len(text) // 2] if fault.truncate else text, content_type="application/json")

    def _next_fault(self, body: dict[str, Any]) -> Fault:
        for fault in self.faults:
            if fault.times != 0 and (fault.only is None or fault.only(body)):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return Fault()

    def _refusal(self, body: dict[str, Any]) -> str:
        if body["model"] not in (self.model, *self.adapters):
            return f"The model `{body['model']}` does not exist."
        if (body.get("logprobs") or 0) > self.max_logprobs:
            return f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed."
        if "logprob_token_ids" in body and self.exact_labels == "rejected":
            return "Extra inputs are not permitted: logprob_token_ids"
        if len(body.get("logprob_token_ids", ())) > MAX_LOGPROB_TOKEN_IDS:
            return "Requested logprob_token_ids of a length which is greater than max allowed."
        if any(len(p) >= self.max_model_len for p in self._prompts(body)):
            return "This model's maximum context length is exceeded."
        if not all(self._prompts(body)):
            return "Either prompt or prompt_embeds must be provided and non-empty."
        if len(self._prompts(body)) > 1024:
            return "too many prompts"
        return ""

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = self._prompts(body)
        choices: list[dict[str, Any]] = [
            {"index": i, "text": "?", "logprobs": self._logprobs(p, body)} for i, p in enumerate(prompts)
        ]
        if body.get("return_token_ids") and self.tells_token_ids:
            for choice, prompt in zip(choices, prompts, strict=True):
                choice["prompt_token_ids"] = prompt
        if self.shuffle:
            choices = choices[1::2] + choices[0::2]
        a_request, a_prompt = self.miscounts
        count = sum(map(len, prompts)) + a_request + len(prompts) * a_prompt
        return {
            "object": "text_completion",
            "model": self.model,
            "choices": choices,
            "usage": {"prompt_tokens": count, "completion_tokens": len(prompts), "total_tokens": count + len(prompts)},
        }

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        prompt = body["prompt"]
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        bos = [BOS] * self.adds_bos
        # A text that is completed has no BOS unless that is asked for; vLLM's own default is the other way round.
        special = {"add_special_tokens": body.get("add_special_tokens", False)}
        return [self._encoded(p, special) if isinstance(p, str) else bos + p for p in prompt]

    def _logprobs(self, tokens: list[int], body: dict[str, Any]) -> dict[str, Any] | None:
        if not self.logprobs or body.get("logprobs") is None:
            return None
        log_odds = self.adapters.get(body["model"])
        self._count_blocks(tokens, f"{body.get('cache_salt', '')}{body['model'] if log_odds else ''}")
        named = self._known | {v: k for k, v in _FIXED.items()}
        if self.distribution is None:
            found = (log_odds or self.log_odds)(tokens)
            likely = dict(zip((TRUE, FALSE), label_distribution(found), strict=True))
        else:
            likely = self.distribution(tokens)
        # Fillers share the last tenth; which ones they are depends on the salt.
        offset = zlib.crc32(self.salt.encode()) % 1000
        every = likely | {200_000 + offset + i: math.log(0.035) - i * 0.5 for i in range(40)}
        every = {t: lp for t, lp in every.items() if t not in self.drop}
        ranked = sorted(every.items(), key=lambda item: -item[1])
        wanted = body.get("logprob_token_ids")
        if wanted is not None and self.exact_labels == "yes":
            rest = -25.0 - (5.0 + offset / 1000) * bool(self.salt)
            listed = dict(ranked[:1]) | {t: every.get(t, rest - t % 7) for t in wanted if t not in self.drop}
        else:
            listed = dict(ranked[: body["logprobs"]])
        listed = {token: value + (self.logits or 0.0) for token, value in listed.items()}
        by_id = body.get("return_tokens_as_token_ids")
        top = {(f"token_id:{t}" if by_id else named.get(t, f"tok{t}")): lp for t, lp in listed.items()}
        return {"tokens": ["?"], "token_logprobs": [ranked[0][1]], "top_logprobs": [top], "text_offset": [0]}

    def _count_blocks(self, tokens: list[int], salt: str) -> None:
        """Whole blocks are found if the whole prefix up to their end was seen; never the last token."""
        if self.keeps == "nothing":
            return
        prefix, hits, unbroken = hash(salt), 0, True
        seen = []
        for start in range(0, len(tokens) - self.block + 1, self.block):
            prefix = hash((prefix, *tokens[start : start + self.block]))
            unbroken = unbroken and prefix in self._blocks and start + self.block < len(tokens)
            seen.append(prefix)
            if unbroken and (self.keeps == "all" or self._in_window.issuperset(seen[-4:])):
                hits = start + self.block
        self._blocks.update(seen)
        self._in_window.update(seen[-4:])
        self.queries += len(tokens)
        self.hits += hits


def _as_pairs(answer: dict[str, Any], labels: Sequence[int]) -> dict[str, Any]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    tops = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
    pairs = [[top.get(f"token_id:{label}") for label in labels] for top in tops]
    return {"logprobs": pairs, "prompt_tokens": answer["usage"]["prompt_tokens"]}


def _no_template() -> web.Response:
    return web.json_response({"error": {"message": "This model has no chat template.", "code": 400}}, status=400)
