"""Break runs in every way that we know, and see that no label changes, no score is paid for twice, and nothing hangs.

    python -m tests.faults.campaign --runs 1000 --seed 1 --json campaign.json
    python -m tests.faults.campaign --kills 200 --seed 1
    python scripts/with_server.py -- python -m tests.faults.campaign --real 20    # before a real vLLM on the CPU

Every run has a plan drawn from its own seed (SEED and the run's number), so that one that fails can be repeated alone:
--only NUMBER. A run passes if it ends by itself with the labels of the undisturbed run, or stops with a reason where
the fault leaves it no choice, and the same command then ends with those labels; if every row of its response cache is
what the honest server answers to that prompt; and if no prompt whose answer arrived whole was asked again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from src.experiments.ICM import main as icm
from tests.faults.proxy import FAULTS, SLOW_KINDS, Strike
from tests.faults.store import forks
from tests.faults.world import RealWorld, World, labels_of, other_weights

SWAPS: dict[str, dict[str, Any]] = {
    "weights": {"salt": "other", "log_odds": other_weights},
    "version": {"version": "0.99.0+fake"},
    "path": {"root": "/models/other"},
    "name": {"model": "another-8b"},
    "none": {},
}
"""As what a server may come back. "none": as it was, but without our extension if it had it."""
MOST = 6
"""Strikes in a row that a client with its ten attempts must survive."""


@dataclass
class Plan:
    """What befalls one run. swap: see SWAPS. trees: the server runs our extension. size: prompts a request."""

    number: int
    strikes: list[Strike]
    swap: str
    trees: bool
    size: int | None
    seed: int

    def __str__(self) -> str:
        told = "+".join(f"{s.kind}@{s.at}x{s.times}" for s in self.strikes)
        return f"run {self.number}: {told} swap={self.swap} trees={self.trees} size={self.size} seed={self.seed}"


@dataclass
class Report:
    """Sums over a campaign."""

    runs: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    went_on: int = 0
    stopped_and_resumed: int = 0
    failures: list[str] = field(default_factory=list)
    paid_twice: int = 0
    hangs: int = 0
    slowest: float = 0.0

    def __iadd__(self, other: Report) -> Report:
        self.runs += other.runs
        self.by_kind += other.by_kind
        self.went_on += other.went_on
        self.stopped_and_resumed += other.stopped_and_resumed
        self.failures += other.failures
        self.paid_twice += other.paid_twice
        self.hangs += other.hangs
        self.slowest = max(self.slowest, other.slowest)
        return self

    def as_dict(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "went_on": self.went_on,
            "stopped_and_resumed": self.stopped_and_resumed,
            "failed": len(self.failures),
            "paid_twice": self.paid_twice,
            "hangs": self.hangs,
            "slowest_seconds": round(self.slowest, 2),
            "struck": dict(sorted(self.by_kind.items())),
            "failures": self.failures,
        }


def draw_plan(seed: int, number: int) -> Plan:
    """The first strike's kind goes round, so that a campaign has them all alike; the rest is drawn."""
    rng = random.Random(f"{seed}/{number}")
    kinds = sorted(FAULTS)
    first = kinds[number % len(kinds)]
    planned = [
        Strike(
            first, rng.randint(1, 6), min(rng.randint(1, 3), 1 if first in SLOW_KINDS else 3), rng.uniform(0.01, 0.3)
        )
    ]
    others = [kind for kind in kinds if FAULTS[kind].owed == "goes on" and kind not in SLOW_KINDS]
    while rng.random() < 0.4 and sum(strike.times for strike in planned) < MOST - 1:
        planned.append(Strike(rng.choice(others), rng.randint(1, 8), 1, rng.uniform(0.01, 0.3)))
    return Plan(
        number,
        planned,
        rng.choice(list(SWAPS)),
        trees=rng.random() < 0.5,
        size=rng.choice((None, None, 4)),
        seed=rng.randint(0, 3),
    )


