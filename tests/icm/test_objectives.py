"""Objectives to compare, against numbers by hand."""

from __future__ import annotations

import math

import pytest

from src.icm.consistency import Consistency
from src.icm.objective import Evaluation, Objective
from src.icm.objectives import OBJECTIVES, margins_of_labels, values_by_objective

NONE = Consistency([])


def evaluation(labels: tuple[int, ...], odds: list[float | tuple[float, ...]], objective: Objective) -> Evaluation:
    return objective.evaluate(labels, dict(enumerate(odds)), NONE)


def test_each_objective_by_hand() -> None:
    labels = (True, False, True)
    found = evaluation(labels, [2.0, -1.0, -4.0], Objective(10.0))  # margins 2, 1, -4
    values = values_by_objective([(labels, found)], 10.0)
    assert values["mean margin"] == [pytest.approx(10 * (2 + 1 - 4) / 3)]
    assert values["mean margin"] == [pytest.approx(found.utility)]
    likelihoods = [1 / (1 + math.exp(-margin)) for margin in (2, 1, -4)]
    assert values["sum of log-likelihoods"] == [pytest.approx(10 * sum(map(math.log, likelihoods)))]
    assert values["share predicted right"] == [pytest.approx(10 * 2 / 3)]
    assert values["median margin"] == [pytest.approx(10 * 1)]
    assert list(values) == list(OBJECTIVES)


def test_margins_are_against_the_calibrated_offset() -> None:
    labels = (True, False)
    found = evaluation(labels, [5.0, 1.0], Objective(1.0, "mean"))
    assert margins_of_labels(labels, found).tolist() == pytest.approx([2.0, 2.0])


def test_of_three_labels_the_log_likelihood_is_the_labels_share() -> None:
    labels = (2, 0)
    objective = Objective(1.0, num_labels=3)
    odds: list[float | tuple[float, ...]] = [(0.5, 1.5), (-1.0, 0.25)]
    found = evaluation(labels, odds, objective)
    shares = [math.exp(1.5) / (1 + math.exp(0.5) + math.exp(1.5)), 1 / (1 + math.exp(-1.0) + math.exp(0.25))]
    values = values_by_objective([(labels, found)], 1.0)
    assert values["sum of log-likelihoods"] == [pytest.approx(sum(map(math.log, shares)))]
    assert values["mean margin"] == [pytest.approx(found.predictability)]


def test_broken_constraints_count_unless_they_are_not_to() -> None:
    labels = (True, True)
    found = Evaluation({0: 1.0, 1: 1.0}, 0.0, 1.0, 3, 7.0)
    assert values_by_objective([(labels, found)], 10.0)["mean margin"] == [pytest.approx(7.0)]
    assert values_by_objective([(labels, found)], 10.0, constraints=False)["mean margin"] == [pytest.approx(10.0)]
