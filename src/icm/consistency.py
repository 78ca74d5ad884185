"""Which pairs of claims constrain each other, and which labelings break a constraint. I(D) of Wen et al. 2025.

A constraint holds between two claims of one group (`consistency_id`). Where it comes from is the testbed's business
(testbeds.py); here it is one of three relations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations

Label = bool | None
Labels = tuple[Label, ...]


class Relation(Enum):
    """What two claims' labels may be together."""

    AGREE = "agree"
    AT_MOST_ONE = "at most one is true"
    EXACTLY_ONE = "exactly one is true"

    def allows(self, first: bool, second: bool) -> bool:
        if self is Relation.AGREE:
            return first == second
        if self is Relation.AT_MOST_ONE:
            return not (first and second)
        return first != second

    @property
    def assignments(self) -> tuple[tuple[bool, bool], ...]:
        """Every pair of labels the relation allows, (False, False) included where it does."""
        pairs = ((True, True), (True, False), (False, True), (False, False))
        return tuple(pair for pair in pairs if self.allows(*pair))


@dataclass(frozen=True, slots=True)
class Constraint:
    """`relation` between the claims at pool positions first < second."""

    first: int
    second: int
    relation: Relation


class Consistency:
    """All constraints of a pool."""

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        self.constraints = tuple(constraints)

    @classmethod
    def of_groups(cls, groups: Sequence[str], relation: Callable[[int, int], Relation | None]) -> Consistency:
        """Constraints from `relation(i, j)` for every pair i < j of pool positions that share a group."""
        members: dict[str, list[int]] = defaultdict(list)
        for position, group in enumerate(groups):
            members[group].append(position)
        found = []
        for positions in members.values():
            for first, second in combinations(positions, 2):
                kind = relation(first, second)
                if kind is not None:
                    found.append(Constraint(first, second, kind))
        return cls(found)

    def broken(self, labels: Sequence[Label]) -> list[Constraint]:
        """Constraints that `labels` (length N, None: unlabelled) violates; unlabelled claims violate none."""
        return [c for c in self.constraints if _violates(c, labels)]

    def count(self, labels: Sequence[Label]) -> int:
        """I(D): the number of inconsistent pairs."""
        return sum(_violates(c, labels) for c in self.constraints)


def _violates(constraint: Constraint, labels: Sequence[Label]) -> bool:
    first, second = labels[constraint.first], labels[constraint.second]
    return first is not None and second is not None and not constraint.relation.allows(first, second)
