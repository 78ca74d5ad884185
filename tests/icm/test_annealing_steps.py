"""Each function that a step of the search is made of, against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from src.icm.annealing import (
    SIBLING_WEIGHT,
    Outcome,
    SearchState,
    advance,
    choose,
    cost,
    decide,
    decides_by_itself,
    explore,
    extra_tokens,
    finished,
    local_evaluation,
    mirror,
    mirrored_labels,
    predicted_label,
    proposal,
    proposal_weights,
    proposals,
    propose,
    rebuild,
    rebuilt_layout,
    settled,
    wants_mirror,
    wants_rebuild,
)
from src.icm.capped_layout import CappedLayout
from src.icm.consistency import Consistency, Constraint, Labels, Relation
from src.icm.objective import Evaluation, Objective
from src.icm.planner import TokenCosts, evaluation_tokens, extra_tokens_of_tail, relaid_tokens
from src.icm.prefix_tree import TreeLayout, UpstreamLayout
from src.icm.problem import (
    Candidate,
    Problem,
    SearchSettings,
    Stream,
    generator,
    part_seed,
)

CONTRADICT = Constraint((0, 1), Relation.EXACTLY_ONE)


def problem(size: int = 4, constraints: tuple[Constraint, ...] = (), **settings: Any) -> Problem:
    groups = tuple("a" if i < 2 else str(i) for i in range(size))
    return Problem(groups, Consistency(constraints), Objective(2.0), SearchSettings(**settings))


def worth(utility: float, offset: float = 0.0, inconsistent: int = 0) -> Evaluation:
    return Evaluation({}, offset, utility, inconsistent, utility)


def state_of(p: Problem, *labels: bool | None, **more: Any) -> SearchState:
    """The pool's first claims labelled as told, the others not."""
    everywhere: Labels = (*labels, *[None] * (p.size - len(labels)))
    layout = p.new_layout([i for i, label in enumerate(everywhere) if label is not None], labels=everywhere)
    state = SearchState(0, everywhere, layout, worth(0.0))
    return replace(state, **more)


# Random numbers and settings that a resumed run must find as they were


def test_streams_of_random_numbers_are_numbered_for_good() -> None:
    numbers = {"POOL": 0, "SEEDS": 1, "LAYOUT": 2, "STEP": 3, "PART": 4, "LABELINGS": 5, "KNOWN": 6}
    assert {stream.name: int(stream) for stream in Stream} == numbers
    assert generator(7, Stream.STEP).random() == np.random.default_rng([7, 3, 0]).random()
    assert generator(7, Stream.STEP, 5).random() == np.random.default_rng([7, 3, 5]).random()


def test_parts_have_seeds_of_their_own_which_never_change() -> None:
    expected = np.random.SeedSequence([7, 4, 1, 2]).generate_state(1)
    assert part_seed(7, 1, 2) == int(expected[0])
    assert len({part_seed(7, batch, number) for batch in range(10) for number in range(10)}) == 100


def test_settings_are_by_default_what_is_documented() -> None:
    assert asdict(SearchSettings()) == {
        "search": "annealing",
        "seed": 27565976,
        "num_seed": 8,
        "K": 3000,
        "consistency_fix_K": 10,
        "decay": 0.99,
        "initial_T": 10.0,
        "final_T": 0.01,
        "scheduler": "log",
        "stop": "labelled",
        "patience": 30,
        "layout": "tree",
        "anchors": 0,
        "max_tail": None,
        "mirror": True,
        "context_cap": None,
        "best_of": 1,
        "local_gain": False,
        "start_share": "half",
        "bootstrap_rounds": 4,
        "bootstrap_start": "random",
        "ascent_starts": 4,
        "ascent_sweeps": 3,
        "ascent_questions": 12,
        "ascent_error": 0.02,
        "gibbs_sweeps": 6,
        "gibbs_temperature": 1.0,
        "gibbs_cooling": 0.5,
    }
    assert SIBLING_WEIGHT == 100


