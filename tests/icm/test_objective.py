"""U(D), agreement, AUC and intervals against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.consistency import Consistency, Constraint, Relation
from src.icm.objective import Objective, accuracy, auc, wilson_interval

NONE = Consistency([])


def test_utility_by_hand() -> None:
    consistency = Consistency([Constraint((0, 1), Relation.AT_MOST_ONE)])
    worth = Objective(alpha=10).evaluate((True, True, False, None), {0: 1.0, 1: -2.0, 2: -4.0}, consistency)
    assert worth.predictability == pytest.approx((1.0 - 2.0 + 4.0) / 3)
    assert worth.inconsistent == 1
    assert worth.utility == pytest.approx(10 * 1.0 - 1)


def test_calibration_subtracts_the_mean_and_makes_constant_labels_worthless() -> None:
    scores = {0: 3.0, 1: 5.0}
    worth = Objective(alpha=1, calibration="mean").evaluate((False, True), scores, NONE)
    assert worth.offset == 4.0
    assert worth.predictability == pytest.approx(1.0)
    assert Objective(1, "mean").evaluate((True, True), scores, NONE).predictability == pytest.approx(0.0)


def test_nothing_is_subtracted_unless_asked_for() -> None:
    assert Objective(alpha=1).calibration == "none"
    assert Objective(1).evaluate((False, True), {0: 3.0, 1: 5.0}, NONE).offset == 0.0


def test_nothing_labelled_is_worth_nothing() -> None:
    worth = Objective(alpha=10).evaluate((None, None), {}, NONE)
    assert (dict(worth.log_odds), worth.offset, worth.predictability) == ({}, 0.0, 0.0)
    assert (worth.inconsistent, worth.utility) == (0, 0.0)


def test_whole_numbers_are_log_odds_too() -> None:
    worth = Objective(1).evaluate((True, False), {0: 2**53, 1: 1}, NONE)
    assert worth.predictability == (2.0**53 - 1) / 2


def test_scores_must_be_of_the_labelled_claims() -> None:
    with pytest.raises(ValueError, match="exactly the labelled"):
        Objective(1).evaluate((True, None), {0: 1.0, 1: 1.0}, NONE)


@given(st.lists(st.tuples(st.booleans(), st.floats(-50, 50)), min_size=1, max_size=40))
def test_flipping_every_label_negates_predictability(pool: list[tuple[bool, float]]) -> None:
    labels = tuple(label for label, _ in pool)
    scores = {i: score for i, (_, score) in enumerate(pool)}
    worth = Objective(1).evaluate(labels, scores, NONE).predictability
    flipped = Objective(1).evaluate(tuple(not label for label in labels), scores, NONE).predictability
    assert math.isclose(worth, -flipped, abs_tol=1e-9)


def test_accuracy_counts_only_claims_with_both_labels() -> None:
    assert accuracy((True, None, False, True), (True, True, True, None)) == (1, 2)
    assert accuracy((True, False, False, True), (True, True, False, True)) == (3, 4)


def test_accuracy_refuses_labels_of_another_pool() -> None:
    with pytest.raises(ValueError, match="shorter"):
        accuracy((True, False), (True,))


def test_auc_by_hand_and_with_ties() -> None:
    assert auc([1.0, 2.0, 3.0], [False, False, True]) == 1.0
    assert auc([1.0, 1.0], [False, True]) == 0.5
    assert auc([1.0, 2.0], [True, True]) is None
    assert auc([1.0, 2.0], [False, False]) is None
    assert auc([1, 3, 2], [0, 1, 1]) == 1.0  # gold as a file may hold it
    assert auc([4.0, 1.0, 2.0, 3.0], [False, True, True, False]) == 0.0


def test_wilson_interval_against_published_values() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0.0
    assert np.isclose(wilson_interval(10, 10)[1], 1.0)
    for trials in range(1, 200):
        assert wilson_interval(0, trials)[0] >= 0.0
        assert wilson_interval(trials, trials)[1] <= 1.0
