"""What only plain sockets can do to a client: hang, fall silent, say too much. Every wait has an end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from core.errors import RateLimited, RequestRejected, ServerUnreachable, TransientError
from core.llm_api.http import transport
from core.llm_api.http.completions import token_pieces
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions, HttpTransport, Pieces
from core.llm_api.types import Prompt, Segment

Answer = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """A server that answers each request as told, until its connection ends."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await answer(head.split(b" ")[1].decode(), reader, writer)
                await writer.drain()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def client(url: str, **options: float) -> AsyncIterator[HttpTransport]:
    http = HttpTransport(url, key=None, key_name="KEY", options=HttpOptions(**options), alive="/health")
    yield http
    await http.aclose()


async def test_a_malformed_chunk_before_the_connection_closes_is_an_error_and_no_endless_wait() -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await writer.drain()
        await asyncio.sleep(0.05)  # the head is read; the rest meets a reader that waits
        writer.write(b"ZZZ\r\n{}")
        await writer.drain()
        writer.close()

    async with serving(answer) as url, client(url, read_timeout=60) as http, asyncio.timeout(10):
        with pytest.raises(TransientError, match="broke"):
            await http.send("GET", "/x")


async def test_a_server_that_falls_silent_is_given_up_long_before_the_read_timeout() -> None:
    silent = False

    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal silent
        if path == "/x":
            silent = True
        if silent:
            await asyncio.Event().wait()
        writer.write(OK)

    async with serving(answer) as url, client(url, read_timeout=60, liveness_timeout=0.5) as http:
        await http.send("GET", "/first")
        began = time.monotonic()
        with pytest.raises(TransientError, match=r"no sign of life for 0\.5 s"):
            await http.send("GET", "/x")
        assert 0.4 < time.monotonic() - began < 5


