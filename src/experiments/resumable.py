"""How a command that asks a model ends: its exit code, one line on what went wrong, and the command that goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, Final

from core.errors import APIError, ConfigurationError, ServerUnreachable
from src.icm.testbeds import BadInput

GO_ON_WITH: Final = "ICM_GO_ON_WITH"
"""Environment variable: the command line that goes on, from a program that runs the job beside a server of its own."""


def run_resumable(job: Coroutine[Any, Any, int], resume: str) -> int:
    """Run `job` to its end; SIGTERM cancels it. resume: the command line that goes on with what it kept, unless
    GO_ON_WITH says another.

    Exit codes: the job's own (0 done), 1 the model or the disk failed (resumable), 2 bad input or no usable server, 130
    interrupted.
    """
    resume = os.environ.get(GO_ON_WITH) or resume
    try:
        return asyncio.run(_until_told(job))
    except (BadInput, ConfigurationError, ServerUnreachable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (APIError, OSError, MemoryError) as error:
        said = "out of memory." if isinstance(error, MemoryError) else error
        print(f"error: {said}\nNothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"\nstopped. Nothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 130


async def _until_told(job: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job
