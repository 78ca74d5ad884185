"""Server-sent events from a byte stream that may be cut anywhere (WHATWG HTML, section 9.2.6).

    parser = SSEParser()
    for chunk in chunks:
        for data in parser.feed(chunk):
            ...

Lines end with CRLF, LF or CR; comments, other fields and an event that the end of the stream cuts off are dropped.
"""

from __future__ import annotations

from typing import Final

_BOM: Final = b"\xef\xbb\xbf"
EVENT_LIMIT: Final = 1 << 20
"""Bytes of one event, or of a line that does not end: no server that we talk to sends more for one token."""


class EventTooLong(ValueError):
    """An event exceeds EVENT_LIMIT."""


class SSEParser:
    """Keeps the part of an event that has arrived; `feed` returns the data of every event that a chunk completes."""

    __slots__ = ("_after_cr", "_data", "_first_line", "_rest", "_size")

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._data: list[bytes] = []
        self._size = 0
        self._after_cr = False  # a LF that comes now belongs to the line end that was already seen
        self._first_line = True

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that are complete with these bytes, in order. Raises EventTooLong."""
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        lines = (self._rest + chunk).splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        if lines and not self._rest:
            self._after_cr = lines[-1].endswith(b"\r")
        events = []
        for line in lines:
            event = self._line(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        if len(self._rest) + self._size > EVENT_LIMIT:
            raise EventTooLong(f"an event of more than {EVENT_LIMIT} bytes")
        return events

    def _line(self, line: bytes) -> bytes | None:
        if self._first_line:
            line, self._first_line = line.removeprefix(_BOM), False
        if not line:
            data, self._data, self._size = self._data, [], 0
            return b"\n".join(data) if data else None
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._size += len(value) + 1
        return None
