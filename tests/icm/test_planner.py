"""When a rebuild is worth it: what the server must hold, what a tail costs, and that the rule is never far off."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    extra_tokens,
    rebuild,
    rebuilt_layout,
    wants_rebuild,
)
from src.icm.consistency import Consistency
from src.icm.objective import Evaluation, Objective
from src.icm.planner import (
    TokenCosts,
    budget,
    evaluation_tokens,
    evaluations_that_fit,
    extra_tokens_of_tail,
    fits,
    fits_rebuilt,
    held_tokens,
    rebuilt_tokens,
    tree_tokens,
)
from src.icm.prefix_tree import Layout, TreeLayout, UpstreamLayout
from src.icm.problem import Problem, SearchSettings
from tests.icm.tries import distinct_demonstrations

WORTH = Evaluation({}, 0.0, 0.0, 0, 0.0)
sizes = st.lists(st.integers(5, 120), min_size=64, max_size=64).map(tuple)


def grown(built: int, appended: int, *, group_size: int = 1, anchors: int = 0, size: int = 64) -> TreeLayout:
    groups = [str(i // group_size) for i in range(size)]
    order = np.random.default_rng(7).permutation(size).tolist()
    layout = TreeLayout.build(order[:built], groups, np.random.default_rng(1), anchors=anchors)
    for claim in order[built : built + appended]:
        layout = layout.append(claim)
    return layout


def computed_demonstrations(layout: Layout) -> int:
    """What an unlimited prefix cache computes of a layout's own questions, one token a demonstration."""
    return distinct_demonstrations(layout.context(claim) for claim in layout.questions)


@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize("anchors", [0, 4])
@pytest.mark.parametrize(("built", "appended"), [(8, 0), (16, 0), (64, 0), (16, 16), (32, 8), (32, 32), (8, 40)])
def test_the_formulas_are_near_the_trie_they_stand_for(
    built: int, appended: int, group_size: int, anchors: int
) -> None:
    layout = grown(built, appended, group_size=group_size, anchors=anchors)
    trie = computed_demonstrations(layout)
    assert 0.8 * trie <= held_tokens(TokenCosts(), layout) <= 1.35 * trie + 20
    rebuilt = TreeLayout.build(layout.questions, layout.groups, np.random.default_rng(3), anchors=anchors)
    exact = computed_demonstrations(rebuilt)
    assert 0.8 * exact <= rebuilt_tokens(TokenCosts(), layout) <= 1.3 * exact + 20


def test_a_tree_costs_its_demonstrations_once_a_level() -> None:
    assert tree_tokens(1, 42) == 0
    assert tree_tokens(64, 64 * 42) == pytest.approx(64 * 6 * 42)


@pytest.mark.parametrize(("built", "appended"), [(4, 6), (16, 16), (32, 8), (32, 32), (64, 24)])
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_detours_are_what_siblings_add_to_the_trie(built: int, appended: int, group_size: int) -> None:
    alone = computed_demonstrations(grown(built, appended, group_size=1))
    layout = grown(built, appended, group_size=group_size)
    added = computed_demonstrations(layout) - alone
    # An estimate: siblings in the tail may share a detour, which counts twice here.
    assert layout.detours == pytest.approx(added, rel=0.45, abs=8)
    assert UpstreamLayout.build([0, 1]).append(2).detours == 0


@given(sizes, st.integers(2, 40), st.integers(0, 24), st.integers(1, 10**7))
def test_more_capacity_never_holds_less(sizes: tuple[int, ...], built: int, appended: int, capacity: int) -> None:
    layout = grown(built, appended)
    small, large = (TokenCosts(sizes, sizes, tokens) for tokens in (capacity, 2 * capacity))
    assert not fits(small, layout) or fits(large, layout)
    assert not fits_rebuilt(small, layout) or fits_rebuilt(large, layout)
    assert evaluations_that_fit(small, layout) <= evaluations_that_fit(large, layout)
    assert fits(replace(small, capacity=None), layout)
    assert math.isinf(evaluations_that_fit(replace(small, capacity=None), layout))


@given(sizes, st.integers(2, 40), st.integers(1, 24), st.integers(1, 10**6))
def test_a_longer_tail_holds_more(sizes: tuple[int, ...], built: int, appended: int, capacity: int) -> None:
    costs = TokenCosts(sizes, sizes, capacity)
    short, long = grown(built, appended - 1), grown(built, appended)
    assert held_tokens(costs, short) < held_tokens(costs, long)
    assert fits(costs, short) or not fits(costs, long)


