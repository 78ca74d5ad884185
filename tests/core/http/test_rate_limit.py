from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigurationError
from core.llm_api.http.rate_limit import RateLimiter


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def limiter(time: Time, requests: int | None = None, tokens: int | None = None) -> RateLimiter:
    return RateLimiter(requests, tokens, clock=time.clock, sleep=time.sleep)


async def test_no_limits_no_waiting() -> None:
    time = Time()
    for _ in range(100):
        await limiter(time).acquire(10**9)
    assert time.now == 1000


async def test_requests_a_minute() -> None:
    time = Time()
    limit = limiter(time, requests=3)
    grants = []
    for _ in range(7):
        await limit.acquire(1)
        grants.append(time.now - 1000)
    assert grants == [0, 0, 0, 60, 60, 60, 120]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0, 50)), max_size=30))
def test_no_window_of_a_minute_holds_more_than_the_limits(asks: list[tuple[int, float]]) -> None:
    async def run() -> list[tuple[float, int]]:
        time = Time()
        limit = limiter(time, requests=4, tokens=150)
        grants = []
        for tokens, pause in asks:
            time.now += pause
            await limit.acquire(tokens)
            grants.append((time.now, tokens))
        return grants

    grants = asyncio.run(run())
    for start, _ in grants:
        window = [tokens for time, tokens in grants if start <= time < start + 60]
        assert len(window) <= 4
        assert sum(window) <= 150


async def test_first_come_first_served_even_for_a_large_request() -> None:
    time = Time()
    limit = limiter(time, tokens=100)
    await limit.acquire(60)
    order: list[str] = []

    async def ask(name: str, tokens: int) -> None:
        await limit.acquire(tokens)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("large", 100))
        await asyncio.sleep(0)
        for i in range(5):
            group.create_task(ask(f"small {i}", 10))
    assert order == ["large", *(f"small {i}" for i in range(5))]


async def test_refund_gives_the_room_back() -> None:
    time = Time()
    limit = limiter(time, requests=1, tokens=10)
    (await limit.acquire(10)).refund()
    await limit.acquire(10)
    assert time.now == 1000


async def test_real_usage_replaces_the_estimate_both_ways() -> None:
    time = Time()
    limit = limiter(time, tokens=100)
    (await limit.acquire(90)).settle(10)
    reservation = await limit.acquire(80)
    assert time.now == 1000
    reservation.settle(95)  # 105 in the window now
    await limit.acquire(1)
    assert time.now == 1060


async def test_slow_down_holds_everyone() -> None:
    time = Time()
    limit = limiter(time, requests=1000)
    limit.slow_down(7)
    limit.slow_down(3)  # a shorter wait does not shorten the longer one
    await asyncio.gather(limit.acquire(1), limit.acquire(1))
    assert time.now == 1007


async def test_slow_down_works_without_limits() -> None:
    time = Time()
    limit = limiter(time)
    limit.slow_down(7)
    await limit.acquire(1)
    assert time.now == 1007


async def test_a_request_that_can_never_fit() -> None:
    with pytest.raises(ConfigurationError, match="101 tokens is larger than the limit of 100"):
        await limiter(Time(), tokens=100).acquire(101)


async def test_a_cancelled_waiter_takes_nothing_and_blocks_nobody() -> None:
    limit = RateLimiter(None, None, sleep=lambda _: asyncio.sleep(3600))
    limit.slow_down(3600)
    waiting = asyncio.create_task(limit.acquire(1))
    await asyncio.sleep(0.01)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    limit._not_before = 0
    assert (await asyncio.wait_for(limit.acquire(1), 1)).tokens == 1
