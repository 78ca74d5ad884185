"""Balanced accuracy and F1 with their intervals, from a confusion table: what accuracy hides where classes are skewed.

Where 95 of 100 claims are True, labels that are all True have an accuracy of 0.95, a balanced accuracy of 0.5, and an
F1 of True of 0.97. Of two labels F1 is that of the second one, True; of more the mean over labels (macro).

Intervals need counts alone. A class's recall is a proportion, and so is TP / (TP + FP + FN), of the claims that have a
label by gold or by the labeling those that have it by both; F1 = 2 j / (1 + j) is a monotone function of it. Each gets
Wilson's interval, and the mean of several the one of Zou and Donner 2008 (Statistics in Medicine 27:1693), which takes
the squares of the distances to their limits together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from src.icm.consistency import Label
from src.icm.label_names import confusion
from src.icm.objective import wilson_interval

Interval = tuple[float, float]
NOT_KNOWN: Final = "–"


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure between 0 and 1 and its 95% interval."""

    value: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class ByClass:
    """Of one labeling. balanced: the mean over gold's classes of the share of each that is labelled so; None where gold
    has fewer than two of them. f1: None where neither gold nor the labeling has the label."""

    balanced: Measure | None
    f1: Measure | None


NOTHING: Final = ByClass(None, None)


def by_class(table: Sequence[Sequence[float]]) -> ByClass:
    """Of a confusion table, shape [K, K], gold in rows; counts may be fractions."""
    counts = np.asarray(table, dtype=np.float64)
    hits, of_gold, said = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    recalls = [_share(hits[k], of_gold[k]) for k in range(len(counts)) if of_gold[k] > 0]
    joint = of_gold + said - hits
    labels = [1] if len(counts) == 2 else range(len(counts))
    f1 = [_f1(_share(hits[k], joint[k])) for k in labels if joint[k] > 0]
    return ByClass(_mean(recalls) if len(recalls) > 1 else None, _mean(f1) if f1 else None)


def by_class_of(pairs: Iterable[tuple[Label, Label]], num_labels: int) -> ByClass:
    """Of (label, gold) of each claim; claims without either are left out."""
    return by_class(confusion(pairs, num_labels))


def over_seeds(tables: Sequence[Sequence[Sequence[int]]], claims: int) -> ByClass:
    """The means of several seeds' figures. Their intervals are those of `claims` distinct claims, as that of Share is:
    they do not cover the choice of seeds."""
    if not tables:
        return NOTHING
    summed = np.asarray(tables, dtype=np.float64).sum(axis=0)
    total = summed.sum()
    if total == 0:
        return NOTHING
    pooled, each = by_class((summed * (claims / total)).tolist()), [by_class(table) for table in tables]
    return ByClass(
        _around(pooled.balanced, [one.balanced for one in each]), _around(pooled.f1, [one.f1 for one in each])
    )


def name_of_f1(names: Sequence[str]) -> str:
    """What F1 is of, for a heading."""
    return f"F1 of {names[1]}" if len(names) == 2 else "macro F1"


def measure_text(measure: Measure | None, digits: int = 2) -> str:
    """'0.84 (0.74 to 0.91)'."""
    if measure is None:
        return NOT_KNOWN
    low, high = measure.interval
    return f"{measure.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _share(hits: float, of: float) -> Measure:
    return Measure(float(hits / of), wilson_interval(float(hits), float(of)))


def _f1(joint: Measure) -> Measure:
    low, high = joint.interval
    return Measure(_from_joint(joint.value), (_from_joint(low), _from_joint(high)))


def _from_joint(share: float) -> float:
    return 2 * share / (1 + share)


def _mean(measures: Sequence[Measure]) -> Measure:
    mean, count = fmean(one.value for one in measures), len(measures)
    below = sum((one.value - one.interval[0]) ** 2 for one in measures) ** 0.5 / count
    above = sum((one.interval[1] - one.value) ** 2 for one in measures) ** 0.5 / count
    return Measure(mean, (max(0.0, mean - below), min(1.0, mean + above)))


def _around(pooled: Measure | None, each: Sequence[Measure | None]) -> Measure | None:
    """The mean of the seeds' values with the distances to the limits of the pooled one."""
    values = [one.value for one in each if one is not None]
    if pooled is None or not values:
        return None
    mean, (low, high) = fmean(values), pooled.interval
    return Measure(mean, (max(0.0, mean - (pooled.value - low)), min(1.0, mean + (high - pooled.value))))
