"""A command in a process of its own, as a user starts it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence


class Program:
    """A command line that is started with more arguments, against the server at `url`."""

    def __init__(self, arguments: Sequence[str], url: str, **environment: str) -> None:
        self.arguments = list(arguments)
        self.environment = {**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull, **environment}

    async def start(self, *more: str) -> asyncio.subprocess.Process:
        """The process, with pipes for what it prints."""
        return await asyncio.create_subprocess_exec(
            *self.arguments,
            *more,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Ignored where the tests run in the background, and a child would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    async def __call__(self, *more: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        process = await self.start(*more)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()
