"""What is advised is what was not done yet and can help."""

from __future__ import annotations

import pytest

from src.icm.consistency import Consistency, Constraint, Relation
from src.icm.objective import Evaluation, Objective
from src.results.messages import check_table, collapse_warning, random_warning

SIZE = 24
GOLD = [claim % 2 == 0 for claim in range(SIZE)]
EXCLUDED = Consistency(tuple(Constraint((at, at + 1), Relation.EXACTLY_ONE) for at in range(0, SIZE, 2)))


def worth(size: int = SIZE, consistency: Consistency | None = None, sign: float = 1.0) -> dict[str, Evaluation]:
    scores = {claim: sign if consistency is not None or GOLD[claim] else -sign for claim in range(size)}
    objective, held = Objective(30.0), consistency or Consistency(())
    return {
        "gold": objective.evaluate(GOLD[:size], scores, held),
        "all True": objective.evaluate([True] * size, dict.fromkeys(range(size), 0.5), held),
    }


@pytest.mark.parametrize(("calibration", "advised"), [("none", True), ("mean", False), ("mean, prior 0.9", False)])
def test_a_calibration_that_is_given_is_not_advised(calibration: str, advised: bool) -> None:
    assert ("--calibrate mean" in check_table(worth(sign=-1.0), calibration)) is advised
    told = collapse_warning([True] * SIZE, calibrated=not advised)
    assert told is not None
    assert ("Try --calibrate mean" in told) is advised


def test_alpha_is_advised_only_where_it_can_change_the_order() -> None:
    told = check_table(worth(sign=-1.0), "mean")
    assert "U(gold) is not the highest (all True beats it)" in told
    assert told.endswith("Try a larger model.")
    told = check_table(worth(consistency=EXCLUDED, sign=0.0), "mean")
    assert told.endswith("Try another --alpha, or a larger model.")


def test_few_claims_are_said_to_tell_little() -> None:
    few = "Fewer than 20 claims tell little"
    assert few in check_table(worth(19), "none")
    assert few not in check_table(worth(20), "none")
    assert "\n1 claim whose gold label is known" in check_table(worth(1), "none")


def test_nothing_is_minus_zero() -> None:
    told = check_table(worth(sign=-1e-9), "none")
    assert "-0.0" not in told
    assert "0.00" in told


def test_labels_of_which_none_was_changed_are_random() -> None:
    assert "all 8 labels of the search are random" in (random_warning(8, 0) or "")
    assert random_warning(8, 1) is None
    assert random_warning(0, 0) is None
