"""A landscape as a picture and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from src.icm.labelings import Evaluated, counts_by_kind
from src.icm.objectives import OBJECTIVES
from src.results.charts import Chart, Point, scatter
from src.results.landscape import Compared, Landscape, compare_objectives
from src.results.side_by_side import Grid
from src.results.text import number, visible

MOST_MARKS: Final = 4
"""Points with their names beside them."""


def chart_of(landscape: Landscape) -> Chart:
    """U against agreement, coloured by kind; gold and what searches found stand out."""
    dots: dict[str, list[Point]] = {}
    marks: dict[str, Point] = {}
    for each in landscape.evaluated:
        labeling = each.labeling
        point = Point(landscape.agreement(each), each.utility, _title(landscape, each))
        if labeling.kind in ("gold", "found") and len(marks) < MOST_MARKS:
            marks[visible(labeling.name if labeling.kind == "gold" else "found")] = point
        else:
            dots.setdefault(labeling.kind, []).append(point)
    return scatter(
        "U and truth" if landscape.has_gold else "U and its highest labeling",
        dots,
        "agreement with gold" if landscape.has_gold else "agreement with the highest U",
        "U",
        f"U of {len(landscape.evaluated)} labelings of one pool over their agreement with {landscape.against}.",
        marks,
    )


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


def _title(landscape: Landscape, each: Evaluated) -> str:
    return f"{each.labeling.name}: U {each.utility:.2f}, agreement {landscape.agreement(each):.2f}"
