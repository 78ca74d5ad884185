"""Many-shot with given labels as demonstrations: gold, gold with every label changed, or random.

Known labels are among the demonstrations of each.
"""

from __future__ import annotations

from src.icm.annealing import mirrored_labels
from src.icm.consistency import Labels
from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import Trial


async def run(trial: Trial) -> RowResult:
    """The pool is predicted leave-one-out: the given labels themselves would say nothing."""
    gold = tuple(trial.labelling.pool.gold)
    labels = {
        "many-shot-gold": trial.problem.with_known(gold),
        "many-shot-flipped": trial.problem.with_known(next_labels(gold, trial.problem.num_labels)),
        "many-shot-random": trial.random_labels(),
    }[trial.row]
    spending = trial.spending()
    pool = await trial.leave_one_out(labels)
    cost = spending.cost()
    return trial.result(pool, await trial.held_out_after(labels), cost)


def next_labels(labels: Labels, num_labels: int) -> Labels:
    """Every label changed: to the next one, the last to the first. Of two labels that is each flipped."""
    if num_labels == 2:
        return mirrored_labels(labels)
    return tuple(None if label is None else (label + 1) % num_labels for label in labels)
