"""Does U lead to truth? What a set of evaluated labelings of one pool says, in numbers (landscape_words.py has words).

Labelings are compared with gold; where too little of it is known, with the labeling of the highest U, which says how
many peaks U has but nothing of the truth. Equal labels are counted once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Final

from src.icm.consistency import Labels
from src.icm.label_names import Names
from src.icm.labelings import Evaluated
from src.icm.objective import accuracy
from src.icm.objectives import values_by_objective
from src.results.findings import Verdict
from src.results.statistics import rank_correlation, rank_correlation_interval

LEADS: Final = 0.5
"""U leads to truth where the rank correlation is at least this (what Cohen 1988 calls a large one), its interval lies
above 0, and the labels of the highest U agree with gold at least so far:"""
NEAR: Final = 0.9
LEAST_KNOWN: Final = 10
"""Gold labels that are needed (or all of the pool's) for labelings to be held against gold."""
NEARLY_HIGHEST: Final = 0.1
"""A labeling is nearly as high as the highest one within this share of the way down to the median U."""


@dataclass(frozen=True)
class Landscape:
    """Evaluated labelings of one pool. gold: by claim, None where it is not known. alpha: of U."""

    evaluated: Sequence[Evaluated]
    gold: Labels
    alpha: float
    names: Names

    @cached_property
    def has_gold(self) -> bool:
        """Whether enough gold is known to hold labelings against it."""
        known = sum(label is not None for label in self.gold)
        return known >= min(LEAST_KNOWN, len(self.gold))

    @cached_property
    def distinct(self) -> tuple[Evaluated, ...]:
        """The first of each labeling that is there several times."""
        return _distinct(self.evaluated)

    @cached_property
    def highest(self) -> Evaluated:
        """The labeling with the highest U, the first of equals."""
        return max(self.distinct, key=lambda each: each.utility)

    @cached_property
    def reference(self) -> Labels:
        """What agreement is measured with."""
        return self.gold if self.has_gold else self.highest.labeling.labels

    @property
    def against(self) -> str:
        """The reference, in words."""
        return "gold" if self.has_gold else "the labels of the highest U"

    def agreement(self, each: Evaluated) -> float:
        """Share of claims with the reference's label, of those that have one."""
        agreeing, compared = accuracy(each.labeling.labels, self.reference)
        return agreeing / compared

    @cached_property
    def compared(self) -> tuple[Evaluated, ...]:
        """What is correlated: all labelings but one that is the reference only because its U is the highest."""
        return self.distinct if self.has_gold else tuple(each for each in self.distinct if each is not self.highest)

    @cached_property
    def without_gold(self) -> tuple[Evaluated, ...]:
        """Labelings that were made without gold, as a search makes its own."""
        of_gold = {each.labeling.name for each in self.evaluated if each.labeling.kind in ("gold", "corrupted gold")}
        return _distinct(
            [each for each in self.evaluated if each.labeling.name not in of_gold and each.labeling.of not in of_gold]
        )

    @cached_property
    def gold_labeling(self) -> Evaluated | None:
        """Gold with its U, where all of it is known."""
        return next((each for each in self.evaluated if each.labeling.kind == "gold"), None)

    @cached_property
    def above_gold(self) -> tuple[Evaluated, ...]:
        """Labelings with a higher U than gold's, the highest first."""
        gold = self.gold_labeling
        above = [] if gold is None else [each for each in self.distinct if each.utility > gold.utility]
        return tuple(sorted(above, key=lambda each: -each.utility))

    @cached_property
    def correlation(self) -> float | None:
        """Spearman's, of U and agreement."""
        return rank_correlation(*self._pairs(self.compared))

    @cached_property
    def correlation_without_mirrors(self) -> float | None:
        """The same of the labelings that are no mirrors: as mirrors predict each other too, U rises again there."""
        return rank_correlation(*self._pairs([each for each in self.compared if each.labeling.kind != "mirrored"]))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """Its bootstrapped 95% interval over labelings. It says nothing of other claims or another model."""
        return rank_correlation_interval(*self._pairs(self.compared))

    def _pairs(self, labelings: Sequence[Evaluated]) -> tuple[list[float], list[float]]:
        return [each.utility for each in labelings], [self.agreement(each) for each in labelings]

    @cached_property
    def mirrors(self) -> tuple[tuple[Evaluated, Evaluated], ...]:
        """(original, mirror) of every mirrored labeling."""
        by_name = {each.labeling.name: each for each in self.evaluated}
        return tuple((by_name[each.labeling.of], each) for each in self.evaluated if each.labeling.of in by_name)

    @property
    def halfway(self) -> float:
        """Halfway between 1 and the agreement of one label everywhere, or chance."""
        known = [label for label in self.gold if label is not None]
        commonest = max(Counter(known).values()) / len(known) if known else 0.0
        return (1 + max(commonest, 1 / len(self.names))) / 2

    @cached_property
    def nearly_highest(self) -> tuple[Evaluated, ...]:
        """Other labelings whose U is nearly the highest."""
        middle = median(each.utility for each in self.distinct)
        bar = self.highest.utility - NEARLY_HIGHEST * (self.highest.utility - middle)
        return tuple(each for each in self.distinct if each is not self.highest and each.utility >= bar)

    @cached_property
    def verdict(self) -> Verdict:
        """OK: U leads to truth; WATCH: part of the way; PROBLEM: it does not; UNKNOWN: gold is not known."""
        if not self.has_gold:
            return Verdict.UNKNOWN
        correlated = (self.interval or (0.0, 0.0))[0] > 0
        top = self.agreement(self.highest)
        if top >= max(NEAR, self.halfway):
            return Verdict.OK if correlated and (self.correlation or 0.0) >= LEADS else Verdict.WATCH
        return Verdict.WATCH if correlated and top >= self.halfway else Verdict.PROBLEM


@dataclass(frozen=True, slots=True)
class Compared:
    """How an objective orders the labelings. at_highest: agreement of the labeling that it likes best (the mean of
    equals), of all, and of those made without gold. above_gold: how many it prefers to gold; None where gold is not
    one of them."""

    objective: str
    correlation: float | None
    at_highest: float
    at_highest_without_gold: float
    above_gold: int | None


def compare_objectives(landscape: Landscape, *, constraints: bool = True) -> list[Compared]:
    """Every objective on the same labelings. constraints: whether broken ones count."""
    found = []
    distinct = landscape.distinct
    pairs = [(each.labeling.labels, each.evaluation) for each in distinct]
    shares = {each.labeling.labels: landscape.agreement(each) for each in distinct}
    without = {each.labeling.labels for each in landscape.without_gold}
    gold = landscape.gold_labeling
    for name, values in values_by_objective(pairs, landscape.alpha, constraints=constraints).items():
        value = {labels: number for (labels, _), number in zip(pairs, values, strict=True)}
        compared = [each.labeling.labels for each in landscape.compared]
        found.append(
            Compared(
                name,
                rank_correlation([value[labels] for labels in compared], [shares[labels] for labels in compared]),
                _at_highest(value, shares),
                _at_highest({labels: number for labels, number in value.items() if labels in without}, shares),
                None if gold is None else sum(number > value[gold.labeling.labels] for number in values),
            )
        )
    return found


def _distinct(evaluated: Sequence[Evaluated]) -> tuple[Evaluated, ...]:
    return tuple({each.labeling.labels: each for each in reversed(evaluated)}.values())[::-1]


def _at_highest(value: dict[Labels, float], shares: dict[Labels, float]) -> float:
    highest = max(value.values())
    return fmean(shares[labels] for labels, number in value.items() if number == highest)
