"""The table of a sweep: one row for all seeds of the same settings, as text, CSV and JSON.

It holds only what the runs found. Times, costs and dates differ between two runs of the same sweep and stand in files
of their own, so that a sweep that was stopped and resumed ends in the same table to the byte.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Final

import orjson

from src.results.side_by_side import Grid
from src.results.statistics import Share
from src.results.text import duration, number, whole

DIGITS: Final = 6  # of figures in CSV and JSON
COSTS: Final = ("seconds", "asked", "from_cache", "tokens_sent", "tokens_cached", "tokens_computed")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure over the seeds. deviation: standard deviation, None for one seed. interval: 95%, where claims were
    judged. by_seed: its value for each seed. claims: distinct ones behind the interval."""

    mean: float
    deviation: float | None
    by_seed: Mapping[str, float]
    interval: tuple[float, float] | None = None
    claims: int | None = None

    @classmethod
    def of_share(cls, share: Share | None) -> Figure | None:
        """From agreement with gold."""
        if share is None:
            return None
        by_seed = {str(seed): right / compared for seed, (right, compared) in share.by_seed.items()}
        return cls(share.mean, share.deviation, by_seed, share.interval, share.claims)

    @classmethod
    def of_values(cls, by_seed: Mapping[str, float]) -> Figure | None:
        """From a number of each seed, which has no interval."""
        values = list(by_seed.values())
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, dict(by_seed)) if values else None


@dataclass(frozen=True, slots=True)
class SweepRow:
    """What the cells of the same settings found. values: of each dimension. label: which baseline; "" without.

    finished, cells: how many of its cells are finished, and how many there are. figures: by column; None where there
    is nothing to tell.
    """

    values: Mapping[str, str]
    label: str
    finished: int
    cells: int
    figures: Mapping[str, Figure | None]


@dataclass(frozen=True, slots=True)
class CellCost:
    """What one cell cost. values as in SweepRow. costs: by COSTS, what is known."""

    name: str
    values: Mapping[str, str]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class SweepTable:
    """A whole sweep. columns: its dimensions without the seeds. missing: cells that are not finished, and why as far as
    this process knows. shares: columns that are agreement with gold, 0 to 1."""

    title: str
    command: str
    columns: Sequence[str]
    rows: Sequence[SweepRow]
    costs: Sequence[CellCost]
    missing: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> list[str]:
        """The figures of any row, in order."""
        return list(dict.fromkeys(name for row in self.rows for name, each in row.figures.items() if each is not None))

    @property
    def has_labels(self) -> bool:
        return any(row.label for row in self.rows)

    @property
    def heads(self) -> list[str]:
        """The names of what tells rows apart."""
        return [*self.columns, *(["row"] if self.has_labels else [])]


def summary_of(table: SweepTable) -> str:
    """One line: how much of it there is."""
    finished, cells = (sum(numbers) for numbers in zip(*{
        tuple(row.values.values()): (row.finished, row.cells) for row in table.rows
    }.values(), strict=True))  # fmt: skip
    varied = ", ".join(table.columns) or "seeds"
    state = "" if finished == cells else f"; {cells - finished} not finished"
    return f"icm {table.command}, {cells} cells over {varied}{state}"


def grid_of(table: SweepTable) -> Grid:
    """For a terminal and a page."""
    heads = table.heads or ["sweep"]
    several = any(row.cells > 1 or row.finished < row.cells for row in table.rows)
    return Grid(
        table.title,
        "mean over seeds ± standard deviation (95% interval over distinct claims)",
        [*heads, *(["cells"] if several else []), *table.figures],
        [
            [
                *(_named(table, row) or ["all"]),
                *([_finished(row)] if several else []),
                *(_figure_text(name, row.figures.get(name)) for name in table.figures),
            ]
            for row in table.rows
        ],
    )


def cost_grid(table: SweepTable) -> Grid:
    """What each cell cost."""
    return Grid(
        "Cost",
        "of each cell: the searches, or all rows of a comparison",
        ["cell", "time", "questions", "from cache", "prompt tokens", "computed tokens", "cache hit rate"],
        [[cost.name, *_cost_cells(cost.costs)] for cost in table.costs],
        "Cells ask what they have in common once: the first to ask it pays. Times overlap where cells run at once.",
    )


def as_csv(table: SweepTable) -> str:
    """One line a row; of each figure its mean, standard deviation and interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    parts = ("", "_sd", "_low", "_high")
    figures = [f"{name.replace(' ', '_')}{part}" for name in table.figures for part in parts]
    writer.writerow([*table.heads, "cells", "of", *figures])
    for row in table.rows:
        numbers: list[object] = []
        for name in table.figures:
            found = row.figures.get(name)
            low, high = (None, None) if found is None or found.interval is None else found.interval
            numbers += [
                _rounded(v) for v in ((None,) * 4 if found is None else (found.mean, found.deviation, low, high))
            ]
        writer.writerow([*_named(table, row), row.finished, row.cells, *("" if v is None else v for v in numbers)])
    return file.getvalue()


def as_json(table: SweepTable) -> bytes:
    """All of the table, each seed's values too."""
    document = {
        "title": table.title,
        "command": table.command,
        "settings": table.settings,
        "columns": list(table.columns),
        "rows": [
            {
                "values": dict(row.values),
                **({"row": row.label} if row.label else {}),
                "cells": row.finished,
                "of": row.cells,
                "figures": {
                    name: None
                    if found is None
                    else {
                        "mean": _rounded(found.mean),
                        "sd": _rounded(found.deviation),
                        "interval": None if found.interval is None else [_rounded(end) for end in found.interval],
                        "claims": found.claims,
                        "seeds": {seed: _rounded(value) for seed, value in found.by_seed.items()},
                    }
                    for name, found in row.figures.items()
                },
            }
            for row in table.rows
        ],
        "missing": list(table.missing),
    }
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def costs_as_csv(table: SweepTable) -> str:
    """One line a cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    dimensions = list(dict.fromkeys(name for cost in table.costs for name in cost.values))
    writer.writerow(["cell", *dimensions, *COSTS])
    for cost in table.costs:
        writer.writerow([cost.name, *(cost.values.get(name, "") for name in dimensions),
                         *(cost.costs.get(name, "") for name in COSTS)])  # fmt: skip
    return file.getvalue()


def _named(table: SweepTable, row: SweepRow) -> list[str]:
    return [*(row.values[name] for name in table.columns), *([row.label] if table.has_labels else [])]


def _finished(row: SweepRow) -> str:
    return str(row.cells) if row.finished == row.cells else f"{row.finished} of {row.cells}"


def _figure_text(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "–"
    digits = 3 if figure.interval or name.startswith("zero-shot") else 1
    text = number(figure.mean, digits)
    if figure.deviation is not None:
        text += f" ± {number(figure.deviation, digits)}"
    return text if figure.interval is None else f"{text} ({figure.interval[0]:.3f} to {figure.interval[1]:.3f})"


def _cost_cells(costs: Mapping[str, float]) -> list[str]:
    cached, computed = costs.get("tokens_cached"), costs.get("tokens_computed")
    known = cached is not None and computed is not None and cached + computed > 0
    rate = cached / (cached + computed) if known and cached is not None and computed is not None else None
    return [
        duration(costs.get("seconds", 0.0)),
        whole(costs.get("asked")),
        whole(costs.get("from_cache")),
        whole(costs.get("tokens_sent")),
        whole(computed if known else None),
        number(rate, 3),
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS) + 0.0
