"""Bootstrapping: the pool labelled by many-shot from the labels of the round before, a few times.

Shrivastava, Qi, Canavan et al., "Eliciting base models with simple unsupervised techniques" (Alignment Forum), find
that bootstrapping and consistency explain most of what ICM gains.
"""

from __future__ import annotations

from dataclasses import replace

from src.icm.consistency import Labels
from src.icm.searches.bootstrapping import likeliest_consistent
from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import Trial
from src.pipeline.predictions import Prediction


async def run(trial: Trial) -> RowResult:
    """The first round shows random labels, or those of zero-shot answers (calibrated where the objective is).
    bootstrap-consistent: as bootstrap with consistent=True."""
    spending = trial.spending()
    start = trial.random_start() if trial.options.start == "random" else await _zero_shot_labels(trial)
    pool = await bootstrap(trial, start, consistent=trial.row == "bootstrap-consistent")
    cost = spending.cost()
    return trial.result(pool, await trial.held_out_after(trial.in_order(pool.labels)), cost)


async def bootstrap(trial: Trial, labels: Labels, *, consistent: bool) -> Prediction:
    """The pool after the trial's rounds, of which the first shows `labels`.

    consistent: after every round the labels that break no constraint at the least loss of log-odds
    (Consistency.nearest).
    """
    found = Prediction({})
    for _ in range(trial.options.rounds):
        found = await trial.leave_one_out(labels)
        if consistent:
            nearest = likeliest_consistent(trial.problem, [found.log_odds[claim] for claim in trial.pool_claims])
            found = replace(found, given={at: label for at, label in enumerate(nearest) if label is not None})
        labels = trial.in_order(found.labels)
    return found


async def _zero_shot_labels(trial: Trial) -> Labels:
    answers, objective = await trial.zero_shot(trial.pool_claims), trial.problem.objective
    if objective.calibration == "mean":
        answers = answers.calibrated(objective.prior)
    return trial.in_order(answers.labels)
