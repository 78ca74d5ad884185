"""Another process has the cache's file for itself, and an event loop goes on."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import StorageFailed
from core.llm_api import response_cache
from core.llm_api.answer_store import AnswerStore
from core.llm_api.response_cache import CacheBusy, ResponseCache
from core.llm_api.types import TokenLogprobs
from tests.core.two_labels import pair

ONE, TWO, THREE = ({bytes([n]) * 32: pair(-n, -2 * n)} for n in (1, 2, 3))
ALL = ONE | TWO | THREE


class Writer:
    """Another connection to the file, as another process has one."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)

    def lock(self, how: str = "IMMEDIATE") -> None:
        self._db.execute(f"BEGIN {how}")

    def let_go(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ResponseCache(tmp_path / "c.sqlite").close()
    return tmp_path / "c.sqlite"


@pytest.fixture
def other(path: Path) -> Iterator[Writer]:
    writer = Writer(path)
    yield writer
    writer.close()


def in_file(path: Path) -> dict[bytes, TokenLogprobs]:
    with ResponseCache(path) as cache:
        return cache.get_many(list(ALL))


async def test_without_another_process_answers_are_in_the_file_at_once(path: Path) -> None:
    store = AnswerStore(ResponseCache(path))
    store.keep(ONE)
    assert in_file(path) == ONE
    await store.stored()
    assert await store.get_many(list(ALL)) == ONE
    await store.aclose()
    await store.aclose()


async def test_other_tasks_go_on_while_another_process_writes(path: Path, other: Writer) -> None:
    store = AnswerStore(ResponseCache(path))
    ticks = 0

    async def let_go_after_ticks() -> None:
        nonlocal ticks
        while ticks < 20:
            await asyncio.sleep(0.001)
            ticks += 1
        other.let_go()

    other.lock()
    ticking = asyncio.create_task(let_go_after_ticks())
    store.keep(ONE)
    assert in_file(path) == {}
    await store.stored()  # ends only because the task could tick
    assert ticks == 20
    assert in_file(path) == ONE
    await ticking
    await store.aclose()


async def test_answers_that_wait_are_found_and_written_in_whatever_order_they_came(path: Path, other: Writer) -> None:
    store = AnswerStore(ResponseCache(path))
    other.lock()
    store.keep(ONE)
    await asyncio.sleep(0)
    store.keep(TWO)
    assert await store.get_many(list(ALL)) == ONE | TWO
    other.let_go()
    store.keep(THREE)
    await store.stored()
    assert in_file(path) == ALL
    await store.aclose()


async def test_a_cancelled_task_does_not_lose_what_it_paid_for(path: Path, other: Writer) -> None:
    store = AnswerStore(ResponseCache(path))

    async def ask() -> None:
        store.keep(ONE)
        await store.stored()

    other.lock()
    asking = asyncio.create_task(ask())
    await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    other.let_go()
    await store.aclose()
    assert in_file(path) == ONE


async def test_closing_waits_for_the_other_process_and_says_so(
    path: Path, other: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    store = AnswerStore(ResponseCache(path))
    other.lock()
    store.keep(ONE | TWO)
    with caplog.at_level(logging.WARNING):
        closing = asyncio.create_task(store.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done()
        other.let_go()
        await closing
    assert "to store 2 answers" in caplog.text
    assert in_file(path) == ONE | TWO


async def test_a_file_that_stays_taken_fails_and_can_be_tried_again(
    path: Path, other: Writer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(response_cache, "BUSY_TIMEOUT", 0.05)
    store = AnswerStore(ResponseCache(path))
    other.lock()
    store.keep(ONE)
    with pytest.raises(StorageFailed, match=r"c\.sqlite: database is locked"):
        await store.stored()
    other.let_go()
    store.keep(TWO)
    await store.stored()
    assert in_file(path) == ONE | TWO
    other.lock()
    store.keep(THREE)
    with caplog.at_level(logging.WARNING):
        await store.aclose()
    assert "1 answers were not stored" in caplog.text
    other.let_go()
    assert in_file(path) == ONE | TWO


async def test_reading_waits_without_holding_the_loop_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(ResponseCache(tmp_path / "r.sqlite"))
    store.keep(ONE)
    real, busy = ResponseCache.get_many, 5

    def taken(self: ResponseCache, keys: list[bytes]) -> dict[bytes, TokenLogprobs]:
        nonlocal busy
        busy -= 1
        if busy >= 0:
            raise CacheBusy("taken")
        return real(self, keys)

    monkeypatch.setattr(ResponseCache, "get_many", taken)
    assert await store.get_many(list(ALL)) == ONE
    assert busy == -1
    monkeypatch.setattr(response_cache, "BUSY_TIMEOUT", 0.0)
    busy = 10**6
    with pytest.raises(CacheBusy):
        await store.get_many(list(ALL))
    await store.aclose()


async def test_a_failure_that_is_no_waiting_is_raised_at_once(path: Path) -> None:
    cache = ResponseCache(path)
    store = AnswerStore(cache)
    cache._db.execute("CREATE TRIGGER t BEFORE INSERT ON answers BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StorageFailed, match="no"):
        store.keep(ONE)
    await store.stored()
    await store.aclose()
