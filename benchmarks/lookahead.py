"""What asking ahead saves: batches, questions asked and unused, seconds, against a simulated server.

    python benchmarks/lookahead.py

Runs the same searches with every --lookahead, one after the other and several times over, against the tests' fake
server in this process. A request takes --overhead seconds and --per_token seconds for each token that is not in the
server's prefix cache, so seconds show what a real engine of that speed would gain; ratios are to lookahead 0. Three
searches: "early" accepts every proposal, "late" refuses nearly all, "whole" is the first 160 proposals with the command
line's defaults. Journals are compared: they may only differ in costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aiohttp import web

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from core.llm_api.llm import open_model_api
from core.settings import Settings
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, prepare_batches
from src.results.run_folder import RunFolder

COST = ("asked", "from_cache", "asked_ahead", "ahead_used", "tokens_sent", "tokens_cached", "tokens_computed")
NOT_DECISIONS = {*COST, "floored", "seconds"}
SEARCHES: dict[str, dict[str, Any]] = {
    "early": {"initial_T": 1e6, "final_T": 1e6, "stop": "K", "K": 40, "num_seed": 8, "mirror": False},
    "late": {"initial_T": 0.01, "final_T": 0.01, "stop": "K", "K": 80, "num_seed": 56, "mirror": False},
    "whole": {"K": 160},
}


class TimedServer(FakeVLLM):
    """A request takes its overhead and the time of the tokens it computes, which includes this server's work."""

    overhead = 0.0
    per_token = 0.0

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        started, computed = time.perf_counter(), self.queries - self.hits
        response = await super()._answer(request, body)
        self.completions.clear()  # otherwise they would fill memory
        due = self.overhead + self.per_token * (self.queries - self.hits - computed)
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        return response


def by_claim_and_context(tokens: Sequence[int]) -> float:
    """Log-odds that depend mostly on the claim, partly on the whole context."""
    return (2.0 if sum(tokens[-12:]) % 3 else -2.0) + 0.5 * hashed_log_odds(tokens)


async def one(args: argparse.Namespace, name: str, lookahead: int | None) -> tuple[dict[str, float], list[Any]]:
    """One search: its costs, and its decisions."""
    settings = SearchSettings(**({"seed": args.seed} | SEARCHES[name]))
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=args.size,
        consistency="gold-free",
        objective=Objective(30.0),
        settings=settings,
    )
    pool = replace(pool, rest=())
    async with TimedServer(log_odds=by_claim_and_context) as server:
        given = {"vllm_base_url": server.url, "cache_path": None}
        with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder)) as run:
            async with open_model_api(Settings.load(given), model=server.model, use_vllm=True) as api:
                labelling = (await Labelling.open(pool, api)).planned_for(None)
                server.overhead, server.per_token = args.overhead, args.per_token
                before, started = api.stats.requests, time.perf_counter()
                await labelling.search(run, lambda *_: None, lookahead)
                seconds, batches = time.perf_counter() - started, api.stats.requests - before
            records = run.read_log()
    costs: dict[str, float] = {key: sum(record.get(key, 0) for record in records) for key in COST}
    steps = [record for record in records if record["event"] == "step"]
    evaluated = [record for record in steps if record["U_proposed"] is not None]
    costs |= {
        "batches": batches,
        "seconds": seconds,
        "steps": len(steps),
        "evaluated": len(evaluated),
        "accepted": sum(record["accepted"] for record in steps),
    }
    return costs, [{k: v for k, v in record.items() if k not in NOT_DECISIONS} for record in records]


async def main() -> int:
    """Run all, print the table."""
    parser = FlagParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="claims in the pool")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--overhead", type=float, default=0.05, help="seconds a request takes at least")
    parser.add_argument("--per_token", type=float, default=2e-5, help="seconds a computed token takes")
    parser.add_argument("--lookahead", nargs="+", default=["0", "1", "4", "16", "auto"])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.size < 8:
        parser.error("--size must be at least 8")
    rows = []
    for name in SEARCHES:
        found: dict[str, list[dict[str, float]]] = {each: [] for each in args.lookahead}
        decisions: list[list[Any]] = []
        for _ in range(args.repeats):
            for each in args.lookahead:
                costs, decided = await one(args, name, None if each == "auto" else int(each))
                found[each].append(costs)
                decisions.append(decided)
        if any(decided != decisions[0] for decided in decisions):
            print(f"{name}: the journals differ", file=sys.stderr)
            return 1
        first = found[args.lookahead[0]][0]
        print(f"\n{name}: {first['steps']:.0f} proposals, {first['evaluated']:.0f} evaluated, "
              f"{first['accepted']:.0f} accepted; journals the same")  # fmt: skip
        print(f"{'lookahead':<11}{'batches':>8}{'questions':>11}{'ahead':>8}{'unused':>8}{'computed':>11}"
              f"{'seconds':>9}{'ratio':>7}")  # fmt: skip
        base = statistics.median(costs["seconds"] for costs in found[args.lookahead[0]])
        for each, runs in found.items():
            middle = {key: statistics.median(costs[key] for costs in runs) for key in runs[0]}
            middle["unused"] = middle["asked_ahead"] - middle["ahead_used"]
            rows.append({"search": name, "lookahead": each, "ratio": middle["seconds"] / base} | middle)
            print(f"{each:<11}{middle['batches']:>8.0f}{middle['asked']:>11.0f}{middle['asked_ahead']:>8.0f}"
                  f"{middle['unused']:>8.0f}{middle['tokens_computed']:>11.0f}{middle['seconds']:>9.2f}"
                  f"{middle['seconds'] / base:>7.2f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"settings": {k: v for k, v in vars(args).items() if k != "json"},
                                         "rows": rows}) + "\n")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
