"""What the finished cells of a sweep found and cost, as its table. Asks no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any, Final

from src.experiments.baseline_table import TableFolder, row_documents
from src.experiments.sweep_cells import Cell, Sweep
from src.icm.label_names import confusion
from src.icm.testbeds import BadInput
from src.pipeline.baselines import BASELINES
from src.pipeline.baselines.row_result import RowResult
from src.results.by_class import Measure, by_class, over_seeds
from src.results.costs import usage_of
from src.results.run_folder import RunFolder
from src.results.run_reader import read_run
from src.results.run_record import RunRecord
from src.results.statistics import Judged, share_right
from src.results.sweep_table import CellCost, Figure, SweepRow, SweepTable

COUNTS: Final = {
    "U": "U",
    "labelled": "labelled",
    "inconsistent pairs": "inconsistent",
    "iterations": "iterations",
}
"""Columns of a sweep of searches, and where run.json's result has them."""


def is_finished(folder: Path, command: str) -> bool:
    """Whether the cell in `folder` holds a result. Raises BadInput where its file is damaged."""
    if command == "label":
        known = RunFolder(folder).read_run()
        return known is not None and "result" in known
    table = TableFolder(folder).read_table()
    return table is not None and bool(table["complete"])


def result_line(folder: Path) -> str:
    """The result of a finished cell in a few words."""
    known = RunFolder(folder).read_run()
    if known is not None:
        agreeing, compared = known["result"]["icm"]
        return f"U {known['result']['U']:.1f}" + (f", agreement {agreeing / compared:.2f}" if compared else "")
    document = TableFolder(folder).read_table()
    shares = [(row["title"], row["test"]) for row in (document or {}).get("rows", ())]
    return ", ".join(f"{title} {share['mean']:.2f}" for title, share in shares if share is not None)


def costs_of(folder: Path, command: str) -> Mapping[str, float]:
    """What a finished cell cost."""
    if command == "label":
        run = read_run(folder)
        return {**run.cost, "tokens_sent": usage_of(run).prompt_tokens}
    tables = TableFolder(folder)
    document = tables.read_table() or {"rows_asked": (), "seeds_asked": ()}
    results = tables.read_results(document["rows_asked"], document["seeds_asked"])
    return _cost_of_rows([result for of_row in results.values() for result in of_row.values()])


def table_of(sweep: Sweep, folder: Path, failed: Mapping[str, str]) -> SweepTable:
    """Every finished cell of the sweep in `folder`. failed: why others are not, by name."""
    experiment, missing = sweep.loaded.experiment, dict[str, str]()
    groups: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    finished: dict[tuple[str, ...], list[Cell]] = defaultdict(list)
    for cell in sweep.cells:
        key = tuple(cell.values[name] for name in sweep.columns)
        groups[key].append(cell)
        try:
            whole = is_finished(folder / cell.name, experiment.command)
        except BadInput as error:
            failed = {cell.name: str(error), **failed}
            whole = False
        if whole and cell.name not in failed:
            finished[key].append(cell)
        else:
            missing[cell.name] = failed.get(cell.name, "not finished")
    rows: list[SweepRow] = []
    costs: dict[str, Mapping[str, float]] = {}
    for key, cells in groups.items():
        values = dict(zip(sweep.columns, key, strict=True))
        make = _of_searches if experiment.command == "label" else _of_comparisons
        figures, spent = make(folder, finished[key])
        costs |= spent
        counts = (len(finished[key]), len(cells))
        rows += [SweepRow(values, label, *counts, found) for label, found in (figures or {"": {}}).items()]
    return SweepTable(
        experiment.title,
        experiment.command,
        sweep.columns,
        rows,
        [CellCost(cell.name, cell.values, costs[cell.name]) for cell in sweep.cells if cell.name in costs],
        missing,
        dict(experiment.settings),
    )


Figures = dict[str, dict[str, Figure | None]]
"""By row and column."""


