"""Runs side by side as plain tables, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from src.icm.label_names import balance_of
from src.results.agreement import agreement_of, differing_settings, paired_test
from src.results.by_class import measure_text, name_of_f1
from src.results.charts import Chart, curve_charts
from src.results.costs import usage_of
from src.results.curves import curves_of
from src.results.prices import PriceFile, bill_of
from src.results.run_record import RunRecord
from src.results.tables import HANDED_OVER, ResultRow, handed_over, results_of
from src.results.text import duration, number, one_line, visible, whole


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of text: the first cell of a row is its name. caption: what the cells hold."""

    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def compare(runs: Sequence[RunRecord], prices: PriceFile | None = None) -> list[Grid]:
    """Settings that differ, results with intervals, cost, and how far the labels agree."""
    names = ["run", *(run.name for run in runs)]
    grids = [
        Grid(
            "Settings that differ",
            "what decides the labels, where it is not the same in every run",
            names,
            [[name, *map(_shown, values)] for name, values in differing_settings(runs).items()],
        ),
        Grid("Results", "agreement with gold and counts, balanced accuracy, F1; 95% intervals", names, _results(runs)),
        Grid("Cost", "of the searches", names, _costs(runs, prices)),
    ]
    if len(runs) > 1:
        grids.append(
            Grid(
                "Agreement between runs",
                "claims that both labelled; one right: of those with a gold label on which they differ",
                ["runs", "the same label", "kappa", "only first right", "only second right", "p"],
                _agreements(runs),
                "kappa: 1 the same, 0 as by chance, -1 mirror images. p: McNemar's exact test, two-sided.",
            )
        )
    return [grid for grid in grids if grid.rows]


def shared_curves(runs: Sequence[RunRecord]) -> list[Chart]:
    """The curves of all runs in the same panels."""
    curves = [(search.name, curves_of(search.journal, search.gold)) for run in runs for search in run.searches]
    balance = " or ".join(dict.fromkeys(visible(balance_of(run.names)) for run in runs))
    return curve_charts([(name, found) for name, found in curves if found.iteration], balance)


def as_text(grids: Sequence[Grid], width: int = 44) -> str:
    """The tables for a terminal; a cell is cut to `width` characters."""
    blocks = []
    for grid in grids:
        cells = [[one_line(cell, width) for cell in row] for row in (grid.columns, *grid.rows)]
        widths = [max(len(row[at]) for row in cells) for at in range(len(grid.columns))]
        lines = [f"{grid.title} ({grid.caption})"]
        for row in cells:
            first, *rest = row
            padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
            lines.append("  " + "  ".join(padded).rstrip())
        if grid.note:
            lines.append(f"  {grid.note}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _results(runs: Sequence[RunRecord]) -> list[list[str]]:
    found = [{row.title: row for row in results_of(run)} for run in runs]
    titles = dict.fromkeys(title for rows in found for title in rows)
    table = []
    for title in titles:
        cells = []
        for run, rows in zip(runs, found, strict=True):
            row = rows.get(title)
            if row is not None and row.interval is None and title == HANDED_OVER:
                cells.append(f"{handed_over(run)} labels")
            elif row is None or row.interval is None:
                cells.append("–")
            else:
                low, high = row.interval
                cells.append(f"{row.share:.3f} ({low:.3f} to {high:.3f}) {row.agreeing}/{row.compared}")
        table.append([title, *cells])
        classes = [_by_class(run, rows.get(title)) for run, rows in zip(runs, found, strict=True)]
        names = dict.fromkeys(name for one in classes for name in one)
        table += [[f"{title}, {name}", *(one.get(name, "–") for one in classes)] for name in names]
    last = [[search.journal[-1] for search in run.searches if search.journal] for run in runs]
    table.append(["U(D)", *(number(sum(r["U"] for r in found) / len(found)) if found else "–" for found in last)])
    table.append(["search", *(run.search for run in runs)])
    table.append(["labelled by the search", *(_labelled(run) for run in runs)])
    table.append(["state", *("finished" if run.finished else "not finished" for run in runs)])
    return table


def _by_class(run: RunRecord, row: ResultRow | None) -> dict[str, str]:
    """Balanced accuracy and F1 by name, where they are known."""
    if row is None:
        return {}
    found = {"balanced accuracy": row.by_class.balanced, name_of_f1(run.names): row.by_class.f1}
    return {name: measure_text(measure, 3) for name, measure in found.items() if measure is not None}


def _labelled(run: RunRecord) -> str:
    count = sum(claim.searched for claim in run.claims)
    known = sum(claim.is_known for claim in run.pool)
    return f"{count} of {len(run.pool)}" + (f", {known} known" if known else "")


def _costs(runs: Sequence[RunRecord], prices: PriceFile | None) -> list[list[str]]:
    used = [usage_of(run) for run in runs]
    rows = [
        ["time", *(duration(usage.seconds) for usage in used)],
        ["prompt tokens", *(whole(usage.search_tokens) for usage in used)],
        ["computed tokens", *(whole(usage.computed_tokens) for usage in used)],
        ["cache hit rate", *(number(usage.hit_rate, 3) for usage in used)],
        ["requests", *(whole(usage.requests) for usage in used)],
    ]
    bills = [bill_of(run, prices) for run in runs]
    if any(bills):
        rows.append(["money", *(f"{bill.total:,.4f} {bill.price.currency}" if bill else "–" for bill in bills)])
    return rows


def _agreements(runs: Sequence[RunRecord]) -> list[list[str]]:
    rows = []
    for first, second in combinations(runs, 2):
        found, test = agreement_of(first, second), paired_test(first, second)
        if not found.compared:
            rows.append([f"{first.name} / {second.name}", "no claim in common", "–", "–", "–", "–"])
            continue
        rows.append(
            [
                f"{first.name} / {second.name}",
                f"{found.agreeing / found.compared:.3f} ({found.agreeing} of {found.compared})",
                number(found.kappa),
                str(test.only_first) if test.compared else "–",
                str(test.only_second) if test.compared else "–",
                "–" if test.p is None else f"{test.p:.3g}",
            ]
        )
    return rows


def _shown(value: object) -> str:
    return "–" if value is None else str(value)
