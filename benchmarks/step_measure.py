"""One measurement: synthetic claims, the engine they are asked of, and what one piece of work costs the client.

Claims are of random words, each its own group, with random labels. The number of words of a claim follows from the
seed; the words are new with every call of the benchmark (`salt`), so that nothing of an earlier call is in a server's
cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from benchmarks.make_shape import WORDS, word
from benchmarks.step_report import CaseResult, Repetition
from core.llm_api.engines.direct import DirectEngine
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import VLLMGroup
from core.llm_api.llm import ModelAPI
from core.llm_api.tokens import Spelling
from src.icm.consistency import Consistency, Labels
from src.icm.objective import Objective
from src.icm.prefix_tree import Layout, TreeLayout
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.prompts import SEPARATOR, PromptBook
from src.pipeline.scoring import PoolScorer

HttpEngine = VLLMClient | VLLMGroup
SPREAD: Final = 8
"""Claims are this many words shorter or longer than asked for, uniformly, as real ones vary."""

WARM_UP: Final = 4
"""Claims that are asked before anything is measured."""


@dataclass(frozen=True)
class Claims:
    """A pool of synthetic claims, tokenized by the engine."""

    book: PromptBook
    labels: tuple[bool, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(map(str, range(len(self.labels))))

    def labelling(self, labelled: Iterable[int]) -> Labels:
        """The labels of `labelled`, None for the others."""
        known = set(labelled)
        return tuple(label if claim in known else None for claim, label in enumerate(self.labels))

    def candidate(self, layout: Layout) -> Candidate:
        """All claims in `layout` with their labels."""
        return Candidate(self.labelling(layout.questions), layout)

    def scorer(self, api: ModelAPI) -> PoolScorer:
        """The scorer with which a search asks a model."""
        return PoolScorer(api, self.book, Problem(self.groups, Consistency(()), Objective(1.0), SearchSettings()))

    def describe(self, entry: CaseResult) -> None:
        """Write the lengths of demonstrations and questions into `entry`."""
        demonstrations = [len(true) for _, true in self.book.demonstrations]
        questions = [len(question) for question in self.book.questions]
        entry.demonstration_tokens, entry.demonstration_max = float(np.mean(demonstrations)), max(demonstrations)
        entry.question_tokens, entry.question_max = float(np.mean(questions)), max(questions)


def texts(count: int, tokens: int, *, lengths: np.random.Generator, words: np.random.Generator) -> list[str]:
    """`count` claims of about `tokens` words."""
    sizes = lengths.integers(max(1, tokens - SPREAD), tokens + SPREAD + 1, size=count)
    return ["".join(word(int(number)) for number in words.integers(WORDS, size=size)) for size in sizes]


@dataclass(frozen=True)
class Backend:
    """An engine, ready to be asked. single: the same server, one request a prompt; None in process.

    salt, seed: see the module. spelling: how the model's tokenizer spells demonstrations.
    """

    api: ModelAPI
    engine: HttpEngine | DirectEngine
    single: ModelAPI | None
    single_engine: HttpEngine | None
    spelling: Spelling
    kv_cache_tokens: int | None
    block_tokens: int | None
    claim_tokens: int
    seed: int
    salt: int
    draws: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    async def open(
        cls,
        engine: HttpEngine | DirectEngine,
        api: ModelAPI,
        single_engine: HttpEngine | None,
        single: ModelAPI | None,
        *,
        claim_tokens: int,
        seed: int,
        salt: int,
    ) -> Backend:
        """Both APIs are started already."""
        return cls(
            api=api,
            engine=engine,
            single=single,
            single_engine=single_engine,
            spelling=await Spelling.of(engine, separator=SEPARATOR),
            kv_cache_tokens=await api.kv_cache_tokens(),
            block_tokens=await engine.kv_block_size(),
            claim_tokens=claim_tokens,
            seed=seed,
            salt=salt,
        )

    async def claims(self, count: int, *purpose: int) -> Claims:
        """New claims. The same `purpose` has the same lengths and labels in every call."""
        lengths = np.random.default_rng([self.seed, count, *purpose])
        words = np.random.default_rng([self.salt, next(self.draws)])
        drawn = texts(count, self.claim_tokens, lengths=lengths, words=words)
        book = await PromptBook.open(self.api, drawn, self.spelling)
        return Claims(book, tuple((lengths.random(count) < 0.5).tolist()))

    async def warm_up(self) -> None:
        """Ask a few claims, also one by one, for connections and for what an engine compiles at its first request."""
        for api in filter(None, (self.api, self.single)):
            claims = await self.claims(WARM_UP, 0)
            layout = TreeLayout.build(range(WARM_UP), claims.groups, np.random.default_rng(self.seed))
            await claims.scorer(api).evaluate([claims.candidate(layout)])

    async def measure(self, work: Callable[[], Awaitable[object]], *, single: bool = False) -> Repetition:
        """The cost of `work`. Counters are read, and memory is freed, outside the measured time."""
        api, engine = (self.single, self.single_engine) if single else (self.api, self.engine)
        assert api is not None
        before, stats = await self.api.prefix_cache(), api.stats.as_dict()
        sent = engine.bytes_sent if isinstance(engine, HttpEngine) else None
        gc.collect()
        peaks = reset_peak_memory()
        cpu, started = time.process_time(), time.perf_counter()
        await work()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = peak_memory() if peaks else None
        after = await self.api.prefix_cache()
        spent = {name: value - stats[name] for name, value in api.stats.as_dict().items()}
        return Repetition(
            seconds=seconds,
            cpu_seconds=cpu,
            prompts=spent["engine_prompts"],
            prompt_tokens=spent["prompt_tokens"],
            computed_tokens=None if before is None or after is None else (after - before).computed,
            requests=spent["requests"],
            retries=spent["retries"],
            request_bytes=engine.bytes_sent - sent if isinstance(engine, HttpEngine) and sent is not None else None,
            peak_bytes=peak,
        )


def reset_peak_memory() -> bool:
    """Reset this process's peak of resident memory; returns whether that worked. Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        # Memory that earlier work freed is given back first, or it would be counted again.
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int | None:
    """The peak of resident memory since reset_peak_memory, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


class Progress:
    """One changing line on a terminal, elsewhere a line every 15 seconds; nothing for what takes less than 2."""

    FIRST: Final = 2.0
    EVERY: Final = 15.0

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()

    @contextlib.asynccontextmanager
    async def doing(self, what: str) -> AsyncIterator[None]:
        """Show `what` and how long it has taken so far."""
        ticker = asyncio.create_task(self._tick(what))
        try:
            yield
        finally:
            ticker.cancel()
            if self._terminal:
                self._out.write("\r\033[K")
                self._out.flush()

    async def _tick(self, what: str) -> None:
        started = time.monotonic()
        await asyncio.sleep(self.FIRST)
        while True:
            line = f"{what}: {time.monotonic() - started:.0f} s"
            self._out.write(f"\r\033[K{line[:110]}" if self._terminal else f"{line}\n")
            self._out.flush()
            await asyncio.sleep(1.0 if self._terminal else self.EVERY)


class Budget:
    """The wall seconds left, and a guess at the seconds of one more repetition, from smaller sizes measured before."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._taken: dict[str, tuple[int, float]] = {}

    @property
    def left(self) -> float:
        """Seconds; infinite without a budget."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def took(self, kind: str, size: int, seconds: float) -> None:
        """Remember the seconds of a repetition, with everything around it."""
        self._taken[kind] = (size, seconds)

    def guess(self, kind: str, size: int, power: float) -> float:
        """Seconds of a repetition, growing as size ** power from the last one measured; 0 if none was."""
        known, seconds = self._taken.get(kind, (size, 0.0))
        return float(seconds * (size / known) ** power)

    def refuses(self, kind: str, size: int, power: float) -> str:
        """Why there is no time for one more repetition; "" if there is."""
        needed, left = self.guess(kind, size, power), self.left
        if left <= 0 or needed > left:
            return f"budget: needs some {needed:.3g} s, {max(0.0, left):.3g} s left"
        return ""
