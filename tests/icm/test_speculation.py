"""How far ahead it pays to ask: the pace of changes and the seconds of a batch decide."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.annealing import Outcome, SearchState, proposal
from src.icm.consistency import Consistency
from src.icm.objective import Evaluation, Objective
from src.icm.problem import Problem, SearchSettings
from src.icm.speculation import MOST, Pace, accepted

WORTH = Evaluation({}, 0.0, 0.0, 0, 0.0)
CHANGE = Outcome(0, 1.0, True, 1.0, proposed_utility=1.0, labels=(True,), evaluation=WORTH)
REFUSAL = Outcome(0, 1.0, True, 1.0, proposed_utility=-1.0)
AS_IT_WAS = Outcome(0, 1.0, True, 1.0)


def pace_of(outcome: Outcome, times: int = 60, *, limit: int | None = None) -> Pace:
    pace = Pace(limit)
    for _ in range(times):
        pace.learn(outcome.accepted, outcome.proposed_utility is not None)
    return pace


def timed(pace: Pace, overhead: float, each: float) -> Pace:
    for tokens in (80, 5_000, 160, 5_600, 80, 6_000, 7_200, 8_000):
        pace.measure(tokens, overhead + each * tokens)
    return pace


def test_predictions_are_asked_as_far_ahead_as_changes_are_apart() -> None:
    assert Pace().predictions == 1
    assert pace_of(CHANGE).predictions == 1
    assert pace_of(REFUSAL).predictions == MOST
    assert pace_of(AS_IT_WAS).predictions == MOST
    assert pace_of(REFUSAL, 7).predictions in range(2, 4)
    assert pace_of(CHANGE, limit=5).predictions == 5


def test_nothing_is_evaluated_ahead_before_batches_were_timed() -> None:
    assert pace_of(REFUSAL).evaluations(5_000, [5_000] * 20) == 0
    one_size = pace_of(REFUSAL)
    for _ in range(20):
        one_size.measure(5_000, 1.0)
    assert one_size.evaluations(5_000, [5_000] * 20) == 0


def test_evaluations_pay_where_refusals_are_likely_and_a_batch_costs_more_than_its_tokens() -> None:
    ahead = [5_000.0] * 20
    assert timed(pace_of(CHANGE), 1.0, 1e-5).evaluations(5_000, ahead) == 0
    assert timed(pace_of(REFUSAL), 1.0, 1e-5).evaluations(5_000, ahead) > 4
    assert timed(pace_of(REFUSAL), 0.0, 1e-5).evaluations(5_000, ahead) == 0
    assert timed(pace_of(REFUSAL, limit=3), 1.0, 1e-5).evaluations(5_000, ahead) == 3
    assert timed(pace_of(REFUSAL), 1.0, 1e-5).evaluations(5_000, ahead[:1]) == 1
    assert timed(pace_of(REFUSAL, limit=0), 1.0, 1e-5).evaluations(5_000, ahead) == 0


def test_a_dear_evaluation_is_not_added_though_cheap_ones_are() -> None:
    pace = timed(pace_of(REFUSAL), 0.1, 1e-5)
    assert pace.evaluations(5_000, [5_000, 5_000, 200_000]) == 2


def test_predictions_for_an_accepted_change_are_asked_where_they_save_more_than_they_cost() -> None:
    assert Pace().is_worth(1e9)  # nothing is known yet
    assert timed(pace_of(CHANGE), 0.1, 1e-5).is_worth(5_000)
    assert not timed(pace_of(CHANGE), 0.1, 1e-5).is_worth(20_000)
    assert not timed(pace_of(REFUSAL), 0.1, 1e-5).is_worth(5_000)


def test_a_change_that_is_taken_for_granted_was_evaluated_as_a_whole() -> None:
    """Nothing was tried for its sake, and still no log-odds of it are an estimate."""
    problem = Problem(("a", "b", "c"), Consistency([]), Objective(1.0), SearchSettings())
    state = SearchState(0, (True, None, None), problem.new_layout([0]), WORTH)
    after = accepted(problem, state, 1, proposal(state, 1, False))
    assert (after.labels, after.changes_since_asked) == ((True, False, None), 0)


@given(st.integers(0, 40), st.floats(0.001, 10), st.floats(1e-6, 1e-3), st.lists(st.integers(100, 50_000), max_size=20))
def test_the_number_is_the_best_of_all(refusals: int, overhead: float, each: float, ahead: list[int]) -> None:
    pace = timed(pace_of(REFUSAL, refusals), overhead, each)
    r = pace.refusal_rate

    def worth(count: int) -> float:
        used = count if math.isclose(r, 1) else (1 - r**count) / (1 - r)
        return used / (overhead + each * (5_000 + sum(ahead[: count - 1])))

    chosen = worth(pace.evaluations(5_000, ahead) + 1)
    assert chosen == pytest.approx(max(worth(count) for count in range(1, min(MOST, len(ahead)) + 2)), rel=1e-6)
