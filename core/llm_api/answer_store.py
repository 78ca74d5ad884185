"""The response cache for an event loop: waiting for another process that writes never blocks the loop.

SQLite blocks the whole thread while it waits, for up to BUSY_TIMEOUT; here a call that finds the file locked is tried
again after its task has slept a little. Calls are not made in a second thread, because Python's lock would be handed
over for every row.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from core.errors import StorageFailed
from core.llm_api import response_cache
from core.llm_api.response_cache import CacheBusy, ResponseCache
from core.llm_api.types import TokenLogprobs

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_WAIT: Final = 0.001
LONGEST_WAIT: Final = 0.05
"""Seconds between two tries; doubled from the first to the longest."""


class AnswerStore:
    """A ResponseCache for the tasks of one event loop; it closes the cache.

    A cancelled caller loses no answers: a separate task writes them, and get_many finds them meanwhile.
    """

    def __init__(self, cache: ResponseCache) -> None:
        self._cache = cache
        self._waiting: dict[bytes, TokenLogprobs] = {}
        self._writer: asyncio.Task[None] | None = None
        self._failure: StorageFailed | None = None
        cache.wait_no_more()

    @property
    def damaged(self) -> int:
        """See ResponseCache."""
        return self._cache.damaged

    @property
    def has_earlier(self) -> bool:
        """See ResponseCache."""
        return self._cache.has_earlier

    async def get_many(self, keys: Sequence[bytes]) -> dict[bytes, TokenLogprobs]:
        """The stored answers, by key. Raises StorageFailed where the file cannot be read, or is locked for longer than
        BUSY_TIMEOUT."""
        found = await _when_free(lambda: self._cache.get_many(keys))
        if self._waiting:
            found |= {key: self._waiting[key] for key in keys if key in self._waiting}
        return found

    def keep(self, answers: dict[bytes, TokenLogprobs]) -> None:
        """Store answers now, or as soon as nobody else writes. Raises StorageFailed where that fails."""
        if self._writer is None:
            answers = self._waiting | answers
            try:
                self._cache.put_many(answers)
            except CacheBusy:
                self._waiting, self._failure = answers, None
                self._writer = asyncio.create_task(self._write(), name="waiting for the response cache")
            else:
                self._waiting = {}
        else:
            self._waiting |= answers

    async def stored(self) -> None:
        """Wait until all that was kept is in the file. Raises StorageFailed where it could not be written.

        Cancelled, it lets the writing go on.
        """
        if self._writer is not None:
            await asyncio.shield(self._writer)
        if self._waiting and self._failure is not None:
            raise self._failure

    async def aclose(self) -> None:
        """Store what still waits, then close the file; idempotent."""
        if self._writer is not None:
            log.warning(
                "another process has %s; waiting up to %.0f s to store %d answers",
                *(self._cache.path, response_cache.BUSY_TIMEOUT, len(self._waiting)),
            )
        try:
            await self.stored()
        except StorageFailed as error:
            log.warning("%d answers were not stored: %s", len(self._waiting), error)
        finally:
            if self._writer is not None:
                self._writer.cancel()
            self._cache.close()

    async def _write(self) -> None:
        try:
            while some := dict(self._waiting):
                await _when_free(functools.partial(self._cache.put_many, some))
                self._waiting = {key: answer for key, answer in self._waiting.items() if key not in some}
        except StorageFailed as error:  # raised by `stored`
            self._failure = error
        finally:
            self._writer = None


async def _when_free(attempt: Callable[[], T]) -> T:
    """What `attempt` returns once the file is free. Raises CacheBusy where it stays locked for BUSY_TIMEOUT seconds."""
    deadline = time.monotonic() + response_cache.BUSY_TIMEOUT
    wait = FIRST_WAIT
    while True:
        try:
            return attempt()
        except CacheBusy:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