def test_a_search_begins_with_nothing_counted() -> None:
    state = state_of(problem(), True)
    counts = (state.accepted, state.unchanged, state.rebuilds, state.spent_on_tail, state.changes_since_asked)
    assert counts == (0, 0, 0, 0, 0)
    assert state.refused == frozenset()
    assert state.mirror_tried is False
    assert state_of(problem(), True, None, False).labelled == (0, 2)
    outcome = Outcome(0, 1.0, True, 10.0)
    assert (outcome.tried, outcome.spent_on_tail, outcome.accepted) == (0, 0, False)
    assert replace(outcome, labels=(True,)).accepted is True


@pytest.mark.parametrize("seed", range(12))
def test_an_odd_seed_label_is_true_half_of_the_time(seed: int) -> None:
    labels = problem(10, num_seed=5, seed=seed).seed_labels()
    assert sum(label is True for label in labels) == 2 + (generator(seed, Stream.SEEDS).random() < 0.5)
    assert {type(label) for label in labels} == {bool, type(None)}


def test_decisions_and_repairs_are_drawn_apart() -> None:
    """A journal is replayed from these draws: [seed, STEP, iteration, 1] and [..., 2]."""
    constraints = tuple(Constraint((i, i + 1), Relation.EXACTLY_ONE) for i in (0, 2, 4, 6))
    p = problem(8, constraints, seed=5, initial_T=1.0, decay=1e-9)
    for iteration in range(30):
        taken, probability, _ = decide(p, state_of(p, True, iteration=iteration), -1.0)
        assert taken == (np.random.default_rng([5, 3, iteration, 2]).random() < probability)
        first = next(explore(p, Candidate((True,) * 8, p.new_layout(range(8))), iteration))
        pair = constraints[int(np.random.default_rng([5, 3, iteration, 1]).integers(4))]
        changed = {i for candidate in first for i, label in enumerate(candidate.labels) if not label}
        assert changed == set(pair.claims)


# Layouts


def test_the_layout_is_the_one_of_the_settings() -> None:
    tree = problem(8, anchors=2).new_layout(range(8))
    assert isinstance(tree, TreeLayout)
    assert tree.anchors == 2
    assert tree == problem(8, anchors=2).new_layout(range(8), 0)
    assert tree != problem(8, anchors=2).new_layout(range(8), 1)
    assert problem(8, layout="upstream").new_layout([3, 1]) == UpstreamLayout((1, 3))
    labels = (True,) * 4 + (False,) * 4
    capped = problem(8, context_cap=4, anchors=1, layout="upstream").new_layout(range(8), labels=labels)
    assert isinstance(capped, CappedLayout)
    assert (capped.cap, capped.anchors, len(capped.demonstrations)) == (4, 1, 4)
    assert sum(labels[claim] for claim in capped.demonstrations) == 2


def test_a_rebuilt_layout_is_of_what_is_labelled_now() -> None:
    p = problem(8, context_cap=2)
    for rebuilds in range(20):
        state = state_of(p, True, None, False, True, rebuilds=rebuilds)
        layout = rebuilt_layout(p, state)
        assert layout == p.new_layout((0, 2, 3), rebuilds + 1, labels=state.labels)
        assert sum(bool(state.labels[claim]) for claim in layout.demonstrations) == 1
    trees = problem(8)
    state = state_of(trees, True, True, False, True, rebuilds=4)
    assert rebuilt_layout(trees, state) == trees.new_layout((0, 1, 2, 3), 5)


def test_a_rebuild_pays_off_the_debt() -> None:
    p = problem(8)
    state = state_of(p, True, False, rebuilds=4, spent_on_tail=9, changes_since_asked=2, unchanged=3)
    layout = p.new_layout((0, 1), 5)
    assert rebuild(state, layout, worth(3.0)) == replace(
        state, layout=layout, evaluation=worth(3.0), rebuilds=5, spent_on_tail=0, changes_since_asked=0
    )


# Proposals


def test_weights_are_of_one_pool() -> None:
    weights = proposal_weights((True, None, None), ("a", "a", "b"))
    assert weights.dtype == np.float64
    with pytest.raises(ValueError, match="shorter"):
        proposal_weights((True, None), ("a", "a", "b"))


