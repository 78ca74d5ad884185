"""Bootstrapping: every label predicted from the labels of the round before, a few times.

The labels of the whole pool begin at random, as many of each or as a prior says, or with those that the model gives
without demonstrations (`--bootstrap_start`). A round asks about every claim with all others as demonstrations, takes
the likeliest label of each (against the objective's offset), and changes as few of these as it must so that no
constraint is broken (Consistency.nearest). After `--bootstrap_rounds` rounds, or where a round gives labels that were
there before and so would give the same again, the labels with the highest U are kept, the first ones included. All
are evaluated in one layout, so that their U can be compared.

Shrivastava, Qi, Canavan et al., "Eliciting base models with simple unsupervised techniques" (Alignment Forum), find
that this explains most of what ICM gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from src.icm.consistency import Labels
from src.icm.objective import LogOdds, margins_of
from src.icm.problem import Candidate, Problem, Stream, generator
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import Ask, Found, Journal

SETTINGS: Final = ("bootstrap_rounds", "bootstrap_start")


async def run(problem: Problem, ask: Ask, journal: Journal) -> Found:
    """Label the whole pool. Raises JournalMismatch where the journal is not one of this search."""
    asked = RecordedAsk(problem, ask, journal)
    labels = await _first_labels(problem, asked)
    layout = problem.new_layout(range(problem.size), labels=labels)
    seen: set[Labels] = set()
    for _ in range(problem.settings.bootstrap_rounds + 1):  # the last one's labels are evaluated too
        if labels in seen:
            break
        seen.add(labels)
        [evaluation] = await asked.evaluate([Candidate(labels, layout)])
        labels = likeliest_consistent(problem, [evaluation.log_odds[claim] for claim in range(problem.size)])
    return asked.standing


async def _first_labels(problem: Problem, ask: Ask) -> Labels:
    if problem.settings.bootstrap_start == "zero-shot":
        return likeliest_consistent(problem, await ask.zero_shot())
    rng = generator(problem.settings.seed, Stream.SEEDS, 2)
    return problem.with_known(tuple(problem.random_labels(problem.size, rng)))


def likeliest_consistent(problem: Problem, log_odds: Sequence[LogOdds]) -> Labels:
    """The labels that these log-odds (nats, of every claim) say against the objective's offset, and that break no
    constraint, the known ones kept."""
    offset = problem.objective.offset(log_odds)
    return problem.likeliest([margins_of(value, offset) for value in log_odds])
