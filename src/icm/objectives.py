"""Objectives to compare, all of the same answers: what else than a mean of margins could say how good a labeling is.

Each is alpha times a number made of the claims' margins (nats, after calibration), minus the broken constraints. The
log-likelihood of a label of margin m is -log(1 + exp(-m)), whatever the number of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from src.icm.consistency import Labels
from src.icm.objective import Evaluation, all_margins

Floats = npt.NDArray[np.float64]

MEAN_MARGIN: Final = "mean margin"
"""U as it is searched with."""
OBJECTIVES: Final[Mapping[str, tuple[str, Callable[[Floats], float]]]] = {
    MEAN_MARGIN: ("U here and in the published code", lambda margins: float(margins.mean())),
    "sum of log-likelihoods": ("equation 3 of the paper", lambda m: -float(np.logaddexp(0.0, -m).sum())),
    "share predicted right": ("claims whose label is the likeliest", lambda m: float((m > 0).mean())),
    "median margin": ("a few huge margins do not move it", lambda margins: float(np.median(margins))),
}
"""Name -> (what it is, its number of all margins)."""


def margins_of_labels(labels: Labels, evaluation: Evaluation) -> Floats:
    """The margin (nats, shape [N]) of the label that each claim of the pool has."""
    odds = np.array([evaluation.log_odds[claim] for claim in range(len(labels))], dtype=np.float64)
    odds = odds.reshape(len(labels), -1) - np.atleast_1d(np.asarray(evaluation.offset, dtype=np.float64))
    given = np.array(labels, dtype=np.intp)
    found: Floats = all_margins(odds)[np.arange(len(labels)), given]
    return found


def values_by_objective(
    labelings: Sequence[tuple[Labels, Evaluation]], alpha: float, *, constraints: bool = True
) -> dict[str, list[float]]:
    """By objective, its value for each labeling. constraints: whether broken ones count."""
    margins = [margins_of_labels(labels, evaluation) for labels, evaluation in labelings]
    broken = [evaluation.inconsistent if constraints else 0 for _, evaluation in labelings]
    return {
        name: [alpha * number(each) - count for each, count in zip(margins, broken, strict=True)]
        for name, (_, number) in OBJECTIVES.items()
    }
