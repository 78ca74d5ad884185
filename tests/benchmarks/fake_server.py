"""Stands in for scripts/launch_vllm_server.sh: fake_server.py MODEL --port P --served-model-name NAME ..."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

from fakes.vllm_server import FakeVLLM


class Server(FakeVLLM):
    """With the route by which a server says that it is ready."""

    def more_routes(self, app: web.Application) -> None:
        app.router.add_get("/health", self._health)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()


async def serve(arguments: list[str]) -> None:
    """Until the process ends."""
    server = Server(model=arguments[arguments.index("--served-model-name") + 1])
    server.port = int(arguments[arguments.index("--port") + 1])
    async with server:
        await asyncio.Event().wait()


if __name__ == "__main__":
    print("(Worker pid=9) INFO 11-21 13:17:28 [x.py:68] Using FLASH_ATTN attention backend out of ['A']", flush=True)
    asyncio.run(serve(sys.argv))
