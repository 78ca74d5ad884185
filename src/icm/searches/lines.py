"""How lines of a journal write labels and log-odds, and how they are read.

Of two labels a label is written as true or false, and a claim's log-odds as a number. Of more a label is its index, and
log-odds are a list of K - 1 numbers. Claims are pool positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds
from src.icm.problem import Problem
from src.icm.searches.seam import JournalMismatch


def scores_of(evaluation: Evaluation) -> dict[str, LogOdds]:
    """Every labelled claim's log-odds, nats."""
    return {str(claim): value for claim, value in evaluation.log_odds.items()}


def labels_of(labels: Labels) -> dict[str, int]:
    """Every labelled claim's label."""
    return {str(claim): label for claim, label in enumerate(labels) if label is not None}


def read_labels(problem: Problem, mapping: Mapping[Any, Any]) -> dict[int, int]:
    """Labels by claim. Raises JournalMismatch for a label that there is not."""
    if problem.num_labels == 2:
        return {int(claim): bool(label) for claim, label in mapping.items()}
    if not all(type(label) is int and 0 <= label < problem.num_labels for label in mapping.values()):
        raise JournalMismatch(f"it has a label that is none of the {problem.num_labels}")
    return {int(claim): label for claim, label in mapping.items()}


def read_log_odds(value: Any) -> LogOdds:
    """One claim's log-odds, nats."""
    return tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)


def read_evaluation(problem: Problem, labels: Labels, record: Mapping[str, Any]) -> Evaluation:
    """The worth of `labels` by the record's "scores". Raises ValueError where these are of other claims."""
    log_odds = {int(claim): read_log_odds(value) for claim, value in record["scores"].items()}
    return problem.objective.evaluate(labels, log_odds, problem.consistency)
