"""A whole run, from the seed labels to N, sampled: the cost of its steps and rebuilds at some sizes, for integration.

Assumed: every proposal is an unlabelled claim and accepted at once, and nothing is repaired, so a step is the new
claim's question and one evaluation of the pool with it. The tree has the tail that it would have in a run at that size.
Upstream's order is sent as one batched request, too, so that only the order differs; its cache is as in a run, since
the step before was just asked, and the new label is at a random place of the pool's order: one place in each of as many
equal parts as there are steps, so that few steps give a fair mean.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.step_measure import Backend, Budget, Claims, Progress
from benchmarks.step_report import Repetition, Report, RunResult, RunSample, fixed_rebuilds, planned_rebuilds
from core.errors import ConfigurationError
from src.icm.planner import TokenCosts
from src.icm.prefix_tree import Layout, TreeLayout, UpstreamLayout

SIZES: Final = (8, 16, 32, 64, 128, 192, 256, 384, 512)
SEEDS: Final = 8
STEPS: Final = 3
POWER: Final = {"tree": 1.4, "upstream": 2.2}


def sampled_sizes(until: int) -> list[int]:
    """Where a run to `until` labels is sampled."""
    return [*(size for size in SIZES if size < until), until]


@dataclass
class RunSimulation:
    """Fills report.run. `save` is called after every sample."""

    backend: Backend
    report: Report
    budget: Budget
    progress: Progress
    save: Callable[[], None]

    async def measure(self, until: int, every: int | None) -> None:
        """Sample both layouts at every size, small sizes first. every: None leaves the rebuilds to the planner."""
        rebuilds = await self._planned(until) if every is None else fixed_rebuilds(SEEDS, until, every)
        run = self.report.run = RunResult(SEEDS, until, rebuilds)
        for size in sampled_sizes(until):
            for layout in ("tree", "upstream"):
                if layout in run.not_measured:
                    continue
                reason = self.budget.refuses(f"run {layout}", size, POWER[layout])
                if reason:
                    run.not_measured[layout] = f"from N = {size}: {reason}"
                    continue
                started = time.monotonic()
                try:
                    async with self.progress.doing(f"whole run, {layout}, at {size} labels"):
                        sample = await (self._tree(size, rebuilds) if layout == "tree" else self._upstream(size))
                except ConfigurationError as error:
                    run.not_measured[layout] = f"from N = {size}: {error}"
                    continue
                run.samples.append(sample)
                self.budget.took(f"run {layout}", size, time.monotonic() - started)
                self.save()

    async def _planned(self, until: int) -> list[int]:
        """When the search's planner would rebuild, for claims as drawn here and the server's KV cache."""
        book = (await self.backend.claims(until, 1, until)).book
        demonstrations = tuple(len(true) for _, true in book.demonstrations)
        questions = tuple(map(len, book.questions))
        return planned_rebuilds(SEEDS, until, TokenCosts(demonstrations, questions, self.backend.kv_cache_tokens))

    async def _tree(self, size: int, rebuilds: list[int]) -> RunSample:
        backend = self.backend
        labelled = max(2, size - (STEPS + 1) // 2)  # so that the steps lie around `size`
        built_size = min(labelled, max((at for at in rebuilds if at <= labelled), default=SEEDS))
        tail = labelled - built_size
        claims = await backend.claims(labelled + STEPS, 1, size)
        rng = np.random.default_rng([backend.seed, 1, size])
        scorer = claims.scorer(backend.api)
        layout: Layout = TreeLayout.build(range(labelled - tail), claims.groups, rng)
        built = await backend.measure(lambda: scorer.evaluate([claims.candidate(layout)]))
        for claim in range(labelled - tail, labelled):
            layout = layout.append(claim)
        if tail:
            await scorer.evaluate([claims.candidate(layout)])
        sample = RunSample("tree", size, labelled - tail, built, [], [])
        for claim in range(labelled, labelled + STEPS):
            layout = await self._step(sample, claims, layout, claim)
        return sample

    async def _upstream(self, size: int) -> RunSample:
        backend = self.backend
        labelled = max(2, size - (STEPS + 1) // 2)
        count = labelled + STEPS
        claims = await backend.claims(count, 2, size)
        rng = np.random.default_rng([backend.seed, 2, size])
        borders = np.linspace(0, count, STEPS + 1).astype(int)
        new = [int(rng.integers(low, high)) for low, high in itertools.pairwise(borders)]
        layout: Layout = UpstreamLayout.build(claim for claim in range(count) if claim not in new)
        scorer = claims.scorer(backend.api)
        built = await backend.measure(lambda: scorer.evaluate([claims.candidate(layout)]))
        sample = RunSample("upstream", size, labelled, built, [], [])
        for claim in rng.permutation(new).tolist():
            layout = await self._step(sample, claims, layout, claim)
        return sample

    async def _step(self, sample: RunSample, claims: Claims, layout: Layout, claim: int) -> Layout:
        """Ask `claim`, label it, evaluate: measured into `sample`. Returns the grown layout."""
        scorer = claims.scorer(self.backend.api)
        grown: list[Layout] = []

        async def step() -> None:
            await scorer.predict([claim], claims.candidate(layout))
            grown.append(layout.append(claim))
            await scorer.evaluate([claims.candidate(grown[0])])

        measured: Repetition = await self.backend.measure(step)
        sample.steps.append(measured)
        sample.sizes.append(len(grown[0].questions))
        return grown[0]
