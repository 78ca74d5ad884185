"""A real HTTP proxy between the client and the fake server, that breaks what passes through it, on a plan.

    async with FaultProxy(server.port) as proxy:
        proxy.plan = [Strike("reset_body", at=3, times=2)]     # the third scoring request, and the one after it
        client = VLLMClient(proxy.url, server.model)

It speaks HTTP/1.1 over plain sockets, so that it can do what no web framework would: stop in the middle of a header,
reset a connection, promise more than it sends. It keeps account of every scoring request: which prompts, and whether
the whole honest answer was handed over. `FAULTS` lists what it can do and what the client owes then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Literal, Self

from icm_vllm import prompt_tree

SCORING = ("/v1/completions", prompt_tree.PATH, prompt_tree.ADAPTER_PATH)
Owed = Literal["goes on", "may stop"]
"""What a run owes under a fault that ends: to go on by itself, or to stop with a reason and be resumable."""


@dataclass
class Strike:
    """One planned fault: which kind, from which scoring request on (1-based), for how many of them, how long."""

    kind: str
    at: int
    times: int = 1
    seconds: float = 0.05


@dataclass
class Exchange:
    """One scoring request. delivered: when its whole honest answer had been handed over (loop time), or None."""

    path: str
    prompts: list[tuple[int, ...]]
    kind: str = ""
    delivered: float | None = None


@dataclass
class Passing:
    """A request on its way, as a fault sees it. `answer` is what the server said, decoded, or None."""

    proxy: FaultProxy
    strike: Strike
    writer: asyncio.StreamWriter
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def answer(self) -> Any:
        return json.loads(self.body)

    def head(self, *, status: int | None = None, more: dict[str, str] | None = None) -> bytes:
        changed = {"Content-Length": str(len(self.body)), **(more or {})}
        theirs = {name.lower() for name in changed}
        headers = {**{k: v for k, v in self.headers.items() if k.lower() not in theirs}, **changed}
        lines = [f"HTTP/1.1 {status or self.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()

    async def say(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.body = body
        await self.send(self.head(status=status, more={k.replace("_", "-"): v for k, v in headers.items()}), body)

    async def say_changed(self, answer: Any) -> None:
        # Python writes NaN and Infinity as such, as some servers do.
        self.body = json.dumps(answer).encode()
        await self.send(self.head(), self.body)

    def reset(self) -> None:
        """RST instead of FIN, as a killed peer or a middlebox sends."""
        reset(self.writer)


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Hold(Exception):
    """Raised by a fault that has nothing more to say on this connection."""


# What can happen to an answer. Each takes a Passing, after the server has answered.


async def reset_before(p: Passing) -> None:
    p.reset()
    raise Hold


async def reset_in_headers(p: Passing) -> None:
    await p.send(p.head()[:25])
    p.reset()
    raise Hold


async def reset_in_body(p: Passing) -> None:
    await p.send(p.head(), p.body[: len(p.body) // 2])
    await asyncio.sleep(0.005)  # let it arrive before the reset overtakes it
    p.reset()
    raise Hold


async def closed_in_body(p: Passing) -> None:
    await p.send(p.head(), p.body[: len(p.body) // 3])
    raise Hold


async def truncated_json(p: Passing) -> None:
    p.body = p.body[: len(p.body) // 2]
    await p.send(p.head(), p.body)


async def malformed_json(p: Passing) -> None:
    await p.say(200, b'{"choices": [{"index": 0, "logprobs": {{{')


async def empty_body(p: Passing) -> None:
    await p.say(200, b"")


async def json_of_other_shape(p: Passing) -> None:
    await p.say(200, b"[[[]], null, 3]")


async def not_utf8(p: Passing) -> None:
    await p.say(200, p.body[:50] + b"\xff\xfe\x00" + p.body[50:])


async def deeply_nested(p: Passing) -> None:
    await p.say(200, b"[" * 100_000 + b"]" * 100_000)


async def bad_gzip(p: Passing) -> None:
    p.headers["Content-Encoding"] = "gzip"
    await p.send(p.head(), p.body)


async def bad_chunks(p: Passing) -> None:
    head = p.head().replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nX-Length")
    await p.send(head, b"ZZZ\r\n" + p.body)
    raise Hold


async def not_http(p: Passing) -> None:
    await p.send(b"220 smtp.example.org ESMTP\r\n")
    raise Hold


async def html_page(p: Passing) -> None:
    await p.say(200, b"<html><body>Log in to the guest network</body></html>", Content_Type="text/html")


async def too_few_choices(p: Passing) -> None:
    await p.say_changed(_shorter(p.answer))


async def too_many_choices(p: Passing) -> None:
    answer = p.answer
    items = answer["choices"] if "choices" in answer else answer["logprobs"]
    items.append(items[-1])
    await p.say_changed(answer)


async def doubled_index(p: Passing) -> None:
    answer = p.answer
    if "choices" not in answer or len(answer["choices"]) < 2:
        answer = _shorter(answer)
    else:
        answer["choices"][0]["index"] = answer["choices"][1]["index"]
    await p.say_changed(answer)


async def choices_out_of_order(p: Passing) -> None:
    answer = p.answer
    if "choices" in answer:  # a tree's answers carry no index: their order is all they have
        answer["choices"].reverse()
    await p.say_changed(answer)


async def label_missing(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, None))


async def nan(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, float("nan")))


async def null_for_minus_infinity(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, "null"))


async def minus_infinity(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, float("-inf")))


async def minus_9999(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, -9999.0))


async def above_zero(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, 3.7))


async def logprob_is_text(p: Passing) -> None:
    await p.say_changed(_with_logprob(p.answer, "minus two"))


async def logprobs_left_out(p: Passing) -> None:
    answer = p.answer
    if "choices" in answer:
        answer["choices"][-1]["logprobs"] = {"top_logprobs": []}
    else:
        answer["logprobs"][-1] = []
    await p.say_changed(answer)


async def answer_to_another_request(p: Passing) -> None:
    """What a proxy that mixes up its connections does: a whole, well-formed answer, to other prompts."""
    answer = p.answer
    items = answer["choices"] if "choices" in answer else answer["logprobs"]
    true, false = (f"token_id:{token}" for token in p.proxy.labels)
    for item in items:
        if "choices" in answer:
            item["logprobs"]["top_logprobs"] = [{true: -0.123, false: -2.5}]
        else:
            item[:] = [-0.123, -2.5]
    if "choices" in answer:
        answer["usage"]["prompt_tokens"] += 7
    else:
        answer["prompt_tokens"] += 7
    await p.say_changed(answer)


async def too_many_requests(p: Passing) -> None:
    await p.say(429, b'{"error": {"message": "slow down"}}')


async def retry_after_seconds(p: Passing) -> None:
    await p.say(429, Retry_After="0.1")


async def retry_after_date(p: Passing) -> None:
    now = datetime.now(UTC)
    await p.say(429, Retry_After=format_datetime(now + timedelta(seconds=1), usegmt=True), Date=format_datetime(now))


async def retry_after_date_of_a_wrong_clock(p: Passing) -> None:
    """The server's clock is five hours ahead: by ours, it asks for five hours."""
    now = datetime.now(UTC) + timedelta(hours=5)
    date = format_datetime(now, usegmt=True)
    await p.say(503, Retry_After=format_datetime(now + timedelta(seconds=1), usegmt=True), Date=date)


