"""The table of results: by class where the claims say it, without it where an older run's files do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from src.results.by_class import NOTHING, by_class_of
from src.results.run_record import LabelledClaim, RunRecord
from src.results.side_by_side import as_text, compare
from src.results.tables import result_text, results_of


def claim(row: int, *, label: bool, gold: bool | None, zero_shot: float | None, by: str = "icm") -> LabelledClaim:
    return LabelledClaim(row, f"g{row}", "q", "c", label=label, log_odds=1.0, gold=gold, by=by, zero_shot=zero_shot)


def skewed_run(**settings: Any) -> RunRecord:
    """Nine of twelve are True; the search says eleven are. Zero-shot all are above 0, and three above their mean."""
    claims = [claim(at, label=at != 11, gold=at < 9, zero_shot=9.0 if at < 3 else 1.0) for at in range(12)]
    outside = [claim(20 + at, label=True, gold=at == 0, zero_shot=None, by="many-shot") for at in range(2)]
    result = {
        "icm": [10, 12],
        "zero_shot": [9, 12],
        "zero_shot_calibrated": [6, 12],
        "predicted": {"many-shot": [1, 2]},
    }
    return RunRecord("r", {"calibrate": "mean", **settings}, (*claims, *outside), result=result)


def test_each_row_has_the_figures_of_its_own_labels() -> None:
    run = skewed_run()
    icm, zero_shot, calibrated, many_shot = results_of(run)
    assert icm.by_class == by_class_of([(claim.label, claim.gold) for claim in run.claims[:12]], 2)
    assert icm.by_class.balanced is not None
    assert icm.by_class.balanced.value == pytest.approx((1 + 1 / 3) / 2)
    assert zero_shot.by_class.balanced is not None
    assert zero_shot.by_class.balanced.value == 0.5
    assert calibrated.by_class.balanced is not None
    assert calibrated.by_class.balanced.value == pytest.approx((3 / 9 + 1) / 2)
    assert many_shot.by_class.balanced is not None
    assert many_shot.by_class.balanced.value == 0.5
    said = result_text(icm, run.names)
    assert "; balanced accuracy 0.67 (" in said
    assert ", F1 of True 0.90 (" in said


@pytest.mark.parametrize("prior", [0.25, "auto"])
def test_calibrated_labels_are_those_of_the_runs_share(prior: object) -> None:
    run = replace(skewed_run(prior=prior), prior_estimate={"prior": 0.25})
    _, _, calibrated, _ = results_of(run)
    assert run.prior == 0.25
    assert calibrated.by_class.balanced is not None
    assert calibrated.by_class.balanced.value == pytest.approx((3 / 9 + 1) / 2)
    assert replace(run, prior_estimate={"prior": None}).prior == (0.25 if prior == 0.25 else None)


def test_an_older_run_without_zero_shot_log_odds_shows_accuracy_alone() -> None:
    run = skewed_run()
    older = replace(run, claims=tuple(replace(claim, zero_shot=None) for claim in run.claims))
    icm, zero_shot, calibrated, _ = results_of(older)
    assert icm.by_class != NOTHING
    assert zero_shot.by_class == calibrated.by_class == NOTHING
    assert result_text(zero_shot, run.names) == "0.75 (9 of 12, 95% interval 0.47 to 0.91)"


def test_runs_side_by_side_have_rows_of_both_figures() -> None:
    text = as_text(compare([skewed_run(), replace(skewed_run(), name="s", claims=(), result=None)]))
    assert "ICM, balanced accuracy" in text
    assert "zero-shot, calibrated, F1 of True" in text