def test_a_sibling_is_proposed_nearly_always() -> None:
    p = problem(8)
    drawn = [propose(p, state_of(p, True, iteration=i)) for i in range(100)]
    assert drawn.count(1) > 80
    assert len(set(drawn)) > 1
    state = state_of(p, True, iteration=3)
    weights = proposal_weights(state.labels, p.groups)
    expected = generator(p.settings.seed, Stream.STEP, 3).choice(8, p=weights / weights.sum())
    assert proposals(p, state) == (expected,)


def test_several_proposals_are_different_claims_and_siblings_come_first() -> None:
    p = problem(8, best_of=3)
    drawn = [proposals(p, state_of(p, True, iteration=i)) for i in range(100)]
    assert all(len(set(claims)) == 3 for claims in drawn)
    assert sum(1 in claims for claims in drawn) > 90
    assert propose(p, state_of(p, True)) == proposals(p, state_of(p, True))[0]
    assert sorted(proposals(problem(4, best_of=9), state_of(problem(4), True))) == [0, 1, 2, 3]
    assert len(proposals(problem(8, best_of=2), state_of(p, True))) == 2


def test_the_surest_change_is_chosen() -> None:
    p = problem()
    state = state_of(p, True, False, evaluation=worth(0.0, offset=1.0))
    assert choose(p, state, {0: 5.0, 1: 2.0, 2: -1.5, 3: 3.0}) == 2
    assert choose(p, state, {1: -3.0, 0: 5.0}) == 1, "without a change the first"


def test_the_label_of_a_claim_that_stands_at_the_offset_is_false() -> None:
    p = problem()
    assert predicted_label(p, state_of(p, True, evaluation=worth(0.0, offset=1.5)), 1.5) is False


def test_a_proposal_appends_a_new_claim_and_only_that() -> None:
    p = problem(4)
    state = state_of(p, True, False)
    assert proposal(state, 2, True) == Candidate((True, False, True, None), state.layout.append(2))
    assert proposal(state, 0, False) == Candidate((False, False, None, None), state.layout)


# Local gain


def test_only_a_new_claim_that_breaks_nothing_decides_by_itself() -> None:
    p = problem(4, (CONTRADICT,), local_gain=True)
    state = state_of(p, True)
    assert decides_by_itself(p, state, 1, (True, False, None, None)) is True
    assert decides_by_itself(p, state, 1, (True, True, None, None)) is False
    assert decides_by_itself(p, state, 0, (False, None, None, None)) is False
    exact = problem(4, (CONTRADICT,))
    assert decides_by_itself(exact, state, 1, (True, False, None, None)) is False


def test_a_local_evaluation_keeps_what_is_known_of_the_others() -> None:
    p = problem(4, (CONTRADICT,))
    known = Evaluation({0: 2.0, 1: -1.0, 3: 7.0}, 0.0, 1.5, 0, 3.0)
    state = state_of(p, True, False, evaluation=known)
    found = local_evaluation(p, state, (True, False, True, None), {2: 5.0, 1: -3.0})
    assert dict(found.log_odds) == {0: 2.0, 1: -3.0, 2: 5.0}
    assert found.utility == pytest.approx(2 * (2 + 3 + 5) / 3)


# Repair


def test_repair_wants_an_evaluation_of_each_labeling() -> None:
    p = problem(2, (CONTRADICT,))
    exploration = explore(p, Candidate((True, True), p.new_layout([0, 1])), 0)
    assert len(next(exploration)) == 3
    with pytest.raises(ValueError, match=r"longer|shorter"):
        exploration.send([worth(0.0)])


def test_repair_tries_a_broken_pair_once_and_stops_after_its_budget() -> None:
    """Three broken pairs that no repair makes better: three rounds; or as many as consistency_fix_K allows."""
    constraints = tuple(Constraint((i, i + 1), Relation.EXACTLY_ONE) for i in (0, 2, 4))
    start: Labels = (True,) * 6
    for budget, rounds in ((10, 3), (3, 3), (2, 2), (1, 1)):
        p = problem(6, constraints, consistency_fix_K=budget)
        exploration = explore(p, Candidate(start, p.new_layout(range(6))), 0)
        wanted, batches = next(exploration), 0
        try:
            while True:
                batches += 1
                wanted = exploration.send([worth(1.0 if c.labels == start else 0.0) for c in wanted])
        except StopIteration as stop:
            best, evaluation, asked = stop.value
        assert (best.labels, evaluation.utility) == (start, 1.0)
        assert (batches, asked) == (rounds, 1 + 2 * rounds)


