"""U(D) = alpha * mutual predictability - I(D), and what is reported with it. Wen et al. 2025, equation 3.

The paper writes mutual predictability as a sum of log P(y_i | x_i, D without i); like its published code this uses
the mean over the pool of the labels' margins, so that alpha means the same for every pool size.

A claim's log-odds are K - 1 numbers, z_k = log P(label k) - log P(label 0) for k = 1 ... K - 1, in nats; z_0 = 0. Of
two labels that is one number, s, kept as a plain float. The margin of a claim with label y is z_y less the log of the
sum of exp(z_k) over the other labels: of two labels s where y is True, and -s where it is False.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from src.icm.consistency import Consistency, Label, likeliest

Calibration = Literal["none", "mean"]
LogOdds = float | tuple[float, ...]
"""Of one claim, nats: a float where there are two labels, K - 1 floats where there are more."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a labeling is worth.

    log_odds: raw leave-one-out z_i in nats by pool position, for exactly the labelled claims.
    offset: what was subtracted from each before taking its margin (see `calibration_offset`), nats.
    predictability: mean of the margins, nats. inconsistent: I(D). utility: U(D).
    """

    log_odds: Mapping[int, LogOdds]
    offset: LogOdds
    predictability: float
    inconsistent: int
    utility: float

    @property
    def num_labels(self) -> int:
        return num_labels_of(self.offset)


@dataclass(frozen=True, slots=True)
class Objective:
    """alpha weighs predictability (nats) against one inconsistent pair; calibration as in `Evaluation.offset`.

    Calibration "mean" is batch calibration (Zhou et al. 2023, arXiv 2309.17249): small models lean to one label by
    an offset that all prompts of a pool share, and a constant labeling is then the most predictable one. It changes
    the objective, so every report names it. The mean assumes that half of the claims are True; prior is their share
    where it is known to be another (above 0, below 1); estimate_prior: it is to be estimated before the search (see
    prior.py), and until then None. Of K labels the mean assumes K equal parts, and there is no
    prior.
    """

    alpha: float
    calibration: Calibration = "none"
    prior: float | None = None
    num_labels: int = 2
    estimate_prior: bool = False

    def offset(self, scores: Sequence[LogOdds] | npt.NDArray[np.float64]) -> LogOdds:
        """What to subtract from these log-odds (nats) before they say a label."""
        return calibration_offset(scores, self.calibration, self.prior, self.num_labels)

    def evaluate(
        self, labels: Sequence[Label], log_odds: Mapping[int, LogOdds], consistency: Consistency
    ) -> Evaluation:
        """U of `labels` (length N) given z_i of every labelled claim. Raises ValueError where one is missing."""
        labelled = [i for i, label in enumerate(labels) if label is not None]
        if set(labelled) != set(log_odds):
            raise ValueError("log-odds are needed for exactly the labelled claims")
        inconsistent = consistency.count(labels)
        if not labelled:
            return Evaluation({}, self.offset([]), 0.0, inconsistent, -float(inconsistent))
        scores = np.array([log_odds[i] for i in labelled], dtype=np.float64)
        offset = self.offset(scores)
        if self.num_labels == 2:
            signs = np.array([1.0 if labels[i] else -1.0 for i in labelled])
            predictability = float(np.mean(signs * (scores - offset)))
        else:
            given = np.array([labels[i] for i in labelled])
            predictability = float(np.mean(all_margins(scores - offset)[np.arange(len(given)), given]))
        return Evaluation(
            log_odds=dict(log_odds),
            offset=offset,
            predictability=predictability,
            inconsistent=inconsistent,
            utility=self.alpha * predictability - inconsistent,
        )


def calibration_offset(
    scores: Sequence[LogOdds] | npt.NDArray[np.float64],
    calibration: Calibration,
    prior: float | None = None,
    num_labels: int = 2,
) -> LogOdds:
    """The offset (nats) that all of `scores` are taken to share; 0 without calibration, or without a score.

    "mean": their mean, which is right where all labels are equally frequent. With a known share of True claims,
    `prior`: their (1 - prior)-quantile (linear between neighbours), above which that share of them lies. A quantile
    does not depend on the scale of the scores, which are no probabilities (docs/algorithm.md compares it with methods
    that do).
    """
    nothing = calibration == "none" or not len(scores)
    if num_labels > 2:
        means = np.zeros(num_labels - 1) if nothing else np.asarray(scores, dtype=np.float64).mean(axis=0)
        return tuple(means.tolist())
    if nothing:
        return 0.0
    values = np.asarray(scores, dtype=np.float64)
    return float(values.mean() if prior is None else np.quantile(values, 1 - prior))


def num_labels_of(log_odds: LogOdds) -> int:
    """K, from one claim's log-odds or from an offset."""
    return len(log_odds) + 1 if isinstance(log_odds, tuple) else 2


def no_offset(num_labels: int) -> LogOdds:
    """The offset without calibration: 0 of two labels, K - 1 zeros of more."""
    return calibration_offset([], "none", None, num_labels)


def all_margins(log_odds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Every label's margin (nats, shape [N, K]) from log-odds against label 0, shape [N, K - 1]."""
    z = np.concatenate([np.zeros((len(log_odds), 1)), log_odds], axis=1)
    count = z.shape[1]
    margins: npt.NDArray[np.float64] = np.empty_like(z)
    for label in range(count):
        others = np.delete(z, label, axis=1)
        margins[:, label] = z[:, label] - np.logaddexp.reduce(others, axis=1)
    return margins


def margins_of(log_odds: LogOdds, offset: LogOdds) -> tuple[float, ...]:
    """The margin of each label (nats, shape [K]) of one claim."""
    if isinstance(log_odds, tuple):
        found: list[float] = all_margins(np.array([log_odds]) - np.array([offset]))[0].tolist()
        return tuple(found)
    assert isinstance(offset, float)
    return (offset - log_odds, log_odds - offset)


def label_of(log_odds: LogOdds, offset: LogOdds) -> int:
    """The likeliest label, the first of equals; of two labels a bool."""
    if isinstance(log_odds, tuple):
        assert isinstance(offset, tuple)
        return likeliest((0.0, *(z - shared for z, shared in zip(log_odds, offset, strict=True))))
    assert isinstance(offset, float)
    return log_odds > offset


def sureness(log_odds: LogOdds, offset: LogOdds) -> float:
    """The margin of the likeliest label, nats."""
    return max(margins_of(log_odds, offset))


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


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927), 95% by default; (0, 1) where nothing was tried."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * ((share * (1 - share) + z * z / (4 * trials)) / trials) ** 0.5
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)
