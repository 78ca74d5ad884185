"""Few-shot: the known labels as demonstrations and nothing else; what they are worth without a search."""

from __future__ import annotations

from src.icm.problem import Candidate
from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import HeldOut, Trial
from src.pipeline.predictions import Prediction, predict


async def run(trial: Trial) -> RowResult:
    """Every claim after all others of a known label, held-out claims after all of them.

    Labels are the likeliest against the objective's offset of the pool's answers, if it is calibrated. Where a pool
    holds no known label, claims are asked without demonstrations.
    """
    labelling, problem = trial.labelling, trial.problem
    known = problem.known or (None,) * problem.size
    layout = problem.new_layout([claim for claim in trial.pool_claims if problem.is_known(claim)], labels=known)
    spending = trial.spending()
    answers = await labelling.scorer().predict(trial.pool_claims, Candidate(known, layout))
    offset = problem.objective.offset(answers)
    pool = Prediction(dict(zip(trial.pool_claims, answers, strict=True)), offset)
    cost = spending.cost()
    shown = layout.demonstrations
    rest = await predict(labelling.api, labelling.book, trial.held_out_claims, demonstrations=shown, labels=known)
    return trial.result(pool, HeldOut(Prediction(rest.log_odds, offset)), cost)
