"""How a pool is best sent to one server: the same cached questions, sent in different ways, side by side in one run.

    python benchmarks/front_end.py --server http://127.0.0.1:8000 --model llama-8b --size 256

Everything asked is in the prefix cache, so everything but the model is measured: JSON, validation, detokenizers, block
hashes, scheduling. To compare settings of the server (--prefix-caching-hash-algo,
--api-server-count, the Rust front end), run it once for each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import numpy as np

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import hardware
from benchmarks.step_measure import Backend, Progress
from core.errors import APIError
from core.flags import FlagParser
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import vllm_engine
from core.llm_api.llm import ModelAPI
from core.settings import Settings
from src.icm.prefix_tree import TreeLayout

WAYS: Final[dict[str, tuple[int | None, bool]]] = {
    "whole prompts, one request": (None, False),
    "whole prompts, 64 a request": (64, False),
    "whole prompts, 16 a request": (16, False),
    "whole prompts, one each, 64 at once": (1, False),
    "tree of segments, 64 a request": (64, True),
    "tree of segments, one request": (None, True),
}
"""(prompts a request, whether our extension is used) of each way."""


async def measure(args: argparse.Namespace) -> dict[str, object]:
    """Seconds, client CPU seconds and request bytes of every way that this server takes, `repeats` times each."""
    settings = Settings.load({"vllm_base_url": args.server})
    rows: dict[str, list[dict[str, float | int | None]]] = {}
    progress = Progress()
    async with AsyncExitStack() as stack:
        backends: dict[str, Backend] = {}
        for name, (prompts, extension) in WAYS.items():
            first_of = {"vllm_base_url": settings.vllm_base_url[:1], "prompts_per_request": prompts}
            engine = vllm_engine(settings.model_copy(update=first_of), args.model, use_extension=extension)
            assert isinstance(engine, VLLMClient)
            api = await stack.enter_async_context(ModelAPI(engine))
            if extension and not engine.takes_trees:
                continue
            backends[name] = await Backend.open(
                engine, api, None, None, claim_tokens=args.claim_tokens, seed=0, salt=secrets.randbits(32)
            )
        first = next(iter(backends.values()))
        claims = await first.claims(args.size, args.size)
        layout = TreeLayout.build(range(args.size), claims.groups, np.random.default_rng(0))
        candidate = claims.candidate(layout)
        async with progress.doing("filling the cache"):
            await claims.scorer(first.api).evaluate([candidate])
        # Round after round, so that disturbances of the machine affect all ways alike.
        for index in range(args.repeats):
            for name, backend in backends.items():
                scorer = claims.scorer(backend.api)
                async with progress.doing(f"{name}, {index + 1} of {args.repeats}"):
                    found = await backend.measure(lambda scorer=scorer: scorer.evaluate([candidate]))  # type: ignore[misc]
                rows.setdefault(name, []).append(
                    {
                        "seconds": found.seconds,
                        "cpu_seconds": found.cpu_seconds,
                        "request_bytes": found.request_bytes,
                        "computed_tokens": found.computed_tokens,
                    }
                )
        identity = first.api.identity
    return {
        "size": args.size,
        "claim_tokens": args.claim_tokens,
        "engine": {"version": identity.version, "model": Path(identity.model).name},
        "hardware": hardware(),
        "notes": args.notes,
        "ways": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --json also write it."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("--model", required=True, help="as the server names it")
    parser.add_argument("--size", type=int, default=256, help="claims (default 256)")
    parser.add_argument("--claim_tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--notes", nargs="*", default=[], metavar="TEXT", help="kept in the JSON")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if min(args.size - 1, args.claim_tokens, args.repeats) < 1:
        parser.error("--size must be at least 2, the other numbers at least 1")
    try:
        result = asyncio.run(measure(args))
    except APIError as error:
        print(f"front_end: {error}", file=sys.stderr)
        return 2
    ways = result["ways"]
    assert isinstance(ways, dict)
    print(f"{args.size} questions, everything cached; median (lowest to highest) of {args.repeats}")
    print(f"{'':<38}{'seconds':<24}{'client CPU s':>13}{'request MB':>12}")
    for name, found in ways.items():
        seconds = sorted(row["seconds"] for row in found)
        spread = f"{statistics.median(seconds):.3f} ({seconds[0]:.3f} to {seconds[-1]:.3f})"
        cpu = statistics.median(row["cpu_seconds"] for row in found)
        print(f"{name:<38}{spread:<24}{cpu:>13.3f}{found[0]['request_bytes'] / 1e6:>12.2f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
