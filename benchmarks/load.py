"""Many runs at once on one client: does its memory stay flat, how much can it take, what does a slow server do to it?

    python benchmarks/load.py --json load.json                       # everything; a quarter of an hour on two cores
    python benchmarks/load.py --parts throughput --repeats 7         # one part
    python benchmarks/load.py --quick                                # some seconds: counts and bounds, no times

Every run has its own pool and evaluates it again and again, as a search does, with other labels every time: no two
prompts are alike, so the response cache never answers. All runs share one ModelAPI; every case is a process.

  memory      the tests' stand-in for vLLM, in another process; resident memory of the client over time. In trees, as
              our servers take pools, and as whole prompts, as a plain vLLM takes them
  throughput  an engine in this process that answers at once, so only the client is measured. With and without its cache
  slow        a server that takes seconds for every answer, and one that stops reading requests: everything is asked,
              next to nothing is answered, for --seconds

Memory needs Linux (/proc). Exit code 1: a wrong answer, a bound not kept, or fewer scores a second than wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from aiohttp import web

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.own_process import serve_until_stopped, stand_in, start_without_ctrl_c
from benchmarks.step_machine import commit, hardware
from benchmarks.step_measure import Progress
from core.flags import FlagParser
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.transport import HttpOptions
from core.llm_api.labels import TRUE_FALSE, SpelledLabels
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import ResponseCache
from core.llm_api.types import (
    Capabilities,
    Engine,
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Query,
    TokenLogprobs,
)
from fakes.vllm_server import BOS, FALSE, TRUE, FakeVLLM, label_distribution
from src.icm.consistency import Consistency
from src.icm.objective import LogOdds, Objective
from src.icm.prefix_tree import TreeLayout
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.prompts import PromptBook
from src.pipeline.scoring import PoolScorer

PEAK: Final = 600.0
"""MB of resident memory that no case may exceed, the interpreter and everything imported included."""
RATE: Final = 20_000
"""Scores a second that the client should manage with an engine that costs nothing."""
FLAT: Final = 20.0
"""MB by which memory may grow over a million scores, by the slope over the second half."""
QUICK_GROWTH: Final = 60.0
"""MB by which memory may grow in a case of --quick."""
EVERY: Final = 0.1
"""Seconds between looks at the memory."""
LONG: Final = 500_000
"""Scores from which a case shows whether memory grows; with fewer, the slope is that of warming up."""
FEW: Final = 20
"""Looks that a slope needs."""
SLOW: Final = 5.0
"""Seconds that the slow server takes for every answer."""
LABELS: Final = SpelledLabels(TRUE_FALSE, ((FALSE,), (TRUE,)))
MODEL: Final = "fake-8b"
MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured. route: tree, whole (prompts) or process (no server). scores: how many; 0: as many as are
    answered in for_seconds.

    stand_in: prompt, slow or stalled. claims: of each run's pool; tokens: of each claim.
    """

    part: str
    route: str
    scores: int
    runs: int
    claims: int
    tokens: int
    stand_in: str = "prompt"
    cache: bool = True
    for_seconds: float = 0.0

    def __str__(self) -> str:
        how = {"process": "cached" if self.cache else "no cache"}.get(self.route, self.stand_in)
        return f"{self.part}, {self.route}, {how}, {self.runs} x {self.claims} x {self.tokens}"


