"""Labelings to hold ICM against: zero-shot, many-shot with given labels, and the objective's precondition.

All share the pool's tokenized segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from core.llm_api.labels import SpelledLabels
from core.llm_api.llm import ModelAPI
from src.icm.annealing import Candidate, Problem, mirrored_labels
from src.icm.consistency import Label, Labels
from src.icm.objective import Evaluation, accuracy, auc, calibration_offset
from src.icm.prompts import PromptBook
from src.pipeline.search import PoolScorer


@dataclass(frozen=True, slots=True)
class Prediction:
    """Labels of a set of claims by the sign of their log-odds, unless they were come by in another way.

    log_odds: nats, by position. offset: subtracted before taking the sign (0 unless calibrated). given: the labels,
    where they are not the signs (annealed, or made consistent).
    """

    log_odds: dict[int, float]
    offset: float = 0.0
    given: dict[int, bool] | None = None

    def calibrated(self, prior: float | None = None) -> Prediction:
        """The same scores against their own mean (batch calibration), or against a known share of True claims."""
        return replace(self, offset=calibration_offset(list(self.log_odds.values()), "mean", prior))

    @property
    def labels(self) -> dict[int, bool]:
        if self.given is not None:
            return self.given
        return {claim: value > self.offset for claim, value in self.log_odds.items()}

    def agreement(self, gold: Sequence[Label]) -> tuple[int, int]:
        """(agreeing, compared) with gold over the predicted claims whose gold label is known."""
        labels = self.labels
        claims = list(labels)
        return accuracy([labels[c] for c in claims], [gold[c] for c in claims])

    def auc(self, gold: Sequence[Label]) -> float | None:
        """Area under the ROC curve over the claims whose gold label is known."""
        known = [(value, gold[c]) for c, value in self.log_odds.items() if gold[c] is not None]
        return auc([value for value, _ in known], [bool(label) for _, label in known])


async def predict(
    api: ModelAPI,
    book: PromptBook,
    tokens: SpelledLabels,
    claims: Sequence[int],
    *,
    demonstrations: Sequence[int] = (),
    labels: Sequence[Label] = (),
) -> Prediction:
    """Predict `claims` after the same demonstrations for all of them (none: zero-shot).

    demonstrations: book positions, in the order they stand in the prompt. labels: by book position.
    """

    # All share the same prefix: every server computes it once and takes its part of the questions.
    prompts = [book.prompt(claim, demonstrations, labels, at / len(claims)) for at, claim in enumerate(claims)]
    scores = await api.score(prompts, tokens)
    return Prediction(dict(zip(claims, scores.log_odds, strict=True)))


def reference_labelings(gold: Sequence[Label], rng: np.random.Generator) -> dict[str, Labels]:
    """What U must be able to tell apart: gold and flipped gold, all True, all False, random.

    All of them label the same claims: those whose gold label is known, or every claim where none is known.
    """
    known = any(label is not None for label in gold)
    drawn = (rng.random(len(gold)) < 0.5).tolist()
    labelings: dict[str, Labels] = {
        "gold": tuple(gold),
        "all True": (True,) * len(gold),
        "all False": (False,) * len(gold),
        "flipped gold": mirrored_labels(tuple(gold)),
        "random": tuple(drawn),
    }
    if not known:
        return {name: labels for name, labels in labelings.items() if "gold" not in name}
    shown = {
        name: tuple(label if gold[i] is not None else None for i, label in enumerate(labels))
        for name, labels in labelings.items()
    }
    # Gold that is constant is no rival of its own.
    return {name: labels for name, labels in shown.items() if name == "gold" or labels != shown["gold"]}


async def check_precondition(
    scorer: PoolScorer, problem: Problem, labelings: Mapping[str, Labels]
) -> dict[str, Evaluation]:
    """U of each labeling, in one layout. ICM can find gold only if gold's U is the highest."""
    some = next(iter(labelings.values()))
    layout = problem.new_layout([claim for claim, label in enumerate(some) if label is not None])
    evaluations = await scorer.evaluate([Candidate(labels, layout) for labels in labelings.values()])
    return dict(zip(labelings, evaluations, strict=True))