async def test_a_slow_honest_answer_of_a_server_that_gives_signs_of_life_is_waited_for() -> None:
    asked = []

    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(path)
        if path == "/x":
            await asyncio.sleep(2)
        writer.write(OK if path == "/x" else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    async with serving(answer) as url, client(url, read_timeout=60, liveness_timeout=0.6) as http:
        assert await http.send("GET", "/x") == b"{}"
    assert asked.count("/health") >= 2
    assert set(asked) == {"/x", "/health"}


async def test_a_client_that_was_stopped_itself_blames_nobody() -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            time.sleep(1)  # the whole process stands still, as under SIGSTOP or on a starved machine
        else:
            await asyncio.sleep(1.5)
        writer.write(OK)

    async with serving(answer) as url, client(url, read_timeout=60, liveness_timeout=0.6) as http:
        assert await http.send("GET", "/x") == b"{}"


async def test_no_sign_of_life_is_asked_for_while_answers_come() -> None:
    asked = []

    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(path)
        writer.write(OK)

    async with serving(answer) as url, client(url, liveness_timeout=0.6) as http:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            await http.send("GET", "/x")
        await asyncio.sleep(0.3)  # nothing is out: nothing to ask about
    assert set(asked) == {"/x"}


async def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER", 2**20)
    sent = 0

    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(CHUNKED)
        while True:
            writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent += 65536
            await writer.drain()

    async with serving(answer) as url, client(url) as http, asyncio.timeout(20):
        with pytest.raises(TransientError, match="longer than 1 MiB"):
            await http.send("GET", "/x")
        assert sent < 64 * 2**20


async def test_bytes_that_trickle_are_waited_for_and_a_pause_is_not() -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        for _ in range(4):
            await writer.drain()
            await asyncio.sleep(0.3)
            writer.write(b"1")
            if path == "/pause":
                await asyncio.sleep(30)

    async with serving(answer) as url, client(url, read_timeout=1) as http, asyncio.timeout(20):
        assert await http.send("GET", "/trickle") == b"1111"
        with pytest.raises(TransientError, match="sent nothing for 1 s"):
            await http.send("GET", "/pause")


async def test_retry_after_as_a_date_is_read_by_the_servers_own_clock() -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = datetime.now(UTC) + timedelta(hours=5)
        date, then = (format_datetime(time, usegmt=True) for time in (ahead, ahead + timedelta(seconds=7)))
        head = f"HTTP/1.1 429 Slow\r\nDate: {date}\r\nRetry-After: {then}\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())

    async with serving(answer) as url, client(url) as http:
        with pytest.raises(RateLimited) as limited:
            await http.send("GET", "/x")
    assert limited.value.retry_after == 7


async def test_connections_are_kept_alive_by_the_kernel() -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async with serving(answer) as url, client(url) as http:
        await http.send("GET", "/x")
        [sock] = http._sockets
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == transport.KEEPALIVE_IDLE


async def test_a_new_era_begins_where_another_server_may_answer() -> None:
    refuse = False

    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n" if refuse else OK)
        if path == "/last":
            await writer.drain()
            writer.close()

    async with serving(answer) as url, client(url) as http:
        await http.send("GET", "/x")
        epoch = http.epoch
        await asyncio.gather(*(http.send("GET", "/x") for _ in range(5)))  # more connections, while one stands
        assert http.epoch == epoch
        refuse = True
        with pytest.raises(TransientError):
            await http.send("GET", "/x")
        assert http.epoch == epoch + 1
        refuse = False
    async with serving(answer) as url, client(url) as http:
        await http.send("GET", "/last")
        await asyncio.sleep(0.05)
        epoch = http.epoch
        await http.send("GET", "/x")
        assert http.epoch == epoch + 1


async def test_no_redirect_is_followed_so_no_key_goes_elsewhere() -> None:
    reached = []

    async def elsewhere(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(path)
        writer.write(OK)

    async with serving(elsewhere) as other:

        async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(f"HTTP/1.1 307 Go\r\nLocation: {other}/x\r\nContent-Length: 0\r\n\r\n".encode())

        async with serving(answer) as url, client(url) as http:
            with pytest.raises(RequestRejected, match="Redirects are not followed"):
                await http.send("POST", "/x", b"{}")
    assert not reached


async def test_a_name_that_cannot_be_resolved_in_mid_run_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async with serving(answer) as url:
        port = int(url.rpartition(":")[2])
        real, failures = socket.getaddrinfo, 0

        def resolve(host: str, *arguments: object, **more: object) -> object:
            nonlocal failures
            if host == "server.example" and failures:
                failures -= 1
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            return real("127.0.0.1" if host == "server.example" else host, *arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        async with client(f"http://server.example:{port}", retry=RetryPolicy(5, base=0.01)) as http:  # type: ignore[arg-type]
            failures = 1
            with pytest.raises(ServerUnreachable):  # never reached: a wrong name, most probably
                await http.call(lambda: http.send("GET", "/x"))
            await http.call(lambda: http.send("GET", "/x"))
            assert http._session is not None
            connector = http._session.connector
            connector.clear_dns_cache()  # type: ignore[union-attr]
            for held in list(http._sockets):
                with contextlib.suppress(OSError):
                    held.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(0.05)
            failures = 3
            _, retries = await http.call(lambda: http.send("GET", "/x"))
            assert retries == 3


# A server that takes its time


async def test_requests_that_a_server_does_not_take_hold_no_bodies() -> None:
    """200 questions of 12 MB each: 2.4 GB, if what waits were encoded; 770 MB, if what is in flight were."""
    shared = Segment("demonstrations", list(range(100_000, 110_000)))
    pool = [Prompt((shared, Segment("q", [i]))) for i in range(180)]
    at_once = 64
    out = 0

    async def never(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal out
        out += 1
        await asyncio.sleep(60)

    async with serving(never) as url, client(url, max_concurrent_requests=at_once) as http, asyncio.timeout(30):
        body = len(token_pieces({}, pool))
        assert body > 12e6
        tracemalloc.start()
        try:
            asked = [
                asyncio.create_task(http.call(lambda: http.send("POST", "/x", token_pieces({}, pool))))
                for _ in range(200)
            ]
            while out < at_once:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.5)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (out, http.telemetry.in_flight, http.telemetry.waiting) == (at_once, at_once, 200 - at_once)
        assert peak < at_once * 0.6e6, "some pieces of 64 KiB for each request, the test's own server included"
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_pieces_arrive_in_order_and_are_made_anew_for_a_retry() -> None:
    seen: list[bytes] = []

    async def second_time(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readexactly(30_000))
        if len(seen) == 1:
            writer.transport.abort()
        writer.write(OK)

    pieces = Pieces(30_000, lambda: iter([b"%05d" % i for i in range(6_000)]))
    quick = RetryPolicy(max_attempts=3, base=0.01)
    async with serving(second_time) as url, client(url) as http, asyncio.timeout(10):
        answer, retries = await http.call(lambda: http.send("POST", "/x", pieces), retry=quick)
    assert (answer, retries) == (b"{}", 1)
    assert seen == [b"".join(pieces.make())] * 2
    assert http.bytes_sent == 60_000
