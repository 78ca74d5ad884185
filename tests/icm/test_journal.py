"""A journal replayed gives the state it was written from, and says so where it cannot."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    decide,
    explore,
    finished,
    flipped,
    mirror,
    mirrored_labels,
    predicted_label,
    propose,
    rebuild,
    rebuilt_layout,
    wants_mirror,
    wants_rebuild,
)
from src.icm.consistency import Consistency, Relation
from src.icm.journal import (
    mirror_record,
    rebuild_record,
    replay,
    start_record,
    step_record,
)
from src.icm.objective import Evaluation, Objective
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.searches.seam import JournalMismatch


def make_problem(**settings: Any) -> Problem:
    groups = tuple(str(i // 2) for i in range(12))
    consistency = Consistency.of_groups(groups, lambda i, j: Relation.EXACTLY_ONE)
    defaults: dict[str, Any] = {"seed": 5, "num_seed": 4, "max_tail": 3, "patience": 6, "K": 200}
    return Problem(groups, consistency, Objective(20.0), SearchSettings(**(defaults | settings)))


def worth(problem: Problem, candidate: Candidate) -> Evaluation:
    """Scores that depend on labels and order, as a model's would."""
    log_odds = {}
    for claim in candidate.layout.questions:
        context = candidate.layout.context(claim)
        content = [claim, *((other, candidate.labels[other]) for other in context)]
        noise = np.random.default_rng(abs(hash(str(content))) % 2**32).normal() * 0.1
        log_odds[claim] = float((1.5 if claim % 3 else -1.5) + noise)
    return problem.objective.evaluate(candidate.labels, log_odds, problem.consistency)


def best_of(problem: Problem, start: Candidate, iteration: int, known: Any) -> tuple[Candidate, Evaluation, int]:
    exploration = explore(problem, start, iteration, known)
    try:
        wanted = next(exploration)
        while True:
            wanted = exploration.send([worth(problem, candidate) for candidate in wanted])
    except StopIteration as stop:
        result: tuple[Candidate, Evaluation, int] = stop.value
        return result


def run(problem: Problem) -> tuple[list[dict[str, Any]], list[SearchState]]:
    labels = problem.seed_labels()
    layout = problem.new_layout([i for i, label in enumerate(labels) if label is not None])
    best, evaluation, _ = best_of(problem, Candidate(labels, layout), 0, {})
    state = SearchState(0, best.labels, layout, evaluation)
    records, states = [start_record(state)], [state]
    while not finished(problem, state):
        if wants_mirror(problem, state):
            turned = worth(problem, Candidate(mirrored_labels(state.labels), state.layout))
            accepted = turned.utility > state.evaluation.utility
            state = mirror(state, turned if accepted else None)
            records.append(mirror_record(state, accepted, turned.utility))
            states.append(state)
            continue
        if wants_rebuild(problem, state):
            new = rebuilt_layout(problem, state)
            state = rebuild(state, new, worth(problem, Candidate(state.labels, new)))
            records.append(rebuild_record(state))
            states.append(state)
        claim = propose(problem, state)
        asked = state.layout if claim in state.evaluation.log_odds else state.layout.append(claim)
        log_odds = state.evaluation.log_odds.get(claim, 1.5 if claim % 3 else -1.5)
        predicted = predicted_label(problem, state, log_odds)
        outcome = Outcome(claim, log_odds, predicted, 1.0)
        if predicted != state.labels[claim]:
            start = Candidate(flipped(state.labels, {claim: predicted}), asked)
            best, evaluation, tried = best_of(problem, start, state.iteration, {state.labels: state.evaluation})
            accepted, probability, temperature = decide(problem, state, evaluation.utility)
            if accepted and best.labels != state.labels:
                outcome = Outcome(
                    claim,
                    log_odds,
                    predicted,
                    temperature,
                    tried,
                    evaluation.utility,
                    probability,
                    best.labels,
                    evaluation,
                )
        after = advance(problem, state, outcome)
        records.append(step_record(state, outcome, after))
        state = after
        states.append(state)
    return [json.loads(json.dumps(record)) for record in records], states


def test_replaying_any_prefix_gives_the_state_it_left() -> None:
    problem = make_problem()
    records, states = run(problem)
    assert {"start", "step", "rebuild", "mirror"} == {record["event"] for record in records}
    assert replay(problem, []) is None
    for count in range(1, len(records) + 1):
        assert replay(problem, records[:count]) == states[count - 1]


def test_an_accepted_mirror_replays() -> None:
    problem = make_problem(K=0)
    records, states = run(problem)
    assert [record["event"] for record in records] == ["start", "mirror"]
    turned = worth(problem, Candidate(mirrored_labels(states[0].labels), states[0].layout))
    accepted = mirror(states[0], turned)
    record = mirror_record(accepted, True, turned.utility)
    assert replay(problem, [records[0], json.loads(json.dumps(record))]) == accepted
    with pytest.raises(JournalMismatch, match="mirrors"):
        replay(make_problem(K=0, mirror=False), records)


def test_a_journal_of_another_seed_is_refused() -> None:
    records, _ = run(make_problem())
    with pytest.raises(JournalMismatch, match="proposes claim"):
        replay(make_problem(seed=6), records)


def test_a_journal_with_other_rebuilds_is_refused() -> None:
    records, _ = run(make_problem())
    with pytest.raises(JournalMismatch, match="rebuilds"):
        replay(make_problem(max_tail=100), records)


@pytest.mark.parametrize(
    "damage", [{"event": "dance"}, {"iteration": 999}, {"T": None, "accepted": True, "changes": 3}]
)
def test_damaged_records_are_refused(damage: dict[str, Any]) -> None:
    problem = make_problem()
    records, _ = run(problem)
    records[3] = records[3] | damage
    with pytest.raises(JournalMismatch):
        replay(problem, records)


def test_a_journal_must_begin_with_a_start() -> None:
    records, _ = run(make_problem())
    with pytest.raises(JournalMismatch, match="start"):
        replay(make_problem(), records[1:])
