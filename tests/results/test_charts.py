"""Charts: what they show, and that a page can hold them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from src.results.charts import (
    MOST_POINTS,
    Chart,
    Point,
    calibration_chart,
    calibration_error,
    contrast_chart,
    curve_charts,
    line_chart,
    margin_chart,
    scatter,
)
from src.results.curves import curves_of
from src.results.plots import draw_curves
from src.results.run_reader import read_run
from src.results.style import PANEL, VARIABLES, write_png
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(chart: Chart) -> ET.Element:
    return ET.fromstring(chart.svg("c-"))


def line_points(chart: Chart) -> list[tuple[float, float]]:
    """The first line's, in the SVG's units."""
    path = next(one.get("d", "") for one in drawn(chart).iter(f"{SVG}path") if one.get("stroke") == "var(--s0)")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.e]+) ([-\d.e]+)", path)]


def y_ticks(chart: Chart) -> list[float]:
    """The numbers beside the y axis, from below."""
    texts = [one for one in drawn(chart).iter(f"{SVG}text") if one.get("text-anchor") == "end"]
    return [float((one.text or "").replace("\N{MINUS SIGN}", "-")) for one in texts]


def titles(chart: Chart) -> list[str]:
    """What is seen when pointing at a piece of the chart."""
    return [one.text or "" for one in drawn(chart).iter(f"{SVG}title")][1:]


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e4, 1e4, allow_nan=False), st.floats(0.01, 1e4, allow_nan=False))
def test_ticks_are_few_and_lie_within(low: float, span: float) -> None:
    chart = line_chart("U", [("a", range(2), [low, low + span])], "units")
    assert chart is not None
    found = y_ticks(chart)
    slack = 0.021 * span + 1e-6 * abs(low)
    assert all(low - slack <= value <= low + span + slack for value in found)
    assert 1 <= len(found) <= 8
    assert found == sorted(found)


def test_ticks_are_round() -> None:
    share = line_chart("Acceptance", [("a", range(2), [0.3, 0.4])], "share", limits=(0, 1))
    wide = line_chart("U", [("a", range(2), [-13.2, 159.0])], "units")
    assert share is not None
    assert wide is not None
    assert y_ticks(share) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert y_ticks(wide) == [0.0, 50.0, 100.0, 150.0]


@settings(deadline=None, max_examples=40)
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
    axes = chart.figure.axes[0].get_position()
    for x, y in line_points(chart):
        assert axes.x0 * PANEL[0] - 0.01 <= x <= axes.x1 * PANEL[0] + 0.01
        assert (1 - axes.y1) * PANEL[1] - 0.01 <= y <= (1 - axes.y0) * PANEL[1] + 0.01


@pytest.mark.parametrize(("points", "marked"), [(1, True), (3, True), (40, False)])
def test_few_points_are_marked_for_a_line_through_one_is_not_seen(points: int, marked: bool) -> None:
    chart = line_chart("U", [("a", range(1, points + 1), [float(n) for n in range(points)])], "units")
    assert chart is not None
    (line,) = chart.figure.axes[0].get_lines()
    assert (line.get_marker() not in ("", "None")) is marked


def test_the_picture_of_one_iteration_has_no_fractions_of_iterations_or_claims(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=HALF[:4], gold=HALF[:4]))
    _, _, labelled, balance = draw_curves(run.journal[:1], run.gold).axes
    for axis in (labelled.xaxis, labelled.yaxis, balance.xaxis):
        low, high = axis.get_view_interval()
        assert all(float(tick).is_integer() for tick in axis.get_majorticklocs() if low <= tick <= high)


def test_a_long_line_is_thinned_and_keeps_its_extremes() -> None:
    values: list[float | None] = [0.0] * 20_000
    values[12_345], values[17] = 9.0, -9.0
    chart = line_chart("U", [("a", range(20_000), values)], "units")
    assert chart is not None
    assert len(line_points(chart)) <= MOST_POINTS + 4
    (line,) = chart.figure.axes[0].get_lines()
    heights = [float(y) for y in line.get_ydata()]  # type: ignore[union-attr]
    assert (min(heights), max(heights)) == (-9.0, 9.0)
    top, bottom = min(y for _, y in line_points(chart)), max(y for _, y in line_points(chart))
    assert bottom - top > 0.7 * PANEL[1]
    assert "lowest -9" in chart.description


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
    assert [name for name, _ in chart.legend] == ["final", "zero-shot"]
    assert {title.split(",")[0] for title in titles(chart)} == {"final", "zero-shot"}
    assert any("20 of 20 are True" in title for title in titles(chart))
    bars = margin_chart(run)
    assert bars is not None
    assert sum(int(title.split()[0]) for title in titles(bars)) == 40
    contrast = contrast_chart(run)
    assert contrast is not None
    assert sorted(int(title.split()[1].strip(",")) for title in titles(contrast)) == list(range(40))


def labelings() -> Chart:
    kinds = {kind: [Point(n, 0.5 + n / 100, f"{kind} {n}") for n in range(20)] for kind in ("random", "flipped <b>")}
    marks = {"gold": Point(30.0, 1.0), "found": Point(25.0, 0.9, "U 25.00")}
    return scatter("Labelings", kinds, "U", "agreement with gold", "U of 40 labelings", marks)


def test_a_scatter_has_a_colour_a_kind_and_names_what_stands_out() -> None:
    chart = labelings()
    root = drawn(chart)
    fills = [one.get("fill") for one in root.iter() if one.tag in (f"{SVG}use", f"{SVG}path")]
    assert (fills.count("var(--s0)"), fills.count("var(--s1)"), fills.count("var(--ink)")) == (20, 20, 2)
    assert chart.legend == [("random", 0), ("flipped <b>", 1)]
    assert {"gold", "found", "U", "agreement with gold"} <= {one.text for one in root.iter(f"{SVG}text")}
    assert {"random 0", "flipped <b> 19", "gold", "U 25.00"} <= set(titles(chart))


def test_the_same_chart_has_the_same_bytes_and_nothing_that_the_page_forbids() -> None:
    text = labelings().svg("c-")
    assert text == labelings().svg("c-")
    root = ET.fromstring(text)
    assert not [one for one in root.iter() if one.tag == f"{SVG}style" or one.get("style") or one.get("clip-path")]
    names = [name for one in root.iter() if (name := one.get("id"))]
    assert len(names) == len(set(names))
    assert all(name.startswith("c-") for name in names)
    title = root[0]
    assert (title.text, root.get("aria-labelledby"), root.get("role")) == ("U of 40 labelings", title.get("id"), "img")


def test_every_colour_is_one_of_the_page() -> None:
    css = Path("src/results/templates/style.css").read_text(encoding="utf-8")
    light = css.split("@media", 1)[0]
    for color, variable in VARIABLES.items():
        assert f"{variable.removeprefix('var(').rstrip(')')}: {color};" in light
    chart = labelings()
    assert not re.search(r"(fill|stroke)=.#", chart.svg("c-"))


def test_names_are_text_whatever_they_are() -> None:
    name = "<script>$x^2$ \ud800 \x07 \N{CJK UNIFIED IDEOGRAPH-6C49} \ufffe"
    chart = line_chart(name, [(name, range(3), [1.0, 2.0, None])], name)
    assert chart is not None
    text = chart.svg("c-")
    assert "<script" not in text
    assert "$x^2$" in text
    assert "<U+D800>" in "".join(drawn(chart).itertext())


def test_a_chart_as_a_file_has_a_title_and_a_legend(tmp_path: Path) -> None:
    chart = labelings()
    write_png(chart.figure, tmp_path / "c.png", "40 labelings")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    (legend,) = chart.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["random", "flipped <b>"]
