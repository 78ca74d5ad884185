"""The table of a sweep and its charts: what stands in the files, what is drawn how."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping

import pytest

from src.results.page import render_sweep
from src.results.side_by_side import as_text
from src.results.statistics import Judged, share_right
from src.results.sweep_charts import Mark, Roles, cost_charts, roles_of, sweep_charts
from src.results.sweep_table import CellCost, Figure, SweepRow, SweepTable, as_csv, as_json, costs_as_csv, grid_of


def figure(mean: float, *seeds: float) -> Figure:
    found = Figure.of_values({str(at): value for at, value in enumerate(seeds or (mean,))})
    assert found is not None
    return Figure(mean, found.deviation, found.by_seed, (mean - 0.1, mean + 0.1), 40)


def table(
    rows: Mapping[tuple[str, ...], Mapping[str, Figure]], columns: tuple[str, ...], label: bool = False
) -> SweepTable:
    """rows: by the values of the columns, and the baseline's name behind them."""
    found = [
        SweepRow(dict(zip(columns, key, strict=False)), key[-1] if label else "", 2, 2, figures)
        for key, figures in rows.items()
    ]
    costs = [
        CellCost(f"cell-{at}", row.values, {"asked": 100.0 * (at + 1), "tokens_sent": 9000.0, "seconds": 1.5})
        for at, row in enumerate(found)
    ]
    return SweepTable("A <b>sweep</b>", "label", columns, found, costs, {}, {"model": "m"})


ALPHAS = table(
    {
        (alpha, calibrate): {"agreement": figure(share, share - 0.1, share + 0.1), "U": figure(3.0)}
        for alpha, share in (("10", 0.5), ("30", 0.75), ("50", 0.875))
        for calibrate in ("none", "mean")
    },
    ("alpha", "calibrate"),
)


def test_a_share_of_several_seeds_has_their_spread_and_the_interval_of_distinct_claims() -> None:
    judged = [Judged(seed, claim, "g", claim < 3 + seed) for seed in (1, 2) for claim in range(8)]
    found = Figure.of_share(share_right(judged))
    assert found is not None
    assert (found.mean, found.by_seed, found.claims) == (4.5 / 8, {"1": 0.5, "2": 0.625}, 8)
    assert found.deviation == pytest.approx(0.125 / 2**0.5)
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] > 0.5  # of 8 claims, not of 16
    assert Figure.of_share(None) is None
    assert Figure.of_values({}) is None


def test_csv_and_json_hold_every_figure_with_its_interval() -> None:
    [head, first, *others] = csv.reader(as_csv(ALPHAS).splitlines())
    assert head == ["alpha", "calibrate", "cells", "of", "agreement", "agreement_sd", "agreement_low", "agreement_high",
                    "U", "U_sd", "U_low", "U_high"]  # fmt: skip
    assert first == ["10", "none", "2", "2", "0.5", "0.141421", "0.4", "0.6", "3.0", "", "2.9", "3.1"]
    assert len(others) == 5
    found = json.loads(as_json(ALPHAS))
    assert found["rows"][0]["figures"]["agreement"] == {
        "mean": 0.5, "sd": 0.141421, "interval": [0.4, 0.6], "claims": 40, "seeds": {"0": 0.4, "1": 0.6}
    }  # fmt: skip
    assert found["settings"] == {"model": "m"}
    [head, first, *_] = csv.reader(costs_as_csv(ALPHAS).splitlines())
    assert head[:4] == ["cell", "alpha", "calibrate", "seconds"]
    assert first[:5] == ["cell-0", "10", "none", "1.5", "100.0"]


def test_the_text_names_rows_and_says_which_cells_are_missing() -> None:
    [row, *_] = ALPHAS.rows
    partly = SweepTable("t", "label", ("alpha",), [SweepRow({"alpha": "10"}, "", 1, 2, row.figures)], (), {"c": "gone"})
    text = as_text([grid_of(partly)])
    assert "1 of 2" in text
    assert "0.500 ± 0.141 (0.400 to 0.600)" in text
    nothing = SweepTable("t", "label", ("alpha",), [SweepRow({"alpha": "10"}, "", 0, 1, {})], (), {"c": "gone"})
    assert "0 of 1" in as_text([grid_of(nothing)])


@pytest.mark.parametrize(
    ("settings", "roles"),
    [
        ([{"alpha": "10"}, {"alpha": "30"}], Roles("alpha", None, (), True)),
        ([{"alpha": a, "model": m} for a in ("1", "2") for m in ("x", "y")], Roles("alpha", "model", (), True)),
        (
            [{"testbed": t, "model": m} for t in ("p", "q", "r") for m in ("x", "y")],
            Roles("testbed", "model", (), False),
        ),
        (
            [{"testbed": t, "row": r} for t in ("p", "q") for r in ("icm", "gold")],
            Roles("row", None, ("testbed",), False),
        ),
        ([{"alpha": a, "row": r} for a in ("1", "2") for r in ("icm", "gold")], Roles("alpha", "row", (), True)),
        ([{"alpha": "10"}], None),
    ],
)
def test_numbers_run_along_x_and_baselines_stand_below_each_other(
    settings: list[dict[str, str]], roles: Roles | None
) -> None:
    assert roles_of([Mark(values, figure(0.5)) for values in settings]) == roles


def test_charts_hold_every_mean_interval_and_seed() -> None:
    agreement, utility = sweep_charts(ALPHAS)
    assert (agreement.title, utility.title) == ("agreement", "U")
    assert "none, 50: 0.875 (0.775 to 0.975)" in agreement.description
    assert [name for name, _ in agreement.legend] == ["calibrate none", "calibrate mean"]
    svg = agreement.svg("a-")
    assert svg.count("<title") >= 3 * 6  # a mean, an interval and two seeds of each of six
    assert ">30<" in svg
    assert [chart.title for chart in cost_charts(ALPHAS)] == ["questions", "prompt tokens", "seconds"]


def test_each_testbed_is_a_panel_with_a_line_for_every_baseline() -> None:
    rows = {(bed, row): {"held-out": figure(0.6), "pool": figure(0.7)} for bed in ("p", "q") for row in ("icm", "gold")}
    charts = sweep_charts(table(rows, ("testbed",), label=True))
    assert [chart.title for chart in charts] == ["held-out: testbed p", "held-out: testbed q",
                                                 "pool: testbed p", "pool: testbed q"]  # fmt: skip
    assert ">icm<" in charts[0].svg("a-")


def test_a_wide_range_of_numbers_is_on_a_scale_of_powers() -> None:
    rows = {(k,): {"agreement": figure(0.5)} for k in ("1", "10", "100")}
    [chart] = sweep_charts(table(rows, ("K",)))
    assert chart.figure.axes[0].get_xscale() == "log"
    below_zero = {(k,): {"agreement": figure(0.5)} for k in ("-1", "0", "100")}
    [chart] = sweep_charts(table(below_zero, ("K",)))
    assert chart.figure.axes[0].get_xscale() == "linear"


def test_the_page_shows_other_people_s_text_as_text() -> None:
    page = render_sweep(ALPHAS)
    assert "<b>sweep" not in page
    assert "A &lt;b&gt;sweep&lt;/b&gt;" in page
    assert 'href="cell-0/labels.jsonl"' in page
    missing = SweepTable("t", "label", ("alpha",), ALPHAS.rows[:1], (), {"cell-9": "no <server> answers"})
    assert "no &lt;server&gt; answers" in render_sweep(missing)
