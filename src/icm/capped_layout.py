"""At most C demonstrations for every question (`--context_cap`): a sample of the labelled claims, the same for all.

The sample is laid out as a tree, as a whole pool would be. Claims outside it are asked after the whole sample, so an
evaluation costs a tree of C claims and N questions however large the pool is. It is another objective than the paper's:
a label is predicted from C others, not from all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from src.icm.consistency import Label
from src.icm.prefix_tree import Context, TreeLayout, reversed_bits


@dataclass(frozen=True)
class CappedLayout:
    """A tree over the sample, and the labelled claims that are only asked about.

    cap: the most demonstrations. built_with: how many claims were labelled when the sample was drawn.
    """

    shown: TreeLayout
    others: tuple[int, ...]
    cap: int
    built_with: int

    @classmethod
    def build(
        cls,
        labelled: Sequence[int],
        labels: Sequence[Label] | None,
        groups: Sequence[str],
        rng: np.random.Generator,
        *,
        cap: int,
        anchors: int = 0,
    ) -> CappedLayout:
        """A random sample with equally many of each label, as far as there are (labels None: any claims)."""
        sample = set(balanced_sample(labelled, labels, cap, rng))
        shown = TreeLayout.build(sample, groups, rng, anchors=anchors)
        return cls(shown, tuple(claim for claim in labelled if claim not in sample), cap, len(labelled))

    @property
    def questions(self) -> tuple[int, ...]:
        return (*self.others, *self.shown.questions)

    @property
    def demonstrations(self) -> Context:
        return self.shown.demonstrations

    @property
    def tail(self) -> Context:
        return self.shown.tail

    @property
    def anchors(self) -> int:
        return self.shown.anchors

    @property
    def tail_length(self) -> int:
        return self.shown.tail_length

    @property
    def detours(self) -> int:
        return self.shown.detours

    @property
    def mean_group_size(self) -> float:
        return self.shown.mean_group_size

    def context(self, claim: int) -> Context:
        return self.shown.context(claim)

    def place(self, claim: int) -> float:
        """As in the tree; the claims outside the sample, which all see the whole of it, are spread evenly."""
        number = self._numbers.get(claim)
        return self.shown.place(claim) if number is None else reversed_bits(number)

    def append(self, claim: int) -> CappedLayout:
        if len(self.shown.questions) < self.cap:
            return replace(self, shown=self.shown.append(claim))
        return replace(self, others=(*self.others, claim))

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {claim: number for number, claim in enumerate(self.others)}


def balanced_sample(
    claims: Iterable[int], labels: Sequence[Label] | None, count: int, rng: np.random.Generator
) -> list[int]:
    """`count` claims (or all) in random order: one of each label in turn, as long as there are any."""
    order: list[int] = rng.permutation(np.array(sorted(claims), dtype=np.int64)).tolist()
    if labels is None:
        return order[:count]
    seen: Counter[int] = Counter()
    ranked: list[tuple[int, int]] = []
    for claim in order:
        label = labels[claim] or 0
        ranked.append((seen[label], claim))
        seen[label] += 1
    ranked.sort(key=lambda ranked_claim: ranked_claim[0])  # stable: the first of each label, then the second, ...
    return [claim for _, claim in ranked[:count]]
