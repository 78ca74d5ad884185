"""benchmarks/load.py: its bounds, and a small part of it for real: counts and growth, never times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import load


def test_a_small_load_keeps_its_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    file.write_text(json.dumps({"rows": [{"part": "memory", "wrong": 9}]}))
    assert load.main(["--quick", "--json", str(file)]) == 0, capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    assert [(row["part"], row["route"]) for row in rows] == [
        ("memory", "tree"),
        ("memory", "whole"),
        ("throughput", "process"),
        ("slow", "whole"),
    ]
    tree, whole, alone, stalled = rows
    assert (tree["answered"], tree["rows_in_cache"], tree["wrong"]) == (2000, 2000, 0)
    assert 0 < whole["most_requests_at_once"] <= 64
    assert alone["rows_in_cache"] == alone["answered"] >= alone["scores"]
    assert stalled["answered"] == 0
    assert stalled["most_requests_at_once"] == stalled["runs"]


def row(**changes: Any) -> dict[str, Any]:
    plain = {
        "part": "memory", "scores": 10**6, "answered": 10**6, "wrong": 0, "cache": True, "rows_in_cache": 10**6,
        "for_seconds": 0.0, "first_mb": 80.0, "peak_mb": 130.0, "slope_mb_a_million_scores": 1.0,
        "most_requests_at_once": 64,
    }  # fmt: skip
    return plain | changes


def test_every_bound_is_looked_at() -> None:
    assert load.broken_bounds(row(), quick=False) == []
    for changes, said in (
        ({"wrong": 1}, "1 wrong answers"),
        ({"rows_in_cache": 10**6 - 1}, "answers are missing in the cache"),
        ({"most_requests_at_once": 65}, "more than 64 requests at once"),
        ({"scores": 10**6 + 1}, "scores are missing"),
        ({"peak_mb": 601.0}, "601 MB of memory, and 600 are allowed"),
        ({"slope_mb_a_million_scores": 30.0}, "memory grows by 30.0 MB a million scores"),
    ):
        assert load.broken_bounds(row(**changes), quick=False) == [said]
    assert load.broken_bounds(row(peak_mb=141.0), quick=True) == ["memory grew by 61 MB"]


def test_best_and_median_of_equal_cases(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"part": "throughput", "claims": claims, "tokens": 8, "cache": False, "scores_a_second": rate,
         "scores_a_cpu_second": 2 * rate}
        for claims, rate in ((64, 10_000), (64, 30_000), (64, 21_000), (256, 19_999))
    ]  # fmt: skip
    assert load.too_slow(rows) == [
        "the client alone, 256 claims of 8 tokens, without a cache: fewer than 20,000 scores a second; "
        "is the machine busy?"
    ]
    told = capsys.readouterr().out
    assert "30,000 scores a second at best, 21,000 in the median; 60,000 and 42,000 a second of its CPU time" in told


def test_the_slope_is_that_of_the_second_half() -> None:
    looks = [(n * 1000, n * 0.1, 100_000_000 + min(n, 50) * 1_000_000 + max(n - 50, 0) * 1000) for n in range(101)]
    told = load.Memory(looks).summary()
    assert told["slope_mb_a_million_scores"] == pytest.approx(1.0)
    assert told["slope_mb_a_minute"] == pytest.approx(0.6)
    assert (told["first_mb"], told["peak_mb"]) == (100.0, 150.1)
    assert load.slope(np.ones(3), np.arange(3.0)) == 0.0


@pytest.mark.parametrize("flags", [["--runs", "0"], ["--small", "4"], ["--parts", "none"], ["--seconds", "-1"]])
def test_wrong_flags_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load.main(flags)
