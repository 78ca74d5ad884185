"""One line an iteration: what annealing did, complete enough to replay it without asking the model again.

Four events: "start" (the repaired seeds), "step" (an iteration), "rebuild" (the same labels scored in a new layout),
"mirror" (two labels swapped everywhere, when the search has settled). Replaying folds them through `annealing.advance`,
so a resumed search has exactly the state of the last complete line.

Labels and log-odds are written as in searches/lines.py. With more than two labels the start has a "format", and a step
has "label_counts" (by index) in place of "true_labels".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    decides_by_itself,
    flipped,
    mirror,
    mirrors_of,
    proposals,
    rebuild,
    rebuilt_layout,
    wants_mirror,
    wants_rebuild,
)
from src.icm.objective import Evaluation
from src.icm.problem import Problem
from src.icm.searches.lines import labels_of, read_evaluation, read_labels, read_log_odds, scores_of
from src.icm.searches.seam import JournalMismatch, Record

FORMAT: Final = 3
"""Of journals of more than two labels. Those of two have no "format"; they are as version 2 writes them."""


def start_record(state: SearchState) -> Record:
    """The state before iteration 0: seeds after repair."""
    count = state.evaluation.num_labels
    kind = {} if count == 2 else {"format": FORMAT, "num_labels": count}
    return {"event": "start"} | kind | {"labels": labels_of(state.labels)} | _worth(state.evaluation)


def rebuild_record(state: SearchState) -> Record:
    """A new layout's scores of unchanged labels."""
    return {"event": "rebuild", "iteration": state.iteration} | _worth(state.evaluation)


def mirror_record(after: SearchState, accepted: bool, proposed_utility: float) -> Record:
    """What the best swap of two labels was worth, and whether it was kept."""
    record: Record = {
        "event": "mirror",
        "iteration": after.iteration,
        "U_proposed": proposed_utility,
        "accepted": accepted,
        "U": after.evaluation.utility,
    }
    if accepted:
        record["changes"] = {str(i): after.labels[i] for i in after.labelled}
        record["scores"] = scores_of(after.evaluation)
    return record


def step_record(before: SearchState, outcome: Outcome, after: SearchState) -> Record:
    """What one iteration proposed, found and decided, and where it left the pool."""
    count = after.evaluation.num_labels
    counts: Record = (
        {"true_labels": sum(label is True for label in after.labels)}
        if count == 2
        else {"label_counts": [after.labels.count(label) for label in range(count)]}
    )
    record: Record = {
        "event": "step",
        "iteration": before.iteration,
        "claim": outcome.claim,
        "log_odds": outcome.log_odds,
        "current": before.labels[outcome.claim],
        "predicted": outcome.predicted,
        "tried": outcome.tried,
        "excess": outcome.spent_on_tail,
        "U_proposed": outcome.proposed_utility,
        "T": outcome.temperature,
        "probability": outcome.probability,
        "accepted": outcome.accepted,
        "U": after.evaluation.utility,
        "predictability": after.evaluation.predictability,
        "inconsistent": after.evaluation.inconsistent,
        "labelled": len(after.labelled),
        **counts,
    }
    if outcome.labels is not None and outcome.evaluation is not None:
        record["changes"] = {
            str(i): new for i, (old, new) in enumerate(zip(before.labels, outcome.labels, strict=True)) if old != new
        }
        record["scores"] = scores_of(outcome.evaluation)
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
        if record.get("num_labels", 2) != problem.num_labels or record.get("format", FORMAT) != FORMAT:
            raise JournalMismatch("it is of other labels, or of a format that this version does not know")
        seeds = flipped((None,) * problem.size, read_labels(problem, record["labels"]))
        # Laid out before the seeds were repaired.
        layout = problem.first_layout(problem.seed_labels())
        return SearchState(0, seeds, layout, read_evaluation(problem, seeds, record))
    if state is None:
        raise JournalMismatch("it does not begin with a start")
    if event == "rebuild":
        if not wants_rebuild(problem, state) and not state.changes_since_asked:
            raise JournalMismatch(f"it rebuilds at iteration {state.iteration}, where this search would not")
        return rebuild(state, rebuilt_layout(problem, state), read_evaluation(problem, state.labels, record))
    if event == "mirror":
        if not wants_mirror(problem, state):
            raise JournalMismatch(f"it mirrors at iteration {state.iteration}, where this search would not")
        if not record["accepted"]:
            return mirror(state, None)
        found = mirrors_of(problem, state.labels)
        labels = found[0] if len(found) == 1 else flipped(state.labels, read_labels(problem, record["changes"]))
        if labels not in found:
            raise JournalMismatch(f"its mirror at iteration {state.iteration} does not swap two labels")
        return mirror(state, read_evaluation(problem, labels, record), labels)
    if event != "step":
        raise JournalMismatch(f"it has an event {event!r} that this version does not know")
    claim = record["claim"]
    if record["iteration"] != state.iteration or claim not in proposals(problem, state):
        raise JournalMismatch(f"iteration {record['iteration']} proposes claim {claim}; this search would not")
    accepted = flipped(state.labels, read_labels(problem, record["changes"])) if record["accepted"] else None
    start = flipped(state.labels, read_labels(problem, {claim: record["predicted"]}))
    outcome = Outcome(
        claim=claim,
        log_odds=read_log_odds(record["log_odds"]),
        predicted=record["predicted"],
        temperature=record["T"],
        tried=record["tried"],
        spent_on_tail=record["excess"],
        proposed_utility=record["U_proposed"],
        probability=record["probability"],
        labels=accepted,
        evaluation=None if accepted is None else read_evaluation(problem, accepted, record),
        pieced_together=accepted is not None and decides_by_itself(problem, state, claim, start),
    )
    return advance(problem, state, outcome)


def _worth(evaluation: Evaluation) -> Record:
    return {"scores": scores_of(evaluation), "U": evaluation.utility}
