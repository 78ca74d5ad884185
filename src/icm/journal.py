"""One line an iteration: what a search did, complete enough to replay it without asking the model again.

Four events: "start" (the repaired seeds), "step" (an iteration), "rebuild" (the same labels scored in a new layout),
"mirror" (all labels flipped, once, when the search has settled). Replaying
folds them through `annealing.advance`, so a resumed search stands exactly where the last complete line left it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from src.icm.annealing import (
    Outcome,
    Problem,
    SearchState,
    advance,
    decides_by_itself,
    flipped,
    mirror,
    mirrored_labels,
    proposals,
    rebuild,
    rebuilt_layout,
    wants_mirror,
    wants_rebuild,
)
from src.icm.consistency import Labels
from src.icm.objective import Evaluation

Record = dict[str, Any]


class JournalMismatch(Exception):
    """The journal is not one of this search: other settings, other code, or damaged in the middle."""


def start_record(state: SearchState) -> Record:
    """The state before iteration 0: seeds after repair."""
    labels = {str(i): state.labels[i] for i in state.labelled}
    return {"event": "start", "labels": labels, "scores": _scores(state.evaluation), "U": state.evaluation.utility}


def rebuild_record(state: SearchState) -> Record:
    """A new layout's scores of unchanged labels."""
    return {
        "event": "rebuild",
        "iteration": state.iteration,
        "scores": _scores(state.evaluation),
        "U": state.evaluation.utility,
    }


def mirror_record(after: SearchState, accepted: bool, proposed_utility: float) -> Record:
    """What flipping every label was worth, and whether it was kept."""
    record: Record = {
        "event": "mirror",
        "iteration": after.iteration,
        "U_proposed": proposed_utility,
        "accepted": accepted,
        "U": after.evaluation.utility,
    }
    if accepted:
        record["changes"] = {str(i): after.labels[i] for i in after.labelled}
        record["scores"] = _scores(after.evaluation)
    return record


def step_record(before: SearchState, outcome: Outcome, after: SearchState) -> Record:
    """What one iteration proposed, found and decided, and where it left the pool."""
    record: Record = {
        "event": "step",
        "iteration": before.iteration,
        "claim": outcome.claim,
        "log_odds": outcome.log_odds,
        "current": before.labels[outcome.claim],
        "predicted": outcome.predicted,
        "tried": outcome.tried,
        "excess": outcome.excess,
        "U_proposed": outcome.proposed_utility,
        "T": outcome.temperature,
        "probability": outcome.probability,
        "accepted": outcome.accepted,
        "U": after.evaluation.utility,
        "predictability": after.evaluation.predictability,
        "inconsistent": after.evaluation.inconsistent,
        "labelled": len(after.labelled),
        "true_labels": sum(label is True for label in after.labels),
    }
    if outcome.labels is not None and outcome.evaluation is not None:
        record["changes"] = {
            str(i): new for i, (old, new) in enumerate(zip(before.labels, outcome.labels, strict=True)) if old != new
        }
        record["scores"] = _scores(outcome.evaluation)
    return record


def replay(problem: Problem, records: Iterable[Mapping[str, Any]]) -> SearchState | None:
    """The state after `records`, None where there are none. Raises JournalMismatch where they do not fit."""
    state: SearchState | None = None
    for number, record in enumerate(records, start=1):
        try:
            state = _apply(problem, state, record)
        except JournalMismatch:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise JournalMismatch(f"line {number} cannot be applied ({type(error).__name__}: {error})") from error
    return state


def _apply(problem: Problem, state: SearchState | None, record: Mapping[str, Any]) -> SearchState:
    event = record["event"]
    if event == "start":
        seeds = flipped((None,) * problem.size, _claims(record["labels"]))
        # Laid out before the seeds were repaired.
        layout = problem.new_layout(
            [i for i, label in enumerate(seeds) if label is not None], labels=problem.seed_labels()
        )
        return SearchState(0, seeds, layout, _evaluation(problem, seeds, record))
    if state is None:
        raise JournalMismatch("it does not begin with a start")
    if event == "rebuild":
        if not wants_rebuild(problem, state) and not state.stale:
            raise JournalMismatch(f"it rebuilds at iteration {state.iteration}, where this search would not")
        return rebuild(state, rebuilt_layout(problem, state), _evaluation(problem, state.labels, record))
    if event == "mirror":
        if not wants_mirror(problem, state):
            raise JournalMismatch(f"it mirrors at iteration {state.iteration}, where this search would not")
        if not record["accepted"]:
            return mirror(state, None)
        return mirror(state, _evaluation(problem, mirrored_labels(state.labels), record))
    if event != "step":
        raise JournalMismatch(f"it has an event {event!r} that this version does not know")
    claim = record["claim"]
    if record["iteration"] != state.iteration or claim not in proposals(problem, state):
        raise JournalMismatch(f"iteration {record['iteration']} proposes claim {claim}; this search would not")
    labels = flipped(state.labels, _claims(record["changes"])) if record["accepted"] else None
    start = flipped(state.labels, {claim: bool(record["predicted"])})
    outcome = Outcome(
        claim=claim,
        log_odds=record["log_odds"],
        predicted=record["predicted"],
        temperature=record["T"],
        tried=record["tried"],
        excess=record["excess"],
        proposed_utility=record["U_proposed"],
        probability=record["probability"],
        labels=labels,
        evaluation=None if labels is None else _evaluation(problem, labels, record),
        pieced_together=labels is not None and decides_by_itself(problem, state, claim, start),
    )
    return advance(problem, state, outcome)


def _scores(evaluation: Evaluation) -> dict[str, float]:
    return {str(claim): value for claim, value in evaluation.log_odds.items()}


def _claims(mapping: Mapping[str, bool]) -> dict[int, bool]:
    return {int(claim): bool(label) for claim, label in mapping.items()}


def _evaluation(problem: Problem, labels: Labels, record: Mapping[str, Any]) -> Evaluation:
    log_odds = {int(claim): float(value) for claim, value in record["scores"].items()}
    return problem.objective.evaluate(labels, log_odds, problem.consistency)
