"""Labelings to hold ICM against: zero-shot, many-shot with given labels, and the objective's precondition.

All share the pool's tokenized segments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from core.llm_api.labels import SpelledLabels
from core.llm_api.llm import ModelAPI
from src.icm.annealing import mirrored_labels, mirrors
from src.icm.consistency import Label, Labels, all_labels
from src.icm.label_names import Names
from src.icm.objective import (
    Evaluation,
    LogOdds,
    accuracy,
    auc,
    calibration_offset,
    label_of,
    no_offset,
    num_labels_of,
)
from src.icm.problem import Candidate, Problem
from src.icm.prompts import PromptBook
from src.pipeline.scoring import PoolScorer, log_odds_of


@dataclass(frozen=True, slots=True)
class Prediction:
    """Labels of a set of claims, the likeliest by their log-odds unless something else gave them.

    log_odds: nats, by position. offset: subtracted before the likeliest is taken (0 unless calibrated). given: the
    labels, where they are not the likeliest (annealed, or made consistent).
    """

    log_odds: dict[int, LogOdds]
    offset: LogOdds = 0.0
    given: dict[int, int] | None = None

    def calibrated(self, prior: float | None = None) -> Prediction:
        """The same scores against their own mean (batch calibration), or against a known share of True claims."""
        scores, num_labels = list(self.log_odds.values()), num_labels_of(self.offset)
        return replace(self, offset=calibration_offset(scores, "mean", prior, num_labels))

    @property
    def labels(self) -> dict[int, int]:
        if self.given is not None:
            return self.given
        return {claim: label_of(value, self.offset) for claim, value in self.log_odds.items()}

    def agreement(self, gold: Sequence[Label]) -> tuple[int, int]:
        """(agreeing, compared) with gold over the predicted claims whose gold label is known."""
        labels = self.labels
        claims = list(labels)
        return accuracy([labels[c] for c in claims], [gold[c] for c in claims])

    def auc(self, gold: Sequence[Label]) -> float | None:
        """Area under the ROC curve over the claims whose gold label is known; None of more than two labels."""
        known = [(value, gold[c]) for c, value in self.log_odds.items() if gold[c] is not None]
        scores = [value for value, _ in known if not isinstance(value, tuple)]
        return auc(scores, [bool(label) for _, label in known]) if len(scores) == len(known) else None


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
    return Prediction(dict(zip(claims, log_odds_of(scores), strict=True)), no_offset(len(tokens)))


def random_labels(count: int, num_labels: int, rng: np.random.Generator) -> Labels:
    """`count` labels, each drawn by itself."""
    drawn = rng.random(count) < 0.5 if num_labels == 2 else rng.integers(num_labels, size=count)
    return tuple(drawn.tolist())


def next_labels(labels: Labels, num_labels: int) -> Labels:
    """Every label's next one, the last one's being the first: none is what it was. Of two labels: each flipped."""
    if num_labels == 2:
        return mirrored_labels(labels)
    return tuple(None if label is None else (label + 1) % num_labels for label in labels)


def reference_labelings(gold: Sequence[Label], rng: np.random.Generator, names: Names) -> dict[str, Labels]:
    """What U must be able to tell apart: gold, gold with two labels swapped, each label alone, random.

    names: of the labels. All of them label the same claims: those whose gold label is known, or every claim where none
    is known.
    """
    count, known = len(names), any(label is not None for label in gold)
    drawn = random_labels(len(gold), count, rng)
    if count == 2:
        turned = {"flipped gold": mirrored_labels(tuple(gold))}
    else:
        swaps = (f"gold, {one} and {other} swapped" for one, other in combinations(names, 2))
        turned = dict(zip(swaps, mirrors(tuple(gold), count), strict=True))
    labelings: dict[str, Labels] = {
        "gold": tuple(gold),
        **{f"all {names[label]}": (label,) * len(gold) for label in reversed(all_labels(count))},
        **turned,
        "random": drawn,
    }
    if not known:
        return {name: labels for name, labels in labelings.items() if name not in ("gold", *turned)}
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
