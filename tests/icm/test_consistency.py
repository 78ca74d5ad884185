"""Relations, constraints and the count of inconsistent pairs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from src.icm.consistency import Consistency, Constraint, Relation


def test_assignments_are_exactly_what_the_relation_allows() -> None:
    assert set(Relation.AGREE.assignments) == {(True, True), (False, False)}
    assert set(Relation.AT_MOST_ONE.assignments) == {(True, False), (False, True), (False, False)}
    assert set(Relation.EXACTLY_ONE.assignments) == {(True, False), (False, True)}


def test_unlabelled_claims_break_nothing() -> None:
    consistency = Consistency([Constraint(0, 1, Relation.EXACTLY_ONE)])
    assert consistency.count((None, True)) == 0
    assert consistency.count((True, True)) == 1
    assert consistency.broken((False, False)) == [Constraint(0, 1, Relation.EXACTLY_ONE)]


def test_constraints_hold_within_groups_only() -> None:
    consistency = Consistency.of_groups(["a", "b", "a", "a"], lambda i, j: Relation.AT_MOST_ONE)
    assert [(c.first, c.second) for c in consistency.constraints] == [(0, 2), (0, 3), (2, 3)]
    assert consistency.count((True, True, True, True)) == 3


@given(st.lists(st.sampled_from([True, False, None]), min_size=2, max_size=8))
def test_count_agrees_with_broken(labels: list[bool | None]) -> None:
    consistency = Consistency.of_groups(["g"] * len(labels), lambda i, j: Relation.AGREE)
    assert consistency.count(labels) == len(consistency.broken(labels))
    trues, falses = labels.count(True), labels.count(False)
    assert consistency.count(labels) == trues * falses
