"""HTTP answers and broken connections as typed errors, with messages for a user."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp
import orjson

from core.errors import APIError, ConfigurationError, RateLimited, RequestRejected, ServerUnreachable, TransientError
from core.llm_api.http.retry import parse_retry_after

MESSAGE_LIMIT: Final = 300
"""Characters of a server's error message that are passed on."""
_HTML: Final = re.compile(r"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_HEADING: Final = re.compile(r"<(title|h1)[^>]*>(.*?)</\1>", re.IGNORECASE | re.DOTALL)


def status_error(
    status: int, said: str, headers: Mapping[str, str], url: str, *, key_name: str, has_key: bool
) -> APIError:
    """The error for a status other than 2xx. said: server_message, without keys. key_name: the key's setting."""
    message = f"HTTP {status} from {url}" + (f": {said}" if said else "")
    # A date in Retry-After is by the server's clock, which need not agree with ours.
    wait = parse_retry_after(headers.get("Retry-After"), now=_date(headers.get("Date")))
    if status == 429:
        return RateLimited(message, retry_after=wait)
    if status in (408, 425) or (status >= 500 and status not in (501, 505)):
        return TransientError(message, retry_after=wait, status=status)
    return RequestRejected(message.rstrip(".") + ".", status=status, hint=_hint(status, key_name, has_key))


def connection_error(error: Exception, url: str, server: str, *, absent: str, silence: float) -> APIError:
    """The error for a connection that broke or was not made. absent: how to get a server; silence: read timeout, s."""
    name = type(error).__name__
    match error:
        case aiohttp.InvalidURL():
            return ConfigurationError(f"{url} is not a valid URL.")
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
            return ConfigurationError(f"no trusted TLS connection to {server} ({name}).")
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return ServerUnreachable(f"no server answers at {server} ({name}).", hint=absent)
        case TimeoutError():
            return TransientError(f"{url} sent nothing for {silence:g} s.", hint="Raise read_timeout if it is slow.")
        case _:
            return TransientError(f"the connection to {url} broke ({name}).")


@contextmanager
def malformed_is_transient() -> Iterator[None]:
    """Around reading the body of an answer. Raises TransientError where it is truncated or malformed."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # orjson.JSONDecodeError is a ValueError
        raise TransientError(f"the answer is truncated or malformed ({type(error).__name__}).") from None


def server_message(content: bytes) -> str:
    """The message in an error's body, on one line, at most MESSAGE_LIMIT characters; "" where there is none."""
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
        if _HTML.match(text):  # a page for people: only its title is of use
            heading = _HEADING.search(text)
            text = re.sub(r"<[^>]+>", " ", heading[2]) if heading else "a page of HTML"
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "..."


def _hint(status: int, key_name: str, has_key: bool) -> str:
    match status:
        case 401 | 403 if not has_key:
            return f"Set {key_name} in SECRETS or the environment."
        case 401 | 403:
            return f"Check {key_name} in SECRETS or the environment."
        case 400 | 422:
            return "Check the prompt's length against the model's, and the request against the server's version."
        case 404:
            return "Check the URL, the model's name, and what the server is for: one that embeds writes no texts."
        case 413:
            return "Raise the limit of what stands before the server (nginx: client_max_body_size)."
        case _ if 300 <= status < 400:
            return "Redirects are not followed; use the final URL."
        case _:
            return ""


def _date(value: str | None) -> datetime | None:
    """An HTTP date; None where there is none or it cannot be read."""
    try:
        date = parsedate_to_datetime(value or "")
    except (ValueError, TypeError, IndexError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
