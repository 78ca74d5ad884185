"""ICM and what it must beat, on one pool: each row labels the pool, then held-out claims from those labels.

Every row asks about the same claims, and its demonstrations are the same claims in the same order: only their labels
differ. The pool's claims come first in the labelling's book, the held-out ones (`pool.rest`) after them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

import numpy as np

from core.llm_api.types import ScoreStats
from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds, margins_of
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate, Stream, generator
from src.pipeline.baselines import Prediction, next_labels, predict
from src.pipeline.labelling import Labelling

BootstrapStart = Literal["random", "zero-shot"]
GivenLabels = Literal["gold", "random", "flipped"]
TITLES: Final = {
    "zero-shot": "zero-shot",
    "zero-shot-calibrated": "zero-shot, calibrated",
    "zero-shot-chat": "zero-shot, chat model",
    "many-shot-random": "many-shot, random labels",
    "many-shot-flipped": "many-shot, flipped labels",
    "many-shot-gold": "many-shot, gold labels",
    "bootstrap": "bootstrapping",
    "bootstrap-consistent": "bootstrapping, consistent",
    "icm": "ICM",
}
"""Row -> what it is called in tables, in their order."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One claim's label. claim: its row in the data file. log_odds: raw, nats; offset: subtracted before the likeliest
    label is taken."""

    claim: int
    group: str
    gold: bool | int | None
    label: bool | int
    log_odds: LogOdds
    offset: LogOdds


Held = tuple[Prediction, float | None]  # answers about held-out claims, U of the labels that were shown


@dataclass(frozen=True, slots=True)
class Cost:
    """What labelling the pool cost, held-out claims not counted.

    asked: questions, also those that the response cache answered; the others are what was sent.
    """

    seconds: float
    asked: int
    prompt_tokens: int
    cached_tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a row says of one pool and its held-out claims. utility: U of its pool labels; None: it has none."""

    row: str
    pool: tuple[Answer, ...]
    test: tuple[Answer, ...]
    utility: float | None
    cost: Cost


