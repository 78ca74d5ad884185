"""A landscape as a picture and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final

from src.icm.consistency import Labels
from src.icm.labelings import Evaluated, counts_by_kind
from src.icm.objectives import OBJECTIVES
from src.results.charts import Chart, Point, scatter
from src.results.landscape import Compared, Landscape, compare_objectives
from src.results.side_by_side import Grid
from src.results.style import write_png
from src.results.text import number, one_line

MOST_MARKS: Final = 4
"""Points with their names beside them."""
LONGEST_MARK: Final = 24
"""Characters of a run's name beside its point."""
INCHES: Final = (8.0, 4.8)
"""Of the chart, which stands alone on its page."""


def chart_of(landscape: Landscape) -> Chart:
    """U against agreement, coloured by kind; gold and what searches found stand out."""
    dots: dict[str, list[Point]] = {}
    marked: dict[Labels, list[Evaluated]] = {}
    for each in landscape.evaluated:
        labels, kind = each.labeling.labels, each.labeling.kind
        if kind in ("gold", "found") and (labels in marked or len(marked) < MOST_MARKS):
            marked.setdefault(labels, []).append(each)
        else:
            dots.setdefault(kind, []).append(_point(landscape, each))
    several = sum(each.labeling.kind == "found" for each in landscape.evaluated) > 1
    marks = {
        ", ".join(
            one_line(each.labeling.name, LONGEST_MARK) if several else each.labeling.kind for each in same
        ): _point(landscape, same[-1])
        for same in marked.values()
    }
    chart = scatter(
        "U and truth" if landscape.has_gold else "U and its highest labeling",
        dots,
        "agreement with gold" if landscape.has_gold else "agreement with the highest U",
        "U",
        f"U of {len(landscape.evaluated)} labelings of one pool over their agreement with {landscape.against}.",
        marks,
    )
    chart.figure.set_size_inches(*INCHES)
    chart.figure.subplots_adjust(left=0.09, bottom=0.13, right=0.98, top=0.97)
    return chart


def write_picture(landscape: Landscape, path: Path, title: str) -> None:
    """The same chart as a PNG. Raises OSError."""
    write_png(chart_of(landscape).figure, path, title)


def grids_of(landscape: Landscape) -> list[Grid]:
    """Labelings by kind, and other objectives on the same labelings."""
    by_kind = {
        kind: [each for each in landscape.evaluated if each.labeling.kind == kind]
        for kind in counts_by_kind(each.labeling for each in landscape.evaluated)
    }
    with_gold = ["prefers to gold"] if landscape.gold_labeling is not None else []
    return [
        Grid(
            "Labelings by kind",
            f"U, and the share of claims that agree with {landscape.against}",
            ["kind", "labelings", "lowest U", "median U", "highest U", "agreement", "broken constraints"],
            [[kind, *_kind_cells(landscape, found)] for kind, found in by_kind.items()],
        ),
        Grid(
            "Objectives on the same labelings",
            f"how each orders them by their agreement with {landscape.against}",
            [
                "objective",
                "what it is",
                "rank correlation",
                "at its highest",
                "at its highest, without gold",
                *with_gold,
            ],
            _objective_rows(landscape, bool(with_gold)),
            "at its highest: agreement of the labeling that it likes best (the mean of equal ones), of all, and of "
            "those that were made without gold."
            + (" prefers to gold: labelings that it puts above gold." if with_gold else ""),
        ),
    ]


def _objective_rows(landscape: Landscape, with_gold: bool) -> list[list[str]]:
    def row(found: Compared, name: str, what: str) -> list[str]:
        shares = (f"{found.at_highest:.2f}", f"{found.at_highest_without_gold:.2f}")
        return [name, what, number(found.correlation), *shares, *([str(found.above_gold)] if with_gold else [])]

    rows = [row(found, found.objective, OBJECTIVES[found.objective][0]) for found in compare_objectives(landscape)]
    if any(each.evaluation.inconsistent for each in landscape.evaluated):
        mean, *_ = compare_objectives(landscape, constraints=False)
        rows.append(row(mean, f"{mean.objective} alone", "broken constraints not counted"))
    return rows


def _kind_cells(landscape: Landscape, found: Sequence[Evaluated]) -> list[str]:
    utilities = [each.utility for each in found]
    return [
        str(len(found)),
        *(number(value) for value in (min(utilities), median(utilities), max(utilities))),
        _span([f"{landscape.agreement(each):.2f}" for each in found]),
        _span([str(each.evaluation.inconsistent) for each in found]),
    ]


def _span(values: Sequence[str]) -> str:
    lowest, highest = min(values, key=float), max(values, key=float)
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _point(landscape: Landscape, each: Evaluated) -> Point:
    share = landscape.agreement(each)
    return Point(share, each.utility, f"{each.labeling.name}: U {each.utility:.2f}, agreement {share:.2f}")
