"""Which errors are worth another attempt, when, and until when. Built on tenacity.

Waits grow exponentially with full jitter (drawn from 0 to min(cap, base * 2**n); Brooker, "Exponential Backoff And
Jitter", AWS Architecture Blog 2015), because many requests that failed together must not come back together. A wait
that the server asks for (Retry-After) is obeyed, plus jitter. Attempts and total time are both bounded.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, RetryError

from core.errors import APIError, RateLimited, RetriesExhausted, ServerUnreachable, TransientError

log = logging.getLogger(__name__)
T = TypeVar("T")


class Kind(Enum):
    """What an error says about the next attempt."""

    TRANSIENT = "transient"
    RATE_LIMITED = "rate limited"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to try again, and the seconds that the server asked us to wait, if it did."""

    kind: Kind
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of one request's attempts. `deadline`, `base` and `cap` in seconds."""

    max_attempts: int = 6
    deadline: float = 1800.0
    base: float = 0.5
    cap: float = 60.0


def judge(error: BaseException, *, contacted: bool = True) -> Verdict:
    """The verdict on one failed attempt.

    contacted: whether the server ever answered. If it never did, a refused connection means a wrong URL or no server,
    which waiting seldom fixes.
    """
    match error:
        case RateLimited():
            return Verdict(Kind.RATE_LIMITED, error.retry_after)
        case TransientError():
            return Verdict(Kind.TRANSIENT, error.retry_after)
        case ServerUnreachable() if contacted:
            return Verdict(Kind.TRANSIENT)
        case _:
            return Verdict(Kind.FINAL)


def parse_retry_after(value: str | None, *, now: datetime | None = None) -> float | None:
    """Seconds to wait from a Retry-After header: a number of seconds or an HTTP date (RFC 9110, section 10.2.3).

    None where there is no header or it says nothing usable. Never negative. `now`: aware, default the current time.
    """
    if value is None or not value.strip():
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, TypeError, IndexError):
            return None
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


async def with_retries(
    attempt: Callable[[], Awaitable[T]],
    policy: RetryPolicy,
    *,
    contacted: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    rng: random.Random | None = None,
) -> tuple[T, int]:
    """Run `attempt` until it succeeds: (its result, number of retries).

    Nothing is held while waiting: `attempt` must take and give back its own concurrency slot. clock: monotonic seconds.
    Raises the attempt's own error where that is final, and RetriesExhausted, caused by the last error, where the
    attempts are used up or the next wait would end after the deadline.
    """
    draw = rng or random.Random()
    started = clock()
    calls = 0

    async def counted() -> T:
        nonlocal calls
        calls += 1
        return await attempt()

    def again(state: RetryCallState) -> bool:
        error = _error(state)
        return error is not None and judge(error, contacted=contacted()).kind is not Kind.FINAL

    def wait(state: RetryCallState) -> float:
        error = _error(state)
        assert error is not None
        asked = judge(error, contacted=contacted()).retry_after
        if asked is not None:
            return asked + draw.uniform(0.0, policy.base)
        # 2.0**attempt_number overflows only past 1,000 attempts; the exponent is capped all the same.
        return draw.uniform(0.0, min(policy.cap, policy.base * 2.0 ** min(state.attempt_number, 32)))

    def stop(state: RetryCallState) -> bool:
        late = clock() - started + state.upcoming_sleep > policy.deadline
        return state.attempt_number >= policy.max_attempts or late

    def report(state: RetryCallState) -> None:
        n, of = state.attempt_number, policy.max_attempts
        log.warning("attempt %d of %d failed, next in %.1f s: %s", n, of, state.upcoming_sleep, _error(state))

    result: T
    retrying = AsyncRetrying(retry=again, wait=wait, stop=stop, sleep=sleep, before_sleep=report)
    try:
        result = await retrying(counted)
    except RetryError as exhausted:
        last = exhausted.last_attempt.exception()
        assert isinstance(last, APIError)
        spent = clock() - started
        raise RetriesExhausted(f"gave up after {calls} attempts in {spent:.0f} s: {last}") from last
    return result, calls - 1


def _error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None and state.outcome.failed else None
