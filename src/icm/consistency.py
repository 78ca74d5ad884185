"""Which claims constrain each other, and which labelings break a constraint. I(D) of Wen et al. 2025.

A constraint holds between two or more claims of one group (`consistency_id`); the testbed says which there are. It is
one of four relations, each a set of allowed assignments of labels.

A label is the index of one of K labels. Of two labels it is a bool: index 1 is True.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import combinations, permutations, product
from math import perm
from statistics import median
from typing import Final

Label = int | None
Labels = tuple[Label, ...]
Margins = float | Sequence[float]

MOST_ASSIGNMENTS: Final = 4096
"""Up to this number of assignments, `nearest` tries them all."""
MOST_COUNTED: Final = 256
"""Up to this number of assignments of linked claims, `trues` tries them all."""
MOST_REPAIRS: Final = 120
"""Assignments that one repair may have to evaluate."""


class Relation(Enum):
    """Which labels two or more claims may have together.

    AGREE and DIFFERENT hold between any labels, the other two only between True and False.
    """

    AGREE = "agree"
    AT_MOST_ONE = "at most one is true"
    EXACTLY_ONE = "exactly one is true"
    DIFFERENT = "no two are alike"

    @property
    def of_true(self) -> bool:
        """Whether it is about the label True, so that the labels must be True and False."""
        return self in (Relation.AT_MOST_ONE, Relation.EXACTLY_ONE)

    def inconsistencies(self, labels: Sequence[Label]) -> int:
        """What `labels` add to I(D): 1 for every forbidden pair, and 1 where one must be true and all are False.

        A claim without a label breaks nothing: it may still become the true one.
        """
        exactly = self is Relation.EXACTLY_ONE
        if exactly or self is Relation.AT_MOST_ONE:
            trues = sum(label is True for label in labels)
            return trues * (trues - 1) // 2 + (exactly and all(label is False for label in labels))
        if len(labels) == 2:  # the usual case, made fast
            first, second = labels
            if first is None or second is None:
                return 0
            return int((first == second) == (self is Relation.DIFFERENT))
        known = [label for label in labels if label is not None]
        alike = sum(count * (count - 1) // 2 for count in map(known.count, set(known)))
        return alike if self is Relation.DIFFERENT else len(known) * (len(known) - 1) // 2 - alike

    def assignments(self, size: int, num_labels: int = 2) -> tuple[tuple[int, ...], ...]:
        """Every labeling of `size` claims that the relation allows, those with the last label first."""
        if self is Relation.AGREE:
            return tuple((label,) * size for label in reversed(all_labels(num_labels)))
        if self is Relation.DIFFERENT:
            return tuple(permutations(reversed(all_labels(num_labels)), size))
        one_true = tuple(tuple(at == true for at in range(size)) for true in range(size))
        return one_true if self is Relation.EXACTLY_ONE else (*one_true, (False,) * size)


def all_labels(num_labels: int) -> tuple[int, ...]:
    """The labels of a space of `num_labels`, in order: False and True where they are two."""
    return (False, True) if num_labels == 2 else tuple(range(num_labels))


@dataclass(frozen=True, slots=True)
class Constraint:
    """`relation` between the claims at two or more pool positions, in ascending order."""

    claims: tuple[int, ...]
    relation: Relation

    def inconsistencies(self, labels: Sequence[Label] | Mapping[int, Label]) -> int:
        """What the labels of a pool (by position, None: unlabelled) add to I(D) here."""
        return self.relation.inconsistencies([labels[claim] for claim in self.claims])

    def repairs(self, labels: Sequence[Label], num_labels: int = 2) -> Iterator[dict[int, int]]:
        """Every assignment of its labelled claims that the constraint allows."""
        known = [claim for claim in self.claims if labels[claim] is not None]
        relation = self.relation
        if relation is Relation.EXACTLY_ONE and len(known) < len(self.claims):
            relation = Relation.AT_MOST_ONE  # the true one may be without a label yet
        return (dict(zip(known, values, strict=True)) for values in relation.assignments(len(known), num_labels))


@dataclass(frozen=True, slots=True)
class Overview:
    """The groups and constraints of a pool, to be shown.

    groups: how many; smallest, median, largest: claims in one. constraints: how many of each relation (its value).
    grouped_by: the column that made the groups, "none" where every row is a group.
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
        with the same entry are one constraint, of the relation that the entry ends in; `relation` is not called for
        pairs among them.
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

    def complaint(self, num_labels: int) -> str | None:
        """Why these constraints are impossible with `num_labels` labels, as the end of a line that begins with the
        pool's name; None where they are possible."""
        for constraint in self.constraints:
            claims, relation = constraint.claims, constraint.relation
            if relation.of_true and num_labels > 2:
                return (
                    f"has claims of which {relation.value}, and {num_labels} labels: more than two labels can only be "
                    f'constrained by "{Relation.AGREE.value}" and "{Relation.DIFFERENT.value}"'
                )
            if relation is Relation.DIFFERENT and not 0 < perm(num_labels, len(claims)) <= MOST_REPAIRS:
                why = "labels" if len(claims) > num_labels else "labels, which is too many ways to try"
                return f"has a group of {len(claims)} claims of which {relation.value}, and {num_labels} {why}"
        return None

    def counts_by_relation(self) -> dict[str, int]:
        """How many constraints there are of each relation that occurs, by the relation's value."""
        counts = Counter(constraint.relation for constraint in self.constraints)
        return {relation.value: counts[relation] for relation in Relation if counts[relation]}

    def overview(self, groups: Sequence[str], grouped_by: str) -> Overview:
        """The groups (one name a claim, at least one claim) and constraints of a pool."""
        sizes = Counter(groups).values()
        return Overview(len(sizes), min(sizes), median(sizes), max(sizes), self.counts_by_relation(), grouped_by)

    def broken(self, labels: Sequence[Label]) -> list[Constraint]:
        """Constraints that `labels` (length N, None: unlabelled) violates; unlabelled claims violate none."""
        return [c for c in self.constraints if c.inconsistencies(labels)]

    def count(self, labels: Sequence[Label]) -> int:
        """I(D): the number of inconsistent pairs, and of sets that must hold a true claim and are all False."""
        return sum(c.inconsistencies(labels) for c in self.constraints)

    def trues(self, size: int) -> tuple[int, int]:
        """The fewest and the most of `size` claims, of two labels, that can be True where no constraint is broken.

        Bounds, which may be too wide where many claims are linked by several constraints.
        """
        neighbours = self._neighbours()
        least, most = 0, size
        for members in _components(neighbours):
            held = list({id(c): c for member in members for c in neighbours[member]}.values())
            fewest, largest = _trues_of_linked(members, held)
            least, most = least + fewest, most - len(members) + largest
        return least, most

    def linked(self) -> list[list[int]]:
        """The claims that constraints link, directly or through others: each set in ascending order."""
        return list(_components(self._neighbours()))

    def _neighbours(self) -> Mapping[int, list[Constraint]]:
        """Every constrained claim's constraints."""
        neighbours: dict[int, list[Constraint]] = defaultdict(list)
        for constraint in self.constraints:
            for claim in constraint.claims:
                neighbours[claim].append(constraint)
        return neighbours

    def nearest(self, margins: Sequence[Margins], known: Labels | None = None) -> Labels:
        """The labels, shape [N], that break no constraint at the smallest loss of margin.

        margins: nats, shape [N, K]; with two labels that of True is enough, shape [N]. A claim loses the margin of its
        likeliest label less that of the label it gets. known: labels that are kept whatever the margins say, shape [N],
        None for a claim that is free. Claims that constrain each other, directly or through others, are decided
        together. Where that is at most MOST_ASSIGNMENTS assignments, all are tried. Where it is more, the claims are
        taken one by one, the surest first, and each gets the label that breaks the fewest constraints with those before
        it, the likeliest of equals; some constraint can stay broken.
        """
        neighbours = self._neighbours()
        gains = [_gains(each) for each in margins]
        labels = [likeliest(each) for each in gains]
        kept = {claim: label for claim, label in enumerate(known or ()) if label is not None}
        for claim, label in kept.items():
            labels[claim] = label
        for members in _components(neighbours):
            held = list({id(c): c for member in members for c in neighbours[member]}.values())
            if not any(c.inconsistencies(labels) for c in held):
                continue
            free = sum(member not in kept for member in members)
            few = len(gains[members[0]]) ** free <= MOST_ASSIGNMENTS
            decide = _decide_exactly if few else _decide_surest_first
            for member, label in decide(members, held, gains, kept).items():
                labels[member] = label
        return tuple(labels)


