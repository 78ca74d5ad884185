"""A finished run in a few lines: one of a thing is not called several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.experiments.summary import print_summary
from src.results.run_folder import RunFolder


def shown(capsys: pytest.CaptureFixture[str], count: int, utility: float = 1.0) -> str:
    result: dict[str, Any] = {
        "labelled": count, "iterations": count, "inconsistent": count, "true_labels": 0, "U": utility,
        "predictability": utility, "icm": (0, 0), "zero_shot": (0, 0), "predicted": {}, "warning": None,
    }  # fmt: skip
    document = {
        "result": result,
        "settings": {"testbed": "mine", "alpha": 30.0, "calibrate": "mean"},
        "engine": {"model": "m"},
        "cost": {"seconds": 1.0, "tokens_computed": 0, "floored": count},
        "left_out": count,
    }
    print_summary(RunFolder(Path("there")), document)
    return capsys.readouterr().out


def test_one_is_one_and_two_are_two(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = shown(capsys, 1), shown(capsys, 2)
    for told in ("mine: 1 claim labelled", "1 iteration,", "- 1 inconsistent pair;", "1 claim of the file is outside"):
        assert told in one
    assert "1 answer lacked a label token and was floored" in one
    for told in ("mine: 2 claims labelled", "2 inconsistent pairs;", "2 claims of the file are", "2 answers lacked"):
        assert told in two


def test_nothing_is_minus_zero(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, 2, -1e-9)
    assert "-0.0" not in told
    assert "U 0.00: 30 x 0.000 nat" in told
