"""How soon is the slot of a cancelled stream free? A real vLLM server, one stream cancelled after the other.

    python benchmarks/cancel.py --server http://127.0.0.1:8000 --model gemma-3-270m --count 100

Every stream is begun and left after a few tokens in one of three ways (closed, task cancelled, left by an exception);
/metrics (vllm:num_requests_running and _waiting) then shows when the server has nothing to do. Nobody else may use the
server. Exit code 1 if a slot took longer than --limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import hardware
from core.errors import APIError
from core.flags import FlagParser
from core.llm_api.engines.vllm_group import vllm_engine
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.llm_api.http.vllm_metrics import requests_in_work
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import Message, SamplingOptions, Token
from core.settings import Settings

WAYS = ("closed", "task cancelled", "exception")


class _Left(Exception):
    pass


async def _read(api: ModelAPI, tokens: int, way: str, chat: bool) -> None:
    """Begin a stream that would take long, and leave it after some tokens."""
    options = SamplingOptions(max_tokens=1500, temperature=1.0, seed=1)
    prompt = "Count from one to ten thousand:"
    stream = api.stream_chat([Message("user", prompt)], options) if chat else api.stream_complete(prompt, options)
    async with aclosing(stream) as events:
        async for event in events:
            if isinstance(event, Token) and event.index >= tokens:
                if way == "closed":
                    return
                if way == "exception":
                    raise _Left
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
                await asyncio.sleep(0)
    raise RuntimeError("the stream ended by itself; raise max_tokens")


async def _free_after(http: HttpTransport, limit: float) -> float | None:
    """Seconds until the server has no request; None if that takes longer than `limit`."""
    began = time.perf_counter()
    while (seconds := time.perf_counter() - began) <= limit:
        if requests_in_work((await http.send("GET", "/metrics")).decode()) == 0:
            return seconds
        await asyncio.sleep(0.01)
    return None


async def measure(settings: Settings, model: str, count: int, limit: float, chat: bool) -> dict[str, object]:
    """Cancel `count` streams, one after the other."""
    seconds: list[float | None] = []
    http = HttpTransport(
        settings.vllm_base_url[0], key=settings.vllm_api_key, key_name="VLLM_API_KEY", options=HttpOptions()
    )
    try:
        async with ModelAPI(vllm_engine(settings, model), scores=False) as api:
            await api.ready()
            for number in range(count):
                reader = asyncio.create_task(_read(api, number % 7, WAYS[number % len(WAYS)], chat))
                await asyncio.wait([reader])
                if not reader.cancelled() and (error := reader.exception()) is not None and type(error) is not _Left:
                    raise error
                seconds.append(await _free_after(http, limit))
    finally:
        await http.aclose()
    free = [value for value in seconds if value is not None]
    return {
        "cancelled": count,
        "free_within_limit": len(free),
        "limit_s": limit,
        "median_s": round(statistics.median(free), 3) if free else None,
        "longest_s": round(max(free), 3) if free else None,
        "ways": list(WAYS),
        "machine": hardware(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 if a slot stayed taken for longer than the limit."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="base URL (default: VLLM_BASE_URL)")
    parser.add_argument("--model", required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--limit", type=float, default=2.0, help="seconds")
    parser.add_argument("--chat", action="store_true", help="chats in place of completions")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    args = parser.parse_args(arguments)
    try:
        settings = Settings.load({"vllm_base_url": args.server})
        result = asyncio.run(measure(settings, args.model, args.count, args.limit, args.chat))
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return 0 if result["free_within_limit"] == args.count else 1


if __name__ == "__main__":
    sys.exit(main())