def likeliest(gains: Sequence[float]) -> int:
    """The label with the largest of `gains`, shape [K]; the first of equals."""
    best = max(range(len(gains)), key=gains.__getitem__)
    return bool(best) if len(gains) == 2 else best


def _gains(margins: Margins) -> tuple[float, ...]:
    return (-margins, margins) if isinstance(margins, float | int) else tuple(margins)


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


def _trues_of_linked(members: Sequence[int], constraints: Sequence[Constraint]) -> tuple[int, int]:
    """The fewest and the most True claims among linked ones; (0, all) where nothing is known."""
    if len(constraints) == 1 and constraints[0].relation.of_true:
        return int(constraints[0].relation is Relation.EXACTLY_ONE), 1
    if 2 ** len(members) > MOST_COUNTED:
        return 0, len(members)
    every = (dict(zip(members, labels, strict=True)) for labels in product((False, True), repeat=len(members)))
    counts = [sum(labels.values()) for labels in every if not any(c.inconsistencies(labels) for c in constraints)]
    return (min(counts), max(counts)) if counts else (0, len(members))


def _decide_exactly(
    members: Sequence[int],
    constraints: Sequence[Constraint],
    gains: Sequence[Sequence[float]],
    kept: Mapping[int, int],
) -> dict[int, int]:
    def worth(labels: dict[int, int]) -> tuple[int, float]:
        broken = sum(c.inconsistencies(labels) for c in constraints)
        return -broken, sum(gains[member][label] for member, label in labels.items())

    every = tuple(reversed(all_labels(len(gains[members[0]]))))
    assignments = product(*((kept[member],) if member in kept else every for member in members))
    return max((dict(zip(members, labels, strict=True)) for labels in assignments), key=worth)


def _decide_surest_first(
    members: Sequence[int],
    constraints: Sequence[Constraint],
    gains: Sequence[Sequence[float]],
    kept: Mapping[int, int],
) -> dict[int, int]:
    labels = {member: kept[member] for member in members if member in kept}
    for member in sorted((m for m in members if m not in kept), key=lambda m: -max(gains[m])):

        def broken(value: int, member: int = member) -> int:
            known = dict.fromkeys(members) | labels | {member: value}
            return sum(c.inconsistencies(known) for c in constraints if member in c.claims)

        # Labels from the likeliest on; min keeps the first of equals.
        first = likeliest(gains[member])
        others = [label for label in all_labels(len(gains[member])) if label != first]
        others.sort(key=gains[member].__getitem__, reverse=True)
        labels[member] = min([first, *others], key=broken)
    return labels
