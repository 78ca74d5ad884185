"""Charts as geometry."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from src.results.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Tick,
    calibration_chart,
    calibration_error,
    contrast_chart,
    curve_charts,
    line_chart,
    margin_chart,
    ticks,
)
from src.results.curves import curves_of
from src.results.run_reader import read_run
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, allow_nan=False), st.floats(0.001, 1e6, allow_nan=False), st.integers(2, 8))
def test_ticks_are_few_and_lie_within(low: float, span: float, about: int) -> None:
    found = ticks(low, low + span, about)
    slack = span * 1e-6
    assert all(low - slack <= value <= low + span + slack for value in found)
    assert 1 <= len(found) <= 2 * about + 2
    assert found == sorted(found)


def test_ticks_are_round() -> None:
    assert ticks(0, 1, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-13.2, 159, 5) == [0.0, 50.0, 100.0, 150.0]


@settings(deadline=None)
@given(st.lists(st.floats(-1e5, 1e5, allow_nan=False) | st.none(), min_size=1, max_size=60))
@example([0.0, 5e-324])
@example([0.0, 1e-13])
@example([1e16, 1e16 + 4])
def test_lines_stay_inside_their_frame(values: list[float | None]) -> None:
    chart = line_chart("U", [("a", range(len(values)), values)], "units")
    if all(value is None for value in values):
        assert chart is None
        return
    assert chart is not None
    for x, y in re.findall(r"[ML]([-\d.e+]+) ([-\d.e+]+)", chart.lines[0].path):
        assert LEFT - 0.01 <= float(x) <= WIDTH - RIGHT + 0.01
        assert TOP - 0.01 <= float(y) <= HEIGHT - BOTTOM + 0.01


def test_a_long_line_is_thinned_and_keeps_its_extremes() -> None:
    values: list[float | None] = [0.0] * 20_000
    values[12_345], values[17] = 9.0, -9.0
    chart = line_chart("U", [("a", range(20_000), values)], "units")
    assert chart is not None
    points = re.findall(r"[ML][\d.]+ ([\d.]+)", chart.lines[0].path)
    assert len(points) <= MOST_POINTS + 4
    assert min(map(float, points)) == pytest.approx(_height(9.0, chart.y_ticks), abs=0.1)
    assert "lowest -9" in chart.description


def _height(value: float, marks: list[Tick]) -> float:
    """Where `value` stands, told from the axis alone."""
    low, high = marks[0], marks[-1]
    share = (value - float(low.text)) / (float(high.text) - float(low.text))
    return low.at + share * (high.at - low.at)


def test_the_curves_of_a_run_and_of_two(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=HALF, gold=HALF))
    one = curve_charts([("a", curves_of(run.journal, run.gold))])
    titles = [chart.title for chart in one]
    for wanted in (
        "U(D)",
        "Agreement with gold",
        "Temperature",
        "Acceptance",
        "Label balance",
        "Prefix cache hit rate",
    ):
        assert wanted in titles
    assert not one[0].legend
    curves = curves_of(run.journal, run.gold)
    two = curve_charts([("a", curves), ("b", curves)])
    assert [name for name, _ in two[0].legend] == ["a", "b"]


def test_without_gold_there_is_no_accuracy_and_no_calibration(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=HALF))
    titles = [chart.title for chart in curve_charts([("a", curves_of(run.journal, run.gold))])]
    assert "Agreement with gold" not in titles
    assert calibration_chart(run) is None
    margins = margin_chart(run)
    assert margins is not None
    assert margins.legend[0][0] == "True (label)"
    assert contrast_chart(run) is None


def test_calibration_error_by_hand() -> None:
    pairs = [(0.9, True)] * 9 + [(0.9, False)] + [(0.2, False)] * 8 + [(0.2, True)] * 2
    assert calibration_error(pairs) == pytest.approx(0.0)
    assert calibration_error([(0.9, False)] * 5) == pytest.approx(0.9)


def test_a_calibration_plot_tells_its_counts(tmp_path: Path) -> None:
    odds = [2.2 if label else -2.2 for label in HALF]
    run = read_run(write_run(tmp_path / "a", labels=HALF, gold=HALF, log_odds=odds, zero_shot=odds))
    chart = calibration_chart(run)
    assert chart is not None
    assert {dot.series for dot in chart.dots} == {0, 1}
    assert any("20 of 20 are True" in dot.told for dot in chart.dots)
    bars = margin_chart(run)
    assert bars is not None
    assert sum(int(bar.told.split()[0]) for bar in bars.bars) == 40
    contrast = contrast_chart(run)
    assert contrast is not None
    assert len(contrast.dots) == 40
