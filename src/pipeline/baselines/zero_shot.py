"""Zero-shot: the pool and the held-out claims without demonstrations."""

from __future__ import annotations

from dataclasses import replace

from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import HeldOut, Trial


async def run(trial: Trial) -> RowResult:
    """zero-shot-calibrated: against the mean of the pool's log-odds, also on held-out claims.

    With a known share of True claims against the offset that belongs to it.
    """
    spending = trial.spending()
    pool = await trial.zero_shot(trial.pool_claims)
    if trial.row == "zero-shot-calibrated":
        pool = pool.calibrated(trial.problem.objective.prior)
    cost = spending.cost()
    held_out = await trial.zero_shot(trial.held_out_claims)
    return trial.result(pool, HeldOut(replace(held_out, offset=pool.offset)), cost)
