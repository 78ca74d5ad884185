"""Many runs at once on one client: does its memory stay flat, what can it take alone, and what does a slow server do to it?

    python benchmarks/load.py --json load.json                       # everything; a quarter of an hour on two cores
    python benchmarks/load.py --parts throughput --repeats 7         # one part
    python benchmarks/load.py --quick                                # some seconds: counts and bounds, no times

Every run has a pool of its own and evaluates it again and again, as a search does, with other labels every time: no two
prompts are alike, so the response cache never answers. All runs share one ModelAPI, and every case is a process of its own.

  memory      the tests' stand-in for vLLM, in another process; resident memory of the client over time. In trees, as our
              servers take pools, and as whole prompts, as a plain vLLM takes them
  throughput  an engine in this process that answers at once: what is left is the client. With and without its cache
  slow        a server that takes seconds for every answer, and one that stops reading requests: everything is asked, next
              to nothing is answered, for --seconds

Memory needs Linux (/proc). Exit code 1: a wrong answer, a bound not kept, or fewer scores a second than wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
from aiohttp import web

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import commit, hardware
from benchmarks.step_measure import Progress
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import ResponseCache
from core.llm_api.transport import HttpOptions
from core.llm_api.types import (
    Engine,
    EngineAnswer,
    EngineIdentity,
    LabelLogprobs,
    LabelTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
)
from core.llm_api.vllm_llm import VLLMClient
from src.icm.annealing import Candidate, Problem, SearchSettings
from src.icm.consistency import Consistency
from src.icm.objective import Objective
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from src.pipeline.search import PoolScorer
from tests.core.fake_server import BOS, FALSE, TRUE, FakeVLLM, label_distribution

PEAK: Final = 600e6
"""Bytes of resident memory that no case may exceed, the interpreter and everything imported included."""
RATE: Final = 20_000
"""Scores a second that the client alone should manage."""
FLAT: Final = 50e6
"""Bytes by which memory may grow over a million scores, by the slope over the second half."""
EVERY: Final = 0.1
"""Seconds between looks at the memory."""
SLOW: Final = 5.0
"""Seconds that the slow server takes for every answer."""
LABELS: Final = LabelTokens(" True", " False", TRUE, FALSE)
MODEL: Final = "fake-8b"
MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured. route: tree, whole (prompts) or process (no server). scores: how many; 0: for `seconds`.

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
    seconds: float = 0.0


@dataclass
class Memory:
    """Resident memory over the work: (scores answered, seconds, bytes) at every look."""

    looks: list[tuple[int, float, int]] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Megabytes, from when a fifth of the time was over; slope: least squares over the second half."""
        later = self.looks[len(self.looks) // 5 :]
        half = np.array(self.looks[len(self.looks) // 2 :], dtype=float)
        seen = [size for _, _, size in later]
        return {
            "first_mb": round(self.looks[0][2] / MB, 1),
            "least_mb": round(min(seen) / MB, 1),
            "peak_mb": round(max(size for _, _, size in self.looks) / MB, 1),
            "slope_mb_a_million_scores": round(slope(half[:, 0], half[:, 2]), 2),
            "slope_mb_a_minute": round(slope(half[:, 1], half[:, 2]) * 60 / MB, 2),
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
    """Between -4 and 4 nats, from every token and its place, at the price of one hash."""
    return (hash(tuple(tokens)) & 0xFFFFFFFF) / 2**32 * 8 - 4


class LoadServer(FakeVLLM):
    """Keeps nothing of what it is asked, for it is asked a million times, and counts no prefix cache.

    manner: prompt, slow (SLOW seconds an answer) or stalled (reads no request's body). The first two questions, which
    a client asks to know the server, are always answered.
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


async def _serve(told: Connection, manner: str, trees: bool) -> None:
    async with LoadServer(manner, trees) as server:
        told.send(server.port)
        with suppress(EOFError):  # the client was killed
            await asyncio.to_thread(told.recv)
            told.send(server.max_in_flight)


def _server_process(told: Connection, manner: str, trees: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the client's to hear; it then ends this process
    asyncio.run(_serve(told, manner, trees))


@contextmanager
def stand_in(manner: str, trees: bool) -> Iterator[tuple[str, Callable[[], int]]]:
    """A LoadServer in a process of its own: its URL, and what stops it and tells the most requests it had at once."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_server_process, args=(there, manner, trees), daemon=True)
    server.start()
    there.close()

    def stop() -> int:
        here.send("stop")
        return int(here.recv())

    try:
        yield f"http://127.0.0.1:{here.recv()}", stop
    finally:
        here.close()
        server.join(1)
        server.kill()


class AtOnce:
    """An Engine in this process that answers at once, from each prompt's digest."""

    async def start(self) -> EngineIdentity:
        return EngineIdentity("at once", MODEL)

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        return None

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        return None

    async def score(
        self, prompts: Sequence[Prompt], labels: LabelTokens, *, on_answer: OnAnswer | None = None
    ) -> EngineAnswer:
        await asyncio.sleep(0)  # let the other runs ask, too
        logprobs = [LabelLogprobs(*label_distribution(digest_log_odds(prompt))) for prompt in prompts]
        answer = EngineAnswer(logprobs, prompt_tokens=0)
        if on_answer is not None:
            on_answer(range(len(prompts)), answer)
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
    """One run's pool, evaluated again and again with other labels."""

    def __init__(self, api: ModelAPI, case: Case, number: int) -> None:
        rng = np.random.default_rng([number, case.claims])
        ids = rng.integers(10_000, 110_000, size=(case.claims, case.tokens)).tolist()
        names = [f"run {number}, claim {claim}" for claim in range(case.claims)]
        book = PromptBook.build(names, LABELS, tokens=ids, prefix_tokens=(BOS,), separator_tokens=(10,))
        groups = tuple(map(str, range(case.claims)))
        self._layout = TreeLayout.build(range(case.claims), groups, rng)
        self._scorer = PoolScorer(
            api.share(alone=False), book, LABELS, Problem(groups, Consistency(()), Objective(1.0), SearchSettings())
        )
        self._rng = rng
        self._expected = digest_log_odds if case.route == "process" else lambda p: quick_log_odds(p.token_ids)

    async def evaluate(self) -> bool:
        """Ask the whole pool; whether the answer to a claim drawn at random is the one to its prompt."""
        candidate = Candidate(tuple((self._rng.random(len(self._layout.questions)) < 0.5).tolist()), self._layout)
        [evaluation] = await self._scorer.evaluate([candidate])
        claim = int(self._rng.integers(len(candidate.labels)))
        expected = self._expected(self._scorer.prompt(claim, candidate))
        return abs(evaluation.log_odds[claim] - expected) < 1e-6


async def measure(case: Case) -> dict[str, Any]:
    """Run one case here."""
    with tempfile.TemporaryDirectory(prefix="icm-load-") as folder:
        cache = ResponseCache(Path(folder) / "cache.sqlite") if case.cache else None
        if case.route == "process":
            return await _ask(case, AtOnce(), cache)
        with stand_in(case.stand_in, case.route == "tree") as (url, stop):
            result = await _ask(case, VLLMClient(url, MODEL), cache)
            return result | {"most_requests_at_once": stop()}


async def _ask(case: Case, engine: Engine, cache: ResponseCache | None) -> dict[str, Any]:
    memory = Memory()
    wrong = asked = 0
    async with ModelAPI(engine, cache=cache) as api:
        runs = [Run(api, case, number) for number in range(case.runs)]
        # A run more than the scores would take ends the others' rounds a little early, never late.
        rounds = iter(range(-(-case.scores // case.claims))) if case.scores else iter(int, 1)
        answered = 0

        async def go(run: Run) -> None:
            nonlocal wrong, answered, asked
            for _ in rounds:
                asked += case.claims
                wrong += not await run.evaluate()
                answered += case.claims

        async def look() -> None:
            while True:
                memory.looks.append((answered, time.perf_counter() - began, resident()))
                await asyncio.sleep(EVERY)

        name = f"{case.part}, {case.route}, {case.stand_in if case.route != 'process' else 'cache' * case.cache or 'no cache'}"
        began, cpu = time.perf_counter(), time.process_time()
        looker = asyncio.create_task(look())
        try:
            async with Progress().doing(f"{name}, {case.runs} runs of {case.claims} claims"):
                with suppress(TimeoutError):
                    async with asyncio.timeout(case.seconds or None), asyncio.TaskGroup() as group:
                        for run in runs:
                            group.create_task(go(run))
        finally:
            looker.cancel()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        memory.looks.append((answered, seconds, resident()))
        return {
            **asdict(case),
            "asked": asked,
            "answered": answered,
            "wrong": wrong,
            "seconds": round(seconds, 2),
            "scores_a_second": round(answered / seconds),
            "scores_a_cpu_second": round(answered / cpu),
            **memory.summary(),
            "rows_in_cache": 0 if cache is None else len(cache),
            "load_average": round(os.getloadavg()[0], 1),
        }
