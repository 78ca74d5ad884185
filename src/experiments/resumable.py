"""How a command that asks a model ends: its exit code, one line about an error, and the command that resumes it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, Final

from core.errors import APIError, ConfigurationError, ServerUnreachable
from src.icm.testbeds import BadInput

GO_ON_WITH: Final = "ICM_GO_ON_WITH"
"""Environment variable: the command line to resume with, set by a program that also starts the server."""


def run_resumable(job: Coroutine[Any, Any, int], resume: str) -> int:
    """Run `job` to its end; SIGTERM cancels it. resume: the command line that resumes it, unless GO_ON_WITH is set.

    Exit codes: the job's (0 done), 1 the model or the disk failed (resumable), 2 bad input or no usable server, 130
    interrupted.
    """
    resume = os.environ.get(GO_ON_WITH) or resume
    try:
        return asyncio.run(_until_sigterm(job))
    except (BadInput, ConfigurationError, ServerUnreachable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (APIError, OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"error: {error}", file=sys.stderr)
            return 2
        said = "out of memory." if isinstance(error, MemoryError) else error
        print(f"error: {said}\nNothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"\nstopped. Nothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 130


async def _until_sigterm(job: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await job
