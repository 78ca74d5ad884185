"""The order of the demonstrations in each leave-one-out prompt, such that a prefix cache computes little.

`TreeLayout` halves the pool again and again. A question about one half sees the other half's demonstrations first,
then those of the neighbouring quarter, and so on down; prompts asked depth first share every edge of that binary
tree, N * log2(N) demonstrations instead of N * N / 2. Labels added since the tree was built are in a *tail* after
it, so that adding one costs each prompt one demonstration and its question. `UpstreamLayout` is the published code's
order: the pool's, with the asked claim left out.

The demonstrations nearest to a question can weigh most, and in a tree they differ from question to question, so that a
search could fit the labels of neighbours in the tree to each other. A few claims, the *anchors*, may be in the tail
from the start: the same last demonstrations for every question, computed once for each (docs/lab-log.md).

A claim's siblings (same group, often the opposite answer) must not be next to its question, or their labels give the
answer away: a group is divided at the root, and siblings in the tail move up by SIBLING_DISTANCE.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import ClassVar, Final, Protocol

import numpy as np

SIBLING_DISTANCE: Final = 16
"""By how many demonstrations an appended sibling is moved up. The effect that it has right before the question is gone
after 4 to 8 (docs/lab-log.md); every one more may be computed again for each claim with a sibling in the tail."""

Node = int | tuple["Node", "Node"]
Context = tuple[int, ...]


class Layout(Protocol):
    """An order of demonstrations for every question about a pool. Claims are pool positions."""

    @property
    def questions(self) -> tuple[int, ...]:
        """The labelled claims, in the order of questions that suits a prefix cache best."""

    @property
    def demonstrations(self) -> Context:
        """All labelled claims in the order in which a claim that is not of the pool sees them."""

    @property
    def tail(self) -> Context:
        """The last of `questions`: those after the shared tree, anchors first, newest last."""

    @property
    def anchors(self) -> int:
        """How many claims of the tail were in it when the layout was built."""

    @property
    def tail_length(self) -> int:
        """How many demonstrations were appended since the layout was built."""

    @property
    def built_with(self) -> int:
        """How many claims were labelled when the layout was built."""

    @property
    def detours(self) -> int:
        """Demonstrations that a prefix cache holds besides the tree and the tail's copies, because questions with a
        sibling in the tail (or near the end of the shared part) see another order from there on."""

    @property
    def mean_group_size(self) -> float:
        """The mean size of a laid-out claim's group, 0 for one without siblings: the detours of one anchor."""

    def context(self, claim: int) -> Context:
        """The other labelled claims in the order in which a question about `claim` (labelled or not) sees them."""

    def place(self, claim: int) -> float:
        """The place of a question about `claim` among the prefixes, 0 <= place < 1; see Prompt.place."""

    def append(self, claim: int) -> Layout:
        """The layout with one more labelled claim."""


@dataclass(frozen=True)
class UpstreamLayout:
    """The published code's order: labelled claims in the pool's order, whole groups together."""

    labelled: tuple[int, ...]
    tail: ClassVar[Context] = ()
    anchors: ClassVar[int] = 0
    tail_length: ClassVar[int] = 0
    detours: ClassVar[int] = 0
    mean_group_size: ClassVar[float] = 0.0

    @classmethod
    def build(cls, labelled: Iterable[int]) -> UpstreamLayout:
        return cls(tuple(sorted(labelled)))

    @property
    def questions(self) -> tuple[int, ...]:
        return self.labelled

    @property
    def demonstrations(self) -> Context:
        return self.labelled

    @property
    def built_with(self) -> int:
        return len(self.labelled)

    def context(self, claim: int) -> Context:
        return tuple(other for other in self.labelled if other != claim)

    def place(self, claim: int) -> float:
        """The place of `claim`, labelled or not, in the pool's order: the claims before it are the shared prefix."""
        return bisect_left(self.labelled, claim) / (len(self.labelled) + 1)

    def append(self, claim: int) -> UpstreamLayout:
        return UpstreamLayout.build((*self.labelled, claim))