class Comparison:
    """The rows of one pool and model."""

    def __init__(self, labelling: Labelling) -> None:
        self._labelling = replace(labelling, api=labelling.api.share())
        self._size = len(labelling.pool.claims)
        self._asked = range(self._size, self._size + len(labelling.pool.rest))

    async def zero_shot(self, *, calibrated: bool) -> RowResult:
        """No demonstrations. calibrated: against the mean of the pool's log-odds, also on held-out claims.

        With a known share of True claims against the offset that belongs to it.
        """

        async def label() -> Prediction:
            pool = await self._without_demonstrations(range(self._size))
            return pool.calibrated(self._labelling.pool.problem.objective.prior) if calibrated else pool

        async def ask(pool: Prediction) -> Held:
            return replace(await self._without_demonstrations(self._asked), offset=pool.offset), None

        return await self._measured("zero-shot-calibrated" if calibrated else "zero-shot", label, ask)

    async def many_shot(self, kind: GivenLabels) -> RowResult:
        """Given labels as demonstrations; the pool's own answers leave one out. Flipped: see next_labels."""
        gold = tuple(self._labelling.pool.gold)
        labels = {"gold": gold, "flipped": next_labels(gold, self._num_labels), "random": self.random_labels}[kind]

        async def label() -> Prediction:
            evaluation = await self._evaluate(labels)
            return Prediction(dict(evaluation.log_odds), evaluation.offset)

        return await self._measured(f"many-shot-{kind}", label, lambda _: self._held_out(labels))

    async def bootstrap(self, *, rounds: int, start: BootstrapStart, consistent: bool) -> RowResult:
        """Label the pool by many-shot from the labels of the round before, `rounds` times.

        start: the first round's demonstrations have random labels, or those of zero-shot answers (calibrated where the
        objective is). consistent: after every round the labels that break no constraint at the least loss of
        log-odds (Consistency.nearest). Shrivastava, Qi, Canavan et al., "Eliciting base models with simple unsupervised
        techniques" (Alignment Forum), find that these two explain most of what ICM gains.
        """
        consistency = self._labelling.pool.problem.consistency

        async def label() -> Prediction:
            labels = self.random_labels if start == "random" else await self._zero_shot_labels()
            found = Prediction({})
            for _ in range(rounds):
                evaluation = await self._evaluate(labels)
                found = Prediction(dict(evaluation.log_odds), evaluation.offset)
                if consistent:
                    margins = [margins_of(found.log_odds[claim], found.offset) for claim in range(self._size)]
                    nearest = enumerate(consistency.nearest(margins))
                    found = replace(found, given={claim: label for claim, label in nearest if label is not None})
                labels = self._whole(found.labels)
            return found

        row = "bootstrap-consistent" if consistent else "bootstrap"
        return await self._measured(row, label, lambda pool: self._held_out(self._whole(pool.labels)))

    async def given(
        self, row: str, labels: Mapping[int, int], log_odds: Mapping[int, LogOdds], cost: Cost
    ) -> RowResult:
        """A finished labelling of the whole pool, by pool position, that cost `cost` to find."""

        async def label() -> Prediction:
            evaluation = await self._evaluate(self._whole(labels))
            return Prediction(dict(log_odds), evaluation.offset, dict(labels))

        result = await self._measured(row, label, lambda _: self._held_out(self._whole(labels)))
        return replace(result, cost=cost)

    async def asked_elsewhere(
        self, row: str, ask: Callable[[Sequence[str]], Awaitable[Prediction]], stats: ScoreStats
    ) -> RowResult:
        """Zero-shot answers of another model to the claims' texts; `stats` counts what it is asked."""
        pool, rest = self._labelling.pool.claims, self._labelling.pool.rest

        async def label() -> Prediction:
            return await ask([claim.text for claim in pool])

        async def held_out(_: Prediction) -> Held:
            answers = await ask([claim.text for claim in rest])
            return Prediction({self._size + at: value for at, value in answers.log_odds.items()}), None

        return await self._measured(row, label, held_out, stats)

    @cached_property
    def random_labels(self) -> Labels:
        """As many of each label, shuffled by the pool's seed."""
        rng = generator(self._labelling.pool.problem.settings.seed, Stream.SEEDS, 2)
        if self._num_labels == 2:
            even = np.array([position < self._size // 2 for position in range(self._size)])
        else:
            even = np.arange(self._size) % self._num_labels
        return tuple(rng.permutation(even).tolist())

    @property
    def _num_labels(self) -> int:
        return self._labelling.pool.problem.num_labels

    @cached_property
    def _layout(self) -> Layout:
        return self._labelling.pool.problem.new_layout(range(self._size))

    async def _evaluate(self, labels: Labels) -> Evaluation:
        [evaluation] = await self._labelling.scorer().evaluate([Candidate(labels, self._layout)])
        return evaluation

    async def _zero_shot_labels(self) -> Labels:
        answers = await self._without_demonstrations(range(self._size))
        objective = self._labelling.pool.problem.objective
        if objective.calibration == "mean":
            answers = answers.calibrated(objective.prior)
        return self._whole(answers.labels)

    def _whole(self, labels: Mapping[int, int]) -> Labels:
        return tuple(labels[claim] for claim in range(self._size))

    async def _without_demonstrations(self, claims: Sequence[int]) -> Prediction:
        labelling = self._labelling
        return await predict(labelling.api, labelling.book, labelling.tokens, claims)

    async def _held_out(self, labels: Labels) -> Held:
        """Held-out claims after the pool's labels, against the offset of the pool's own answers; U of the labels."""
        labelling = self._labelling
        evaluation = await self._evaluate(labels)
        predicted = await predict(
            labelling.api,
            labelling.book,
            labelling.tokens,
            self._asked,
            demonstrations=self._layout.demonstrations,
            labels=labels,
        )
        return replace(predicted, offset=evaluation.offset), evaluation.utility

    async def _measured(
        self,
        row: str,
        label: Callable[[], Awaitable[Prediction]],
        ask: Callable[[Prediction], Awaitable[Held]],
        stats: ScoreStats | None = None,
    ) -> RowResult:
        """The pool's labels and what they cost, then the held-out claims."""
        stats = stats or self._labelling.api.stats
        before, started = stats.as_dict(), time.perf_counter()
        pool = await label()
        seconds, after = round(time.perf_counter() - started, 3), stats.as_dict()
        spent = {key: after[key] - before[key] for key in ("asked", "prompt_tokens", "cached_tokens", "requests")}
        test, utility = await ask(pool)
        return RowResult(row, self._answers(pool), self._answers(test), utility, Cost(seconds, **spent))

    def _answers(self, prediction: Prediction) -> tuple[Answer, ...]:
        claims = (*self._labelling.pool.claims, *self._labelling.pool.rest)
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
