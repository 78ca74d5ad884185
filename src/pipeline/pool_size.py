"""How large a pool this machine can label in a given time, from the speed of a few questions.

How many tokens a search computes is nearly known in advance; how fast a machine computes them is not: two cores with
AMX do four times as many a second as two with AVX2. So a few of the run's questions are timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from src.icm.problem import Candidate, Stream, generator
from src.pipeline.labelling import Labelling
from src.pipeline.predictions import predict

ASKED: Final = 16
"""Claims of the tree that is timed."""
UNUSED: Final = 1_000_000
"""A rebuild number that no run reaches: in a layout of the run, its prompts would later be found cached."""
COST_OF_SEARCH: Final = {16: 600.0, 32: 1700.0, 64: 8300.0}
"""Tokens that a whole search over so many claims computes, as multiples of the mean length of a claim's demonstration
and question together. From searches of the built-in claims (docs/lab-log.md, 2026-11-27)."""

ASCENT_EVALUATIONS: Final = 6.0
"""Evaluations of the whole pool that an ascent asks for: 2 to 13 in docs/results.md, most of them fewer than these."""


@dataclass(frozen=True, slots=True)
class Speed:
    """tokens: computed, by the engine's count where it counts, else sent. seconds: what they took."""

    tokens: int
    seconds: float

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.seconds


async def measure(labelling: Labelling) -> Speed:
    """Time a tree of the pool's first claims, and the same with one more label: what a search asks most.

    Raises an APIError where the engine does not answer. The first question of all, which warms the engine up, is not
    timed.
    """
    api, scorer, problem = labelling.api, labelling.scorer(), labelling.pool.problem
    count = min(ASKED, problem.size)
    labels = tuple((generator(problem.settings.seed, Stream.SEEDS, 2).random(problem.size) < 0.5).tolist())
    tree = problem.new_layout(range(count - 1), UNUSED)
    await predict(api, labelling.book, [0])
    before, started = await api.prefix_cache(), time.perf_counter()
    sent = api.stats.prompt_tokens
    for layout in (tree, tree.append(count - 1)):
        await scorer.predict(layout.questions, Candidate(labels, layout))
    seconds = time.perf_counter() - started
    after = await api.prefix_cache()
    computed = api.stats.prompt_tokens - sent if before is None or after is None else (after - before).computed
    return Speed(max(1, computed), seconds)


def search_tokens(claims: int, mean: float, search: str = "annealing") -> float:
    """Tokens that a search over a pool computes. mean: of a claim's demonstration and question together.

    Between the sizes of COST_OF_SEARCH, and outside them, as a power of the pool's size. An ascent: evaluations of a
    cold tree, N log2 N demonstrations and N questions each.
    """
    if search == "ascent":
        return mean * ASCENT_EVALUATIONS * claims * (1 + float(np.log2(claims)))
    sizes, costs = np.log(np.array(list(COST_OF_SEARCH.items()), dtype=np.float64)).T
    at = min(max(int(np.searchsorted(sizes, np.log(claims))), 1), len(sizes) - 1)
    growth = (costs[at] - costs[at - 1]) / (sizes[at] - sizes[at - 1])
    return mean * float(np.exp(costs[at] + growth * (np.log(claims) - sizes[at])))


def choose_pool(
    speed: Speed, mean: float, asked_later: int, seconds: float, pools: Sequence[int], search: str = "annealing"
) -> tuple[int, float]:
    """The largest pool that is labelled within `seconds`, the smallest if none is; and the seconds that it takes.

    mean, search: as in search_tokens. asked_later: claims outside the largest pool that are labelled from it. pools:
    claims of each, the largest first.
    """
    found = []
    for size in pools:
        # Besides the search, the pool is asked zero-shot, and the other claims after its labels.
        asked_once = size + (pools[0] - size + asked_later if asked_later else 0)
        found.append((size, (search_tokens(size, mean, search) + asked_once * mean) / speed.tokens_a_second))
    return next(((size, needed) for size, needed in found if needed <= seconds), found[-1])
