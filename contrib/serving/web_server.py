"""uvicorn with the guard's shutdown: asked to end, it takes nothing new and gives what is at work its time."""

from __future__ import annotations

import logging
import socket
from typing import Final

import uvicorn

from contrib.serving.guard import Guard
from contrib.serving.options import Limits

log = logging.getLogger(__name__)

MARGIN: Final = 3.0
"""Seconds that answers have to be sent after the guard stopped the last requests; then connections are cut."""


class WebServer(uvicorn.Server):
    """Serves one Guard. SIGINT and SIGTERM end it; a second Ctrl-C ends it at once."""

    def __init__(self, guard: Guard, limits: Limits) -> None:
        super().__init__(
            uvicorn.Config(
                guard,
                lifespan="on",
                http="h11",  # not whatever is installed: it is the one that bounds a request's head
                log_config=None,  # the guard writes one line a request, without query strings
                access_log=False,
                server_header=False,
                timeout_keep_alive=20,
                timeout_graceful_shutdown=int(limits.shutdown_seconds + MARGIN) + 1,
                h11_max_incomplete_event_size=16_384,
            )
        )
        self._guard = guard

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; then say where it listens."""
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn; the guard's clock starts here."""
        self._guard.drain()
        await super().shutdown(sockets)
