from __future__ import annotations

import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import (
    APIError,
    ConfigurationError,
    MissingLabel,
    RateLimited,
    RequestRejected,
    RetriesExhausted,
    ServerUnreachable,
    TransientError,
)
from core.llm_api.http.retry import Kind, RetryPolicy, judge, parse_retry_after, with_retries

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


class Time:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(*errors: Exception, result: str = "ok"):
    left = list(errors)

    async def attempt() -> str:
        if left:
            raise left.pop(0)
        return result

    return attempt


async def run(attempt, policy: RetryPolicy | None = None, *, contacted: bool = True, time: Time | None = None):
    time = time or Time()
    return await with_retries(
        attempt,
        policy or RetryPolicy(),
        contacted=lambda: contacted,
        clock=time.clock,
        sleep=time.sleep,
        rng=random.Random(0),
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransientError("x"), Kind.TRANSIENT),
        (RateLimited("x", retry_after=3), Kind.RATE_LIMITED),
        (RequestRejected("x", status=400), Kind.FINAL),
        (MissingLabel("x"), Kind.FINAL),
        (ConfigurationError("x"), Kind.FINAL),
        (ValueError("x"), Kind.FINAL),
    ],
)
def test_verdicts(error: Exception, kind: Kind) -> None:
    assert judge(error).kind is kind


def test_unreachable_is_final_before_the_first_contact_only() -> None:
    assert judge(ServerUnreachable("x"), contacted=False).kind is Kind.FINAL
    assert judge(ServerUnreachable("x"), contacted=True).kind is Kind.TRANSIENT


async def test_success_after_failures_counts_retries() -> None:
    assert await run(failing(TransientError("a"), RateLimited("b"))) == ("ok", 2)
    assert await run(failing()) == ("ok", 0)


async def test_final_errors_are_raised_at_once_and_unchanged() -> None:
    time, error = Time(), RequestRejected("no", status=400)
    with pytest.raises(RequestRejected) as caught:
        await run(failing(error), time=time)
    assert caught.value is error
    assert time.slept == []


async def test_attempts_are_bounded_and_the_last_error_is_the_cause() -> None:
    errors = [TransientError(str(i)) for i in range(9)]
    with pytest.raises(RetriesExhausted, match=r"after 3 attempts .*: 2") as caught:
        await run(failing(*errors), RetryPolicy(max_attempts=3))
    assert caught.value.__cause__ is errors[2]


async def test_no_wait_ends_after_the_deadline() -> None:
    time = Time()
    with pytest.raises(RetriesExhausted):
        await run(failing(*[TransientError("x", retry_after=40)] * 9), RetryPolicy(99, deadline=100), time=time)
    assert len(time.slept) == 2
    assert time.now <= 100


async def test_a_retry_after_beyond_the_deadline_gives_up_without_waiting() -> None:
    time = Time()
    with pytest.raises(RetriesExhausted):
        await run(failing(RateLimited("x", retry_after=3600)), time=time)
    assert time.slept == []


async def test_retry_after_is_a_lower_bound() -> None:
    time = Time()
    await run(failing(RateLimited("x", retry_after=7)), time=time)
    assert 7 <= time.slept[0] <= 7.5


async def test_backoff_has_full_jitter_and_a_cap() -> None:
    longest, shortest = [0.0] * 7, 99.0
    for seed in range(200):
        time = Time()
        policy = RetryPolicy(8, deadline=1e9, base=1, cap=16)
        await with_retries(
            failing(*[TransientError("x")] * 7), policy, clock=time.clock, sleep=time.sleep, rng=random.Random(seed)
        )
        longest = list(map(max, longest, time.slept))
        shortest = min(shortest, *time.slept)
        assert all(wait <= min(16, 2 ** (n + 1)) for n, wait in enumerate(time.slept))
    assert longest[0] > 1.8
    assert longest[-1] > 15
    assert shortest < 0.1  # full jitter reaches down to 0, not just around the mean


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("-3", 0),
        ("0", 0),
        ("2.5", 2.5),
        (" 120 ", 120),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30),
        ("Thu, 01 Jan 2026 12:00:30", 30),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0),
        ("Thursday, 01-Jan-26 12:01:00 GMT", 60),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, now=NOW) == seconds


@given(st.text())
def test_no_retry_after_header_raises(header: str) -> None:
    seconds = parse_retry_after(header)
    assert seconds is None or seconds >= 0


def test_every_error_is_one_line_with_its_hint() -> None:
    for kind in (ConfigurationError, ServerUnreachable, TransientError, RateLimited, MissingLabel, RetriesExhausted):
        assert str(kind("What.", hint="Do.")) == "What. Do."
        assert issubclass(kind, APIError)
