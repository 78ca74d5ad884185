"""One HTTP server: a session, a bounded number of requests in flight, and a typed error for everything that goes wrong.

The only file that touches aiohttp on the client's side and the only one that sees a key. `send` is one attempt; `call`
puts a concurrency slot and retries around an attempt, parsing included, so that a truncated body is asked for again.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import aiohttp
import orjson
from pydantic import SecretStr

from core.llm_api.errors import (
    APIError,
    ConfigurationError,
    RateLimited,
    RequestRejected,
    ServerUnreachable,
    TransientError,
)
from core.llm_api.retry import RetryPolicy, parse_retry_after, with_retries
from core.llm_api.telemetry import RequestTelemetry, outcome_of

T = TypeVar("T")

MESSAGE_LIMIT: Final = 300
"""Characters of a server's own error message that we pass on."""
KEEPALIVE: Final = 4.0
"""Seconds an idle connection is kept. vLLM (uvicorn) closes its end after 5 s; reusing one then resets the request."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How patient and how parallel a client is. Timeouts in seconds; there is no total timeout, on purpose."""

    connect_timeout: float = 10.0
    read_timeout: float = 900.0
    max_concurrent_requests: int = 64
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class HttpTransport:
    """Requests to one server. `key_name` is the setting that holds the key, for hints; `absent` says how to get one.

    bytes_sent: bytes of all request bodies handed to the connection so far, retries included, headers not.
    """

    def __init__(
        self, base_url: str, *, key: SecretStr | None, key_name: str, options: HttpOptions, absent: str = ""
    ) -> None:
        self.base_url = base_url
        self.contacted = False
        self.bytes_sent = 0
        self.telemetry = RequestTelemetry(base_url)
        self._key = key
        self._key_name = key_name
        self._options = options
        self._absent = absent
        self._slots = asyncio.Semaphore(options.max_concurrent_requests)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"HttpTransport({self.base_url!r})"

    async def call(self, attempt: Callable[[], Awaitable[T]], *, retry: RetryPolicy | None = None) -> tuple[T, int]:
        """Run `attempt` in a slot, with retries: (result, retries). The slot is free while waiting to retry.

        retry: in place of the options' policy.
        """

        tries = 0

        async def in_slot() -> T:
            nonlocal tries
            tries += 1
            began = await self._take_slot(again=tries > 1)
            outcome = "ok"
            try:
                return await attempt()
            except BaseException as error:  # only to name it
                outcome = outcome_of(error)
                raise
            finally:
                self._free_slot(began, outcome)

        return await with_retries(in_slot, retry or self._options.retry, contacted=lambda: self.contacted)

    async def _take_slot(self, *, again: bool) -> float:
        with self.telemetry.waits():
            await self._slots.acquire()
        self.telemetry.retries += again
        return self.telemetry.begin()

    def _free_slot(self, began: float, outcome: str) -> None:
        self.telemetry.end(began, outcome)
        self._slots.release()

    async def send(self, method: str, path: str, body: bytes | None = None, *, request_id: str = "") -> bytes:
        """One attempt: the body of a 2xx answer. Raises a typed APIError for everything else.

        request_id: sent as X-Request-Id, by which servers name the request in their log.
        """
        url = self.base_url + path
        try:
            async with await self._request(method, url, body, request_id) as response:
                self.contacted = True
                content = await response.read()
                status, answered = response.status, response.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._connection_error(error, url) from None
        if 200 <= status < 300:
            return content
        raise self._status_error(status, content, answered, url)

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

        Leaving before the end closes the connection, by which the server knows to stop. admitted: entered around
        each attempt. retry: in place of the options' policy. Raises a typed APIError for everything that goes wrong.
        """
        url = self.base_url + path

        tries = 0

        async def attempt() -> tuple[aiohttp.ClientResponse, float]:
            nonlocal tries
            tries += 1
            began = await self._take_slot(again=tries > 1)
            try:
                async with admitted():
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
        try:
            response = await self._request("POST", url, body, request_id)
            self.contacted = True
            if 200 <= response.status < 300:
                return response
            async with response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._connection_error(error, url) from None
        raise self._status_error(response.status, content, response.headers, url)

    async def _chunks(self, response: aiohttp.ClientResponse, url: str) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._connection_error(error, url) from None

    async def _request(self, method: str, url: str, body: bytes | None, request_id: str) -> aiohttp.ClientResponse:
        # BytesIO is written in pieces; one `bytes` of many MB would block the event loop, and aiohttp warns of it.
        payload = None if body is None else io.BytesIO(body)
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
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # The slots bound the number of requests; a second bound in the connector could only starve /metrics.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE)
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=self._options.connect_timeout, sock_read=self._options.read_timeout
            )
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    def _connection_error(self, error: Exception, url: str) -> APIError:
        name = type(error).__name__
        match error:
            case aiohttp.InvalidURL():
                return ConfigurationError(f"{url} is not a valid URL.")
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
                return ConfigurationError(f"no trusted TLS connection to {self.base_url} ({name}).")
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return ServerUnreachable(f"no server answers at {self.base_url} ({name}).", hint=self._absent)
            case TimeoutError():
                silent = self._options.read_timeout
                return TransientError(f"{url} sent nothing for {silent:g} s.", hint="Raise read_timeout if it is slow.")
            case _:
                return TransientError(f"the connection to {url} broke ({name}).")

    def _status_error(self, status: int, content: bytes, headers: Mapping[str, str], url: str) -> APIError:
        said = self._redact(server_message(content))
        message = f"HTTP {status} from {url}" + (f": {said}" if said else "")
        wait = parse_retry_after(headers.get("Retry-After"))
        if status == 429:
            return RateLimited(message, retry_after=wait)
        if status in (408, 425) or (status >= 500 and status not in (501, 505)):
            return TransientError(message, retry_after=wait)
        return RequestRejected(message.rstrip(".") + ".", status=status, hint=self._hint(status))

    def _hint(self, status: int) -> str:
        match status:
            case 401 | 403 if self._key is None:
                return f"Set {self._key_name} in SECRETS or the environment."
            case 401 | 403:
                return f"Check {self._key_name} in SECRETS or the environment."
            case 400 | 422:
                return "Check the prompt's length against the model's, and the request against the server's version."
            case 404:
                return "Check the URL and the model's name."
            case 413:
                return "Lower prompts_per_request."
            case _ if 300 <= status < 400:
                return "Redirects are not followed; use the final URL."
            case _:
                return ""

    def _redact(self, text: str) -> str:
        """Servers like to repeat the key that they refuse."""
        key = self._key.get_secret_value() if self._key is not None else ""
        return text.replace(key, "***") if key else text


def server_message(content: bytes) -> str:
    """What the body of an error says, on one line, at most MESSAGE_LIMIT characters; "" where it says nothing."""
    try:
        parsed = orjson.loads(content)
    except orjson.JSONDecodeError:
        parsed = None
    if isinstance(parsed, dict):
        inner = parsed.get("error", parsed)
        found = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
        text = found if isinstance(found, str) else orjson.dumps(found).decode() if found else ""
    else:
        text = content.decode(errors="replace")
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "..."


async def all_or_cancel(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls at once, started in order: their results in order. The first failure cancels the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        # `from None` would wipe the cause that RetriesExhausted carries.
        raise first from first.__cause__
    return [task.result() for task in tasks]