async def retry_after_nonsense(p: Passing) -> None:
    await p.say(429, Retry_After="soon, and NaN")


async def http_408(p: Passing) -> None:
    await p.say(408)


async def http_500(p: Passing) -> None:
    await p.say(500, b'{"error": {"message": "EngineDeadError"}}')


async def http_502(p: Passing) -> None:
    await p.say(502, b"<html>Bad Gateway</html>", Content_Type="text/html")


async def http_503(p: Passing) -> None:
    await p.say(503, Retry_After="0")


async def http_504(p: Passing) -> None:
    await p.say(504, b"")


async def http_400(p: Passing) -> None:
    await p.say(400, b'{"error": {"message": "bad request"}}')


async def http_404(p: Passing) -> None:
    await p.say(404, b'{"detail": "Not Found"}')


async def redirect(p: Passing) -> None:
    await p.say(307, b"", Location="http://127.0.0.1:1/v1/completions")


async def slow_headers(p: Passing) -> None:
    await asyncio.sleep(p.strike.seconds)
    await p.send(p.head(), p.body)


async def slow_body(p: Passing) -> None:
    step = max(1, len(p.body) // 8)
    await p.send(p.head())
    for start in range(0, len(p.body), step):
        await asyncio.sleep(p.strike.seconds / 8)
        await p.send(p.body[start : start + step])


async def stall(p: Passing) -> None:
    """Longer than the client waits; others are answered meanwhile."""
    await asyncio.sleep(p.proxy.stall)
    raise Hold


async def stall_in_body(p: Passing) -> None:
    await p.send(p.head(), p.body[: len(p.body) // 2])
    await asyncio.sleep(p.proxy.stall)
    raise Hold


async def host_falls_silent(p: Passing) -> None:
    """Connections stay open, new ones are accepted, and nothing is answered at all: a host that hangs."""
    p.proxy.silent_until = asyncio.get_running_loop().time() + p.proxy.silence
    await asyncio.sleep(p.proxy.stall)
    raise Hold


async def endless_body(p: Passing) -> None:
    """An answer that does not end, as fast as it is read."""
    await p.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(p.proxy.endless // 2**20):
            await p.send(b" " * 2**20)
    raise Hold


async def closed_after(p: Passing) -> None:
    """The answer, then a reset of the connection that the client keeps for the next request."""
    await p.send(p.head(), p.body)
    raise Hold


async def reset_when_reused(p: Passing) -> None:
    """The answer; then the kept connection is reset as soon as the next request is on it."""
    await p.send(p.head(), p.body)
    p.proxy.reset_on_next.add(p.writer)


async def refused(p: Passing) -> None:
    """The server goes away, and comes back as it was."""
    await p.proxy.go_away(p.strike.seconds)
    raise Hold


async def restart_as_another(p: Passing) -> None:
    """The server goes away in the middle of an answer, and comes back with another model or version (`swap`)."""
    await p.proxy.go_away(p.strike.seconds, swap=True)
    raise Hold


async def restart_between_requests(p: Passing) -> None:
    """The answer arrives; then every connection is closed and the next one meets another model or version (`swap`)."""
    await p.send(p.head(), p.body)
    await p.proxy.go_away(0.0, swap=True, politely=True)
    raise Hold


@dataclass(frozen=True)
class Kind:
    """act: what happens. honest: whether the whole honest answer arrives all the same. owed: see Owed."""

    act: Callable[[Passing], Awaitable[None]]
    owed: Owed = "goes on"
    honest: bool = False


FAULTS: dict[str, Kind] = {
    **{
        act.__name__: Kind(act)
        for act in (
            *(reset_before, reset_in_headers, reset_in_body, closed_in_body, truncated_json, malformed_json),
            *(empty_body, json_of_other_shape, not_utf8, deeply_nested, bad_gzip, bad_chunks, not_http, html_page),
            *(too_few_choices, too_many_choices, doubled_index, above_zero, logprob_is_text, logprobs_left_out),
            *(answer_to_another_request, too_many_requests, retry_after_seconds, retry_after_date),
            *(retry_after_date_of_a_wrong_clock, retry_after_nonsense, http_408, http_500, http_502, http_503),
            *(http_504, stall, stall_in_body, host_falls_silent, refused, endless_body),
        )
    },
    **{act.__name__: Kind(act, honest=True) for act in (closed_after, reset_when_reused, slow_headers, slow_body)},
    "choices_out_of_order": Kind(choices_out_of_order, honest=True),
    "restart_between_requests": Kind(restart_between_requests, "may stop", honest=True),
    **{
        act.__name__: Kind(act, "may stop")
        for act in (
            *(label_missing, nan, null_for_minus_infinity, minus_infinity, minus_9999, http_400, http_404, redirect),
            restart_as_another,
        )
    },
}


SLOW_KINDS = ("host_falls_silent", "stall", "stall_in_body", "endless_body")
"""Kinds that take one of the client's timeouts each, or a lot of bytes; at most once in a plan."""


class FaultProxy:
    """`plan` decides what happens to which scoring request; `exchanges` is the account. One loop, many connections.

    stall: seconds a stalled answer holds its connection. silence: how long a host that falls silent stays so.
    swap: called when the server is to come back as another; strange: it has, and what it answers now is not what the
    run asked for. labels: token ids of True and False.
    """

    def __init__(self, upstream: int, *, labels: tuple[int, int], stall: float = 8.0, silence: float = 4.0) -> None:
        self.upstream = upstream
        self.labels = labels
        self.stall, self.silence = stall, silence
        self.endless = 2**40
        self.plan: list[Strike] = []
        self.exchanges: list[Exchange] = []
        self.struck: list[str] = []
        self.swap: Callable[[], None] = lambda: None
        self.silent_until = 0.0
        self.strange = False
        self.reset_on_next: set[asyncio.StreamWriter] = set()
        self.connections = 0
        self.paths: list[str] = []
        self.port = 0
        self._scored = 0
        self._server: asyncio.Server | None = None
        self._changing = asyncio.Lock()
        self._open: set[asyncio.StreamWriter] = set()
        self._returning: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._returning:
            task.cancel()
        await self._close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    def renew(self, plan: list[Strike]) -> None:
        """Forget the last run and plan the next."""
        self.plan, self.exchanges, self.struck, self._scored = plan, [], [], 0
        self.silent_until = 0.0
        self.strange = False
        self.paths = []

    async def go_away(self, seconds: float, *, swap: bool = False, politely: bool = False) -> None:
        """Refuse connections for a while, and cut those that are open."""
        await self._close()
        for writer in list(self._open):
            writer.close() if politely else reset(writer)
        if swap:
            self.swap()

        if seconds:
            task = asyncio.create_task(self.come_back(seconds))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
        else:
            await self._listen()

    async def come_back(self, seconds: float = 0.0) -> None:
        """Accept connections again."""
        await asyncio.sleep(seconds)
        await self._listen()

    async def _listen(self) -> None:
        async with self._changing:
            if self._server is None:
                await self._open_port()

    async def _open_port(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**22)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            while await self._pass_one(reader, writer):
                pass
        except (Hold, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            self.reset_on_next.discard(writer)
            writer.close()

    async def _pass_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, headers = _parse_head(head)
        body = await _read_body(reader, headers)
        if writer in self.reset_on_next:
            reset(writer)
            return False
        loop = asyncio.get_running_loop()
        self.paths.append(path)
        if loop.time() < self.silent_until:
            await asyncio.sleep(self.stall)
            return False
        exchange = None
        strike = None
        if method == "POST" and path in SCORING:
            prompts = _prompts(path, body)
            if len(prompts) > 1 or len(prompts[0]) > 8:  # not the canary
                self._scored += 1
                exchange = Exchange(path, prompts)
                self.exchanges.append(exchange)
                strike = self._next_strike()
        status, answered, content = await self._forward(head, body)
        kept = {k: v for k, v in answered.items() if k.lower() in ("content-type", "date", "server")}
        if strike is None:
            passing = Passing(self, Strike("", 0), writer, status, kept, content)
            await passing.send(passing.head(), content)
        else:
            assert exchange is not None
            exchange.kind = strike.kind
            self.struck.append(strike.kind)
            kind = FAULTS[strike.kind]
            if kind.honest and status == 200 and not self.strange:
                exchange.delivered = loop.time()
            try:
                await kind.act(Passing(self, strike, writer, status, kept, content))
            except ConnectionError:  # the client has hung up: it did not take the answer
                exchange.delivered = None
                raise
            return True
        if exchange is not None and status == 200 and not self.strange:
            exchange.delivered = loop.time()
        return True

    def _next_strike(self) -> Strike | None:
        for strike in self.plan:
            if strike.times > 0 and self._scored >= strike.at:
                strike.times -= 1
                return strike
        return None

    async def _forward(self, head: bytes, body: bytes) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream, limit=2**26)
        try:
            ours = (b"connection:", b"transfer-encoding:", b"accept-encoding:")
            lines = [line for line in head.rstrip().split(b"\r\n") if not line.lower().startswith(ours)]
            if b"content-length" not in head.lower() and body:
                lines.append(b"Content-Length: %d" % len(body))
            writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            headers = _headers(answer)
            return int(answer.split(b" ", 2)[1]), headers, await _read_body(reader, headers)
        finally:
            writer.close()


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
    return method, path, _headers(head)


def _headers(head: bytes) -> dict[str, str]:
    pairs = (line.decode("latin-1").partition(":") for line in head.rstrip().split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", ""):
        pieces = []
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            pieces.append(await reader.readexactly(size))
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
        return b"".join(pieces)
    return await reader.readexactly(int(headers.get("content-length", 0)))


def _prompts(path: str, body: bytes) -> list[tuple[int, ...]]:
    if path != "/v1/completions":
        tree, *_ = prompt_tree.read_request(body)
        return [tuple(ids) for ids, _ in tree.prompts()]
    prompt = json.loads(body)["prompt"]
    return [tuple(map(ord, p)) if isinstance(p, str) else tuple(p) for p in prompt]


def _shorter(answer: Any) -> Any:
    if "choices" in answer:
        answer["choices"] = answer["choices"][1:]
    else:
        answer["logprobs"] = answer["logprobs"][1:]
    return answer


def _with_logprob(answer: Any, value: object) -> Any:
    """The last prompt's log P(False) changed; None leaves it out, "null" writes null."""
    if "choices" in answer:
        [top] = answer["choices"][-1]["logprobs"]["top_logprobs"]
        key = f"token_id:{_FALSE}"
        if value is None:
            top.pop(key, None)
        else:
            top[key] = None if value == "null" else value
    else:
        answer["logprobs"][-1][1] = None if value in (None, "null") else value
    return answer


_FALSE = 7983  # of the fake server; a real one is asked for trees
