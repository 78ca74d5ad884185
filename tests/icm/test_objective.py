"""U(D), agreement, AUC and intervals against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.consistency import Consistency, Constraint, Relation
from src.icm.objective import Objective, accuracy, auc, calibration_offset, wilson_interval

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


def test_with_a_known_share_that_share_of_the_pool_lies_above_the_offset() -> None:
    scores = [float(n * n) for n in range(64)]  # skewed, so that their mean is not their median
    for trues in (1, 32, 51, 62, 63):
        offset = calibration_offset(scores, "mean", trues / 64)
        assert sum(score > offset for score in scores) == trues
    assert calibration_offset(scores, "mean", 0.5) == pytest.approx((31**2 + 32**2) / 2)
    assert calibration_offset([3.0], "mean", 0.97) == 3.0
    assert calibration_offset([], "mean", 0.97) == 0.0
    assert calibration_offset(scores, "none", None) == 0.0


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=80), st.floats(0.01, 0.99), st.floats(-20, 20))
def test_an_offset_moves_with_what_all_scores_share(scores: list[float], prior: float, lean: float) -> None:
    before = calibration_offset(scores, "mean", prior)
    assert calibration_offset([s + lean for s in scores], "mean", prior) == pytest.approx(before + lean, abs=1e-9)
    assert min(scores) - 1e-9 <= before <= max(scores) + 1e-9


def test_a_half_is_the_mean_of_scores_that_lean_to_neither_side() -> None:
    scores = [-4.0, -1.0, 1.0, 4.0]
    assert Objective(1, "mean", 0.5).offset(scores) == Objective(1, "mean").offset(scores) == 0.0


def test_the_rarer_claims_of_a_skewed_pool_are_signed_by_the_known_share() -> None:
    labels = (True,) * 7 + (False,)
    scores = dict(enumerate([3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 1.0]))
    known = Objective(1, "mean", 7 / 8).evaluate(labels, scores, NONE)
    assert 1.0 < known.offset < 3.0
    signed = [(1 if label else -1) * (scores[claim] - known.offset) for claim, label in enumerate(labels)]
    assert known.predictability == pytest.approx(sum(signed) / 8)
    assert min(signed) > 0
    wrong = Objective(1, "mean").evaluate((False, *labels[1:]), scores, NONE)
    assert wrong.offset > 3.0  # the mean would call a True claim False


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
