"""A stand-in server in a process of its own, so that what is measured is the client's alone."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

Stop = Callable[[], int]


async def serve_until_told(told: Connection, port: int, most: Callable[[], int]) -> None:
    """For the server's process: tell the port, wait for the client's stop, and tell the most that went on at once."""
    told.send(port)
    await asyncio.to_thread(told.recv)
    told.send(most())


@contextmanager
def stand_in(serve: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> Iterator[tuple[str, Stop]]:
    """serve(told, *arguments) in a process of its own: its URL, and what stops it and returns what `most` said.

    serve: a function of a module, which ends with serve_until_told.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_run, args=(serve, there, *arguments), daemon=True)
    start_deaf(server)
    there.close()

    def stop() -> int:
        here.send("stop")
        return int(here.recv())

    try:
        yield f"http://127.0.0.1:{here.recv()}", stop
    finally:
        here.close()
        server.join(1)
        server.kill()


def _run(serve: Callable[..., Coroutine[Any, Any, None]], told: Connection, *arguments: object) -> None:
    with suppress(EOFError):  # the client ended, or was killed
        asyncio.run(serve(told, *arguments))


def start_deaf(process: BaseProcess) -> None:
    """Start a process that Ctrl-C does not reach: it would die of it while it still imports, with a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
