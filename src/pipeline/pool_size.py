"""How large a pool this machine can label in a given time, from the speed of a few questions.

What a search computes is known in advance but for its luck; how fast a machine computes it is not: two cores with AMX
do four times as many tokens a second as two with AVX2. So a few of the run's own questions are timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from src.icm.annealing import Candidate, Stream, generator
from src.pipeline.baselines import predict
from src.pipeline.labelling import Labelling

SIZES: Final = (64, 32, 16)
"""Pools to choose among, the largest first."""
ASKED: Final = 16
"""Claims of the tree that is timed."""
UNUSED: Final = 1_000_000
"""A rebuild that no run comes to, whose layout is the run's own nowhere: its prompts would be found cached later."""
WORTH: Final = {64: 8300.0, 32: 1700.0, 16: 600.0}
"""Tokens that a whole search computes, in mean demonstrations and questions of a claim."""


@dataclass(frozen=True, slots=True)
class Speed:
    """tokens: computed, by the engine's count where it counts. seconds: what they took."""

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
    await predict(api, labelling.book, labelling.tokens, [0])
    before, started = await api.prefix_cache(), time.perf_counter()
    sent = api.stats.prompt_tokens
    for layout in (tree, tree.append(count - 1)):
        await scorer.ask_all(layout.questions, Candidate(labels, layout))
    seconds = time.perf_counter() - started
    after = await api.prefix_cache()
    computed = api.stats.prompt_tokens - sent if before is None or after is None else (after - before).computed
    return Speed(max(1, computed), seconds)


def search_tokens(size: int, mean: float) -> float:
    """Tokens that a search over `size` claims computes, a size among SIZES; mean: of a demonstration and a question."""
    return WORTH[size] * mean


def choose_size(
    speed: Speed, mean: float, claims: int, seconds: float, sizes: Sequence[int] = SIZES
) -> tuple[int, float]:
    """The largest pool that ends in `seconds`, the smallest if none does; and the seconds that it takes.

    mean: tokens of a demonstration and a question of it. claims: how many there are, those outside the pool labelled
    from it. sizes: of SIZES, the largest first.
    """
    # Beside the search every claim is asked once, many-shot or at its end, and those of the pool zero-shot.
    found = [(size, (search_tokens(size, mean) + (claims + size) * mean) / speed.tokens_a_second) for size in sizes]
    return next(((size, needed) for size, needed in found if needed <= seconds), found[-1])
