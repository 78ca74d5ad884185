"""The application's outer wall: who may ask, how much at once, how large, how long, and what a shutdown does.

An ASGI middleware that reads a request's body itself, within its limits, before anything behind it starts to work. The
order is cheapest first: token, shutdown, concurrency, kind and size of the body. Requests whose client has left are
cancelled, which closes the connection to the model, which stops computing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from pydantic import SecretStr

from contrib.serving.metrics import ServingMetrics
from contrib.serving.options import Limits

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN: Final = ("/health", "/ready")
"""Asked by probers, who carry no token."""
UNLIMITED: Final = (*OPEN, "/metrics")
"""Answered also when every place is taken: else a busy application would look like a dead one."""
ROUTES: Final = (*UNLIMITED, "/query", "/score", "/openapi.json")


LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 32 * 1024 * 1024


class Refusal(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, reason: str, message: str, headers: Iterable[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.reason, self.headers = status, reason, tuple(headers)


class Guard:
    """Wraps `app`. token: None lets everyone in. Not shared between event loops."""

    def __init__(self, app: App, limits: Limits, token: SecretStr | None, metrics: ServingMetrics) -> None:
        self._app = app
        self._limits = limits
        self._token = None if token is None else _digest(token.get_secret_value().encode())
        self._metrics = metrics
        self._at_work: set[asyncio.Task[None]] = set()
        self._places = limits.concurrent
        self._mean_seconds = 1.0
        self._draining = False

    @property
    def draining(self) -> bool:
        """Whether the application was asked to end."""
        return self._draining

    def drain(self) -> None:
        """Take no more requests, and stop those at work once shutdown_seconds have passed. Returns at once."""
        if not self._draining:
            self._draining = True
            asyncio.get_running_loop().call_later(self._limits.shutdown_seconds, self._stop_all)

    def _stop_all(self) -> None:
        for task in self._at_work:
            task.cancel()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; the start and end of the application pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        route = scope["path"] if scope["path"] in ROUTES else "other"
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                await self._admit(scope, route, receive, counted)
            except (Refusal, asyncio.CancelledError) as error:
                # Only the server cancels this task, when it ends; uvicorn would log a traceback and answer 500.
                refusal = error if isinstance(error, Refusal) else _stopped()
                self._metrics.refused.labels(refusal.reason).inc()
                if status == 0:  # else it came too late: the client sees a broken answer
                    await _answer(counted, refusal)
        finally:
            seconds = time.monotonic() - start
            self._metrics.requests.labels(route, str(status or "none")).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            # Without the query string, in which some clients send their keys.
            log.info("%s %s %s %.3f s", scope["method"], route, status or "no answer", seconds)

    async def _admit(self, scope: Message, route: str, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if route not in OPEN:
            self._check_token(headers.get(b"authorization", b""))
        if route in UNLIMITED:
            await self._run(scope, b"", receive, send)
            return
        if self._draining:
            raise Refusal(503, "draining", "the server is being stopped", [("Retry-After", "5")])
        if self._places == 0:
            wait = str(min(60, math.ceil(self._mean_seconds)))
            message = f"{self._limits.concurrent} requests are at work already"
            raise Refusal(429, "busy", message, [("Retry-After", wait)])
        self._places -= 1
        self._metrics.in_flight.inc()
        start = time.monotonic()
        try:
            body = await self._body(scope, headers, receive)
            await self._run(scope, body, receive, send)
            self._mean_seconds += 0.1 * (time.monotonic() - start - self._mean_seconds)
        finally:
            self._places += 1
            self._metrics.in_flight.dec()

    def _check_token(self, given: bytes) -> None:
        if self._token is None:
            return
        scheme, _, token = given.partition(b" ")
        # Digests, so that neither the time nor an error depends on the length or the bytes of what was given.
        if not hmac.compare_digest(_digest(token), self._token) or scheme.lower() != b"bearer":
            raise Refusal(401, "token", "a valid bearer token is needed", [("WWW-Authenticate", "Bearer")])

    async def _body(self, scope: Message, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self._limits.body_bytes
        large = Refusal(413, "size", f"the body is larger than {limit} bytes", [("Connection", "close")])
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > limit:
            if b"expect" not in headers:  # else the client waits for our word before it sends anything
                await _discard(receive)
            raise large
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(499, "left", "the client left")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > limit:
                        await _discard(receive)
                        raise large
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            seconds = f"{self._limits.body_seconds:g}"
            close = [("Connection", "close")]
            raise Refusal(408, "slow body", f"the body did not arrive within {seconds} s", close) from None
        body = b"".join(pieces)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if body and kind != b"application/json":
            raise Refusal(415, "content type", "the body must be JSON, sent as application/json")
        return body

    async def _run(self, scope: Message, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application work until it is done, its time is over, its client has left, or it is stopped."""
        left = asyncio.Event()
        given = False

        async def replay() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        task = asyncio.create_task(_call(self._app, scope, replay, send))
        leaving = asyncio.create_task(_until_left(receive))
        self._at_work.add(task)
        try:
            done, _ = await asyncio.wait(
                (task, leaving), timeout=self._limits.request_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                _settle(task)
                return
            left.set()
            if leaving in done:
                raise Refusal(499, "left", "the client left")
            message = f"no answer within {self._limits.request_seconds:g} s"
            raise Refusal(504, "time", message)
        finally:
            leaving.cancel()
            task.cancel()  # does nothing to a finished one
            await asyncio.wait((task, leaving))
            self._at_work.discard(task)


def _stopped() -> Refusal:
    return Refusal(503, "stopped", "the server was stopped", [("Retry-After", "5")])


def _settle(task: asyncio.Task[None]) -> None:
    """Raise a Refusal where the application did not get to its end; what it raised itself is in the log already."""
    if task.cancelled():  # by the guard's clock or, at a second Ctrl-C, by the end of the event loop
        raise _stopped()
    if task.exception() is not None:
        raise Refusal(500, "error", "internal error")


async def _discard(receive: Receive) -> None:
    """Read on for a moment: closed while the client still sends, the connection would lose the answer on its way."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while size < LINGER_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _call(app: App, scope: Message, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _answer(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"error": str(refusal), "details": []}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *refusal.headers]
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
