"""Layouts: every prompt holds the other claims once, the tree shares what it promises, siblings stay away."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.prefix_tree import SIBLING_DISTANCE, Node, TreeLayout, UpstreamLayout
from tests.icm.tries import distinct_demonstrations


def random_groups(size: int, seed: int) -> list[str]:
    rng = np.random.default_rng([size, seed])
    return [str(group) for group in rng.integers(0, max(1, size // int(rng.integers(1, 5))), size)]


@pytest.mark.parametrize("size", range(2, 65))
def test_every_prompt_holds_the_other_claims_once_and_the_tree_is_shared(size: int) -> None:
    for seed in range(3):
        groups = random_groups(size, seed)
        layout = TreeLayout.build(range(size), groups, np.random.default_rng(seed))
        contexts = [layout.context(claim) for claim in layout.questions]
        assert sorted(layout.questions) == list(range(size))
        for claim, context in zip(layout.questions, contexts, strict=True):
            assert sorted((*context, claim)) == list(range(size))
        assert distinct_demonstrations(contexts) <= size * (math.log2(size) + 2)


@given(st.data())
def test_appended_labels_reach_every_prompt_once_and_cost_one_demonstration_each(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 24))
    groups = [str(i) for i in range(size)]  # no siblings: nothing has to be moved
    order = data.draw(st.permutations(range(size)))
    built = data.draw(st.integers(1, size - 1))
    layout = TreeLayout.build(order[:built], groups, np.random.default_rng(0))
    for claim in order[built:]:
        before = [layout.context(known) for known in layout.questions]
        grown = layout.append(claim)
        contexts = [grown.context(known) for known in grown.questions]
        for question, context in zip(grown.questions, contexts, strict=True):
            assert sorted((*context, question)) == sorted(grown.questions)
        for old, new in zip(before, contexts, strict=False):
            assert new == (*old, claim)
        # the new claim's own question sees exactly what its prediction saw
        assert grown.context(claim) == layout.context(claim)
        layout = grown


@given(st.data())
def test_no_sibling_stands_next_to_the_question(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 32))
    groups = [str(g) for g in data.draw(st.lists(st.integers(0, size // 2), min_size=size, max_size=size))]
    order = data.draw(st.permutations(range(size)))
    built = data.draw(st.integers(0, size))
    layout = TreeLayout.build(order[:built], groups, np.random.default_rng(0))
    for claim in order[built:]:
        layout = layout.append(claim)
    for claim in layout.questions:
        context = layout.context(claim)
        if any(groups[other] != groups[claim] for other in context):
            assert groups[context[-1]] != groups[claim]


@pytest.mark.parametrize("appended", [0, 8])
def test_siblings_are_far_away_where_groups_are_pairs(appended: int) -> None:
    groups = [str(i // 2) for i in range(64)]
    order = [*range(0, 64, 2), *range(1, 64, 2)]  # the appended claims are siblings of claims in the tree
    layout = TreeLayout.build(order[: 64 - appended], groups, np.random.default_rng(1))
    for claim in order[64 - appended :]:
        layout = layout.append(claim)
    for claim in layout.questions:
        context = layout.context(claim)
        distance = len(context) - 1 - max(i for i, other in enumerate(context) if groups[other] == groups[claim])
        in_tree = not {claim, claim ^ 1} & set(layout.tail)
        assert distance >= ((64 - appended) // 2 - 1 if in_tree else SIBLING_DISTANCE)


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("anchors", [0, 4])
def test_siblings_keep_their_distance_in_larger_groups(group_size: int, anchors: int) -> None:
    size = 64
    groups = [str(i // group_size) for i in range(size)]
    order = np.random.default_rng(3).permutation(size).tolist()
    layout = TreeLayout.build(order[:48], groups, np.random.default_rng(1), anchors=anchors)
    for claim in order[48:56]:
        layout = layout.append(claim)
    tree = 48 - anchors
    for claim in range(size):
        context = layout.context(claim)
        siblings = [i for i, other in enumerate(context) if groups[other] == groups[claim]]
        after = len(context) - 1 - max(siblings, default=-1)
        # In the tree a group of four parts twice: half its members are half the tree away, one a quarter.
        assert after >= min(SIBLING_DISTANCE, tree // group_size - group_size)
        if not siblings or claim in layout.tail or claim not in layout.questions:
            assert after >= SIBLING_DISTANCE


@given(st.data())
def test_what_a_question_has_seen_stays_in_front_as_others_are_appended(data: st.DataObject) -> None:
    """Else every label would be paid for again. Only a sibling moves, once, when it comes."""
    size, built = 60, 40
    group_size = data.draw(st.integers(1, 4))
    groups = [str(i // group_size) for i in range(size)]
    order = data.draw(st.permutations(range(size)))
    layout = TreeLayout.build(order[:built], groups, np.random.default_rng(0))
    for claim in order[built:]:
        grown = layout.append(claim)
        for asked in layout.questions:
            before, after = layout.context(asked), grown.context(asked)
            if groups[asked] != groups[claim]:
                assert after == (*before, claim)
            else:
                assert after[: len(before) - SIBLING_DISTANCE] == before[: len(before) - SIBLING_DISTANCE]
        layout = grown


def test_outsiders_see_every_label_once_anchors_last() -> None:
    layout = TreeLayout.build(range(9), [str(i) for i in range(9)], np.random.default_rng(0), anchors=2)
    assert sorted(layout.demonstrations) == list(range(9))
    assert layout.demonstrations[-2:] == layout.tail


def test_depth_first_neighbours_share_all_but_a_few_demonstrations() -> None:
    layout = TreeLayout.build(range(64), [str(i) for i in range(64)], np.random.default_rng(2))
    contexts = [layout.context(claim) for claim in layout.questions]
    for first, second in zip(contexts[::2], contexts[1::2], strict=True):
        assert first[:-1] == second[:-1]


@pytest.mark.parametrize("size", [2, 3, 8, 33, 64])
def test_anchors_stand_last_in_every_prompt(size: int) -> None:
    layout = TreeLayout.build(range(size), [str(i) for i in range(size)], np.random.default_rng(0), anchors=4)
    anchors = layout.tail
    assert len(anchors) == min(4, size // 2)
    assert layout.tail_length == 0
    assert sorted(layout.questions) == list(range(size))
    for claim in layout.questions:
        expected = tuple(anchor for anchor in anchors if anchor != claim)
        context = layout.context(claim)
        assert sorted((*context, claim)) == list(range(size))
        assert context[len(context) - len(expected) :] == expected


def test_a_claim_cannot_be_appended_twice() -> None:
    layout = TreeLayout.build([0, 1], ["a", "b", "c"], np.random.default_rng(0)).append(2)
    for claim in (0, 2):
        with pytest.raises(ValueError, match="already"):
            layout.append(claim)


def test_an_empty_pool_has_empty_contexts() -> None:
    layout = TreeLayout.build([], ["a", "b"], np.random.default_rng(0))
    assert layout.questions == ()
    assert layout.context(1) == ()
    assert layout.append(1).context(0) == (1,)


def test_upstream_order_is_the_pools_with_the_asked_claim_left_out() -> None:
    layout = UpstreamLayout.build([5, 1, 3])
    assert layout.questions == (1, 3, 5)
    assert layout.context(3) == (1, 5)
    assert layout.append(2).context(4) == (1, 2, 3, 5)
    assert distinct_demonstrations([layout.context(c) for c in layout.questions]) == 5


@pytest.mark.parametrize("size", [1, 2, 3, 12, 33, 64])
def test_places_of_the_tree_stand_in_depth_first_order_and_each_half_is_a_subtree(size: int) -> None:
    layout = TreeLayout.build(range(size), random_groups(size, 1), np.random.default_rng(1))
    places = [layout.place(claim) for claim in layout.questions]
    assert places == sorted(set(places))
    assert all(0 <= place < 1 for place in places)
    node = layout.root
    start, width = 0.0, 1.0
    while isinstance(node, tuple):  # down the right edge: 1/2, 3/4, 7/8
        start, width = start + width / 2, width / 2
        node = node[1]
        inside = {claim for claim in layout.questions if layout.place(claim) >= start}
        assert inside == leaves(node)


def leaves(node: Node) -> set[int]:
    return {node} if isinstance(node, int) else leaves(node[0]) | leaves(node[1])


def test_places_stay_as_the_tail_grows_which_is_spread_evenly() -> None:
    layout = TreeLayout.build(range(8), [str(i) for i in range(40)], np.random.default_rng(0), anchors=2)
    before: dict[int, float] = {}
    for claim in range(8, 40):
        assert layout.place(claim) == 0.0, "unlabelled claims share one prefix"
        layout = layout.append(claim)
        places = {known: layout.place(known) for known in layout.questions}
        assert before.items() <= places.items()
        assert all(0 <= place < 1 for place in places.values())
        before = places
        for servers in (2, 4):
            held = [int(layout.place(known) * servers) for known in layout.tail]
            counts = [held.count(server) for server in range(servers)]
            assert max(counts) - min(counts) <= 1


def test_places_of_the_published_order_follow_it() -> None:
    layout = UpstreamLayout.build([5, 1, 3])
    places = [layout.place(claim) for claim in (1, 3, 4, 5, 6)]
    assert places == sorted(places)
    assert all(0 <= place < 1 for place in places)
    assert UpstreamLayout.build([]).place(2) == 0.0
