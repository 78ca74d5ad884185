"""Which pairs of claims constrain each other, and which labelings break a constraint. I(D) of Wen et al. 2025.

A constraint holds between two claims of one group (`consistency_id`). Where it comes from is the testbed's business
(testbeds.py); here it is one of three relations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations, product
from typing import Final

Label = bool | None
Labels = tuple[Label, ...]

MOST_EXACT: Final = 12
"""Claims that constrain each other whose labels are chosen by trying all of them (4,096 at most)."""


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

    def nearest(self, margins: Sequence[float]) -> tuple[bool, ...]:
        """Labels by the sign of their margins (nats, length N) that break no constraint, losing as little as possible.

        The loss is the sum of |margin| over labels against their sign. Claims that constrain each other are decided
        together: exactly where they are at most MOST_EXACT, else the surest first, each as its sign says unless a
        decided neighbour forbids it (which can leave a constraint broken where no neighbour's label was possible).
        """
        neighbours: dict[int, list[Constraint]] = defaultdict(list)
        for constraint in self.constraints:
            neighbours[constraint.first].append(constraint)
            neighbours[constraint.second].append(constraint)
        labels = [margin > 0 for margin in margins]
        for members in _components(neighbours):
            held = {c for member in members for c in neighbours[member]}
            if all(c.relation.allows(labels[c.first], labels[c.second]) for c in held):
                continue
            decide = _decide_exactly if len(members) <= MOST_EXACT else _decide_surest_first
            for member, label in decide(members, held, margins).items():
                labels[member] = label
        return tuple(labels)


def _components(neighbours: Mapping[int, Sequence[Constraint]]) -> Iterator[list[int]]:
    """Claims that are linked by constraints, directly or through others; each set in ascending order."""
    seen: set[int] = set()
    for start in sorted(neighbours):
        if start in seen:
            continue
        found, waiting = {start}, [start]
        while waiting:
            for c in neighbours[waiting.pop()]:
                new = {c.first, c.second} - found
                found |= new
                waiting += new
        seen |= found
        yield sorted(found)


def _decide_exactly(members: Sequence[int], held: Iterable[Constraint], margins: Sequence[float]) -> dict[int, bool]:
    best: tuple[int, float] | None = None
    chosen: dict[int, bool] = {}
    constraints = list(held)
    for values in product((True, False), repeat=len(members)):
        labels = dict(zip(members, values, strict=True))
        broken = sum(not c.relation.allows(labels[c.first], labels[c.second]) for c in constraints)
        gain = sum(margins[m] if label else -margins[m] for m, label in labels.items())
        if best is None or (-broken, gain) > best:
            best, chosen = (-broken, gain), labels
    return chosen


def _decide_surest_first(
    members: Sequence[int], held: Iterable[Constraint], margins: Sequence[float]
) -> dict[int, bool]:
    labels: dict[int, bool] = {}
    constraints = list(held)
    for member in sorted(members, key=lambda m: -abs(margins[m])):
        wanted = margins[member] > 0
        broken = {}
        for value in (wanted, not wanted):
            known = labels | {member: value}
            broken[value] = sum(
                not c.relation.allows(known[c.first], known[c.second])
                for c in constraints
                if member in (c.first, c.second) and c.first in known and c.second in known
            )
        labels[member] = wanted if broken[wanted] <= broken[not wanted] else not wanted
    return labels


def _violates(constraint: Constraint, labels: Sequence[Label]) -> bool:
    first, second = labels[constraint.first], labels[constraint.second]
    return first is not None and second is not None and not constraint.relation.allows(first, second)
