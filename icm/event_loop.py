"""A coroutine run to its end by a function that waits for it, also where an event loop runs already (a notebook)."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from core.errors import APIError, ConfigurationError, ServerUnreachable

T = TypeVar("T")

GO_ON: Final = "Nothing is lost: the same call again goes on where this one stopped."


def finished(job: Coroutine[Any, Any, T]) -> T:
    """The result of `job`. KeyboardInterrupt (Ctrl-C, "interrupt kernel") cancels it, waits for its end, and is raised.

    A thread has at most one running loop. Where this one has it already, the job gets a thread and a loop of its own.
    """
    try:
        return asyncio.run(job) if not _runs_here() else _in_own_thread(job)
    except KeyboardInterrupt as stop:
        stop.add_note(GO_ON)
        raise


@contextmanager
def resumable() -> Iterator[None]:
    """Adds to an error in between that nothing is lost, unless nothing had begun."""
    try:
        yield
    except (APIError, OSError, MemoryError) as error:
        if not isinstance(error, ConfigurationError | ServerUnreachable):
            error.add_note(GO_ON)
        raise


def _runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _in_own_thread(job: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.new_event_loop()
    task = loop.create_task(job)

    def run() -> T:
        try:
            return loop.run_until_complete(task)
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="icm")
    try:
        # What the thread shows belongs to the cell of a notebook that called, which the context says.
        end = thread.submit(contextvars.copy_context().run, run)
        try:
            return end.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            end.exception()  # until the journal is closed
            raise
    finally:
        thread.shutdown(wait=False)
