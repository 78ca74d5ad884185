"""A finished run in a few lines: one of a thing is not called several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.experiments.summary import print_summary
from src.results.run_folder import RunFolder


def shown(folder: Path, capsys: pytest.CaptureFixture[str], count: int, utility: float = 1.0, **more: Any) -> str:
    """What a run whose labels.jsonl is not there says. more: of its result."""
    result: dict[str, Any] = {
        "labelled": count, "iterations": count, "inconsistent": count, "true_labels": 0, "U": utility,
        "predictability": utility, "icm": (0, 0), "zero_shot": (0, 0), "predicted": {}, "warning": None,
    } | more  # fmt: skip
    document = {
        "result": result,
        "settings": {"testbed": "mine", "alpha": 30.0, "calibrate": "mean"},
        "engine": {"model": "m"},
        "cost": {"seconds": 1.0, "tokens_computed": 0, "floored": count},
        "left_out": count,
    }
    folder.mkdir(exist_ok=True)
    run = RunFolder(folder)
    run.write_run(document)
    print_summary(run, document)
    return capsys.readouterr().out


def test_one_is_one_and_two_are_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = shown(tmp_path / "one", capsys, 1), shown(tmp_path / "two", capsys, 2)
    for told in ("mine: 1 claim labelled", "1 iteration,", "- 1 inconsistent pair;", "1 claim of the file is outside"):
        assert told in one
    assert "1 answer lacked a label token and was floored" in one
    for told in ("mine: 2 claims labelled", "2 inconsistent pairs;", "2 claims of the file are", "2 answers lacked"):
        assert told in two


def test_known_labels_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "  known labels         3, kept; the others" in shown(tmp_path / "a", capsys, 2, known=3)
    assert "known labels" not in shown(tmp_path / "b", capsys, 2)


def test_nothing_is_minus_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(tmp_path / "run", capsys, 2, -1e-9)
    assert "-0.0" not in told
    assert "U 0.00: 30 x 0.000 nat" in told
