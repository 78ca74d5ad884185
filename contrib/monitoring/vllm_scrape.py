"""The metrics of several vLLM servers as one page, each with labels that say whose they are.

    icm metrics --url http://gpu1:8000,http://gpu2:8000 --pool_id llama-8b --port 9464
    icm metrics --once                      # print the page and end

Added to every sample: engine ("vllm"), engine_version, pool_id, replica_id (host and port) and model_id. A label of
vLLM's own that has one of these names is kept as exported_NAME, as Prometheus itself would. Servers are asked when the
page is; one that does not answer shows as icm_replica_up 0, and keeps nothing of the others back.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import orjson
from aiohttp import web

from core.errors import APIError, ConfigurationError
from core.flags import FlagParser, port_number
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.settings import Settings

SCRAPE_SECONDS: Final = 5.0
"""After which a server counts as down; Prometheus itself gives up after 10 s by default."""
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Replica:
    """What one server showed. text: its page of metrics; None where it did not answer. seconds: that this took."""

    labels: Mapping[str, str]
    text: str | None
    seconds: float


class VLLMScraper:
    """Asks all servers of one pool. Labels of a server are kept while it is down, as they were when it was last up."""

    def __init__(self, settings: Settings, *, pool_id: str = "default") -> None:
        options = HttpOptions(
            connect_timeout=SCRAPE_SECONDS, read_timeout=SCRAPE_SECONDS, retry=RetryPolicy(max_attempts=1)
        )
        self._servers = [
            HttpTransport(url, key=settings.vllm_api_key, key_name="VLLM_API_KEY", options=options)
            for url in settings.vllm_base_url
        ]
        self._labels = {
            server.base_url: {
                "engine": "vllm",
                "engine_version": "",
                "pool_id": pool_id,
                "replica_id": server.base_url.partition("://")[2],
                "model_id": "",
            }
            for server in self._servers
        }

    async def scrape(self) -> str:
        """The page, in Prometheus' text format."""
        from contrib.monitoring.relabel import page  # raises ConfigurationError where the package is missing

        return page(await asyncio.gather(*map(self._ask, self._servers)))

    async def aclose(self) -> None:
        """Close the connections; idempotent."""
        await asyncio.gather(*(server.aclose() for server in self._servers))

    async def _ask(self, server: HttpTransport) -> Replica:
        began = time.perf_counter()
        text: str | None = None
        try:
            async with asyncio.timeout(SCRAPE_SECONDS):
                text = (await server.send("GET", "/metrics")).decode(errors="replace")
                await self._name(server)
        except (APIError, TimeoutError):
            pass  # the page says so
        return Replica(self._labels[server.base_url], text, time.perf_counter() - began)

    async def _name(self, server: HttpTransport) -> None:
        """Ask for its version and model, each time: it may have been started anew as another."""
        found = self._labels[server.base_url]
        with suppress(APIError, LookupError, TypeError, orjson.JSONDecodeError):
            found["engine_version"] = str(orjson.loads(await server.send("GET", "/version"))["version"])
            found["model_id"] = str(orjson.loads(await server.send("GET", "/v1/models"))["data"][0]["id"])


async def serve(scraper: VLLMScraper, host: str, port: int) -> None:
    """Serve GET /metrics until SIGINT or SIGTERM. Raises ConfigurationError where the port is taken."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=(await scraper.scrape()).encode(), headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        print(f"metrics at http://{host}:{port}/metrics", flush=True)
        stopped = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        await stopped.wait()
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen at {host}:{port}: {error.strerror}.", hint="Give another --port."
        ) from None
    finally:
        await runner.cleanup()


def build_parser() -> argparse.ArgumentParser:
    """Of `icm metrics`."""
    parser = FlagParser(prog="icm metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL, or several with commas (default: VLLM_BASE_URL)")
    parser.add_argument("--pool_id", default="default", help="name of this group of servers (default: default)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=port_number, default=9464, help="port to listen at (default: 9464)")
    parser.add_argument("--once", action="store_true", help="print the page and end; exit code 1 if no server answers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 no server answers (--once), 2 bad input."""
    options = build_parser().parse_args(arguments)
    try:
        return asyncio.run(_run(Settings.load({"vllm_base_url": options.url}), options))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


async def _run(settings: Settings, options: argparse.Namespace) -> int:
    scraper = VLLMScraper(settings, pool_id=options.pool_id)
    try:
        shown = await scraper.scrape()
        up = sum(line.startswith("icm_replica_up") and line.endswith(" 1.0") for line in shown.splitlines())
        if options.once:
            print(shown, end="")
            return 0 if up else 1
        print(f"{up} of {len(settings.vllm_base_url)} servers show metrics")
        await serve(scraper, options.host, options.port)
        return 0
    finally:
        await scraper.aclose()


if __name__ == "__main__":
    sys.exit(main())
