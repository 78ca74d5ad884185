"""ICM: the labels of the search, shown to held-out claims as any other row's are."""

from __future__ import annotations

from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import Trial
from src.pipeline.predictions import Prediction


async def run(trial: Trial) -> RowResult:
    """The cost is what the search counted."""
    assert trial.search is not None, "the row icm needs a search"
    found = await trial.search()
    labels = trial.in_order(found.labels)
    evaluation = await trial.evaluate(labels)
    pool = Prediction(found.log_odds, evaluation.offset, found.labels)
    return trial.result(pool, await trial.held_out_after(labels), found.cost)
