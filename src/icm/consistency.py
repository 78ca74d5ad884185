"""Which claims constrain each other, and which labelings break a constraint. I(D) of Wen et al. 2025.

A constraint holds between claims of one group (`consistency_id`). Where it comes from is the testbed's business
(testbeds.py); here it is one of three relations, between two claims or more.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations, product
from statistics import median
from typing import Final

Label = bool | None
Labels = tuple[Label, ...]

MOST_EXACT: Final = 12
"""Claims that constrain each other whose labels are chosen by trying all of them (4,096 at most)."""


class Relation(Enum):
    """What the labels of two claims, or of more, may be together."""

    AGREE = "agree"
    AT_MOST_ONE = "at most one is true"
    EXACTLY_ONE = "exactly one is true"

    def inconsistencies(self, labels: Sequence[Label]) -> int:
        """What `labels` add to I(D): every pair that cannot be, and 1 where one must be true and all are False.

        A claim without a label contradicts none, and may still be the true one.
        """
        trues = sum(label is True for label in labels)
        if self is Relation.AGREE:
            return trues * sum(label is False for label in labels)
        none_is_true = self is Relation.EXACTLY_ONE and all(label is False for label in labels)
        return trues * (trues - 1) // 2 + none_is_true

    def assignments(self, size: int) -> tuple[tuple[bool, ...], ...]:
        """Every labeling of `size` claims that the relation allows."""
        if self is Relation.AGREE:
            return ((True,) * size, (False,) * size)
        one_true = tuple(tuple(at == true for at in range(size)) for true in range(size))
        return one_true if self is Relation.EXACTLY_ONE else (*one_true, (False,) * size)


@dataclass(frozen=True, slots=True)
class Constraint:
    """`relation` between the claims at two or more pool positions, in ascending order."""

    claims: tuple[int, ...]
    relation: Relation

    def inconsistencies(self, labels: Sequence[Label]) -> int:
        """What the labels of a pool (length N, None: unlabelled) add to I(D) here."""
        return self.relation.inconsistencies([labels[claim] for claim in self.claims])

    def repairs(self, labels: Sequence[Label]) -> Iterator[dict[int, bool]]:
        """Every assignment of its labelled claims that the constraint allows, (False, False) included where it does."""
        known = [claim for claim in self.claims if labels[claim] is not None]
        relation = self.relation
        if relation is Relation.EXACTLY_ONE and len(known) < len(self.claims):
            relation = Relation.AT_MOST_ONE  # the true one may be without a label yet
        return (dict(zip(known, values, strict=True)) for values in relation.assignments(len(known)))


@dataclass(frozen=True, slots=True)
class Overview:
    """The groups and constraints of a pool, to be shown.

    groups: how many; smallest, median, largest: claims in one. constraints: how many of each relation (its value).
    grouped_by: the column that made the groups, "none" where every row is one by itself.
    """

    groups: int
    smallest: int
    median: float
    largest: int
    constraints: Mapping[str, int]
    grouped_by: str


class Consistency:
    """All constraints of a pool."""

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        self.constraints = tuple(constraints)

    @classmethod
    def of_groups(
        cls,
        groups: Sequence[str],
        relation: Callable[[int, int], Relation | None],
        together: Sequence[tuple[Hashable, Relation] | None] | None = None,
    ) -> Consistency:
        """The constraints of N claims by their groups.

        relation(i, j): of every pair i < j of pool positions that share a group. together (length N): claims of a group
        that have the same entry here constrain each other as one set, by the relation that the entry ends in; pairs
        within such a set get no relation of their own.
        """
        together = together or [None] * len(groups)
        members: dict[str, list[int]] = defaultdict(list)
        for position, group in enumerate(groups):
            members[group].append(position)
        found = []
        for positions in members.values():
            sets: dict[tuple[Hashable, Relation], list[int]] = defaultdict(list)
            for position in positions:
                if (entry := together[position]) is not None:
                    sets[entry].append(position)
            found += [Constraint(tuple(each), kind) for (_, kind), each in sets.items() if len(each) > 1]
            for first, second in combinations(positions, 2):
                if together[first] is not None and together[first] == together[second]:
                    continue
                if (pair := relation(first, second)) is not None:
                    found.append(Constraint((first, second), pair))
        return cls(found)

    def counts_by_relation(self) -> dict[str, int]:
        """How many constraints there are of each relation that occurs, by the relation's value."""
        counts = Counter(constraint.relation for constraint in self.constraints)
        return {relation.value: counts[relation] for relation in Relation if counts[relation]}

    def overview(self, groups: Sequence[str], grouped_by: str) -> Overview:
        """What there is to tell of a pool: its groups (one name a claim; not empty) and constraints."""
        sizes = Counter(groups).values()
        return Overview(len(sizes), min(sizes), median(sizes), max(sizes), self.counts_by_relation(), grouped_by)

    def broken(self, labels: Sequence[Label]) -> list[Constraint]:
        """Constraints that `labels` (length N, None: unlabelled) violates; unlabelled claims violate none."""
        return [c for c in self.constraints if c.inconsistencies(labels)]

    def count(self, labels: Sequence[Label]) -> int:
        """I(D): the number of inconsistent pairs, and of sets that must hold a true claim and are all False."""
        return sum(c.inconsistencies(labels) for c in self.constraints)

    def nearest(self, margins: Sequence[float]) -> tuple[bool, ...]:
        """Labels by the sign of their margins (nats, length N) that break no constraint, losing as little as possible.

        The loss is the sum of |margin| over labels against their sign. Claims that constrain each other are decided
        together: exactly where they are at most MOST_EXACT, else the surest first, each as its sign says unless a
        decided neighbour forbids it (which can leave a constraint broken where no neighbour's label was possible).
        """
        neighbours: dict[int, list[Constraint]] = defaultdict(list)
        for constraint in self.constraints:
            for claim in constraint.claims:
                neighbours[claim].append(constraint)
        labels = [margin > 0 for margin in margins]
        for members in _components(neighbours):
            held = {c for member in members for c in neighbours[member]}
            if not any(c.inconsistencies(labels) for c in held):
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
                new = set(c.claims) - found
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
        broken = sum(c.relation.inconsistencies([labels[claim] for claim in c.claims]) for c in constraints)
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
                c.relation.inconsistencies([known.get(claim) for claim in c.claims])
                for c in constraints
                if member in c.claims
            )
        labels[member] = wanted if broken[wanted] <= broken[not wanted] else not wanted
    return labels