def make(capacity: int | None = None, **settings: Any) -> Problem:
    groups = tuple(map(str, range(64)))
    costs = TokenCosts((40,) * 64, (37,) * 64, capacity)
    return Problem(groups, Consistency([]), Objective(1.0), SearchSettings(**settings), costs)


def start(problem: Problem, labelled: int) -> SearchState:
    labels = tuple(True if i < labelled else None for i in range(problem.size))
    return SearchState(0, labels, problem.new_layout(range(labelled)), WORTH)


def take_in(problem: Problem, state: SearchState, claim: int) -> SearchState:
    labels = tuple(True if i == claim else label for i, label in enumerate(state.labels))
    return advance(problem, state, Outcome(claim, 1.0, True, 1.0, labels=labels, evaluation=WORTH))


def try_flip(problem: Problem, state: SearchState, claim: int) -> SearchState:
    """A flip that was evaluated and refused."""
    labels = tuple(not label if i == claim else label for i, label in enumerate(state.labels))
    paid = extra_tokens(problem, state, [labels])
    return advance(problem, state, Outcome(claim, 1.0, True, 1.0, spent_on_tail=paid))


def rebuilt(problem: Problem, state: SearchState) -> SearchState:
    return rebuild(state, rebuilt_layout(problem, state), WORTH)


def test_without_a_capacity_and_without_flips_nothing_is_ever_rebuilt() -> None:
    problem = make()
    state = start(problem, 8)
    for claim in range(8, 64):
        state = take_in(problem, state, claim)
        assert not wants_rebuild(problem, state)
    assert state.spent_on_tail == 0


@given(st.integers(3_000, 400_000), st.integers(2, 32))
def test_what_is_held_fits_the_capacity_or_not_even_the_bare_tree_does(capacity: int, seeds: int) -> None:
    problem = make(capacity)
    state = start(problem, seeds)
    for claim in range(seeds, 64):
        state = take_in(problem, state, claim)
        if wants_rebuild(problem, state):
            state = rebuilt(problem, state)
            assert not wants_rebuild(problem, state)
        layout = state.layout
        if fits_rebuilt(problem.costs, layout):
            held = held_tokens(problem.costs, layout) + evaluation_tokens(problem.costs, layout)
            assert held <= budget(problem.costs)


def test_flips_behind_a_tail_run_up_a_debt_that_a_rebuild_clears() -> None:
    problem = make()
    state = start(problem, 32)
    for claim in range(32, 36):
        state = take_in(problem, state, claim)
    flips = 0
    while not wants_rebuild(problem, state):
        state = try_flip(problem, state, 0)
        flips += 1
    assert flips > 1
    price = rebuilt_tokens(problem.costs, state.layout) + problem.costs.of_questions(state.layout.questions)
    one = extra_tokens(problem, state, [tuple(not label if i == 0 else label for i, label in enumerate(state.labels))])
    assert price <= state.spent_on_tail < price + one  # bought as soon as the rent has reached the price
    state = rebuilt(problem, state)
    assert state.spent_on_tail == 0
    assert extra_tokens(problem, state, [(False,) * 64]) == 0  # no tail, no excess


def test_a_flip_of_the_newest_claim_costs_no_more_than_in_a_tree() -> None:
    costs, layout = TokenCosts((40,) * 64, (37,) * 64), grown(32, 16)
    assert extra_tokens_of_tail(costs, layout, [layout.tail[-1]]) == 0
    assert extra_tokens_of_tail(costs, layout, []) == 0
    in_tree = extra_tokens_of_tail(costs, layout, layout.questions[:1])
    assert in_tree >= extra_tokens_of_tail(costs, layout, layout.tail[:1]) > 0
    assert in_tree == extra_tokens_of_tail(costs, layout, (layout.questions[0], layout.tail[0]))


def test_where_nothing_fits_every_evaluation_is_rent() -> None:
    costs, layout = TokenCosts((40,) * 64, (37,) * 64, 1_000), grown(32, 16)
    assert not fits_rebuilt(costs, layout)
    assert extra_tokens_of_tail(costs, layout, []) > 0


def test_a_tail_bound_given_by_the_user_holds() -> None:
    problem = make(max_tail=3)
    state = start(problem, 8)
    for claim in range(8, 11):
        assert not wants_rebuild(problem, state)
        state = take_in(problem, state, claim)
    assert wants_rebuild(problem, state)


def test_upstreams_order_is_never_rebuilt() -> None:
    problem = make(1_000, layout="upstream")
    state = start(problem, 8)
    for claim in range(8, 40):
        state = try_flip(problem, take_in(problem, state, claim), 0)
        assert state.spent_on_tail == 0
        assert not wants_rebuild(problem, state)