def play(world: World, plan: Plan, report: Report, *, limit: float = 60.0) -> list[str]:
    """Run the plan, resume if it stopped; what is wrong with the outcome. limit: seconds that a run may take."""
    flags = ("--seed", str(plan.seed))
    whole = world.undisturbed(*flags)
    world.be(trees=plan.trees)
    runs = world.home / f"run {plan.number}"
    world.proxy.renew([Strike(s.kind, s.at, s.times, s.seconds) for s in plan.strikes])

    def swap() -> None:
        world.be(trees=plan.trees and plan.swap != "none", **SWAPS[plan.swap])
        world.proxy.strange = plan.swap != "none"

    world.proxy.swap = swap
    flags += () if plan.size is None else ("--prompts_per_request", str(plan.size))
    wrong = []
    ended = world.run(runs, *flags, limit=limit)
    report.slowest = max(report.slowest, ended.seconds)
    report.by_kind.update(world.proxy.struck)
    if ended.hung:
        report.hangs += 1
        wrong.append("hung")
    elif "Traceback" in ended.err:
        wrong.append(f"crashed: {ended.err[-300:]}")
    elif ended.code:
        may = any(FAULTS[kind].owed == "may stop" for kind in world.proxy.struck)
        if not may:
            wrong.append(f"stopped where it should go on ({ended.code}): {ended.err.strip()[-300:]}")
        if "error: " not in ended.err:
            wrong.append(f"stopped without a reason: {ended.err[-300:]}")
        if "go on with:" not in ended.err:
            wrong.append(f"stopped without saying how to go on: {ended.err[-200:]}")
    if ended.code:
        world.be(trees=plan.trees)
        world.proxy.plan, world.proxy.strange = [], False
        again = world.run(runs, *flags, limit=limit)
        report.hangs += again.hung
        if again.code:
            return [*wrong, f"cannot be resumed ({again.code}): {again.err[-300:]}"]
        report.stopped_and_resumed += 1
    else:
        report.went_on += 1
    if labels_of(runs) != whole:
        wrong.append("other labels than the undisturbed run's")
    if bad := world.wrong_in_cache(runs):
        wrong.append(f"{bad} scores in the cache that were not given for their prompt")
    if twice := world.paid_twice():
        report.paid_twice += twice
        wrong.append(f"{twice} scores paid for twice")
    shutil.rmtree(runs)
    return wrong


def network_campaign(world: World, numbers: Sequence[int], seed: int, *, told: bool = False) -> Report:
    """Plans `numbers` of `seed`, one after the other."""
    report = Report()
    for number in numbers:
        plan = draw_plan(seed, number)
        wrong = play(world, plan, report)
        report.runs += 1
        if wrong:
            report.failures.append(f"{plan}: {'; '.join(wrong)}")
            if told:
                print(report.failures[-1], flush=True)
    return report


