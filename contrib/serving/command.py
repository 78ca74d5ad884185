"""`icm serve`: the application on a port, with a model server that it starts or one that runs already.

    icm serve                                        # asks the server that VLLM_BASE_URL names
    icm serve --start local --model gemma-3-270m     # starts one on this machine's CPU and stops it at the end
    icm serve --start 8B --host 0.0.0.0 --port 8080 -- --max-model-len 8192      # after --, vLLM's own options

Then: curl -s localhost:8080/query -H 'Content-Type: application/json' -d '{"question": "How is a run resumed?"}'
Ctrl-C or SIGTERM ends it: what is at work may finish within --shutdown_seconds, then the model server is stopped.
With ICM_SERVE_TOKEN in the environment or in SECRETS, all but /health and /ready ask for it as a bearer token.
Exit code 0: it ended on a signal; 2: it could not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from contrib.serving.options import DEFAULT_DOCUMENTS, Limits, read_token
from core.errors import APIError, ConfigurationError
from core.flags import FlagParser, number, port_number, whole_number
from core.llm_api.llm import ModelAPI, open_model_api
from core.settings import REPO_ROOT, Settings
from core.vllm_server import ServerFailed, VLLMServer

log = logging.getLogger(__name__)

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
START_SECONDS: Final = 7200.0
"""Until the model server must be up: a large model is fetched and loaded in this time."""
MODEL_ATTEMPTS: Final = 3
"""Of one request to the model. Few, because the client of the application can come back by itself."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the model is. model: its name there; None takes the first one that is served."""

    settings: Settings
    model: str | None

    async def check(self) -> None:
        """Raise ConfigurationError where no engine is configured at all, which no waiting mends. Asks nobody."""
        await open_model_api(self.settings, model=self.model or "", scores=False).aclose()

    async def open(self) -> ModelAPI:
        """A ModelAPI, not started. Raises an APIError where there is no name and nobody to ask for one."""
        if self.model is not None:
            return open_model_api(self.settings, model=self.model)
        asking = open_model_api(self.settings, model="", scores=False)
        try:
            served = await asking.models()
        finally:
            await asking.aclose()
        if not served:
            raise ConfigurationError("the server serves no model.", hint="Name one with --model.")
        return open_model_api(self.settings, model=served[0])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = FlagParser(
        prog="icm serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Limits()
    parser.add_argument("--model", help="name under which it is served (default: the first one that is)")
    parser.add_argument(
        "--start", metavar="SIZE", help="start a vLLM server: local, 8B, 70B, 405B, a folder or a Hugging Face id"
    )
    parser.add_argument("--documents", type=Path, default=DEFAULT_DOCUMENTS, help="folder of .txt, .md and .rst files")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8080, help="(default: %(default)s)")
    parser.add_argument("--server_log", type=Path, default=REPO_ROOT / "runs" / "serve_vllm.log", help="of --start")
    parser.add_argument("vllm_options", nargs="*", metavar="VLLM_OPTION", help="with --start, after --")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--body_bytes", type=_positive_int, default=default.body_bytes, help="(default: %(default)s)")
    limits.add_argument(
        "--request_seconds",
        type=_positive,
        default=default.request_seconds,
        help="for an answer (default: %(default)s)",
    )
    limits.add_argument(
        "--concurrent", type=_positive_int, default=default.concurrent, help="requests at once (default: %(default)s)"
    )
    limits.add_argument(
        "--shutdown_seconds",
        type=_positive,
        default=default.shutdown_seconds,
        help="for requests at work when it is asked to end (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return _run(options)
    except (APIError, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before it listened.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        # The extra `serving`: not among what the base install brings.
        from contrib.serving.app import build
        from contrib.serving.documents import Library
        from contrib.serving.web_server import WebServer
    except ImportError as error:
        raise ConfigurationError(f"{error}.", hint="Install it with: pip install '.[serving]'") from None
    token = read_token(os.environ)
    if token is None and options.host not in LOOPBACK:
        log.warning("no ICM_SERVE_TOKEN: whoever reaches %s port %d may ask the model", options.host, options.port)
    limits = Limits(
        body_bytes=options.body_bytes,
        request_seconds=options.request_seconds,
        concurrent=options.concurrent,
        shutdown_seconds=options.shutdown_seconds,
    )
    library = Library.read(options.documents)
    log.info("%d passages in %s", len(library.passages), options.documents)
    with _listening(options.host, options.port) as listener, _model_server(options) as server:
        overrides: dict[str, object] = {"max_attempts": MODEL_ATTEMPTS, "read_timeout": options.request_seconds}
        if server is not None:
            overrides |= {"vllm_base_url": server.url, "use_vllm": True}
        source = ModelSource(Settings.load(overrides), options.model if server is None else None)
        alive = (lambda: True) if server is None else server.is_running
        guard = build(source.open, library, limits, token=token, alive=alive)
        asyncio.run(source.check())
        with _quiet_end():
            WebServer(guard, limits).run(sockets=[listener])
    return 0


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Taken before a model is loaded, so that a port in use is known in a second."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error}.") from None
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except (OSError, OverflowError) as error:
            raise ConfigurationError(f"cannot listen on {host} port {port}: {error}.", hint="Try --port.") from None
        yield listener


@contextlib.contextmanager
def _model_server(options: argparse.Namespace) -> Iterator[VLLMServer | None]:
    if options.start is None:
        if options.vllm_options:
            raise ConfigurationError(f"{' '.join(options.vllm_options)}: options for vLLM need --start.")
        yield None
        return
    model = {"model": options.model} if options.model is not None else {}
    with VLLMServer(
        size=options.start, log=options.server_log, options=tuple(options.vllm_options), timeout=START_SECONDS, **model
    ) as server:
        yield server


@contextlib.contextmanager
def _quiet_end() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for whoever waits for it. Here nobody does."""
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(number)

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _positive(text: str) -> float:
    value = number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _positive_int(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