@dataclass
class Memory:
    """Resident memory over the work: (scores answered, seconds, bytes) at every look."""

    looks: list[tuple[int, float, int]] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """Megabytes, the least of them after the first fifth of the time; slopes: least squares over the second half,
        None where that has fewer than FEW looks."""
        later = self.looks[len(self.looks) // 5 :]
        half = np.array(self.looks[len(self.looks) // 2 :], dtype=float)
        few = len(half) < FEW
        seen = [size for _, _, size in later]
        return {
            "first_mb": round(self.looks[0][2] / MB, 1),
            "least_mb": round(min(seen) / MB, 1),
            "peak_mb": round(max(size for _, _, size in self.looks) / MB, 1),
            "slope_mb_a_million_scores": None if few else round(slope(half[:, 0], half[:, 2]) * 1e6 / MB, 2),
            "slope_mb_a_minute": None if few else round(slope(half[:, 1], half[:, 2]) * 60 / MB, 2),
        }


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least squares; 0 where x does not move."""
    spread = x - x.mean()
    total = float(spread @ spread)
    return float(spread @ (y - y.mean())) / total if total else 0.0


def resident() -> int:
    """Bytes of this process in memory. Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# The servers


def quick_log_odds(tokens: Sequence[int]) -> float:
    """Between -4 and 4 nats, from every token and its place, at the cost of one hash."""
    return (hash(tuple(tokens)) & 0xFFFFFFFF) / 2**32 * 8 - 4


class LoadServer(FakeVLLM):
    """Keeps nothing of its requests, of which there are a million, and does not count a prefix cache.

    manner: prompt, slow (SLOW seconds an answer) or stalled (reads no request's body). The first two questions, which
    are those of a client's start, are always answered.
    """

    def __init__(self, manner: str, trees: bool) -> None:
        super().__init__(log_odds=quick_log_odds, trees=trees, max_model_len=2**20)
        self.manner = manner
        self.answered = 0

    async def _label_logprobs(self, request: web.Request) -> web.StreamResponse:
        return await self._after(request, super()._label_logprobs)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._after(request, super()._completions)

    async def _after(self, request: web.Request, answer: Callable[[web.Request], Any]) -> web.StreamResponse:
        self.answered += 1
        if self.answered > 2 and self.manner != "prompt":
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            try:
                await asyncio.sleep(SLOW if self.manner == "slow" else 1e6)
            finally:
                self.in_flight -= 1
        response: web.StreamResponse = await answer(request)
        for seen in (self.completions, self.requests, self.authorizations):
            seen.clear()
        return response

    def _count_blocks(self, tokens: list[int], salt: str) -> None:
        pass


async def _serve(client: Connection, manner: str, trees: bool) -> None:
    async with LoadServer(manner, trees) as server:
        await serve_until_stopped(client, server.port, lambda: server.max_in_flight)


class AtOnce:
    """An Engine in this process that answers at once, from each prompt's digest."""

    capabilities: Final = Capabilities()

    async def start(self) -> EngineIdentity:
        return EngineIdentity("at once", MODEL)

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        return None

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """None: not needed here."""
        return None

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        return None

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        await asyncio.sleep(0)  # let the other runs ask, too
        logprobs = [TokenLogprobs(label_distribution(digest_log_odds(query.prompt))) for query in queries]
        answer = EngineAnswer(logprobs, prompt_tokens=0)
        if on_answer is not None:
            on_answer(range(len(queries)), answer)
        return answer

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        return None

    async def kv_cache_tokens(self) -> int | None:
        return None

    async def aclose(self) -> None:
        pass


def digest_log_odds(prompt: Prompt) -> float:
    """Between -4 and 4 nats."""
    return int(prompt.digest[:8], 16) / 2**32 * 8 - 4


# The client


class Run:
    """One run's pool, asked again and again with other labels."""

    def __init__(self, api: ModelAPI, case: Case, number: int) -> None:
        rng = np.random.default_rng([number, case.claims])
        ids = rng.integers(10_000, 110_000, size=(case.claims, case.tokens)).tolist()
        names = [f"run {number}, claim {claim}" for claim in range(case.claims)]
        book = PromptBook.build(names, LABELS, tokens=ids, prefix_tokens=(BOS,), separator_tokens=(10,))
        groups = tuple(map(str, range(case.claims)))
        self._layout = TreeLayout.build(range(case.claims), groups, rng)
        self._api = api.share(exclusive=False)
        self._scorer = PoolScorer(self._api, book, Problem(groups, Consistency(()), Objective(1.0), SearchSettings()))
        self._rng = rng
        self._expected: Callable[[Prompt], float] = (
            digest_log_odds if case.route == "process" else lambda prompt: quick_log_odds(prompt.token_ids)
        )

    async def evaluate(self) -> bool:
        """Evaluate the pool as a search does; returns whether a claim drawn at random got the answer to its prompt."""
        candidate = self._candidate()
        [evaluation] = await self._scorer.evaluate([candidate])
        claim = int(self._rng.integers(len(candidate.labels)))
        return self._is_right(self._scorer.prompt(claim, candidate), evaluation.log_odds[claim])

    def prompts(self) -> list[Prompt]:
        """The whole pool's questions, laid out."""
        candidate = self._candidate()
        return [self._scorer.prompt(claim, candidate) for claim in self._layout.questions]

    async def score(self, prompts: Sequence[Prompt]) -> bool:
        """As `evaluate`, for prompts that are laid out already."""
        scores = await self._api.score(prompts, LABELS)
        at = int(self._rng.integers(len(prompts)))
        return self._is_right(prompts[at], scores.log_odds[at])

    def _candidate(self) -> Candidate:
        drawn = self._rng.random(len(self._layout.questions)) < 0.5
        return Candidate(tuple(drawn.tolist()), self._layout)

    def _is_right(self, prompt: Prompt, log_odds: LogOdds) -> bool:
        return isinstance(log_odds, float) and abs(log_odds - self._expected(prompt)) < 1e-6


@dataclass
class Work:
    """Work done. asking: wall and CPU seconds of this process without laying out prompts; None: including it."""

    answered: int = 0
    wrong: int = 0
    asking: tuple[float, float] | None = None


async def measure(case: Case) -> dict[str, Any]:
    """Run one case here."""
    with tempfile.TemporaryDirectory(prefix="icm-load-") as folder:
        cache = ResponseCache(Path(folder) / "cache.sqlite") if case.cache else None
        if case.route == "process":
            return await _measure(case, AtOnce(), cache)
        with stand_in(_serve, case.stand_in, case.route == "tree") as (url, stop):
            result = await _measure(case, VLLMClient(url, MODEL), cache)
            return result | {"most_requests_at_once": stop()}


async def _measure(case: Case, engine: Engine, cache: ResponseCache | None) -> dict[str, Any]:
    memory, work = Memory(), Work()
    async with ModelAPI(engine, cache=cache) as api:
        runs = [Run(api, case, number) for number in range(case.runs)]
        bodies = case.runs * sum(prompt.json_size for prompt in runs[0].prompts())
        began, cpu = time.perf_counter(), time.process_time()

        async def look() -> None:
            while True:
                memory.looks.append((work.answered, time.perf_counter() - began, resident()))
                await asyncio.sleep(EVERY)

        looker = asyncio.create_task(look())
        try:
            async with Progress().doing(f"{case}"):
                with suppress(TimeoutError):
                    async with asyncio.timeout(case.for_seconds or None):
                        await (_ask_in_turns if case.part == "throughput" else _ask_at_will)(case, runs, work)
        finally:
            looker.cancel()
        seconds, cpu = work.asking or (time.perf_counter() - began, time.process_time() - cpu)
        memory.looks.append((work.answered, seconds, resident()))
        return {
            **asdict(case),
            "answered": work.answered,
            "wrong": work.wrong,
            "seconds": round(seconds, 2),
            "scores_a_second": round(work.answered / seconds),
            "scores_a_cpu_second": round(work.answered / cpu),
            "with_layout_a_second": round(work.answered / (time.perf_counter() - began)),
            **memory.summary(),
            "bodies_of_a_round_mb": round(bodies / MB, 1),
            "rows_in_cache": 0 if cache is None else len(cache),
            "load_average": round(os.getloadavg()[0], 1),
        }


async def _ask_at_will(case: Case, runs: Sequence[Run], work: Work) -> None:
    """Every run evaluates its pool again and again, until there are case.scores together; for ever if that is 0."""
    rounds = iter(range(-(-case.scores // case.claims))) if case.scores else itertools.count()

    async def go(run: Run) -> None:
        for _ in rounds:
            work.wrong += not await run.evaluate()
            work.answered += case.claims

    async with asyncio.TaskGroup() as group:
        for run in runs:
            group.create_task(go(run))


async def _ask_in_turns(case: Case, runs: Sequence[Run], work: Work) -> None:
    """All runs lay out their prompts, which is not timed, and ask them at once, which is."""
    wall = cpu = 0.0
    while work.answered < case.scores:
        laid_out = [run.prompts() for run in runs]
        started, at = time.perf_counter(), time.process_time()
        right = await asyncio.gather(*(run.score(prompts) for run, prompts in zip(runs, laid_out, strict=True)))
        wall, cpu = wall + time.perf_counter() - started, cpu + time.process_time() - at
        work.wrong += right.count(False)
        work.answered += case.runs * case.claims
        work.asking = wall, cpu
        await asyncio.sleep(0)  # lets `look` run


# The command line


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the flags. Small pools give many scores; the bodies of large ones are 1.2 GB a round."""
    runs, many = args.runs, args.scores

    def case(name: str, route: str, scores: int, pool: Sequence[int], times: int = 1) -> Case:
        return Case(name, route, scores, times * runs, claims=pool[0], tokens=pool[1])

    def waiting(route: str, manner: str, times: int = 1) -> Case:
        return replace(case("slow", route, 0, args.large, times), stand_in=manner, for_seconds=args.seconds)

    part = {
        "memory": [
            case("memory", "tree", many, args.small),
            case("memory", "whole", many // 20, args.small),
            case("memory", "tree", many // 20, args.large),
            case("memory", "whole", many // 20, args.large),
        ],
        "throughput": [
            replace(case("throughput", "process", many // 8, pool), cache=cache)
            for _ in range(args.repeats)
            for pool in (args.small, args.large)
            for cache in (False, True)
        ],
        "slow": [
            waiting("tree", "stalled"),
            waiting("whole", "slow"),
            waiting("whole", "stalled"),
            waiting("whole", "stalled", times=2),
        ],
    }
    if args.quick:
        part["memory"], part["slow"] = part["memory"][:2], part["slow"][-1:]
        part["throughput"] = part["throughput"][1:2]
    return [case for name in args.parts for case in part[name]]


def broken_bounds(row: Mapping[str, Any], *, quick: bool) -> list[str]:
    """The bounds that a case broke. Times are not checked here."""
    grown = row["peak_mb"] - row["first_mb"]
    slots = HttpOptions().max_concurrent_requests
    found = [
        (row["wrong"] > 0, f"{row['wrong']} wrong answers"),
        (row["cache"] and row["rows_in_cache"] < row["answered"], "answers are missing in the cache"),
        (row.get("most_requests_at_once", 0) > slots, f"more than {slots} requests at once"),
        (not row["for_seconds"] and row["answered"] < row["scores"], "scores are missing"),
        (quick and grown > QUICK_GROWTH, f"memory grew by {grown:.0f} MB"),
        (not quick and row["peak_mb"] > PEAK, f"{row['peak_mb']:.0f} MB of memory, and {PEAK:.0f} are allowed"),
        (
            row["scores"] >= LONG and (row["slope_mb_a_million_scores"] or 0.0) > FLAT,
            f"memory grows by {row['slope_mb_a_million_scores']} MB a million scores",
        ),
    ]
    return [message for is_broken, message in found if is_broken]


def too_slow(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Prints best and median of equal throughput cases; returns those whose best is below RATE."""
    slow = []
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["part"] == "throughput":
            cache = "with its cache" if row["cache"] else "without a cache"
            alike.setdefault(f"{row['claims']} claims of {row['tokens']} tokens, {cache}", []).append(row)
    for name, repeated in alike.items():
        rates, cpu = ([row[key] for row in repeated] for key in ("scores_a_second", "scores_a_cpu_second"))
        print(
            f"the client alone, {name}: {max(rates):,} scores a second at best, {statistics.median(rates):,.0f} in the "
            f"median; {max(cpu):,} and {statistics.median(cpu):,.0f} a second of its CPU time"
        )
        if max(rates) < RATE:
            slow.append(f"the client alone, {name}: fewer than {RATE:,} scores a second; is the machine busy?")
    return slow


def _case_process(parent: Connection, case: Case) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C: the cache's folder is removed
    with suppress(KeyboardInterrupt):
        parent.send(asyncio.run(measure(case)))


def _in_a_process(case: Case) -> dict[str, Any]:
    """`measure` in a new process, so that its memory is measured. Raises EOFError where that ends without a result."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_case_process, args=(there, case))
    start_without_ctrl_c(child)
    there.close()
    try:
        result: dict[str, Any] = here.recv()
    except BaseException:
        child.terminate()
        raise
    finally:
        child.join(10)
        child.kill()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module for the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("memory", "throughput", "slow")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--runs", type=int, default=64, help="runs at once (default 64)")
    parser.add_argument("--scores", type=int, default=1_000_000, help="of the longest case (default 1000000)")
    for name, pool in (("small", [64, 20]), ("large", [256, 40])):
        parser.add_argument(
            f"--{name}",
            nargs=2,
            type=int,
            metavar=("CLAIMS", "TOKENS"),
            default=pool,
            help=f"a {name} pool (default {pool[0]} {pool[1]})",
        )
    parser.add_argument("--repeats", type=int, default=3, help="of each throughput case (default 3)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each slow case (default 20)")
    parser.add_argument("--quick", action="store_true", help="a small part of it, in this process; no times are judged")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows here, after every case; other parts' rows stay"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.runs, args.scores, args.small, args.large = 8, 2_000, [16, 8], [32, 8]
        args.repeats, args.seconds = 1, 1.0
    if min(args.runs, args.scores, *args.small, *args.large, args.repeats, args.seconds) <= 0:
        parser.error("numbers must be above 0")
    if not Path("/proc/self/statm").exists():
        parser.error("memory is read from /proc, which only Linux has")
    kept: list[dict[str, Any]] = []
    if args.json is not None and args.json.exists():
        kept = [row for row in json.loads(args.json.read_text()).get("rows", []) if row["part"] not in args.parts]
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    print(f"{'case':<44}{'answered':>10}{'scores/s':>10}{'a CPU s':>9}{'MB first':>10}{'peak':>8}{'slope':>8}")
    try:
        for case in cases(args):
            row = asyncio.run(measure(case)) if args.quick else _in_a_process(case)
            rows.append(row)
            broken += [f"{case}: {bound}" for bound in broken_bounds(row, quick=args.quick)]
            numbers = f"{row['answered']:>10}{row['scores_a_second']:>10}{row['scores_a_cpu_second']:>9}"
            slope_shown = "-" if row["slope_mb_a_million_scores"] is None else row["slope_mb_a_million_scores"]
            memory = f"{row['first_mb']:>10}{row['peak_mb']:>8}{slope_shown:>8}"
            print(f"{case!s:<44}{numbers}{memory}", flush=True)
            if args.json is not None:
                result = {"commit": commit(), "machine": hardware(), "rows": kept + rows}
                args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except KeyboardInterrupt:
        print("stopped; finished cases are kept", file=sys.stderr)
        return 130
    except EOFError:
        print("error: the process of a case ended without a result", file=sys.stderr)
        return 2
    slow = too_slow(rows)
    for bound in (broken := broken + ([] if args.quick else slow)):
        print(f"not kept: {bound}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
