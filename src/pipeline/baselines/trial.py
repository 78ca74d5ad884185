"""What every baseline is run on: one pool, one model, held-out claims, and the ways of asking that all have in common.

Every row asks about the same claims, and its demonstrations are the same claims in the same order: only their labels
differ. The pool's claims come first in the labelling's book, the held-out ones (`pool.rest`) after them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from core.llm_api.llm import ModelAPI
from core.llm_api.types import EngineIdentity, ScoreStats
from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds
from src.icm.prefix_tree import Layout
from src.icm.problem import BootstrapStart, Candidate, Problem, Stream, generator
from src.icm.searches.seam import Standing
from src.pipeline.baselines.row_result import Answer, Cost, RowResult
from src.pipeline.labelling import Labelling
from src.pipeline.predictions import Prediction, predict


@dataclass(frozen=True, slots=True)
class Options:
    """rounds: of bootstrapping. start: the labels that its first round shows. restarts: of bootstrap-best. halves:
    whether random labels to start with are halves even where a share of True is known, as in earlier versions."""

    rounds: int = 4
    start: BootstrapStart = "random"
    restarts: int = 8
    halves: bool = False


@dataclass(frozen=True, slots=True)
class ChatModel:
    """open: its ModelAPI, not yet started. on_asked: gets its identity and whether it has a chat template."""

    open: Callable[[], ModelAPI]
    on_asked: Callable[[EngineIdentity, bool], None]


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found: label and log-odds (nats) of every claim of the pool, by position, and what that cost."""

    labels: dict[int, int]
    log_odds: dict[int, LogOdds]
    cost: Cost


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Answers about the held-out claims. utility: U of the pool labels that were shown; None where none were."""

    prediction: Prediction
    utility: float | None = None


class Spending:
    """Counts what is asked from the moment it is made."""

    def __init__(self, stats: ScoreStats) -> None:
        self._stats = stats
        self._before = stats.as_dict()
        self._started = time.perf_counter()

    def cost(self) -> Cost:
        """What was spent up to now."""
        seconds, after = round(time.perf_counter() - self._started, 3), self._stats.as_dict()
        spent = {key: after[key] - self._before[key] for key in ("asked", "prompt_tokens", "cached_tokens", "requests")}
        return Cost(seconds, **spent)


@dataclass(frozen=True)
class Trial:
    """What one row is made from. search: runs the search of this pool, for the row icm. chat: for zero-shot-chat."""

    row: str
    labelling: Labelling
    options: Options = field(default_factory=Options)
    search: Callable[[], Awaitable[Searched]] | None = None
    chat: ChatModel | None = None

    @property
    def problem(self) -> Problem:
        return self.labelling.pool.problem

    @property
    def pool_claims(self) -> range:
        """Positions of the pool's claims in the book."""
        return range(len(self.labelling.pool.claims))

    @property
    def held_out_claims(self) -> range:
        """Positions of the held-out claims in the book."""
        size = len(self.pool_claims)
        return range(size, size + len(self.labelling.pool.rest))

    @cached_property
    def layout(self) -> Layout:
        """The whole pool as demonstrations, in the order that all rows share."""
        return self.problem.new_layout(self.pool_claims)

    def random_labels(self, restart: int = 0, share: float | None = None) -> Labels:
        """Equally many of each label, or that share of True, shuffled by the pool's seed and `restart`; then the known
        ones in their place."""
        rng = generator(self.problem.settings.seed, Stream.SEEDS, 2 + restart)
        size, num_labels = len(self.pool_claims), self.problem.num_labels
        if num_labels == 2:
            trues = size // 2 if share is None else round(size * share)
            even = np.array([position < trues for position in range(size)])
        else:
            even = np.arange(size) % num_labels
        return self.problem.with_known(tuple(rng.permutation(even).tolist()))

    def random_start(self, restart: int = 0) -> Labels:
        """random_labels to start bootstrapping with: with --prior that share of them True, as in a search."""
        return self.random_labels(restart, None if self.options.halves else self.problem.prior_of_starts)

    def in_order(self, labels: Mapping[int, int]) -> Labels:
        """Labels of the whole pool, by position, the known ones as they are known."""
        return self.problem.with_known(tuple(labels[claim] for claim in self.pool_claims))

    def spending(self, stats: ScoreStats | None = None) -> Spending:
        """Counts what the model is asked from now on; with `stats`, what another one is."""
        return Spending(self.labelling.api.stats if stats is None else stats)

    async def zero_shot(self, claims: Sequence[int]) -> Prediction:
        """Those claims without demonstrations."""
        labelling = self.labelling
        return await predict(labelling.api, labelling.book, claims)

    async def evaluate(self, labels: Labels) -> Evaluation:
        """U of the labels, and every claim's log-odds given the labels of all others."""
        [evaluation] = await self.labelling.scorer().evaluate([Candidate(labels, self.layout)])
        return evaluation

    async def leave_one_out(self, labels: Labels) -> Prediction:
        """Every claim of the pool predicted from the given labels of all others."""
        evaluation = await self.evaluate(labels)
        return Prediction(dict(evaluation.log_odds), evaluation.offset)

    async def held_out_after(self, labels: Labels) -> HeldOut:
        """Held-out claims after the whole pool with these labels, against the offset of the pool's answers."""
        evaluation = await self.evaluate(labels)
        predicted = await self.labelling.label_rest(Standing(0, labels, self.layout, evaluation))
        return HeldOut(predicted, evaluation.utility)

    def result(self, pool: Prediction, held_out: HeldOut, cost: Cost) -> RowResult:
        """The row. cost: of labelling the pool. Of the pool it has the claims whose label is not known: only these are
        compared, also in rows that have no use for known labels."""
        answers = tuple(
            answer
            for position, answer in zip(sorted(pool.labels), self._answers(pool), strict=True)
            if not self.problem.is_known(position)
        )
        return RowResult(self.row, answers, self._answers(held_out.prediction), held_out.utility, cost)

    def _answers(self, prediction: Prediction) -> tuple[Answer, ...]:
        claims = (*self.labelling.pool.claims, *self.labelling.pool.rest)
        return tuple(
            Answer(
                claims[position].row,
                claims[position].group,
                claims[position].gold,
                label,
                prediction.log_odds[position],
                prediction.offset,
            )
            for position, label in sorted(prediction.labels.items())
        )
