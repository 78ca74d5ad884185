"""Calls at once: one failure, one cancellation, and what becomes of the rest."""

from __future__ import annotations

import asyncio
import time

import pytest

from core.errors import APIError, TransientError
from core.llm_api.http import gather


async def test_one_failure_lets_what_is_on_its_way_arrive_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "SETTLE", 0.3)
    done = []

    async def call(name: str, seconds: float) -> str:
        await asyncio.sleep(seconds)
        if name == "bad":
            raise TransientError("bad")
        done.append(name)
        return name

    with pytest.raises(APIError, match="bad"):
        await gather.all_or_settle([call("soon", 0.1), call("bad", 0.05), call("late", 30)])
    assert done == ["soon"]
    assert await gather.all_or_settle([call("a", 0.02), call("b", 0.0)]) == ["a", "b"]
    assert await gather.all_or_settle([]) == []


async def test_whoever_is_cancelled_does_not_wait_for_the_others() -> None:
    calls = asyncio.create_task(gather.all_or_settle([asyncio.sleep(30), asyncio.sleep(30)]))
    await asyncio.sleep(0.01)
    calls.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await calls
    assert time.monotonic() - began < 1
