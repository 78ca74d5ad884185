"""Layouts of a few claims, worked out by hand: orders, places, and what siblings cost."""

from __future__ import annotations

import numpy as np
import pytest

from src.icm.prefix_tree import SIBLING_DISTANCE, Node, TreeLayout, UpstreamLayout
from tests.icm.tries import distinct_demonstrations

EIGHT: Node = (((0, 1), (2, 3)), ((4, 5), (6, 7)))


def balanced(first: int, last: int) -> Node:
    """The tree over first ... last - 1 (a power of two of them), in order."""
    if last - first == 1:
        return first
    middle = (first + last) // 2
    return balanced(first, middle), balanced(middle, last)


def groups_of(size: int, *pairs: tuple[int, int]) -> tuple[str, ...]:
    """Every claim is a group of its own, but the second of each pair is in the first's."""
    other = {second: first for first, second in pairs}
    return tuple(str(other.get(claim, claim)) for claim in range(size))


def leaves(node: Node) -> list[int]:
    return [node] if isinstance(node, int) else leaves(node[0]) + leaves(node[1])


# The tree


def test_a_tree_of_eight_and_a_tail() -> None:
    layout = TreeLayout(groups_of(13), EIGHT, (8, 9, 10, 11, 12))
    tail = (8, 9, 10, 11, 12)
    assert layout.anchors == 0
    assert layout.questions == (0, 1, 2, 3, 4, 5, 6, 7, *tail)
    assert layout.demonstrations == (4, 5, 6, 7, 0, 1, 2, 3, *tail)
    assert layout.context(0) == (4, 5, 6, 7, 2, 3, 1, *tail)
    assert layout.context(5) == (0, 1, 2, 3, 6, 7, 4, *tail)
    assert layout.context(10) == (4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 11, 12)
    assert [layout.place(claim) for claim in range(8)] == [i / 8 for i in range(8)]
    assert [layout.place(claim) for claim in tail] == [0.0, 0.5, 0.25, 0.75, 0.125]
    assert (layout.tail_length, layout.built_with) == (5, 8)
    anchored = TreeLayout(groups_of(13), EIGHT, tail, anchors=2)
    assert (anchored.tail_length, anchored.built_with) == (3, 10)


def test_trees_of_one_and_of_none() -> None:
    one = TreeLayout(groups_of(3), 1)
    assert (one.questions, one.demonstrations, one.context(1), one.context(2)) == ((1,), (1,), (), (1,))
    assert (one.place(1), one.place(2), one.built_with, one.detours) == (0.0, 0.0, 1, 0)
    none = TreeLayout(groups_of(3))
    assert (none.questions, none.demonstrations, none.context(2)) == ((), (), ())
    assert (none.place(2), none.built_with, none.detours, none.mean_group_size) == (0.0, 0, 0, 0.0)


def test_the_same_claims_and_seed_give_the_same_layout_for_good() -> None:
    """Scores depend on it, so a resumed run needs it."""
    groups = list("aabbccdde")
    layout = TreeLayout.build(range(9), groups, np.random.default_rng(5), anchors=2)
    assert layout == TreeLayout.build([8, 0, 7, 1, 6, 2, 5, 3, 4], groups, np.random.default_rng(5), anchors=2)
    assert (layout.root, layout.tail) == (((4, (2, 1)), ((7, 5), (3, 0))), (6, 8))


def test_every_node_halves_its_claims_and_each_group() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 50))
        groups = [str(group) for group in rng.integers(0, 8, size)]
        root = TreeLayout.build(range(size), groups, rng).root
        assert root is not None
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if isinstance(node, int):
                continue
            waiting += node
            left, right = leaves(node[0]), leaves(node[1])
            assert abs(len(left) - len(right)) <= 1
            for group in set(groups):
                counts = [sum(groups[claim] == group for claim in half) for half in (left, right)]
                assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize(
    ("wanted", "size", "anchors"), [(0, 9, 0), (3, 9, 3), (4, 9, 4), (5, 9, 4), (9, 2, 1), (4, 1, 0)]
)
def test_at_most_half_of_the_claims_are_anchors(wanted: int, size: int, anchors: int) -> None:
    layout = TreeLayout.build(range(size), groups_of(size), np.random.default_rng(0), anchors=wanted)
    assert (layout.anchors, len(layout.tail)) == (anchors, anchors)
    assert layout.built_with == size


# Siblings


def test_a_sibling_in_the_tail_moves_up_as_far_as_the_first_half() -> None:
    layout = TreeLayout(groups_of(12, (0, 11)), EIGHT, (8, 9, 10, 11))
    assert layout.context(0) == (4, 5, 6, 7, 11, 2, 3, 1, 8, 9, 10)
    assert layout.context(1) == (4, 5, 6, 7, 2, 3, 0, 8, 9, 10, 11)


def test_a_sibling_in_the_tail_moves_up_by_the_distance_at_which_it_no_longer_counts() -> None:
    assert SIBLING_DISTANCE == 16
    layout = TreeLayout(groups_of(70, (0, 66)), balanced(0, 64), (64, 65, 66, 67))
    context = layout.context(0)
    others = [*range(32, 64), *range(16, 32), *range(8, 16), 4, 5, 6, 7, 2, 3, 1, 64, 65]
    assert context == (*others[:-16], 66, *others[-16:], 67)


