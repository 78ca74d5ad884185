"""Labelings of one pool to compare by U: gold, gold corrupted by degrees, random, constant, mirrored.

Of two labels a mirror has every label flipped; of more, two labels are swapped everywhere. Pure; nothing is asked here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, Literal

import numpy as np

from src.icm.annealing import swapped
from src.icm.consistency import Label, Labels, all_labels
from src.icm.label_names import Names
from src.icm.objective import Evaluation, LogOdds
from src.icm.problem import balanced_labels

Kind = Literal["gold", "found", "corrupted gold", "random", "constant", "zero-shot", "bootstrapped", "mirrored"]
Odds = tuple[LogOdds, ...]
"""Of every claim of the pool, nats (see objective)."""
DEGREES: Final = (0.05, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50)
"""Shares of gold's labels that are changed."""
ROUNDS: Final = 4
"""Rounds of bootstrapping in a chain; each one's labels are a labeling."""
FEWEST: Final = 30


@dataclass(frozen=True, slots=True)
class Labeling:
    """Labels of the whole pool. of: the name of the labeling that this is the mirror of."""

    name: str
    kind: Kind
    labels: Labels
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A labeling with its U, and every claim's log-odds given the labels of all others, in the pool's one layout."""

    labeling: Labeling
    evaluation: Evaluation

    @property
    def utility(self) -> float:
        return self.evaluation.utility


@dataclass(frozen=True, slots=True)
class Plan:
    """How many labelings there are of each kind.

    draws: corrupted ones of each degree. randoms: random ones, the first `chains` - 1 of which are what a chain of
    bootstrapping begins with; the last chain begins with zero-shot labels. mirrors: at most.
    """

    draws: int
    randoms: int
    chains: int
    mirrors: int

    @classmethod
    def of(cls, labelings: int, *, gold: bool) -> Plan:
        """About `labelings` of them in all, at least FEWEST. Without gold the part of the corrupted ones goes to
        bootstrapping and to random labels."""
        corrupted, bootstrapped, random = (0.35, 0.25, 0.20) if gold else (0.0, 0.48, 0.32)
        total = max(labelings, FEWEST)
        draws = max(1, round(corrupted * total / len(DEGREES))) if gold else 0
        chains = max(2, round(bootstrapped * total / ROUNDS))
        randoms = max(chains - 1, round(random * total))
        rest = total - draws * len(DEGREES) - chains * ROUNDS - randoms
        return cls(draws, randoms, chains, max(3, rest - 4))  # gold, constant and zero-shot ones are four

    def most(self, num_labels: int, *, gold: bool, found: int) -> int:
        """Labelings that will be evaluated at most: chains may end early, and equal labelings are asked about once."""
        corrupted = self.draws * len(DEGREES)
        return gold + found + corrupted + self.randoms + num_labels + 1 + self.chains * ROUNDS + self.mirrors


def corrupted(
    labels: Sequence[int], count: int, num_labels: int, rng: np.random.Generator, free: Sequence[int] | None = None
) -> Labels:
    """`labels` with exactly `count` of them changed to another one, which ones and to what at random.

    free: the claims whose labels may change; None: all.
    """
    changed = list(labels)
    places = range(len(changed)) if free is None else free
    for claim in (places[at] for at in rng.choice(len(places), size=count, replace=False).tolist()):
        if num_labels == 2:
            changed[claim] = not changed[claim]
        else:
            changed[claim] = (changed[claim] + int(rng.integers(1, num_labels))) % num_labels
    return tuple(changed)


def corrupted_gold(
    gold: Sequence[int], plan: Plan, num_labels: int, rng: np.random.Generator, free: Sequence[int] | None = None
) -> list[Labeling]:
    """Gold with every share of DEGREES changed, `plan.draws` times each: the nearest number of claims, at least one.

    free: the claims whose labels may change; None: all. Shares are of these.
    """
    size = len(gold) if free is None else len(free)
    found: list[Labeling] = []
    if not size:
        return found
    for share in DEGREES:
        count = max(1, round(share * size))
        for draw in range(plan.draws):
            name = f"gold, {count} of {size} labels changed ({share:.0%}), draw {draw + 1}"
            found.append(Labeling(name, "corrupted gold", corrupted(gold, count, num_labels, rng, free)))
    return found


def random_labelings(size: int, plan: Plan, num_labels: int, rng: np.random.Generator) -> list[Labeling]:
    """As many of each label, in random order."""
    return [
        Labeling(f"random {number + 1}", "random", tuple(balanced_labels(size, num_labels, rng)))
        for number in range(plan.randoms)
    ]


def constant_labelings(size: int, names: Names) -> list[Labeling]:
    """Every claim with the same label, one for each label."""
    return [Labeling(f"all {names[label]}", "constant", (label,) * size) for label in all_labels(len(names))]


def mirrored(originals: Iterable[Labeling], most: int, names: Names, rng: np.random.Generator) -> list[Labeling]:
    """The mirrors of the first `most` labelings that differ from each other, in their order.

    Of more than two labels one swap each, drawn from those that change something.
    """
    found: list[Labeling] = []
    seen: set[Labels] = set()
    for original in originals:
        if len(found) == most:
            break
        present = set(original.labels)
        swaps = [pair for pair in combinations(all_labels(len(names)), 2) if present & set(pair)]
        if original.labels in seen:
            continue
        seen.add(original.labels)
        one, other = swaps[int(rng.integers(len(swaps)))]
        how = "mirror" if len(names) == 2 else f"{names[one]} and {names[other]} swapped"
        labels = swapped(original.labels, one, other)
        found.append(Labeling(f"{how} of {original.name}", "mirrored", labels, original.name))
    return found


def by_turns(groups: Iterable[Sequence[Labeling]]) -> list[Labeling]:
    """The first of each group, then the second of each, and so on."""
    lists = list(groups)
    longest = max(map(len, lists), default=0)
    return [group[at] for at in range(longest) for group in lists if at < len(group)]


def counts_by_kind(labelings: Iterable[Labeling]) -> Mapping[str, int]:
    """How many there are of each kind, in the order in which the kinds first come."""
    return Counter(labeling.kind for labeling in labelings)


def whole(labels: Sequence[Label]) -> tuple[int, ...] | None:
    """The labels where every claim has one, else None."""
    known = tuple(label for label in labels if label is not None)
    return known if len(known) == len(labels) else None
