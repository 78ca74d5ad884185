"""U(D) = alpha * mutual predictability - I(D), and what is reported beside it. Wen et al. 2025, equation 3.

The paper writes mutual predictability as a sum of log P(y_i | x_i, D without i); like its published code this uses
the mean over the pool of the signed label log-odds, so that alpha means the same for every pool size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from src.icm.consistency import Consistency, Label

Calibration = Literal["none", "mean"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One labeling's worth.

    log_odds: raw leave-one-out s_i in nats by pool position, for exactly the labelled claims.
    offset: what was subtracted from each before signing (see `calibration_offset`), nats.
    predictability: mean of the signed log-odds, nats. inconsistent: I(D). utility: U(D).
    """

    log_odds: Mapping[int, float]
    offset: float
    predictability: float
    inconsistent: int
    utility: float


@dataclass(frozen=True, slots=True)
class Objective:
    """alpha weighs predictability (nats) against one inconsistent pair; calibration as in `Evaluation.offset`.

    Calibration "mean" is batch calibration (Zhou et al. 2023, arXiv 2309.17249): small models lean to one label by
    an offset that all prompts of a pool share, and a constant labeling is then the most predictable one. It changes
    the objective, so every report names it. The mean assumes that half of the claims are True; prior is their share
    where it is known to be another (above 0, below 1).
    """

    alpha: float
    calibration: Calibration = "none"
    prior: float | None = None

    def offset(self, scores: Sequence[float]) -> float:
        """What to subtract from these log-odds (nats) before their sign is a label."""
        return calibration_offset(scores, self.calibration, self.prior)

    def evaluate(self, labels: Sequence[Label], log_odds: Mapping[int, float], consistency: Consistency) -> Evaluation:
        """U of `labels` (length N) given s_i of every labelled claim. Raises ValueError where one is missing."""
        labelled = [i for i, label in enumerate(labels) if label is not None]
        if set(labelled) != set(log_odds):
            raise ValueError("log-odds are needed for exactly the labelled claims")
        inconsistent = consistency.count(labels)
        if not labelled:
            return Evaluation({}, 0.0, 0.0, inconsistent, -float(inconsistent))
        scores = np.array([log_odds[i] for i in labelled], dtype=np.float64)
        signs = np.array([1.0 if labels[i] else -1.0 for i in labelled])
        offset = self.offset(scores.tolist())
        predictability = float(np.mean(signs * (scores - offset)))
        return Evaluation(
            log_odds=dict(log_odds),
            offset=offset,
            predictability=predictability,
            inconsistent=inconsistent,
            utility=self.alpha * predictability - inconsistent,
        )


def calibration_offset(scores: Sequence[float], calibration: Calibration, prior: float | None = None) -> float:
    """The offset (nats) that all of `scores` are taken to share; 0 without calibration, or without a score.

    "mean": their mean, whose sign splits claims that are True by halves. With a known share of True claims, `prior`:
    their (1 - prior)-quantile (linear between neighbours), above which that share of them lies. A quantile asks nothing
    of the scores' scale, which is not a probability's (docs/algorithm.md compares it with what does).
    """
    if calibration == "none" or not len(scores):
        return 0.0
    values = np.asarray(scores, dtype=np.float64)
    return float(values.mean() if prior is None else np.quantile(values, 1 - prior))


def accuracy(labels: Sequence[Label], gold: Sequence[Label]) -> tuple[int, int]:
    """(agreeing, compared) over claims that have both a label and a gold label."""
    pairs = [(a, b) for a, b in zip(labels, gold, strict=True) if a is not None and b is not None]
    return sum(a == b for a, b in pairs), len(pairs)


def auc(log_odds: Sequence[float], gold: Sequence[bool]) -> float | None:
    """Area under the ROC curve of ranking by log-odds, ties counting half; None where gold has one class only."""
    scores, truth = np.asarray(log_odds, dtype=np.float64), np.asarray(gold, dtype=bool)
    positive, negative = scores[truth], scores[~truth]
    if not len(positive) or not len(negative):
        return None
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), 95% by default; (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)
