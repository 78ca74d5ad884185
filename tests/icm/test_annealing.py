"""The search as a state machine: schedules, proposals, repair, acceptance, stopping. No model, no file."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from src.icm.annealing import (
    SIBLING_WEIGHT,
    Outcome,
    SearchState,
    advance,
    decide,
    explore,
    finished,
    mirror,
    predicted_label,
    proposal_weights,
    propose,
    wants_mirror,
    wants_rebuild,
)
from src.icm.consistency import Consistency, Constraint, Labels, Relation, all_labels
from src.icm.objective import Evaluation, Objective
from src.icm.problem import Candidate, Problem, SearchSettings


def problem(size: int = 4, relation: Relation | None = None, **settings: Any) -> Problem:
    constraints = [] if relation is None else [Constraint((0, 1), relation)]
    groups = tuple("a" if i < 2 else str(i) for i in range(size))
    return Problem(groups, Consistency(constraints), Objective(1.0), SearchSettings(**settings))


def worth(utility: float) -> Evaluation:
    return Evaluation({}, 0.0, utility, 0, utility)


def state_of(p: Problem, labels: Labels, utility: float = 0.0, **more: Any) -> SearchState:
    layout = p.new_layout([i for i, label in enumerate(labels) if label is not None])
    return SearchState(more.pop("iteration", 0), labels, layout, worth(utility), **more)


def drive(
    generator: Generator[list[Candidate], list[Evaluation], tuple[Candidate, Evaluation, int]],
    utilities: Mapping[Labels, float],
) -> tuple[Labels, int, list[list[Labels]]]:
    batches = []
    try:
        wanted = next(generator)
        while True:
            batches.append([c.labels for c in wanted])
            wanted = generator.send([worth(utilities[c.labels]) for c in wanted])
    except StopIteration as stop:
        best, _, asked = stop.value
        return best.labels, asked, batches


def test_log_schedule_is_the_papers_with_decay_as_beta() -> None:
    settings = SearchSettings(decay=2.0, initial_T=10.0, final_T=0.01)
    assert settings.temperature(0, 0) == 10.0
    assert settings.temperature(99, 0) == pytest.approx(10 / (1 + 2 * math.log(100)))
    assert SearchSettings(decay=0.5).temperature(99, 0) > settings.temperature(99, 0)


def test_upstreams_schedule_counts_accepted_changes_and_ignores_decay() -> None:
    settings = SearchSettings(scheduler="log-upstream", decay=0.1)
    assert settings.temperature(500, 0) == 10.0
    assert settings.temperature(0, 9) == pytest.approx(10 / (1 + 2 * math.log(10)))


def test_exponential_schedule_and_floor() -> None:
    assert SearchSettings(scheduler="exp", decay=0.5).temperature(0, 3) == pytest.approx(1.25)
    assert SearchSettings(scheduler="exp", decay=0.5).temperature(0, 100) == 0.01


@pytest.mark.parametrize(("num_seed", "trues"), [(0, {0}), (1, {0, 1}), (4, {2}), (5, {2, 3}), (99, {5})])
def test_seed_labels_are_half_true(num_seed: int, trues: set[int]) -> None:
    for seed in range(8):
        labels = problem(10, num_seed=num_seed, seed=seed).seed_labels()
        known = [label for label in labels if label is not None]
        assert len(known) == min(num_seed, 10)
        assert sum(known) in trues


@pytest.mark.parametrize(("prior", "trues"), [(0.95, 19), (0.05, 1), (0.8, 16), (0.5, 10)])
def test_seed_labels_follow_the_prior_where_that_is_asked_for(prior: float, trues: int) -> None:
    groups = tuple(map(str, range(20)))
    for share, expected in (("prior", trues), ("half", 10)):
        settings = SearchSettings(num_seed=20, start_share=share)  # type: ignore[arg-type]
        labels = Problem(groups, Consistency([]), Objective(1.0, "mean", prior), settings).seed_labels()
        assert sum(label is True for label in labels) == expected
        assert set(map(type, labels)) == {bool}
    without = Problem(groups, Consistency([]), Objective(1.0, "mean"), settings)
    assert without.seed_labels() == replace(without, settings=replace(settings, start_share="prior")).seed_labels()


def test_seeds_are_of_different_groups_while_there_are_any() -> None:
    groups = ("a", "a", "a", "b", "b", "c")
    p = Problem(groups, Consistency([]), Objective(1.0), SearchSettings(num_seed=4))
    assert [claim for claim, label in enumerate(p.seed_labels()) if label is not None] == [0, 1, 3, 5]


def test_unlabelled_siblings_of_labelled_claims_weigh_100() -> None:
    weights = proposal_weights((True, None, None, True), ("a", "a", "b", "c"))
    assert weights.tolist() == [1, SIBLING_WEIGHT, 1, 1]
    refused = proposal_weights((True, None, None, True), ("a", "a", "b", "c"), frozenset({1}))
    assert refused.tolist() == [1, 1, 1, 1]


def test_proposals_depend_on_seed_and_iteration_only() -> None:
    p = problem(16, seed=3)
    labels: Labels = (True,) * 8 + (None,) * 8
    first = [propose(p, state_of(p, labels, iteration=i)) for i in range(20)]
    again = [propose(p, state_of(p, labels, iteration=i, accepted=5)) for i in range(20)]
    assert first == again
    assert len(set(first)) > 5


def test_prediction_is_against_the_pools_offset() -> None:
    p = problem()
    state = SearchState(0, (True, False, None, None), p.new_layout([0, 1]), Evaluation({}, 1.5, 0, 0, 0))
    assert not predicted_label(p, state, 1.4)
    assert predicted_label(p, state, 1.6)


def test_a_consistent_proposal_is_evaluated_once() -> None:
    p = problem()
    labels, asked, batches = drive(
        explore(p, Candidate((True, False, None, None), p.new_layout([0, 1])), 0), {(True, False, None, None): 1.0}
    )
    assert (labels, asked, len(batches)) == ((True, False, None, None), 1, 1)


def test_repair_tries_every_assignment_of_the_pair_in_one_batch_and_takes_the_best() -> None:
    p = problem(2, Relation.AT_MOST_ONE)
    utilities = {(True, True): 0.0, (True, False): 1.0, (False, True): 2.0, (False, False): 3.0}
    labels, asked, batches = drive(explore(p, Candidate((True, True), p.new_layout([0, 1])), 0), utilities)
    assert labels == (False, False)
    assert asked == 4
    assert set(batches[0]) == set(utilities)


def test_repair_of_exactly_one_of_four_tries_every_option_as_the_true_one() -> None:
    p = Problem(
        ("g",) * 4, Consistency([Constraint((0, 1, 2, 3), Relation.EXACTLY_ONE)]), Objective(1.0), SearchSettings()
    )
    one_true = {tuple(at == true for at in range(4)): float(true) for true in range(4)}
    start = Candidate((False,) * 4, p.new_layout(range(4)))
    labels, asked, batches = drive(explore(p, start, 0), {start.labels: -1.0, **one_true})
    assert (labels, asked, len(batches)) == ((False, False, False, True), 5, 1)
    assert set(batches[0]) == {start.labels, *one_true}


def test_repair_of_a_half_labelled_group_labels_no_other_claim() -> None:
    p = Problem(
        ("g",) * 4, Consistency([Constraint((0, 1, 2, 3), Relation.EXACTLY_ONE)]), Objective(1.0), SearchSettings()
    )
    tried = {(True, True, None, None): 0.0, (True, False, None, None): 1.0, (False, True, None, None): 3.0,
             (False, False, None, None): 2.0}  # fmt: skip
    labels, asked, _ = drive(explore(p, Candidate((True, True, None, None), p.new_layout([0, 1])), 0), tried)
    assert (labels, asked) == ((False, True, None, None), 4)


def test_repair_keeps_the_proposal_where_nothing_is_better() -> None:
    p = problem(2, Relation.EXACTLY_ONE)
    utilities = {(True, True): 5.0, (True, False): 1.0, (False, True): 2.0}
    assert drive(explore(p, Candidate((True, True), p.new_layout([0, 1])), 0), utilities)[0] == (True, True)


def test_known_evaluations_are_not_asked_again() -> None:
    p = problem(2, Relation.EXACTLY_ONE)
    known = {(True, False): worth(9.0)}
    utilities = {(True, True): 5.0, (False, True): 2.0}
    labels, asked, _ = drive(explore(p, Candidate((True, True), p.new_layout([0, 1])), 0, known), utilities)
    assert (labels, asked) == ((True, False), 2)


def test_no_repairs_with_a_budget_of_zero() -> None:
    p = problem(2, Relation.EXACTLY_ONE, consistency_fix_K=0)
    labels, asked, _ = drive(explore(p, Candidate((True, True), p.new_layout([0, 1])), 0), {(True, True): 0.0})
    assert (labels, asked) == ((True, True), 1)


@given(st.integers(0, 1000), st.sampled_from(list(Relation)), st.sampled_from([2, 3, 6]), st.sampled_from([2, 3, 4]))
def test_repair_ends_consistent_when_consistency_pays(seed: int, relation: Relation, of: int, num_labels: int) -> None:
    """With utility = -I(D), a chain of constraints is repaired, and only evaluated labelings are returned."""
    rng = np.random.default_rng(seed)
    size = 6
    consistency = Consistency([Constraint(tuple(range(i, i + of)), relation) for i in range(0, size, of)])
    assume(consistency.complaint(num_labels) is None)
    p = Problem(("g",) * size, consistency, Objective(1.0, num_labels=num_labels), SearchSettings(seed=seed))
    start: Labels = tuple(rng.choice(all_labels(num_labels), size).tolist())
    exploration = explore(p, Candidate(start, p.new_layout(range(size))), 0)
    try:
        wanted = next(exploration)
        while True:
            wanted = exploration.send([worth(-consistency.count(c.labels)) for c in wanted])
    except StopIteration as stop:
        best, evaluation, _ = stop.value
    assert consistency.count(best.labels) == 0
    assert evaluation.utility == 0


def test_gains_are_always_accepted_without_overflow() -> None:
    p = problem()
    state = state_of(p, (True, None, None, None), utility=-1e9)
    assert decide(p, state, 1e9)[:2] == (True, 1.0)


def test_losses_are_accepted_as_often_as_metropolis_says() -> None:
    p = problem(initial_T=2.0, decay=1e-9)
    accepted = []
    start = state_of(p, (True, None, None, None), utility=1.0)
    for iteration in range(4000):
        taken, probability, _ = decide(p, replace(start, iteration=iteration), 0.0)
        assert probability == pytest.approx(math.exp(-0.5), rel=1e-6)
        accepted.append(taken)
    assert abs(np.mean(accepted) - math.exp(-0.5)) < 4 * math.sqrt(0.25 / 4000)


def test_a_cold_search_never_accepts_a_large_loss() -> None:
    p = problem(initial_T=0.01)
    assert decide(p, state_of(p, (True, None, None, None), utility=1e6), -1e6)[:2] == (False, 0.0)


def test_advance_appends_a_new_claim_and_resets_patience() -> None:
    p = problem()
    state = state_of(p, (True, False, None, None), unchanged=7)
    nothing = advance(p, state, Outcome(0, 1.0, True, 10.0))
    assert (nothing.iteration, nothing.unchanged, nothing.labels) == (1, 8, state.labels)
    outcome = Outcome(2, 1.0, True, 10.0, labels=(True, False, True, None), evaluation=worth(2.0))
    after = advance(p, state, outcome)
    assert (after.accepted, after.unchanged, after.evaluation.utility) == (1, 0, 2.0)
    assert after.layout.questions[-1] == 2
    flip = advance(p, after, Outcome(0, -1.0, False, 10.0, labels=(False, False, True, None), evaluation=worth(3.0)))
    assert flip.layout.questions == after.layout.questions
    assert after.layout.tail_length == 1


def test_rebuild_when_the_tail_is_long() -> None:
    p = problem(8, max_tail=2)
    state = state_of(p, (True,) + (None,) * 7)
    for claim in (3, 4):
        assert not wants_rebuild(p, state)
        labels = tuple(True if i == claim else label for i, label in enumerate(state.labels))
        state = advance(p, state, Outcome(claim, 1.0, True, 1.0, labels=labels, evaluation=worth(0.0)))
    assert wants_rebuild(p, state)
    assert not wants_rebuild(
        problem(8, layout="upstream", max_tail=1), state_of(problem(8, layout="upstream"), (True,) * 8)
    )


def test_stop_labelled_waits_for_all_labels_and_patience() -> None:
    p = problem(patience=5, mirror=False)
    assert not finished(p, state_of(p, (True, True, True, None), unchanged=99, refused=frozenset({0})))
    assert finished(p, state_of(p, (True, True, True, None), unchanged=99, refused=frozenset({0, 3})))
    assert not finished(p, state_of(p, (True,) * 4, unchanged=4))
    assert finished(p, state_of(p, (True,) * 4, unchanged=5))
    assert finished(p, state_of(p, (True, True, True, None), iteration=3000))
    k = problem(stop="K", K=10, mirror=False)
    assert not finished(k, state_of(k, (True,) * 4, unchanged=99, iteration=9))
    assert finished(k, state_of(k, (True,) * 4, iteration=10))


def test_the_mirror_is_tried_once_when_the_search_has_settled() -> None:
    p = problem(patience=5)
    unsettled = state_of(p, (True, False, True, True), unchanged=4)
    assert not wants_mirror(p, unsettled)
    settled = state_of(p, (True, False, True, True), unchanged=5)
    assert wants_mirror(p, settled)
    assert not finished(p, settled)
    assert finished(p, mirror(settled, None))
    turned = mirror(settled, worth(9.0))
    assert turned.labels == (False, True, False, False)
    assert not finished(p, turned)  # the search goes on from there
    assert not wants_mirror(p, turned)
    assert not wants_mirror(problem(patience=5, mirror=False), settled)


def test_labels_of_another_run_stand_in_place_of_random_ones() -> None:
    p = replace(problem(num_seed=4), start_labels=(True, None, False, None))
    assert p.seed_labels() == (True, None, False, None)
