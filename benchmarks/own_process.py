"""A stand-in server in another process, so that only the client is measured."""

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


async def serve_until_stopped(client: Connection, port: int, most: Callable[[], int]) -> None:
    """In the server's process: send the port, wait for the client's stop, and send most()."""
    client.send(port)
    await asyncio.to_thread(client.recv)
    client.send(most())


@contextmanager
def stand_in(serve: Callable[..., Coroutine[Any, Any, None]], *arguments: object) -> Iterator[tuple[str, Stop]]:
    """serve(client, *arguments) in another process: its URL, and a function that stops it and returns its most().

    serve: a function of a module, which ends with serve_until_stopped.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_run, args=(serve, there, *arguments), daemon=True)
    start_without_ctrl_c(server)
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


def _run(serve: Callable[..., Coroutine[Any, Any, None]], client: Connection, *arguments: object) -> None:
    with suppress(EOFError):  # the client ended, or was killed
        asyncio.run(serve(client, *arguments))


def start_without_ctrl_c(process: BaseProcess) -> None:
    """Start a process that ignores Ctrl-C, which would end it with a traceback while it imports."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
