"""What ICM must beat, one file each: a way to label the pool, and then held-out claims from those labels.

Such a file has `async run(trial: Trial) -> RowResult` (trial.py says what a trial offers) and is imported when its row
is asked for. To add a baseline: a file like that, and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import Trial


@dataclass(frozen=True, slots=True)
class Baseline:
    """module: where `run` is. title: what tables call the row. needs_chat: cannot be run without a chat model.
    needs_known: has no meaning without known labels. on_request: run only where it is named, because it costs several
    times as much as the others."""

    module: str
    title: str
    needs_chat: bool = False
    needs_known: bool = False
    on_request: bool = False


BASELINES: Final[Mapping[str, Baseline]] = {
    "zero-shot": Baseline("src.pipeline.baselines.zero_shot", "zero-shot"),
    "zero-shot-calibrated": Baseline("src.pipeline.baselines.zero_shot", "zero-shot, calibrated"),
    "zero-shot-chat": Baseline("src.pipeline.baselines.chat", "zero-shot, chat model", needs_chat=True),
    "few-shot-known": Baseline("src.pipeline.baselines.few_shot", "few-shot, known labels", needs_known=True),
    "many-shot-random": Baseline("src.pipeline.baselines.many_shot", "many-shot, random labels"),
    "many-shot-flipped": Baseline("src.pipeline.baselines.many_shot", "many-shot, flipped labels"),
    "many-shot-gold": Baseline("src.pipeline.baselines.many_shot", "many-shot, gold labels"),
    "bootstrap": Baseline("src.pipeline.baselines.bootstrapping", "bootstrapping"),
    "bootstrap-consistent": Baseline("src.pipeline.baselines.bootstrapping", "bootstrapping, consistent"),
    "bootstrap-best": Baseline(
        "src.pipeline.baselines.bootstrapping_best", "bootstrapping, best of R by U", on_request=True
    ),
    "icm": Baseline("src.pipeline.baselines.icm", "ICM"),
}
"""Row -> its baseline, in the order of tables. ICM itself is the last one."""


async def run_baseline(trial: Trial) -> RowResult:
    """The result of the row that the trial names."""
    result: RowResult = await importlib.import_module(BASELINES[trial.row].module).run(trial)
    return result
