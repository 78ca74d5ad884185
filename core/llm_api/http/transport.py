"""One HTTP server: a session, a bounded number of requests in flight, and a typed error for everything that goes wrong.

The only file that touches aiohttp on the client's side and the only one that sees a key. `send` is one attempt; `call`
puts a concurrency slot and retries around an attempt, parsing included, so that a truncated body is asked for again.

An answer may take minutes, so silence on one connection means little. While requests are out, the server is asked for a
sign of life on another connection; if it gives none for about a minute, all its requests are given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Final, TypeVar

import aiohttp
from pydantic import SecretStr

from core.errors import (
    APIError,
    TransientError,
)
from core.llm_api.http.retry import RetryPolicy, with_retries
from core.llm_api.http.server_errors import connection_error, server_message, status_error
from core.llm_api.telemetry import RequestTelemetry, outcome_of
from core.settings import Settings

log = logging.getLogger(__name__)
T = TypeVar("T")

KEEPALIVE: Final = 4.0
"""Seconds an idle connection is kept. vLLM (uvicorn) closes its end after 5 s; reusing one then resets the request."""
MAX_ANSWER: Final = 64 * 2**20
"""Most bytes of an answer that are read: 1,024 prompts with 20 alternatives each are 3 MB."""
LOOK: Final = 1.0
"""Seconds between checks that a connection whose answer has begun is still open."""
PROBES: Final = 6
"""How often a silent server is asked for a sign of life until it is given up."""
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 15, 5, 4
"""TCP keepalive, seconds and probes: the kernel notices in 35 s that the other end of a connection is gone."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How patient and how parallel a client is. Timeouts in seconds; there is no total timeout, on purpose.

    read_timeout: without a byte on one connection. liveness_timeout: without any sign of life from a server that has
    requests out, on any connection.
    """

    connect_timeout: float = 10.0
    read_timeout: float = 900.0
    liveness_timeout: float = 60.0
    max_concurrent_requests: int = 64
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def of(cls, settings: Settings) -> HttpOptions:
        """The options in the user's settings."""
        return cls(
            connect_timeout=settings.connect_timeout,
            read_timeout=settings.read_timeout,
            max_concurrent_requests=settings.max_concurrent_requests,
            liveness_timeout=settings.liveness_timeout,
            retry=RetryPolicy(
                max_attempts=settings.max_attempts, deadline=settings.retry_deadline, base=settings.retry_base
            ),
        )


@dataclass(frozen=True, slots=True)
class Pieces:
    """A large body that is made while it is sent, so that a slow server keeps only one piece of it in memory.

    size: bytes in all; make: yields the same pieces at every call, each large enough for a write.
    """

    size: int
    make: Callable[[], Iterator[bytes]]

    def __len__(self) -> int:
        return self.size


