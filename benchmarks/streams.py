"""Do many streams at once lose, double or misplace a token? The client against a server in another process.

    python benchmarks/streams.py --streams 10000 --at_once 200 --tokens 20

The server is the tests' stand-in for vLLM: every token names its stream and its number, and events are cut at random
places. Exit code 1 if any stream is not what was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.own_process import serve_until_stopped, stand_in
from benchmarks.step_machine import hardware
from core.flags import FlagParser
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import End, SamplingOptions, Token
from fakes.text_server import FakeTextServer, Manner, written


async def serve(client: Connection, delay: float) -> None:
    """The tests' stand-in for vLLM; at its end it sends the most streams that it had at once."""
    rng = random.Random(7)

    def cut(event: bytes) -> list[bytes]:
        at = rng.randrange(len(event) + 1)
        return [event[:at], event[at:]] if rng.random() < 0.1 else [event]

    async with FakeTextServer(manner=Manner(cut=cut, delay=delay)) as server:
        await serve_until_stopped(client, server.port, lambda: server.max_streaming)


async def measure(url: str, streams: int, at_once: int, tokens: int) -> dict[str, object]:
    """Read all streams and compare every event with what was sent."""
    options = HttpOptions(max_concurrent_requests=at_once)
    wrong: list[str] = []
    events = 0

    async def read(number: int, api: ModelAPI) -> None:
        nonlocal events
        name = f"s{number}x"
        kinds: list[str] = []
        index = 0
        async for event in api.stream_complete(f"say {name}", SamplingOptions(max_tokens=tokens)):
            kinds.append(event.kind)
            events += 1
            if isinstance(event, Token):
                if (event.index, event.text) != (index, written(name, index)):
                    wrong.append(f"{name}: token {index} is {event}")
                index += 1
        expected = ["started", *["token"] * tokens, "metrics", "end"]
        if kinds != expected or event != End("length"):
            wrong.append(f"{name}: {len(kinds)} events, the last one {event}")

    async with ModelAPI(VLLMClient(url, "fake-8b", options=options), scores=False) as api:
        began, cpu = time.perf_counter(), time.process_time()
        numbers = iter(range(streams))

        async def reader() -> None:
            for number in numbers:
                await read(number, api)

        await asyncio.gather(*(reader() for _ in range(at_once)))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "streams": streams,
        "at_once": at_once,
        "tokens_each": tokens,
        "events": events,
        "wrong": len(wrong),
        "first_wrong": wrong[:3],
        "seconds": round(seconds, 2),
        "streams_a_second": round(streams / seconds, 1),
        "events_a_second": round(events / seconds),
        "client_cpu_us_an_event": round(cpu / events * 1e6, 1),
        "client_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "machine": hardware(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 if an event was wrong."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--at_once", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20, help="tokens of each stream")
    parser.add_argument("--delay", type=float, default=0.005, help="seconds before each token")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    args = parser.parse_args(arguments)
    with stand_in(serve, args.delay) as (url, most_at_once):
        result = asyncio.run(measure(url, args.streams, args.at_once, args.tokens))
        result["most_at_once"] = most_at_once()
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
