"""Requests and tokens a minute, first come first served.

A limit of n a minute is strict: no window of 60 seconds holds more than n, by the times at which they were granted.
Only the first in line looks at the limits, so small requests cannot overtake a large one for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from core.errors import ConfigurationError, RateLimited, ServerUnreachable

WINDOW: Final = 60.0
"""Seconds."""
SLOW_DOWN: Final = 5.0
"""Seconds that everyone waits after a 429 that names no time."""


class Reservation:
    """What one granted request takes from the limits. `tokens` is an estimate until `settle` corrects it."""

    __slots__ = ("requests", "time", "tokens")

    def __init__(self, granted: float, tokens: int) -> None:
        self.time = granted
        self.requests = 1
        self.tokens = tokens

    def settle(self, tokens: int) -> None:
        """Correct the estimate by the real usage."""
        self.tokens = tokens

    def refund(self) -> None:
        """Give everything back: the request was not sent."""
        self.requests = self.tokens = 0


class RateLimiter:
    """At most so many requests and tokens in any minute; None is no limit. One per endpoint, shared by all its callers.

    clock: monotonic seconds; with sleep injectable for tests.
    """

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._max_requests = requests_per_minute
        self._max_tokens = tokens_per_minute
        self._clock = clock
        self._sleep = sleep
        self._granted: deque[Reservation] = deque()
        self._line = asyncio.Lock()  # asyncio's lock is first come first served
        self._not_before = float("-inf")

    async def acquire(self, tokens: int) -> Reservation:
        """Wait for our turn and for room: the reservation of one request of so many tokens.

        A caller that is cancelled while waiting leaves nothing behind. Raises ConfigurationError for a request that
        could never fit.
        """
        if self._max_tokens is not None and tokens > self._max_tokens:
            raise ConfigurationError(
                f"one request of about {tokens} tokens is larger than the limit of {self._max_tokens} tokens a minute.",
                hint="Raise tokens_per_minute or use a smaller pool.",
            )
        async with self._line:
            while (wait := self._wait(tokens)) > 0:
                await self._sleep(wait)
            reservation = Reservation(self._clock(), tokens)
            if self._max_requests is not None or self._max_tokens is not None:
                self._granted.append(reservation)
            return reservation

    def slow_down(self, seconds: float) -> None:
        """Grant nothing to anyone for so many seconds from now: the server said 429."""
        self._not_before = max(self._not_before, self._clock() + seconds)

    def _wait(self, tokens: int) -> float:
        """Seconds until a request of so many tokens may be worth another look; 0 if it may go now."""
        now = self._clock()
        if now < self._not_before:
            return self._not_before - now
        while self._granted and self._granted[0].time + WINDOW <= now:
            self._granted.popleft()
        too_many_requests = self._max_requests is not None and (
            sum(r.requests for r in self._granted) + 1 > self._max_requests
        )
        too_many_tokens = self._max_tokens is not None and (
            sum(r.tokens for r in self._granted) + tokens > self._max_tokens
        )
        if not (too_many_requests or too_many_tokens):
            return 0.0
        # Not empty: an empty window has room for any request that acquire lets through.
        return self._granted[0].time + WINDOW - now


class Turns:
    """The turns of one request's attempts. estimate: its tokens, asked for anew before each attempt."""

    __slots__ = ("_estimate", "_granted", "_limiter")

    def __init__(self, limiter: RateLimiter, estimate: Callable[[], int]) -> None:
        self._limiter = limiter
        self._estimate = estimate
        self._granted: Reservation | None = None

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Around one attempt. The turn is given back if the request was never sent; a 429 slows down everyone."""
        self._granted = await self._limiter.acquire(self._estimate())
        try:
            yield
        except ServerUnreachable:
            self.refund()
            raise
        except RateLimited as error:
            self._limiter.slow_down(SLOW_DOWN if error.retry_after is None else error.retry_after)
            raise

    def settle(self, tokens: int) -> None:
        """Correct the latest estimate by the real usage."""
        if self._granted is not None:
            self._granted.settle(tokens)

    def refund(self) -> None:
        """Give the latest turn back: nothing was sent."""
        if self._granted is not None:
            self._granted.refund()
