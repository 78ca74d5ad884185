"""What HTTP and the client add to a chat turn, over the same engine in this process.

    python benchmarks/chat_turn.py --model gemma-3-270m --turns 40                      # both, one after the other
    python benchmarks/chat_turn.py --model gemma-3-270m --only http --server http://127.0.0.1:8000
    python benchmarks/chat_turn.py --only stand-in --turns 200   # a server that answers at once: HTTP and client

Three figures. "added": seconds of a turn at the client less the seconds that the server counts for the same request
(vllm:e2e_request_latency_seconds), so that the machine's noise affects both; it consists of HTTP, JSON, chat template
and event loop, which the engine in process does without. "client_cpu": CPU seconds of the client's process, which do
not depend on what else the machine does. And both turns' medians; on a CPU the two cannot run at once, so these include
the machine's noise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.own_process import stand_in
from benchmarks.step_machine import hardware
from benchmarks.streams import serve
from core.errors import APIError
from core.flags import FlagParser
from core.llm_api.engines.direct import DirectOptions
from core.llm_api.engines.vllm_group import vllm_engine
from core.llm_api.http.transport import HttpOptions, HttpTransport
from core.llm_api.http.vllm_metrics import engine_seconds
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.text.generation import Message, SamplingOptions, collect
from core.settings import REPO_ROOT, Settings
from core.vllm_server import VLLMServer

TEMPLATE: Final = REPO_ROOT / "configs" / "chat_template.jinja"
TOKENS: Final = 50


async def _turns(api: ModelAPI, turns: int, stream: bool, http: HttpTransport | None) -> dict[str, object]:
    """Seconds of each turn and, where the server counts its seconds, how many were added. Three turns warm up."""
    options = SamplingOptions(max_tokens=TOKENS, frequency_penalty=0.5)
    seconds: list[float] = []
    added: list[float] = []
    busy: list[float] = []
    tokens: list[int] = []
    for number in range(-3, turns):
        question = [Message("user", f"Tell me about the number {number + 1000}, and take your time.")]
        before = await _engine_seconds(http)
        began, cpu = time.perf_counter(), time.process_time()
        answer = await (collect(api.stream_chat(question, options)) if stream else api.chat(question, options))
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        after = await _engine_seconds(http)
        if number < 0:
            continue
        seconds.append(took)
        busy.append(cpu)
        tokens.append(answer.completion_tokens)
        if before is not None and after is not None and after[1] == before[1] + 1:
            added.append(took - (after[0] - before[0]))
        extra = f", added {_ms(added[-1])}" if added else ""
        print(
            f"{'streamed' if stream else 'whole'} turn {number + 1}: {_ms(took)} ms{extra}", file=sys.stderr, flush=True
        )
    result: dict[str, object] = {
        "turns": turns,
        "median_ms": _ms(statistics.median(seconds)),
        "median_tokens": statistics.median(tokens),
    }
    if http is not None:
        result["client_cpu_ms"] = _ms(statistics.median(busy))
    if added:
        quartiles = statistics.quantiles(added, n=4)
        result["added_ms"] = {"median": _ms(quartiles[1]), "quartiles": [_ms(quartiles[0]), _ms(quartiles[2])]}
        result["added_ms"] |= {"turns": len(added)}  # type: ignore[operator]
    return result


async def _engine_seconds(http: HttpTransport | None) -> tuple[float, int] | None:
    return None if http is None else engine_seconds((await http.send("GET", "/metrics")).decode())


async def over_http(url: str, model: str, turns: int) -> dict[str, object]:
    """Turns through a server, whole and streamed."""
    settings = Settings.load({"vllm_base_url": url})
    http = HttpTransport(url, key=settings.vllm_api_key, key_name="VLLM_API_KEY", options=HttpOptions())
    try:
        async with ModelAPI(vllm_engine(settings, model), scores=False) as api:
            return {
                "whole": await _turns(api, turns, False, http),
                "streamed": await _turns(api, turns, True, http),
            }
    finally:
        await http.aclose()


async def in_process(model: str, turns: int, cpu: bool) -> dict[str, object]:
    """The same turns on the same engine in this process."""
    options = DirectOptions(cpu=cpu, max_model_len=2048, chat_template=str(TEMPLATE))
    async with open_model_api(Settings(), model=model, direct=True, direct_options=options, scores=False) as api:
        return {
            "whole": await _turns(api, turns, False, None),
            "streamed": await _turns(api, turns, True, None),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a folder in models/, or what --server serves")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--only", choices=("http", "in-process", "stand-in"), help="measure one of them")
    parser.add_argument("--server", help="base URL of a running server (default: one is started)")
    parser.add_argument("--gpu", action="store_true", help="in process: vLLM's own defaults, not those for a CPU")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    args = parser.parse_args(arguments)
    result: dict[str, object] = {
        "model": "none" if args.only == "stand-in" else args.model,
        "tokens": TOKENS,
        "machine": hardware(),
    }
    try:
        if args.only == "stand-in":
            with stand_in(serve, 0.0) as (url, stop):
                result["stand-in"] = asyncio.run(over_http(url, "fake-8b", args.turns))
                stop()
        if args.only in (None, "in-process"):
            folder = REPO_ROOT / "models" / args.model
            model = str(folder) if folder.is_dir() else args.model
            result["in process"] = asyncio.run(in_process(model, args.turns, not args.gpu))
        if args.only in (None, "http") and args.server:
            result["http"] = asyncio.run(over_http(args.server, args.model, args.turns))
        elif args.only in (None, "http"):
            log = REPO_ROOT / "runs" / "chat-turn-server.log"
            with VLLMServer(model=args.model, log=log, options=("--chat-template", str(TEMPLATE))) as server:
                result["http"] = asyncio.run(over_http(server.url, args.model, args.turns))
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(result, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return 0


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


if __name__ == "__main__":
    sys.exit(main())
