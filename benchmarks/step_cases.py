"""The cases of a search step, measured one after another: docs/benchmarks.md says what each is.

Cheap cases come first, at every size; then the slow ones (upstream's order, a and b) in rounds of one repetition of
every size, so that a budget that runs out costs repetitions before it costs sizes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from benchmarks.step_measure import Backend, Budget, Claims, Progress
from benchmarks.step_report import CASES, CaseResult, Repetition, Report
from core.errors import ConfigurationError
from src.icm.annealing import flipped
from src.icm.prefix_tree import TreeLayout, UpstreamLayout
from src.icm.problem import Candidate

SLOW: Final = ("b", "a")
POWER: Final = {"a": 2.2, "b": 2.2}
"""The exponents with which a case's seconds grow with N, for guesses; 1.4 for the others."""


@dataclass
class Grown:
    """A tree with a tail, whose prompts are all in the prefix cache, and the next claim to append."""

    claims: Claims
    layout: TreeLayout
    next: int


class Cases:
    """Measures into `report`; `save` is called after every case. cases: keys of CASES."""

    def __init__(
        self,
        backend: Backend,
        report: Report,
        *,
        cases: list[str],
        sizes: list[int],
        repeats: int,
        budget: Budget,
        progress: Progress,
        save: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._report = report
        self._sizes = sorted(sizes)
        self._repeats = repeats
        self._budget = budget
        self._progress = progress
        self._save = save
        self._wanted = [case for case in CASES if case in cases or (case == "d0" and "d" in cases)]
        report.cases = [CaseResult(case, size) for size in self._sizes for case in self._wanted]

    async def quick_ones(self) -> None:
        """The tree's cases, all repetitions, size after size."""
        for size in self._sizes:
            cold = await self._cold_tree(size) if "c" in self._wanted else None
            if "e" in self._wanted:
                await self._cached(size, cold)
            if {"d", "f"} & set(self._wanted):
                await self._grown_tree(size)

    async def slow_ones(self, rounds: range) -> None:
        """One repetition a round of every size in upstream's order."""
        for index in rounds:
            for size in self._sizes:
                for case in SLOW:
                    if case in self._wanted:
                        await self._slow(case, size, index)

    async def _slow(self, case: str, size: int, index: int) -> None:
        backend, entry = self._backend, self._report.case(case, size)
        if case == "a" and backend.single is None:
            entry.not_measured = "in process there are no requests: the same as b"
            return

        async def repetition() -> Repetition:
            # Equal lengths in a and b: their token counts can be compared.
            claims = await backend.claims(size, size, index)
            claims.describe(entry)
            api = backend.single if case == "a" else backend.api
            assert api is not None
            scorer = claims.scorer(api)
            return await backend.measure(
                lambda: scorer.evaluate([claims.candidate(UpstreamLayout.build(range(size)))]), single=case == "a"
            )

        await self._repeat(case, size, repetition, 1)

    async def _cold_tree(self, size: int) -> Grown | None:
        backend, entry = self._backend, self._report.case("c", size)
        last: Grown | None = None

        async def repetition() -> Repetition:
            nonlocal last
            index = len(entry.repetitions)
            claims = await backend.claims(size, size, index)
            claims.describe(entry)
            rng = np.random.default_rng([backend.seed, size, index])
            scorer = claims.scorer(backend.api)
            layouts: list[TreeLayout] = []

            def build() -> Awaitable[object]:
                layouts.append(TreeLayout.build(range(size), claims.groups, rng))
                return scorer.evaluate([claims.candidate(layouts[0])])

            measured = await backend.measure(build)
            last = Grown(claims, layouts[0], size)
            return measured

        await self._repeat("c", size, repetition, self._repeats)
        return last

    async def _cached(self, size: int, cold: Grown | None) -> None:
        entry = self._report.case("e", size)
        if cold is None:
            cold = await self._prepared(entry, size, size)
        if cold is None:
            return
        claims, candidate = cold.claims, cold.claims.candidate(cold.layout)
        claims.describe(entry)
        scorer = claims.scorer(self._backend.api)
        await self._repeat(
            "e", size, lambda: self._backend.measure(lambda: scorer.evaluate([candidate])), self._repeats
        )

    async def _grown_tree(self, size: int) -> None:
        """d and d0 on a tail that grows from below N to above it, so that their mean size is N; f where it makes N."""
        cases = [case for case in ("d0", "d", "f") if case in self._wanted]
        entries = [self._report.case(case, size) for case in cases]
        appends = self._repeats if "d" in cases else 0
        start = max(2, size - max(1, (appends + 1) // 2))
        grown = await self._prepared(entries[0], start, start + appends + self._repeats)
        if grown is None:
            for entry in entries:
                entry.not_measured = entries[0].not_measured
            return
        for entry in entries:
            grown.claims.describe(entry)
        for append in range(max(1, appends)):
            if "f" in cases and start + append == size - 1:
                await self._repeat("f", size, partial(self._alternatives, grown), self._repeats)
            if append == appends:
                break
            if await self._repeat("d0", size, partial(self._ask, grown), 1):
                await self._repeat("d", size, partial(self._append, grown), 1)
            else:
                self._report.case("d", size).not_measured = self._report.case("d0", size).not_measured

    async def _prepared(self, entry: CaseResult, size: int, count: int) -> Grown | None:
        """A tree of `size` of `count` claims, asked once, untimed. None, and why in `entry`, where that fails."""
        backend, budget = self._backend, self._budget
        entry.not_measured = budget.refuses("prepare", size, 1.4)
        if entry.not_measured:
            return None
        started = time.monotonic()
        try:
            async with self._progress.doing(f"N = {size}: filling the cache"):
                claims = await backend.claims(count, size)
                layout = TreeLayout.build(range(size), claims.groups, np.random.default_rng([backend.seed, size]))
                await claims.scorer(backend.api).evaluate([claims.candidate(layout)])
        except ConfigurationError as error:  # the prompts are longer than the model takes
            entry.not_measured = str(error)
            return None
        budget.took("prepare", size, time.monotonic() - started)
        return Grown(claims, layout, size)

    async def _ask(self, grown: Grown) -> Repetition:
        scorer = grown.claims.scorer(self._backend.api)
        candidate = grown.claims.candidate(grown.layout)
        return await self._backend.measure(lambda: scorer.predict([grown.next], candidate))

    async def _append(self, grown: Grown) -> Repetition:
        scorer = grown.claims.scorer(self._backend.api)
        layouts: list[TreeLayout] = []

        def evaluate() -> Awaitable[object]:
            layouts.append(grown.layout.append(grown.next))
            return scorer.evaluate([grown.claims.candidate(layouts[0])])

        measured = await self._backend.measure(evaluate)
        grown.layout, grown.next = layouts[0], grown.next + 1
        return measured

    async def _alternatives(self, grown: Grown) -> Repetition:
        """A new claim appended as True and as False, in one batch; the tree is not changed."""
        scorer = grown.claims.scorer(self._backend.api)
        labels = grown.claims.labelling(grown.layout.questions)
        claim, grown.next = grown.next, grown.next + 1
        await scorer.predict([claim], grown.claims.candidate(grown.layout))  # a search has asked it before

        def evaluate() -> Awaitable[object]:
            layout = grown.layout.append(claim)
            return scorer.evaluate([Candidate(flipped(labels, {claim: label}), layout) for label in (True, False)])

        return await self._backend.measure(evaluate)

    async def _repeat(self, case: str, size: int, once: Callable[[], Awaitable[Repetition]], times: int) -> bool:
        """Repeat while the budget allows, and save; returns whether any repetition was measured."""
        entry, budget, done = self._report.case(case, size), self._budget, 0
        for _ in range(times):
            count = len(entry.repetitions)
            reason = budget.refuses(case, size, POWER.get(case, 1.4))
            if reason:
                entry.not_measured = reason
                break
            started = time.monotonic()
            try:
                async with self._progress.doing(
                    f"N = {size}, {CASES[case]}, repetition {count + 1} of {self._repeats}"
                ):
                    entry.repetitions.append(await once())
            except ConfigurationError as error:  # the prompts are longer than the model takes
                entry.not_measured = str(error)
                break
            budget.took(case, size, time.monotonic() - started)
            done += 1
            entry.not_measured = "" if count + 1 >= self._repeats else "interrupted"
        self._save()
        return done > 0