class _PiecesPayload(aiohttp.Payload):
    """Pieces as an aiohttp payload. It waits after every write until the connection takes more."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces, content_type="application/json")
        self._size = pieces.size

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._value.make()).decode(encoding, errors)

    async def write(self, writer: aiohttp.abc.AbstractStreamWriter) -> None:
        for piece in self._value.make():
            await writer.write(piece)
            await asyncio.sleep(0)  # a fast server would keep everyone else waiting


class HttpTransport:
    """Requests to one server. `key_name` is the setting that holds the key, for hints; `absent` says how to get one.

    alive: a path that a live server answers at once, with any status; "" asks for no sign of life.
    bytes_sent: bytes of all request bodies handed to the connection so far, retries included, headers not.
    epoch: raised whenever the server may have been replaced since the last answer: an attempt failed, or a connection
    was opened while none was open. What is known about the server holds for one epoch and must be checked in the next.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: SecretStr | None,
        key_name: str,
        options: HttpOptions,
        absent: str = "",
        alive: str = "",
    ) -> None:
        self.base_url = base_url
        self.contacted = False
        self.bytes_sent = 0
        self.telemetry = RequestTelemetry(base_url)
        self.epoch = 0
        self._alive = alive
        self._sockets: list[socket.socket] = []
        self._out: set[asyncio.Timeout] = set()
        self._silenced: set[asyncio.Timeout] = set()
        self._last_sign = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._probe: asyncio.Task[None] | None = None
        self._key = key
        self._key_name = key_name
        self._options = options
        self._absent = absent
        self._slots = asyncio.Semaphore(options.max_concurrent_requests)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"HttpTransport({self.base_url!r})"

    @property
    def read_timeout(self) -> float:
        """Seconds that a live server may keep silent within an answer."""
        return self._options.read_timeout

    async def call(
        self,
        attempt: Callable[[], Awaitable[T]],
        *,
        admitted: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        retry: RetryPolicy | None = None,
    ) -> tuple[T, int]:
        """Run `attempt` in a slot, with retries: (result, retries). The slot is free while waiting to retry.

        admitted: entered around each attempt, in its slot; waiting for it does not count as the attempt's latency.
        retry: in place of the options' policy.
        """
        tries = 0

        async def in_slot() -> T:
            nonlocal tries
            tries += 1
            await self._take_slot(again=tries > 1)
            began, outcome = None, "ok"
            try:
                async with self._turn(admitted):
                    began = self.telemetry.begin()
                    return await attempt()
            except BaseException as error:  # only to name it
                outcome = outcome_of(error)
                raise
            finally:
                self._free_slot(began, outcome)

        return await with_retries(in_slot, retry or self._options.retry, contacted=lambda: self.contacted)

    async def _take_slot(self, *, again: bool) -> None:
        with self.telemetry.waits(self.telemetry.queue):
            await self._slots.acquire()
        self.telemetry.retries += again

    @asynccontextmanager
    async def _turn(self, admitted: Callable[[], AbstractAsyncContextManager[None]]) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            with self.telemetry.waits(self.telemetry.limited):
                await stack.enter_async_context(admitted())
            yield

    def _free_slot(self, began: float | None, outcome: str) -> None:
        self.telemetry.end(began, outcome)
        self._slots.release()

    async def send(self, method: str, path: str, body: bytes | Pieces | None = None, *, request_id: str = "") -> bytes:
        """One attempt: the body of a 2xx answer. Raises a typed APIError for everything else.

        request_id: sent as X-Request-Id, by which servers name the request in their log.
        """
        url = self.base_url + path
        async with self._wait(url) as patience, await self._request(method, url, body, request_id) as response:
            content = await self._content(response, patience)
        if content is None:
            raise self._too_long(url)
        if 200 <= response.status < 300:
            return content
        raise self._status_error(response.status, content, response.headers, url)

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        body: bytes,
        *,
        request_id: str = "",
        admitted: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        retry: RetryPolicy | None = None,
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Chunks of a 2xx answer as they come. Retried until its headers are there; holds a slot until it is left.

        A server that falls silent is given up as in `send`; the time that the caller takes for a chunk does not count.
        Leaving before the end closes the connection, which tells the server to stop. admitted: entered around
        each attempt. retry: in place of the options' policy. Raises a typed APIError for everything that goes wrong.
        """
        url = self.base_url + path
        tries = 0

        async def attempt() -> tuple[aiohttp.ClientResponse, float]:
            nonlocal tries
            tries += 1
            await self._take_slot(again=tries > 1)
            began = None
            try:
                async with self._turn(admitted):
                    began = self.telemetry.begin()
                    return await self._opened(url, body, request_id), began
            except BaseException as error:  # also a cancelled wait: the slot is given back
                self._free_slot(began, outcome_of(error))
                raise

        patience = retry or self._options.retry
        (response, began), _ = await with_retries(attempt, patience, contacted=lambda: self.contacted)
        outcome = "ok"
        try:
            async with aclosing(self._chunks(response, url)) as chunks:
                yield chunks
        except BaseException as error:  # only to name it
            outcome = outcome_of(error)
            raise
        finally:
            response.close()
            self._free_slot(began, outcome)

    async def _opened(self, url: str, body: bytes, request_id: str) -> aiohttp.ClientResponse:
        async with self._wait(url) as patience:
            response = await self._request("POST", url, body, request_id)
            self.contacted = True
            if 200 <= response.status < 300:
                return response
            async with response:
                content = await self._content(response, patience)
        if content is None:
            raise self._too_long(url)
        raise self._status_error(response.status, content, response.headers, url)

    async def _chunks(self, response: aiohttp.ClientResponse, url: str) -> AsyncGenerator[bytes, None]:
        size = 0
        while True:
            async with self._wait(url) as patience:
                patience.reschedule(None)
                chunk = await _chunk(response, self._options.read_timeout)
                self._note_sign()
            if not chunk:
                return
            size += len(chunk)
            if size > MAX_ANSWER:
                raise self._too_long(url)
            yield chunk

    @asynccontextmanager
    async def _wait(self, url: str) -> AsyncIterator[asyncio.Timeout]:
        """Around a wait for the server, which ends when the server is given up; errors become typed APIErrors."""
        # aiohttp's own timeouts come first; this one ends waits that they miss.
        patience = asyncio.timeout(self._options.connect_timeout + 2 * self._options.read_timeout)
        try:
            async with patience:
                with self._watched(patience):
                    yield patience
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.epoch += 1
            if patience in self._silenced:
                raise self._given_up() from None
            raise self._connection_error(error, url) from None

    async def _content(self, response: aiohttp.ClientResponse, patience: asyncio.Timeout) -> bytes | None:
        """The whole body; None where it is longer than MAX_ANSWER."""
        self.contacted = True
        self._note_sign()
        patience.reschedule(None)
        content = await _read(response, self._options.read_timeout)
        self._note_sign()
        return content

    async def _request(
        self, method: str, url: str, body: bytes | Pieces | None, request_id: str
    ) -> aiohttp.ClientResponse:
        # BytesIO is written in pieces; one `bytes` of many MB would block the event loop, and aiohttp warns of it.
        payload = io.BytesIO(body) if isinstance(body, bytes) else None if body is None else _PiecesPayload(body)
        self.bytes_sent += len(body or b"")
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if request_id:
            headers["X-Request-Id"] = request_id
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        # A redirect would carry the key to another host, so none is followed.
        return await self._open().request(method, url, data=payload, headers=headers, allow_redirects=False)

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        probe, self._probe = self._probe, None
        if probe is not None:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # The slots limit the number of requests; a second limit in the connector could only starve /metrics.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE, socket_factory=self._make_socket)
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=self._options.connect_timeout, sock_read=self._options.read_timeout
            )
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    def _make_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = address
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", KEEPALIVE_IDLE),
            ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL),
            ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ):
            if hasattr(socket, name):  # not everywhere
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._sockets = [sock for sock in self._sockets if sock.fileno() != -1]
        if not self._sockets:
            self.epoch += 1
        self._sockets.append(made)
        return made

    @contextlib.contextmanager
    def _watched(self, patience: asyncio.Timeout) -> Iterator[None]:
        """End `patience` when the server is given up."""
        if not self._out:
            self._note_sign()
            self._set_alarm()
        self._out.add(patience)
        try:
            yield
        finally:
            self._out.discard(patience)
            if not self._out and self._alarm is not None:
                self._alarm.cancel()

    def _note_sign(self) -> None:
        self._last_sign = asyncio.get_running_loop().time()

    def _set_alarm(self) -> None:
        if self._alive:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_at(loop.time() + self._options.liveness_timeout / PROBES, self._look_for_life)

    def _look_for_life(self) -> None:
        """While requests are out and no sign of life comes, ask for one, one question at a time."""
        assert self._alarm is not None
        now, wait = asyncio.get_running_loop().time(), self._options.liveness_timeout / PROBES
        if now - self._alarm.when() > wait:  # this process was stopped: answers may be waiting unread
            self._note_sign()
        self._set_alarm()
        if now - self._last_sign >= wait and (self._probe is None or self._probe.done()):
            self._probe = asyncio.create_task(self._ask_for_life(), name=f"sign of life of {self.base_url}")

    async def _ask_for_life(self) -> None:
        loop = asyncio.get_running_loop()
        limit = self._options.liveness_timeout
        try:
            async with asyncio.timeout(limit / PROBES):
                async with self._open().get(self.base_url + self._alive, allow_redirects=False):
                    self._note_sign()
        except (aiohttp.ClientError, TimeoutError, OSError):
            if loop.time() - self._last_sign >= limit:
                self._silenced = set(self._out)
                for patience in self._out:
                    patience.reschedule(loop.time())
                self._note_sign()  # the next request has the full time again

    def _given_up(self) -> APIError:
        silent = self._options.liveness_timeout
        return TransientError(
            f"{self.base_url} gave no sign of life for {silent:g} s.",
            hint="Raise liveness_timeout if it is only busy.",
        )

    def _too_long(self, url: str) -> APIError:
        self.epoch += 1
        return TransientError(f"the answer of {url} is longer than {MAX_ANSWER / 2**20:.0f} MiB.")

    def _connection_error(self, error: Exception, url: str) -> APIError:
        silence = self._options.read_timeout
        return connection_error(error, url, self.base_url, absent=self._absent, silence=silence)

    def _status_error(self, status: int, content: bytes, headers: Mapping[str, str], url: str) -> APIError:
        if status >= 500:  # a server that is stopping or starting, or a proxy before it
            self.epoch += 1
        said = self._redact(server_message(content))
        return status_error(status, said, headers, url, key_name=self._key_name, has_key=self._key is not None)

    def _redact(self, text: str) -> str:
        """Without the key: servers often repeat one that they refuse."""
        key = self._key.get_secret_value() if self._key is not None else ""
        return text.replace(key, "***") if key else text


async def _read(response: aiohttp.ClientResponse, silence: float) -> bytes | None:
    """The whole body; None where it is longer than MAX_ANSWER. silence: seconds without a byte."""
    content = bytearray()
    while chunk := await _chunk(response, silence):
        content += chunk
        if len(content) > MAX_ANSWER:
            response.close()
            return None
    return bytes(content)


async def _chunk(response: aiohttp.ClientResponse, silence: float) -> bytes:
    """The next bytes of the body, at least one; b"" at its end. silence: seconds without one.

    Checks that the connection is still open: where it breaks off after a malformed chunk, aiohttp (3.14) lets the
    reader wait for ever.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        look = asyncio.timeout(min(LOOK, silence))
        try:
            async with look:
                return await response.content.readany()
        except TimeoutError:
            if not look.expired() or loop.time() - began >= silence:
                raise
            if response.connection is None or response.connection.transport is None:
                raise aiohttp.ClientPayloadError from None
