"""Relations, constraints and the count of inconsistent pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.consistency import Consistency, Constraint, Relation


def test_assignments_are_exactly_what_the_relation_allows() -> None:
    assert set(Relation.AGREE.assignments(2)) == {(True, True), (False, False)}
    assert set(Relation.AT_MOST_ONE.assignments(2)) == {(True, False), (False, True), (False, False)}
    assert set(Relation.EXACTLY_ONE.assignments(2)) == {(True, False), (False, True)}


def test_unlabelled_claims_break_nothing() -> None:
    consistency = Consistency([Constraint((0, 1), Relation.EXACTLY_ONE)])
    assert consistency.count((None, True)) == 0
    assert consistency.count((True, True)) == 1
    assert consistency.broken((False, False)) == [Constraint((0, 1), Relation.EXACTLY_ONE)]


def test_constraints_hold_within_groups_only() -> None:
    consistency = Consistency.of_groups(["a", "b", "a", "a"], lambda i, j: Relation.AT_MOST_ONE)
    assert [c.claims for c in consistency.constraints] == [(0, 2), (0, 3), (2, 3)]
    assert consistency.count((True, True, True, True)) == 3


@given(st.lists(st.sampled_from([True, False, None]), min_size=2, max_size=8))
def test_count_agrees_with_broken(labels: list[bool | None]) -> None:
    consistency = Consistency.of_groups(["g"] * len(labels), lambda i, j: Relation.AGREE)
    assert consistency.count(labels) == len(consistency.broken(labels))
    trues, falses = labels.count(True), labels.count(False)
    assert consistency.count(labels) == trues * falses


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from(Relation)), max_size=8),
)
def test_the_nearest_labels_break_least_and_then_lose_least(
    margins: list[float], pairs: list[tuple[int, int, Relation]]
) -> None:
    constraints = [Constraint((min(a, b), max(a, b)), r) for a, b, r in pairs if a != b and max(a, b) < len(margins)]
    consistency = Consistency(constraints)

    def gain(labels: Sequence[bool]) -> float:
        return sum(m if label else -m for m, label in zip(margins, labels, strict=True))

    found = consistency.nearest(margins)
    best = max(
        product((True, False), repeat=len(margins)), key=lambda labels: (-consistency.count(labels), gain(labels))
    )
    assert consistency.count(found) == consistency.count(best)
    assert gain(found) == pytest.approx(gain(best))


def test_a_large_component_is_decided_by_the_surest_first() -> None:
    chain = Consistency([Constraint((i, i + 1), Relation.EXACTLY_ONE) for i in range(19)])
    labels = chain.nearest([1.0] * 7 + [-3.0] + [1.0] * 12)
    assert chain.count(labels) == 0
    assert labels[7] is False
    assert all(label == (i % 2 == 0) for i, label in enumerate(labels))


ONE_OF_FOUR = Constraint((0, 1, 2, 3), Relation.EXACTLY_ONE)


@pytest.mark.parametrize(
    ("labels", "count"),
    [
        ((True, False, False, False), 0),
        ((False, False, False, False), 1),
        ((False, False, False, None), 0),  # the one without a label may be the true one
        ((None, None, None, None), 0),
        ((True, True, None, False), 1),
        ((True, True, True, False), 3),
        ((True, True, True, True), 6),
    ],
)
def test_exactly_one_of_four_counts_pairs_and_all_false(labels: tuple[bool | None, ...], count: int) -> None:
    consistency = Consistency([ONE_OF_FOUR])
    assert consistency.count(labels) == count
    assert consistency.broken(labels) == ([ONE_OF_FOUR] if count else [])


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_assignments_of_a_relation_are_those_without_an_inconsistency(relation: Relation, size: int) -> None:
    allowed = {values for values in product((True, False), repeat=size) if not relation.inconsistencies(values)}
    assert set(relation.assignments(size)) == allowed
    assert len(relation.assignments(size)) == len(allowed)


def test_repairs_of_exactly_one_leave_claims_without_a_label_alone() -> None:
    assert list(ONE_OF_FOUR.repairs((True, True, None, None))) == [
        {0: True, 1: False},
        {0: False, 1: True},
        {0: False, 1: False},  # the true one may be among the others
    ]
    assert [sorted(changes.values()) for changes in ONE_OF_FOUR.repairs((False,) * 4)] == [[False] * 3 + [True]] * 4


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=20))
def test_of_many_options_the_likeliest_is_the_true_one(margins: list[float]) -> None:
    one = Consistency([Constraint(tuple(range(len(margins))), Relation.EXACTLY_ONE)])
    labels = one.nearest(margins)
    assert one.count(labels) == 0
    assert margins[labels.index(True)] == pytest.approx(max(margins), abs=1e-12)


def test_an_overview_counts_groups_and_relations() -> None:
    consistency = Consistency([ONE_OF_FOUR, Constraint((4, 5), Relation.AGREE), Constraint((4, 6), Relation.AGREE)])
    assert consistency.counts_by_relation() == {"agree": 2, "exactly one is true": 1}
    overview = consistency.overview(["a"] * 4 + ["b"] * 3 + ["c"], "question")
    assert (overview.groups, overview.smallest, overview.median, overview.largest) == (3, 1, 3, 4)
    assert overview.constraints == {"agree": 2, "exactly one is true": 1}
    assert overview.grouped_by == "question"


@st.composite
def few_constraints(draw: st.DrawFn) -> list[Constraint]:
    """Up to four constraints between some of six claims, which can link them all."""
    return [
        Constraint(
            tuple(sorted(draw(st.sets(st.integers(0, 5), min_size=2, max_size=4)))), draw(st.sampled_from(Relation))
        )
        for _ in range(draw(st.integers(0, 4)))
    ]


@given(few_constraints())
def test_how_many_claims_can_be_true_is_what_trying_all_labels_says(constraints: list[Constraint]) -> None:
    constraints = [c for c in constraints if c.relation is not Relation.DIFFERENT or len(c.claims) == 2]
    consistency = Consistency(constraints)
    counts = [sum(labels) for labels in product((False, True), repeat=6) if not consistency.broken(labels)]
    if counts:
        assert consistency.trues(6) == (min(counts), max(counts))


def test_one_large_group_says_how_many_claims_can_be_true() -> None:
    assert Consistency([Constraint(tuple(range(20)), Relation.EXACTLY_ONE)]).trues(23) == (1, 4)
    assert Consistency([Constraint(tuple(range(20)), Relation.AT_MOST_ONE)]).trues(20) == (0, 1)
    assert Consistency([Constraint((0, at), Relation.AGREE) for at in range(1, 20)]).trues(20) == (0, 20)
