"""Many calls at once, and what becomes of the others when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Final, TypeVar

T = TypeVar("T")

SETTLE: Final = 10.0
"""Seconds that requests in flight have to finish after another one of their batch has failed for good."""


async def all_or_cancel(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run calls at once, started in order: their results in order. The first failure cancels the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        # `from None` would wipe the cause that RetriesExhausted carries.
        raise first from first.__cause__
    return [task.result() for task in tasks]


async def all_or_settle(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """As all_or_cancel, but calls in flight when one fails have SETTLE seconds: they may be computed already.

    Where the caller is cancelled, all are cancelled at once.
    """
    tasks = [asyncio.create_task(call) for call in calls]
    if not tasks:
        return []
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=SETTLE)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    failures = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    if failures:
        raise failures[0] from failures[0].__cause__
    return [task.result() for task in tasks]