# Acceptance


@pytest.mark.parametrize("gain", [0.0, 0.25, 0.5, 3.0])
def test_no_gain_is_more_than_certain(gain: float) -> None:
    p = problem()
    assert decide(p, state_of(p, True, evaluation=worth(1.0)), 1.0 + gain)[:2] == (True, 1.0)


def test_a_loss_is_weighed_by_the_temperature_of_its_iteration() -> None:
    p = problem(initial_T=4.0, decay=1.0)
    _, probability, temperature = decide(p, state_of(p, True, evaluation=worth(1.0), iteration=9), 0.0)
    assert temperature == 4.0 / (1 + math.log(10))
    assert probability == math.exp(-1.0 / temperature)


def test_a_refused_claim_is_remembered_with_what_it_cost() -> None:
    p = problem()
    state = state_of(
        p,
        True,
        False,
        unchanged=7,
        refused=frozenset({3}),
        spent_on_tail=5,
        iteration=2,
        changes_since_asked=1,
        accepted=4,
    )
    expected = replace(state, iteration=3, unchanged=8, refused=frozenset({2, 3}), spent_on_tail=16)
    assert advance(p, state, Outcome(2, 1.0, True, 10.0, spent_on_tail=11)) == expected
    assert advance(p, state, Outcome(2, 1.0, True, 10.0, spent_on_tail=11, labels=(True,) * 4)) == expected
    assert advance(p, state, Outcome(2, 1.0, True, 10.0, spent_on_tail=11, evaluation=worth(1.0))) == expected


# What was tried says nothing of staleness: an evaluation that was known already was asked, too.
@pytest.mark.parametrize(
    ("tried", "pieced_together", "changes_since_asked"), [(0, True, 3), (1, False, 0), (4, False, 0), (0, False, 0)]
)
def test_an_accepted_change_ends_the_waiting(tried: int, pieced_together: bool, changes_since_asked: int) -> None:
    p = problem()
    state = state_of(
        p,
        True,
        False,
        unchanged=7,
        refused=frozenset({3}),
        spent_on_tail=5,
        iteration=2,
        changes_since_asked=2,
        accepted=4,
    )
    labels: Labels = (True, False, True, None)
    outcome = Outcome(
        *(2, 1.0, True, 10.0),
        tried=tried,
        spent_on_tail=11,
        labels=labels,
        evaluation=worth(2.0),
        pieced_together=pieced_together,
    )
    assert advance(p, state, outcome) == replace(
        state,
        iteration=3,
        labels=labels,
        layout=state.layout.append(2),
        evaluation=worth(2.0),
        accepted=5,
        unchanged=0,
        refused=frozenset(),
        spent_on_tail=16,
        changes_since_asked=changes_since_asked,
    )


# What it costs, and when to rebuild


def priced(capacity: int | None = None, **settings: Any) -> tuple[Problem, SearchState]:
    """Eight claims of different prices: four in the tree, two in its tail, two unlabelled."""
    costs = TokenCosts(tuple(range(10, 18)), tuple(range(2, 10)), capacity)
    p = replace(problem(8, **settings), costs=costs)
    layout = p.new_layout([0, 1, 2, 3]).append(4).append(5)
    return p, SearchState(0, (True,) * 6 + (None,) * 2, layout, worth(0.0))


def test_cost_and_excess_are_of_what_is_relabelled() -> None:
    p, state = priced()
    new: Labels = (True,) * 7 + (None,)
    tree: Labels = (False,) + (True,) * 5 + (None,) * 2
    tail: Labels = (True,) * 4 + (False, True, None, None)
    each = evaluation_tokens(p.costs, state.layout)
    whole, end = relaid_tokens(p.costs, state.layout, [0]), relaid_tokens(p.costs, state.layout, [4])
    assert 0 < end < whole
    assert cost(p, state, [new]) == each
    assert cost(p, state, [tree]) == whole + each
    assert cost(p, state, [new, tail, tree]) == pytest.approx(whole + end + 3 * each)
    more = extra_tokens_of_tail(p.costs, state.layout, [0])
    assert more > 0
    assert extra_tokens(p, state, [new]) == 0
    assert extra_tokens(p, state, [tree, new, tree]) == 2 * more
    assert extra_tokens(p, state, []) == cost(p, state, []) == 0


