"""The model's own labels: against their mean, consistent, and in the place of none that is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from src.icm.consistency import Consistency
from src.icm.searches.bootstrapping import likeliest_consistent
from src.icm.searches.starts import own_labels, zero_shot_labels
from tests.icm.searches.answers import Model, make_problem


@pytest.mark.parametrize("num_labels", [2, 3])
@pytest.mark.parametrize("calibration", ["none", "mean"])
def test_zero_shot_labels_are_calibrated_whatever_the_objective_is(num_labels: int, calibration: str) -> None:
    problem = make_problem(12, num_labels, calibration)
    rng = np.random.default_rng(3)
    answers = [
        float(values[0]) + 2 if num_labels == 2 else tuple((values + 2).tolist())
        for values in rng.standard_normal((12, num_labels - 1))
    ]
    found = zero_shot_labels(problem, answers)
    mean = replace(problem, objective=replace(problem.objective, calibration="mean"))
    assert found == likeliest_consistent(mean, answers)
    assert problem.consistency.count(found) == 0
    free = replace(problem, consistency=Consistency([]))
    assert len(set(zero_shot_labels(free, answers))) == num_labels, "without the mean one label would win everywhere"


async def test_labels_that_are_given_are_kept_and_only_the_others_asked_for() -> None:
    problem = replace(make_problem(12), consistency=Consistency([]))
    given = tuple(bool(claim % 2) if claim < 6 else None for claim in range(12))
    answers = await Model(problem).zero_shot()
    found = await own_labels(replace(problem, start_labels=given), Model(problem))
    assert found[:6] == given[:6]
    assert found[6:] == zero_shot_labels(problem, answers)[6:]
    silent = Model(problem)
    assert await own_labels(replace(problem, start_labels=(True,) * 12), silent) == (True,) * 12
    assert silent.asked == []