def _of_searches(folder: Path, cells: Sequence[Cell]) -> tuple[Figures, dict[str, Mapping[str, float]]]:
    """Of cells that differ in their seed alone."""
    runs = {cell.name: read_run(folder / cell.name) for cell in cells}
    if not runs:
        return {}, {}
    results = {str(run.settings.get("seed")): run.result or {} for run in runs.values()}
    figures: dict[str, Figure | None] = {}
    for name, in_pool in (("agreement", True), ("held-out", False)):
        share = share_right(_judged(runs.values(), in_pool=in_pool))
        figures[name] = Figure.of_share(share)
        by_seed = {
            str(run.settings.get("seed")): confusion(
                [(claim.label, claim.gold_to_find) for claim in run.claims if claim.in_pool == in_pool], run.num_labels
            )
            for run in runs.values()
        }
        classes = over_seeds(list(by_seed.values()), 0 if share is None else share.claims)
        each = {seed: by_class(table) for seed, table in by_seed.items()}
        prefix = "" if in_pool else "held-out "
        figures[f"{prefix}balanced accuracy"] = _measure(
            classes.balanced, {seed: one.balanced for seed, one in each.items()}
        )
        figures[f"{prefix}F1"] = _measure(classes.f1, {seed: one.f1 for seed, one in each.items()})
    for name, key in (("zero-shot", "zero_shot"), ("zero-shot calibrated", "zero_shot_calibrated")):
        counts = {seed: result.get(key) or (0, 0) for seed, result in results.items()}
        shares = {seed: right / compared for seed, (right, compared) in counts.items() if compared}
        figures[name] = Figure.of_values(shares)
    for name, key in COUNTS.items():
        figures[name] = Figure.of_values({seed: float(result[key]) for seed, result in results.items()})
    warned = {seed: float(bool(result.get("warning"))) for seed, result in results.items()}
    figures["warnings"] = Figure.of_values(warned) if any(warned.values()) else None
    return {"": figures}, {name: run.cost for name, run in runs.items()}


def _judged(runs: Iterable[RunRecord], *, in_pool: bool) -> list[Judged]:
    """Each label against gold: of the pool, or of the claims outside it."""
    return [
        Judged(int(run.settings.get("seed", 0)), claim.row, claim.group, claim.agrees)
        for run in runs
        for claim in run.claims
        if claim.in_pool == in_pool and claim.agrees is not None
    ]


def _measure(measure: Measure | None, by_seed: Mapping[str, Measure | None]) -> Figure | None:
    if measure is None:
        return None
    values = {seed: one.value for seed, one in by_seed.items() if one is not None}
    deviation = stdev(values.values()) if len(values) > 1 else None
    return Figure(measure.value, deviation, values, measure.interval)


def _of_comparisons(folder: Path, cells: Sequence[Cell]) -> tuple[Figures, dict[str, Mapping[str, float]]]:
    """Of tables of baselines that differ in their seeds alone."""
    merged: dict[str, dict[int, RowResult]] = {}
    costs: dict[str, Mapping[str, float]] = {}
    for cell in cells:
        tables = TableFolder(folder / cell.name)
        document = tables.read_table()
        assert document is not None
        results = tables.read_results(document["rows_asked"], document["seeds_asked"])
        for row, of_row in results.items():
            merged.setdefault(row, {}).update(of_row)
        costs[cell.name] = _cost_of_rows([result for of_row in results.values() for result in of_row.values()])
    in_order = {row: dict(sorted(merged[row].items())) for row in BASELINES if row in merged}
    figures: Figures = {}
    for document in row_documents(in_order):
        utilities = dict(zip(map(str, document["seeds"]), document.get("U", ()), strict=False))
        figures[document["row"]] = {
            "held-out": _summary(document["test"]),
            "held-out balanced accuracy": _class_summary(document["test"], "balanced_accuracy"),
            "held-out F1": _class_summary(document["test"], "f1"),
            "pool": _summary(document["pool"]),
            "U": Figure.of_values(utilities),
        }
    return figures, costs


def _summary(share: Mapping[str, Any] | None) -> Figure | None:
    if share is None:
        return None
    by_seed = {str(each["seed"]): each["agreeing"] / each["compared"] for each in share["seeds"]}
    return Figure(share["mean"], share["sd"], by_seed, tuple(share["interval"]), share["claims"])


def _class_summary(share: Mapping[str, Any] | None, name: str) -> Figure | None:
    """Balanced accuracy or F1 over the seeds."""
    found = (share or {}).get(name)
    return None if found is None else Figure(found["value"], None, {}, tuple(found["interval"]))


def _cost_of_rows(results: Sequence[RowResult]) -> dict[str, float]:
    costs = [result.cost for result in results]
    sent, cached = sum(cost.prompt_tokens for cost in costs), sum(cost.cached_tokens for cost in costs)
    return {
        "seconds": round(sum(cost.seconds for cost in costs), 3),
        "asked": sum(cost.asked for cost in costs),
        "tokens_sent": sent,
        **({"tokens_cached": cached, "tokens_computed": sent - cached} if cached else {}),
    }
