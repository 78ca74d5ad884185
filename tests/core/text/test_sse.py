"""The event parser: the same events however the bytes are cut, and what the standard says of odd lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.text.sse import EventTooLong, SSEParser

DATA = st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12), min_size=1)


def parse(stream: bytes, cuts: list[int] = ()) -> list[bytes]:
    parser = SSEParser()
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [event for start, end in pairwise(edges) for event in parser.feed(stream[start:end])]


@given(
    st.lists(DATA, max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.lists(st.integers(0, 10**6), max_size=20),
)
def test_any_chunking_gives_the_events_that_were_sent(
    events: list[list[str]], end: str, noise: bool, cuts: list[int]
) -> None:
    noisy = [f": keep-alive{end}", f"event: x{end}id:7{end}", f"{end}"] if noise else []
    stream = "".join("".join(noisy) + "".join(f"data: {line}{end}" for line in event) + end for event in events)
    expected = ["\n".join(event).encode() for event in events]
    assert parse(stream.encode(), cuts) == expected
    assert parse(stream.encode(), list(range(len(stream.encode())))) == expected, "byte by byte"


@given(st.binary(max_size=60).map(lambda noise: noise + b"\n\ndata: x\n"), st.lists(st.integers(0, 100), max_size=9))
def test_no_bytes_break_it_and_no_cut_changes_what_they_mean(stream: bytes, cuts: list[int]) -> None:
    assert parse(stream, cuts) == parse(stream)


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\ndata:b\ndata:  c\n\n", [b"a\nb\n c"]),  # one space is dropped, not two
        (b"data\n\n", [b""]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n", []),  # cut off by the end
        (b"retry: 10\n\n: only a comment\n\n", []),
        (b"datum: a\nDATA: b\n\n", []),
        (b"data: a\r\ndata: b\r\r\ndata: c\n\n", [b"a\nb", b"c"]),
    ],
)
def test_what_the_standard_says(stream: bytes, events: list[bytes]) -> None:
    assert parse(stream) == events
    assert parse(stream, list(range(len(stream)))) == events


@pytest.mark.parametrize("piece", [b"data: xxxxxxx\n", b"x" * 4096])
def test_an_event_without_end_is_refused(piece: bytes) -> None:
    parser = SSEParser()

    def feed_for_ever() -> None:
        while True:
            parser.feed(piece)

    with pytest.raises(EventTooLong):
        feed_for_ever()
