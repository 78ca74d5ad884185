"""Annealing (Wen et al. 2025, algorithm 1): asks what the state machine in `src/icm/annealing.py` proposes.

Every iteration is a line of the journal (`src/icm/journal.py`) before the next one begins. All labelings of one repair
round are asked in one batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    choose,
    decide,
    decides_by_itself,
    explore,
    extra_tokens,
    finished,
    local_evaluation,
    mirror,
    mirrors_of,
    predicted_label,
    proposal,
    proposals,
    rebuild,
    rebuilt_layout,
    wants_mirror,
    wants_rebuild,
)
from src.icm.consistency import Labels
from src.icm.journal import mirror_record, rebuild_record, replay, start_record, step_record
from src.icm.objective import Evaluation, LogOdds
from src.icm.problem import Candidate, Problem
from src.icm.searches.seam import Ask, Journal
from src.icm.speculation import Evaluating, Intent, Predicting, Rebuilding

SETTINGS: Final = (
    *("num_seed", "K", "consistency_fix_K", "decay", "initial_T", "final_T", "scheduler", "stop", "patience"),
    *("max_tail", "mirror", "best_of", "local_gain", "lookahead", "continue_from"),
)


async def run(problem: Problem, ask: Ask, journal: Journal) -> SearchState:
    """Label the pool. Raises JournalMismatch where the journal is not one of this search."""
    state = replay(problem, journal.records)
    if state is None:
        state = await _start(problem, ask)
        await journal.write(start_record(state), state)
    while not finished(problem, state):
        if wants_mirror(problem, state):
            turned = mirrors_of(problem, state.labels)
            worth = await ask.evaluate([Candidate(labels, state.layout) for labels in turned], Intent(state))
            labels, evaluation = max(zip(turned, worth, strict=True), key=lambda each: each[1].utility)
            accepted = evaluation.utility > state.evaluation.utility
            state = mirror(state, evaluation, labels) if accepted else mirror(state, None)
            await journal.write(mirror_record(state, accepted, evaluation.utility), state)
            continue
        outcome = None if wants_rebuild(problem, state) else await _step(problem, ask, state)
        if outcome is None:
            layout = rebuilt_layout(problem, state)
            intent = Rebuilding(state, rebuild(state, layout, state.evaluation))
            [evaluation] = await ask.evaluate([Candidate(state.labels, layout)], intent)
            state = rebuild(state, layout, evaluation)
            await journal.write(rebuild_record(state), state)
            continue
        after = advance(problem, state, outcome)
        await journal.write(step_record(state, outcome, after), after)
        state = after
    return state


async def _start(problem: Problem, ask: Ask) -> SearchState:
    """Evaluate the labels that it starts with and repair their inconsistencies."""
    labels = problem.seed_labels()
    layout = problem.first_layout(labels)
    if (carried := problem.carried) is not None and carried.log_odds and labels == carried.labels:
        # What is inconsistent there, that search has tried to repair.
        return SearchState(0, labels, layout, problem.objective.evaluate(labels, carried.log_odds, problem.consistency))

    async def evaluate(batch: list[Candidate]) -> list[Evaluation]:
        return await ask.evaluate(batch, Intent(None))

    best, evaluation, _ = await _explore(problem, evaluate, Candidate(labels, layout), 0, {})
    return SearchState(0, best.labels, layout, evaluation)


async def _step(problem: Problem, ask: Ask, state: SearchState) -> Outcome | None:
    """One iteration; None where it must compare evaluations, and the state's is pieced together."""
    answers = await _predictions(problem, ask, state)
    claim = choose(problem, state, answers)
    log_odds = answers[claim]
    predicted = predicted_label(problem, state, log_odds)
    temperature = problem.temperature(state.iteration, state.accepted)
    if predicted == state.labels[claim]:
        return Outcome(claim, log_odds, predicted, temperature)
    start = proposal(state, claim, predicted)

    async def evaluate(batch: list[Candidate]) -> list[Evaluation]:
        return await ask.evaluate(batch, Evaluating(state, claim, start))

    tried: list[Labels] = []
    by_itself = decides_by_itself(problem, state, claim, start.labels)
    if by_itself:
        best, evaluation = start, local_evaluation(problem, state, start.labels, {claim: log_odds})
    elif state.changes_since_asked:
        return None
    else:
        known = {state.labels: state.evaluation}
        best, evaluation, tried = await _explore(problem, evaluate, start, state.iteration, known)
    accepted, probability, temperature = decide(problem, state, evaluation.utility)
    changed = accepted and best.labels != state.labels
    return Outcome(
        claim=claim,
        log_odds=log_odds,
        predicted=predicted,
        temperature=temperature,
        tried=len(tried),
        spent_on_tail=extra_tokens(problem, state, tried),
        proposed_utility=evaluation.utility,
        probability=probability,
        labels=best.labels if changed else None,
        evaluation=evaluation if changed else None,
        pieced_together=changed and by_itself,
    )


async def _predictions(problem: Problem, ask: Ask, state: SearchState) -> dict[int, LogOdds]:
    """log-odds (nats) of the claims that this iteration proposes, in the order proposed."""
    claims = proposals(problem, state)
    # A labelled claim's question is part of the current evaluation, unless that was pieced together.
    known = {} if state.changes_since_asked else state.evaluation.log_odds
    asked = [claim for claim in claims if claim not in known]
    answers: dict[int, LogOdds] = {}
    if asked:
        found = await ask.predict(asked, Candidate(state.labels, state.layout), Predicting(state))
        answers = dict(zip(asked, found, strict=True))
    return {claim: known[claim] if claim in known else answers[claim] for claim in claims}


async def _explore(
    problem: Problem,
    evaluate: Callable[[list[Candidate]], Awaitable[list[Evaluation]]],
    start: Candidate,
    iteration: int,
    known: dict[Labels, Evaluation],
) -> tuple[Candidate, Evaluation, list[Labels]]:
    """Drive `explore`: evaluate what it yields until it names the best labeling. Also: what was evaluated."""
    exploration = explore(problem, start, iteration, known)
    tried: list[Labels] = []
    try:
        wanted = next(exploration)
        while True:
            tried += [candidate.labels for candidate in wanted]
            wanted = exploration.send(await evaluate(wanted))
    except StopIteration as stop:
        best, evaluation, _ = stop.value
        return best, evaluation, tried