def test_a_rebuild_is_wanted_when_the_debt_is_as_high_as_its_price() -> None:
    p, state = priced()
    assert wants_rebuild(p, state) is False
    assert wants_rebuild(p, replace(state, spent_on_tail=10_000)) is True
    assert wants_rebuild(p, replace(state, spent_on_tail=10_000, layout=p.new_layout(range(6)))) is False


@pytest.mark.parametrize("variant", [{"context_cap": 8}, {"local_gain": True}, {"context_cap": 8, "local_gain": True}])
def test_a_sampled_or_estimated_pool_is_asked_anew_when_it_has_doubled(variant: dict[str, Any]) -> None:
    p = problem(8, **variant)
    state = state_of(p, True, False, True)
    for claim in (3, 4, 5, 6):
        assert wants_rebuild(p, state) is (len(state.layout.questions) >= 6)
        state = replace(state, layout=state.layout.append(claim))
    assert wants_rebuild(p, state) is True
    assert wants_rebuild(p, replace(state_of(p, True, False, True), spent_on_tail=10_000)) is False


def test_a_tail_is_never_longer_than_allowed() -> None:
    p = problem(8, max_tail=1)
    state = state_of(p, True, False)
    assert wants_rebuild(p, state) is False
    assert wants_rebuild(p, replace(state, layout=state.layout.append(2))) is True


def test_estimates_are_asked_before_a_search_ends_or_tries_the_mirror() -> None:
    p = problem(2, patience=3, local_gain=True)
    ended = state_of(p, True, False, unchanged=3, changes_since_asked=1)
    assert wants_rebuild(p, ended) is True
    assert finished(p, ended) is False
    assert wants_mirror(p, ended) is False
    assert wants_rebuild(p, replace(ended, unchanged=2)) is False
    asked = replace(ended, changes_since_asked=0)
    assert wants_rebuild(p, asked) is False
    assert wants_mirror(p, asked) is True
    assert finished(p, replace(asked, mirror_tried=True)) is True
    assert finished(p, replace(ended, mirror_tried=True)) is False


# The end


def test_a_search_is_settled_after_k_iterations_or_when_every_claim_was_tried_in_vain() -> None:
    p = problem(3, patience=2, K=50)
    assert settled(p, state_of(p, True, True, True, iteration=50)) is True
    assert settled(p, state_of(p, True, True, True, iteration=49)) is False
    assert settled(p, state_of(p, True, True, True, unchanged=1)) is False
    assert settled(p, state_of(p, True, True, True, unchanged=2)) is True
    assert settled(p, state_of(p, True, True, None, unchanged=2)) is False
    assert settled(p, state_of(p, True, True, None, unchanged=2, refused=frozenset({2}))) is True
    assert settled(p, state_of(p, True, None, None, unchanged=2, refused=frozenset({2}))) is False
    to_the_end = problem(3, patience=2, K=50, stop="K")
    assert settled(to_the_end, state_of(p, True, True, True, unchanged=9, iteration=49)) is False


def test_the_mirror_flips_every_label_and_starts_the_waiting_anew() -> None:
    p = problem(4)
    state = state_of(p, True, False, unchanged=9, refused=frozenset({2, 3}), spent_on_tail=5, accepted=3, iteration=40)
    assert mirrored_labels((True, None, False)) == (False, None, True)
    assert mirror(state, None) == replace(state, mirror_tried=True)
    assert mirror(state, worth(4.0)) == replace(
        state,
        labels=(False, True, None, None),
        evaluation=worth(4.0),
        unchanged=0,
        refused=frozenset(),
        mirror_tried=True,
    )


def test_there_is_nothing_to_mirror_in_a_pool_without_labels() -> None:
    p = problem(2, patience=0)
    state = state_of(p, unchanged=1, refused=frozenset({0, 1}))
    assert settled(p, state) is True
    assert wants_mirror(p, state) is False
    assert finished(p, state) is True
