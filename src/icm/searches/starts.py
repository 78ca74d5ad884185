"""The labels that a model gives by itself, with which searches start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from src.icm.consistency import Labels
from src.icm.objective import LogOdds, calibration_offset, margins_of
from src.icm.problem import Problem
from src.icm.searches.seam import Ask

HELD: Final = 1e3
"""Margin, nats, in favour of a label that changes for a constraint only."""


async def own_labels(problem: Problem, ask: Ask) -> Labels:
    """The model's own labels (see zero_shot_labels); where the search goes on from another one's, those."""
    given = None if problem.start_labels is None else problem.with_known(problem.start_labels)
    if given is not None and None not in given:
        return problem.likeliest([held(label, problem.num_labels) for label in given])
    return zero_shot_labels(problem, await ask.zero_shot(), given)


def zero_shot_labels(problem: Problem, log_odds: Sequence[LogOdds], given: Labels | None = None) -> Labels:
    """What zero-shot answers (nats, of every claim) say against their mean, or against the known share of True claims,
    changed as little as it must be to break no constraint. given: labels that only a constraint changes, None for none.
    """
    offset = calibration_offset(log_odds, "mean", problem.objective.prior, problem.num_labels)
    margins = [margins_of(each, offset) for each in log_odds]
    for claim, label in enumerate(given or ()):
        if label is not None:
            margins[claim] = held(label, problem.num_labels)
    return problem.likeliest(margins)


def held(label: int | None, num_labels: int) -> tuple[float, ...]:
    """Margins (nats) by which a claim keeps its label."""
    return tuple(HELD if label == other else -HELD for other in range(num_labels))