@dataclass(frozen=True)
class TreeLayout:
    """A binary tree over the claims labelled when it was built, and a tail of those labelled since.

    groups: the group of every claim of the pool (length N). Groups, not labels: a layout stays as labels flip.
    anchors: how many claims of the tail were in it when the tree was built.
    """

    groups: tuple[str, ...]
    root: Node | None = None
    tail: tuple[int, ...] = ()
    anchors: int = 0

    @classmethod
    def build(
        cls, labelled: Iterable[int], groups: Sequence[str], rng: np.random.Generator, *, anchors: int = 0
    ) -> TreeLayout:
        """A tree over `labelled` in a random order drawn from `rng`, every group divided at the root.

        anchors: how many claims (at most half of them) are in the tail from the start, so that the demonstrations
        nearest to the question, which weigh most, are the same for every question.
        """
        order = rng.permutation(np.array(sorted(labelled), dtype=np.int64)).tolist()
        anchors = min(anchors, len(order) // 2)
        inside = len(order) - anchors
        return cls(tuple(groups), _halve(order[:inside], groups) if order else None, tuple(order[inside:]), anchors)

    @property
    def tail_length(self) -> int:
        return len(self.tail) - self.anchors

    @property
    def built_with(self) -> int:
        return len(self.questions) - self.tail_length

    @cached_property
    def detours(self) -> int:
        behind_root = len(self._outer[1])
        ending = {self.groups[claim] for claim in self._outer[1][-SIBLING_DISTANCE:]}
        first_of: dict[str, int] = {}
        for place, claim in enumerate(self.tail):
            first_of.setdefault(self.groups[claim], place)
        total = 0
        for claim, path in self._paths.items():
            # Every question has its copy of the tail anyway; only an early sibling moves up into the shared part.
            moved = SIBLING_DISTANCE - first_of.get(self.groups[claim], SIBLING_DISTANCE)
            total += min(max(0, moved), sum(map(len, path[1:])))
        for place, claim in enumerate(self.tail):
            # These share the tree and the tail before them, up to where their first sibling has moved.
            first = first_of[self.groups[claim]]
            moved = first - SIBLING_DISTANCE if first < place else place
            if self.groups[claim] in ending:
                moved = min(moved, -SIBLING_DISTANCE)
            total += place - max(moved, -behind_root)
        return total

    @cached_property
    def mean_group_size(self) -> float:
        sizes = Counter(self.groups[claim] for claim in self.questions)
        return sum(size**2 for size in sizes.values() if size > 1) / max(1, sizes.total())

    @property
    def questions(self) -> tuple[int, ...]:
        return (*self._paths, *self.tail)

    @property
    def demonstrations(self) -> Context:
        return (*chain.from_iterable(self._outer), *self.tail)

    def context(self, claim: int) -> Context:
        path = self._paths[claim] if claim in self._paths else self._spine(claim)
        first_edge = path[0] if path else ()
        context = list(chain.from_iterable(path))
        for other in self.tail:
            if other == claim:
                continue
            # A sibling is moved up once. Its place stays as others are appended, and what is cached stays valid.
            near = self._are_siblings(claim, other)
            context.insert(max(len(first_edge), len(context) - SIBLING_DISTANCE) if near else len(context), other)
        return self._part_from_siblings(claim, tuple(context))

    def place(self, claim: int) -> float:
        """The tree halves [0, 1) at every node: half, a quarter, an eighth of [0, 1) is exactly a subtree.

        Claims of the tail see the whole tree first and belong to no subtree: they are spread evenly, in a sequence that
        stays even as it grows. Unlabelled claims share one prefix and are all at 0. No labelled claim's place changes
        as others are appended.
        """
        if claim in self._places:
            return self._places[claim]
        return reversed_bits(self.tail.index(claim)) if claim in self.tail else 0.0

    def append(self, claim: int) -> TreeLayout:
        if claim in self._paths or claim in self.tail:
            raise ValueError(f"claim {claim} is already laid out")
        return replace(self, tail=(*self.tail, claim))

    @cached_property
    def _paths(self) -> dict[int, tuple[Context, ...]]:
        """The edges from the root to each claim of the tree, depth first."""
        return dict(_walk(self.root, ())) if self.root is not None else {}

    @cached_property
    def _places(self) -> dict[int, float]:
        """Where each claim's part of [0, 1) begins."""
        return dict(_intervals(self.root, 0.0, 1.0)) if self.root is not None else {}

    @cached_property
    def _outer(self) -> tuple[Context, Context]:
        """The tree's two halves in the order in which claims outside the tree see them."""
        if self.root is None:
            return (), ()
        if isinstance(self.root, int):
            return (self.root,), ()
        left, right = self.root
        return _leaves(right), _leaves(left)

    def _spine(self, claim: int) -> tuple[Context, Context]:
        """The whole tree as seen by a claim outside it: both halves, siblings at the end moved up."""
        first, second = self._outer
        near = [other for other in second[-SIBLING_DISTANCE:] if self._are_siblings(claim, other)]
        if not near:
            return first, second
        others = [other for other in second if other not in near]
        cut = max(0, len(others) - SIBLING_DISTANCE)
        return first, (*others[:cut], *near, *others[cut:])

    def _are_siblings(self, claim: int, other: int) -> bool:
        return self.groups[claim] == self.groups[other]

    def _part_from_siblings(self, claim: int, context: Context) -> Context:
        """`context`, its last non-sibling moved to the end if a sibling stood there (tiny or one-group pools)."""
        if not context or not self._are_siblings(claim, context[-1]):
            return context
        for position in range(len(context) - 1, -1, -1):
            if not self._are_siblings(claim, context[position]):
                return (*context[:position], *context[position + 1 :], context[position])
        return context


def _halve(claims: Sequence[int], groups: Sequence[str]) -> Node:
    """A balanced binary tree over `claims`; every group is split as evenly as it goes at every node."""
    if len(claims) == 1:
        return claims[0]
    members: dict[str, list[int]] = defaultdict(list)
    for claim in claims:
        members[groups[claim]].append(claim)
    left: list[int] = []
    right: list[int] = []
    for group in members.values():
        half = len(group) // 2
        left += group[:half]
        right += group[half : 2 * half]
        if len(group) % 2:
            (left if len(left) < len(right) else right).append(group[-1])
    return _halve(left, groups), _halve(right, groups)


def _leaves(node: Node) -> Context:
    if isinstance(node, int):
        return (node,)
    return (*_leaves(node[0]), *_leaves(node[1]))


def _walk(node: Node, path: tuple[Context, ...]) -> Iterable[tuple[int, tuple[Context, ...]]]:
    if isinstance(node, int):
        yield node, path
        return
    left, right = node
    yield from _walk(left, (*path, _leaves(right)))
    yield from _walk(right, (*path, _leaves(left)))


def _intervals(node: Node, start: float, width: float) -> Iterable[tuple[int, float]]:
    if isinstance(node, int):
        yield node, start
        return
    left, right = node
    yield from _intervals(left, start, width / 2)
    yield from _intervals(right, start + width / 2, width / 2)


def reversed_bits(number: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, 1/8, ... Its first n numbers are spread evenly."""
    value, width = 0.0, 0.5
    while number:
        value += width * (number % 2)
        number, width = number // 2, width / 2
    return value
