"""Bootstrapping from several random starts: the labels of the start that ends with the highest U.

U ranks the starts and gold is not looked at, as in the search: which start ends well is the luck of the random labels,
and U is what can be known of it without gold.
"""

from __future__ import annotations

from src.pipeline.baselines.bootstrapping import bootstrap
from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import Trial


async def run(trial: Trial) -> RowResult:
    """Each start is bootstrapped as in bootstrap-consistent, so that no broken constraint decides which one is kept.

    `options.start` does not count: every start has random labels, since from zero-shot labels all would end alike. The
    first has those of bootstrap-consistent. U is that of the pool's labels in the layout that all rows share; of equals
    the first is kept. Costs `restarts` times (rounds + 1) questions a claim.
    """
    spending = trial.spending()
    found = []
    for restart in range(trial.options.restarts):
        pool = await bootstrap(trial, trial.random_start(restart), consistent=True)
        evaluation = await trial.evaluate(trial.in_order(pool.labels))
        found.append((evaluation.utility, pool))
    _, best = max(found, key=lambda each: each[0])
    cost = spending.cost()
    return trial.result(best, await trial.held_out_after(trial.in_order(best.labels)), cost)