def real_campaign(world: RealWorld, runs: int, seed: int, *, told: bool = False) -> Report:
    """`runs` plans of as many kinds, evenly out of all that a server which stays itself can meet."""
    report = Report()
    kinds = [kind for kind in sorted(FAULTS) if kind != "restart_as_another"]
    rng = random.Random(f"real {seed}")
    for number in range(runs):
        kind = kinds[(number * len(kinds) // runs + seed - 1) % len(kinds)]
        strike = Strike(kind, rng.randint(1, 6), 1 if kind in SLOW_KINDS else rng.randint(1, 3), rng.uniform(0.01, 0.3))
        plan = Plan(number, [strike], "none", trees=True, size=None, seed=number % 2)
        wrong = play(world, plan, report, limit=400.0)
        report.runs += 1
        if wrong:
            report.failures.append(f"{plan}: {'; '.join(wrong)}")
        if told:
            print(f"{plan}: {'; '.join(wrong) or 'as undisturbed'}", flush=True)
    return report


def _share(numbers: Sequence[int], seed: int) -> Report:
    with World() as world:
        return network_campaign(world, numbers, seed, told=True)


def shared_campaign(runs: int, seed: int, jobs: int) -> Report:
    """The same in several processes at once, each with servers of its own."""
    report = Report()
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(_share, [range(job, runs, jobs) for job in range(jobs)], [seed] * jobs):
            report += part
    return report


def kill_campaign(world: World, kills: int, seed: int, *, told: bool = False) -> Report:
    """SIGKILL at random moments of a run's whole life, each followed by a resume that ends with the same labels."""
    report = Report()
    rng = random.Random(f"kill {seed}")
    whole = world.undisturbed("--seed", "0")
    world.server.latency = 0.02
    duration = _seconds_of_a_run(world)
    number = 0
    while report.runs < kills:
        number += 1
        runs = world.home / f"kill {number}"
        world.be(trees=bool(number % 2))
        world.proxy.renew([])
        process = _start(world, runs)
        moment = rng.uniform(0.0, duration)
        process.join(moment)
        if process.exitcode is not None:
            shutil.rmtree(runs)
            continue  # it was done before: not a kill
        process.kill()
        process.join()
        stored = world.stored(runs)
        report.runs += 1
        before = list(world.proxy.exchanges)
        ended = world.run(runs, "--seed", "0", limit=90)
        report.hangs += ended.hung
        wrong = []
        if ended.code:
            wrong.append(f"cannot be resumed ({ended.code}): {ended.err[-300:]}")
        else:
            if labels_of(runs) != whole:
                wrong.append("other labels")
            if bad := world.wrong_in_cache(runs):
                wrong.append(f"{bad} wrong scores in the cache")
            # What was on its way to the client, or to its disk, when it was killed is asked again.
            twice = sum(len(stored.intersection(e.prompts)) for e in world.proxy.exchanges[len(before) :])
            lost = sum(e.delivered is not None and not stored.issuperset(e.prompts) for e in before)
            if lost > 1:
                wrong.append(f"{lost} answers lost, and one at a time is stored")
            report.paid_twice += twice
            if twice:
                wrong.append(f"{twice} scores paid for twice")
            report.stopped_and_resumed += 1
        if wrong:
            report.failures.append(f"kill {number} at {moment:.3f} s: {'; '.join(wrong)}")
            if told:
                print(report.failures[-1], flush=True)
        shutil.rmtree(runs, ignore_errors=True)
    world.server.latency = 0.0
    report.by_kind["SIGKILL"] = report.runs
    return report


def _start(world: World, runs: Path) -> ForkServerProcess:
    """A run in a process of its own, forked from one that has imported everything: kills meet the run, not imports."""
    process = forks.Process(target=run_here, args=(world.arguments(runs, "--seed", "0"), world.environment()))
    process.start()
    return process


def run_here(arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        sys.exit(icm(arguments))


def _seconds_of_a_run(world: World) -> float:
    for name in ("warm", "timed"):
        started = time.perf_counter()
        process = _start(world, world.home / name)
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=0, help="runs with faults on the way to the server")
    parser.add_argument("--kills", type=int, default=0, help="runs killed with SIGKILL and resumed")
    parser.add_argument("--real", type=int, default=0, help="runs with faults on the way to the vLLM at VLLM_BASE_URL")
    parser.add_argument("--model", default="gemma-3-270m", help="what that one serves")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once for --runs")
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER", help="one run of --runs alone")
    parser.add_argument("--json", type=Path, default=None, help="write the result there")
    args = parser.parse_args(arguments)
    url = os.environ.get("VLLM_BASE_URL", "")
    if args.real and not url:
        parser.error("--real needs a server: set VLLM_BASE_URL, or put scripts/with_server.py -- before the command")
    started = time.perf_counter()
    result: dict[str, Any] = {
        "command": " ".join(["python -m tests.faults.campaign", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}",
    }
    if args.only is not None:
        result["faults"] = _share([args.only], args.seed).as_dict()
    elif args.runs:
        result["faults"] = shared_campaign(args.runs, args.seed, args.jobs).as_dict()
    if args.real:
        with RealWorld(url, args.model) as world:
            result["real"] = real_campaign(world, args.real, args.seed, told=True).as_dict()
    if args.kills:
        forks.set_forkserver_preload(["__main__"])  # imported once, not in every child
        with World() as world:
            result["kills"] = kill_campaign(world, args.kills, args.seed, told=True).as_dict()
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(any(part["failed"] for part in result.values() if isinstance(part, dict)))


if __name__ == "__main__":
    sys.exit(main())
