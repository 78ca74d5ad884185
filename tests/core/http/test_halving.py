"""One prompt that fails its request is found in few requests; a server that fails for all is not asked for each."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import APIError, RequestRejected, RetriesExhausted, ServerUnreachable, TransientError
from core.llm_api.http.halving import ALIKE, NAMED, ask_in_halves, may_be_one_prompt

WHOLE = RequestRejected("the whole", status=400)


class Asked:
    """Answers prompts that are not bad, and keeps account."""

    def __init__(self, bad: set[int]) -> None:
        self.bad = bad
        self.requests = 0
        self.answered: list[int] = []

    async def __call__(self, start: int, end: int) -> None:
        self.requests += 1
        if self.bad & set(range(start, end)):
            raise RequestRejected(f"{start} to {end}", status=400)
        self.answered += range(start, end)


def search(asked: Asked, count: int) -> dict[int, APIError] | None:
    """None: it is the server's fault."""
    try:
        return asyncio.run(ask_in_halves(asked, count, WHOLE, ours=lambda _: True))
    except RequestRejected as error:
        return None if error is WHOLE else pytest.fail(f"another error than the whole's: {error}")


@given(st.data(), st.integers(2, 1024))
def test_whatever_is_bad_is_found_or_the_server_blamed(data: st.DataObject, count: int) -> None:
    bad = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=8))
    asked = Asked(bad)
    found = search(asked, count)
    assert asked.requests <= 2 * (NAMED + 1) * math.ceil(math.log2(count)) + ALIKE
    assert len(asked.answered) == len(set(asked.answered))
    assert not bad & set(asked.answered)
    if found is None:
        assert not asked.answered
        assert len(bad) > 1
    else:
        assert set(found) <= bad
        assert len(found) == min(len(bad), NAMED)
        if len(bad) <= NAMED:
            assert set(asked.answered) == set(range(count)) - bad


@given(st.integers(2, 1024))
def test_a_server_that_fails_for_all_is_asked_as_often_as_a_request_can_be_halved(count: int) -> None:
    asked = Asked(set(range(count)))
    assert search(asked, count) is None
    assert asked.requests <= math.ceil(math.log2(count)) + 1 + ALIKE


def test_nothing_fails_the_second_time() -> None:
    asked = Asked(set())
    assert search(asked, 5) == {}
    assert sorted(asked.answered) == [0, 1, 2, 3, 4]


def test_what_is_no_prompts_fault_ends_the_search() -> None:
    asked = Asked({3})

    async def ask(start: int, end: int) -> None:
        if asked.requests == 2:
            raise ServerUnreachable("gone")
        await asked(start, end)

    with pytest.raises(ServerUnreachable):
        asyncio.run(ask_in_halves(ask, 64, WHOLE, ours=may_be_one_prompt))


def exhausted(status: int | None) -> APIError:
    error = RetriesExhausted("gave up")
    error.__cause__ = TransientError("x", status=status)
    return error


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (RequestRejected("x", status=400), True),
        (RequestRejected("x", status=422), True),
        (RequestRejected("x", status=401), False),
        (RequestRejected("x", status=413), False),
        (exhausted(500), True),
        (exhausted(200), True),
        (exhausted(503), False),
        (exhausted(None), False),
        (TransientError("x", status=500), False),
        (ServerUnreachable("x"), False),
        (RetriesExhausted("x"), False),
    ],
)
def test_only_some_failures_may_be_one_prompts(error: APIError, may: bool) -> None:
    assert may_be_one_prompt(error) == may
