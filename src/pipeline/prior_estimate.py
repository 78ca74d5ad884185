"""`--prior auto`: what the model is asked so that the share of True claims can be estimated before the search.

Every claim is asked after all others twice: once with all of them shown as True, once as False. Such demonstrations say
what is asked, and nothing of which claims are True, so the answers cannot confirm labels that were there before; those
of a search do, whatever their share (docs/lab-log.md). The two answers of a claim are added.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from src.icm.objective import LogOdds
from src.icm.prior import PriorEstimate, estimate, read_estimate
from src.icm.problem import Candidate
from src.pipeline.labelling import Labelling


async def estimate_prior(labelling: Labelling) -> PriorEstimate:
    """The share of True claims of the pool; deterministic, and what the response cache knows is not asked again."""
    problem = labelling.pool.problem
    labelings = [(label,) * problem.size for label in (True, False)]
    layout = problem.new_layout(range(problem.size), labels=labelings[0])
    worth = await labelling.scorer().evaluate([Candidate(labels, layout) for labels in labelings])
    scores = [sum(_number(each.log_odds[claim]) for each in worth) for claim in range(problem.size)]
    return estimate(scores, problem.groups)


async def with_prior(
    labelling: Labelling, known: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> tuple[Labelling, PriorEstimate | None]:
    """The labelling calibrated to its estimated share where --prior auto asks for that, and the estimate; None where it
    does not ask. known: the estimate's record, if there is one. quiet: do not say what was found."""
    objective = labelling.pool.problem.objective
    if not objective.estimate_prior:
        return labelling, None
    found = read_estimate(known)
    if found is None:
        if not quiet:
            asked = 2 * len(labelling.pool.claims)
            print(f"estimating the share of True claims: {asked} questions", file=sys.stderr, flush=True)
        found = await estimate_prior(labelling)
    if not quiet:
        print(found.sentence(), file=sys.stderr, flush=True)
    return calibrated_to(labelling, found), found


def calibrated_to(labelling: Labelling, found: PriorEstimate) -> Labelling:
    """The labelling with the estimate as its prior, or the mean where the estimate is not used."""
    pool, problem = labelling.pool, labelling.pool.problem
    objective = replace(problem.objective, prior=found.prior, estimate_prior=False)
    return replace(labelling, pool=replace(pool, problem=replace(problem, objective=objective)))


def _number(log_odds: LogOdds) -> float:
    assert not isinstance(log_odds, tuple), "a share of True is of two labels"
    return log_odds