def test_a_sibling_at_the_end_of_the_tree_moves_up_for_those_outside() -> None:
    small = TreeLayout(groups_of(9, (3, 8)), EIGHT)
    assert small.context(8) == (4, 5, 6, 7, 3, 0, 1, 2)
    groups = groups_of(70, (30, 64), (5, 65), (16, 66))
    large = TreeLayout(groups, balanced(0, 64))
    first, second = [*range(32, 64)], [*range(32)]
    without = [claim for claim in second if claim != 30]
    assert large.context(64) == (*first, *without[:15], 30, *without[15:])
    assert large.context(65) == (*first, *second), "far enough away"
    without = [claim for claim in second if claim != 16]
    assert large.context(66) == (*first, *without[:15], 16, *without[15:])
    several = TreeLayout(groups_of(70, (30, 64), (30, 28)), balanced(0, 64))
    without = [claim for claim in second if claim not in (28, 30)]
    assert several.context(64) == (*first, *without[:14], 28, 30, *without[14:])


def test_the_last_stranger_stands_between_a_question_and_its_siblings() -> None:
    four: Node = ((0, 1), (2, 3))
    assert TreeLayout(("a", "b", "b", "b"), four).context(3) == (1, 2, 0)
    assert TreeLayout(("a", "a", "b", "b"), four).context(3) == (0, 2, 1)
    assert TreeLayout(("b", "a", "b", "b"), four).context(3) == (0, 2, 1)
    assert TreeLayout(("a", "a", "b", "c"), four).context(3) == (0, 1, 2)
    assert TreeLayout(("b", "b", "b", "b"), four).context(3) == (0, 1, 2)


def test_detours_of_a_small_tree() -> None:
    """A question with a moved sibling has for its own what stands behind it; the tail is a question's own anyway."""
    assert TreeLayout(groups_of(12), EIGHT, (8, 9, 10, 11)).detours == 0
    # Claim 0: 2, 3 and 1 behind the moved 11. Claim 11: 0 is moved, so 1, 2 and 3 behind it, itself, 8, 9 and 10.
    assert TreeLayout(groups_of(12, (0, 11)), EIGHT, (8, 9, 10, 11)).detours == 3 + 7
    # Claim 11 only: 8 is moved to the tree's first half.
    assert TreeLayout(groups_of(12, (8, 11)), EIGHT, (8, 9, 10, 11)).detours == 7
    # Two siblings in the tail of one in the tree's first half, which does not end the tree: both move for claim 4.
    assert TreeLayout(groups_of(12, (4, 9), (4, 11)), EIGHT, (8, 9, 10, 11)).detours == 3 + 0 + 7


@pytest.mark.parametrize(
    ("pairs", "detours"),
    [
        # The tree's question: 16 demonstrations are moved over, of which 3 are of the tail.
        ([(0, 67)], (16 - 3) + 0),
        ([(0, 84)], 0),
        # The tail's: its sibling at the end of the tree is moved over 16 of the tree, and all of the tail is its own.
        ([(30, 67)], (16 - 3) + (3 + 16)),
        ([(30, 84)], 20 + 16),
        ([(16, 84)], 20 + 16),
        ([(15, 84)], 0),
        # A sibling in the tail is moved up from where it stands.
        ([(69, 83)], 19 + 16 - 5),
        ([(64, 65)], 1 + 16),
        ([(80, 84)], 20 - (16 - 16)),
        # All of these at once: the farther of the two.
        ([(30, 69), (30, 83)], (16 - 5) + (5 + 16) + (19 + 16)),
    ],
)
def test_detours_of_a_large_tree(pairs: list[tuple[int, int]], detours: int) -> None:
    layout = TreeLayout(groups_of(90, *pairs), balanced(0, 64), tuple(range(64, 85)))
    assert layout.detours == detours


def test_kin_is_the_mean_size_of_a_group_that_is_one() -> None:
    groups = ("a", "a", "a", "b", "b", "c", "d", "a", "c")
    assert TreeLayout(groups, ((0, 1), (2, 3)), (4, 5, 6)).mean_group_size == (3 * 3 + 2 * 2) / 7
    assert TreeLayout(groups_of(8), EIGHT).mean_group_size == 0.0


# The published order


def test_the_published_order_has_no_tree() -> None:
    layout = UpstreamLayout.build([5, 1, 3])
    assert layout.demonstrations == (1, 3, 5)
    assert (layout.tail, layout.anchors, layout.tail_length, layout.built_with) == ((), 0, 0, 3)
    assert (layout.detours, layout.mean_group_size) == (0, 0.0)
    assert [layout.place(claim) for claim in (0, 1, 3, 4, 9)] == [0.0, 0.0, 0.25, 0.5, 0.75]


def test_distinct_demonstrations_are_the_edges_of_the_trie() -> None:
    assert distinct_demonstrations([]) == distinct_demonstrations([()]) == 0
    assert distinct_demonstrations([(1, 2, 3), (1, 2, 4), (2, 1)]) == 6
