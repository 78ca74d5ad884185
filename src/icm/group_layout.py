"""An order of demonstrations in which no claim sees its own group, for searches that draw a group's labels together.

In a tree the pool's *groups* are halved again and again, and the claims of a group stand side by side: all of them see
the same demonstrations. Groups that are asked one after another, depth first, then share the edges of the tree as the
claims of `TreeLayout` do. A label that changes when its group was asked changes only edges that no later group of the
same subtree sees: whoever walks the pool so computes each edge once, as one evaluation does, although the labels change
on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from src.icm.prefix_tree import Context, Layout, Node, TreeLayout


@dataclass(frozen=True)
class OtherGroups:
    """`whole` without the demonstrations of the asked claim's group. groups: of every claim of the pool (length N)."""

    whole: Layout
    groups: tuple[str, ...]

    @property
    def questions(self) -> tuple[int, ...]:
        return self.whole.questions

    @property
    def demonstrations(self) -> Context:
        return self.whole.demonstrations

    @property
    def tail(self) -> Context:
        return self.whole.tail

    @property
    def anchors(self) -> int:
        return self.whole.anchors

    @property
    def tail_length(self) -> int:
        return self.whole.tail_length

    @property
    def built_with(self) -> int:
        return self.whole.built_with

    @property
    def detours(self) -> int:
        return self.whole.detours

    @property
    def mean_group_size(self) -> float:
        return self.whole.mean_group_size

    def context(self, claim: int) -> Context:
        own = self.groups[claim]
        return tuple(other for other in self.whole.context(claim) if self.groups[other] != own)

    def place(self, claim: int) -> float:
        return self.whole.place(claim)

    def append(self, claim: int) -> OtherGroups:
        return OtherGroups(self.whole.append(claim), self.groups)

    @property
    def in_turn(self) -> list[list[int]]:
        """The claims of each group, the groups in the order of their first questions."""
        found: dict[str, list[int]] = {}
        for claim in self.questions:
            found.setdefault(self.groups[claim], []).append(claim)
        return list(found.values())


def tree_of_groups(groups: Sequence[str], rng: np.random.Generator, *, anchors: int = 0) -> TreeLayout:
    """A tree over all claims in which those of a group stand side by side, the groups in an order drawn from `rng`.

    anchors: claims, at most half of all, that stand last in every prompt: the last whole groups that are no more.
    """
    members: dict[str, list[Node]] = {}
    for claim, group in enumerate(groups):
        members.setdefault(group, []).append(claim)
    order = [list(members.values())[at] for at in rng.permutation(len(members)).tolist()]
    tail: Context = ()
    while len(tail) + len(order[-1]) <= min(anchors, len(groups) // 2):
        tail = (*(claim for claim in order.pop() if isinstance(claim, int)), *tail)
    return TreeLayout(tuple(groups), _balanced([_balanced(group) for group in order]), tail, len(tail))


def _balanced(nodes: Sequence[Node]) -> Node:
    half = len(nodes) // 2
    return nodes[0] if len(nodes) == 1 else (_balanced(nodes[:half]), _balanced(nodes[half:]))
