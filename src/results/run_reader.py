"""Reading runs that may be finished, in progress, stopped, of an older version, or partly damaged.

Nothing is written and nothing locked, so a run in progress is never disturbed. Lines that cannot be read are left out
and counted; only a folder without a run is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from core.settings import KEPT_IN
from src.icm.consistency import Constraint, Relation
from src.icm.label_names import Names, names_of, read_label, read_odds
from src.icm.testbeds import BadInput
from src.results.rows import ABSTAINED, labelled_row
from src.results.run_record import KNOWN, LabelledClaim, RunRecord, batch_of, with_journal_labels
from src.results.run_schema import RunDocument, first_complaint, journal_line

BASELINES = "baselines.json"
RUNS = KEPT_IN / "runs"
"""Where commands keep runs unless told otherwise, from whatever folder they are run."""


class SeedCount(BaseModel):
    """One seed's agreement with gold: counts."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seed: int
    agreeing: int
    compared: int


class Versus(BaseModel):
    """A paired comparison with another row: difference of accuracies, its 95% interval, two-sided p."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    difference: float
    interval: tuple[float, float]
    p: float | None = None


class MeasureSummary(BaseModel):
    """The mean over seeds of a figure other than accuracy, and its 95% interval."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    value: float
    interval: tuple[float, float]


class SetSummary(BaseModel):
    """A row's agreement on one set of claims over the seeds. interval: 95%, on the number of distinct claims.
    balanced_accuracy and f1 as in by_class.py; None in older tables."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    seeds: list[SeedCount] = []
    mean: float | None = None
    sd: float | None = None
    claims: int = 0
    interval: tuple[float, float] | None = None
    versus: dict[str, Versus] = {}
    balanced_accuracy: MeasureSummary | None = None
    f1: MeasureSummary | None = None


class BaselineRow(BaseModel):
    """One baseline. pool: its labels of the pool. test: of held-out claims, with those labels as demonstrations."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    row: str
    title: str
    pool: SetSummary | None = None
    test: SetSummary | None = None
    cost: dict[str, float] = {}


class BaselineTable(BaseModel):
    """baselines.json: baselines on the same pools."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = ""
    settings: dict[str, Any] = {}
    seeds: list[int] = []
    seeds_asked: list[int] = []
    complete: bool = True
    rows: list[BaselineRow] = []


def is_baselines(folder: Path) -> bool:
    """Whether `folder` holds a table of baselines rather than a run."""
    return (folder / BASELINES).is_file()


def read_baselines(folder: Path) -> tuple[BaselineTable, list[RunRecord]]:
    """The table of `folder` and the searches of its seeds. Raises BadInput where the table cannot be read."""
    path = folder / BASELINES
    try:
        document = orjson.loads(path.read_bytes())
        table = BaselineTable.model_validate({**document, "name": folder.resolve().name})
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BadInput(f"{path}: is damaged ({error})") from None
    except ValidationError as error:
        raise BadInput(f"{path}: {first_complaint(error)}") from None
    found = sorted(folder.glob("seed-*/run.json"), key=lambda file: (len(file.parent.name), file.parent.name))
    return table, [_within(table.name, read_run(file.parent)) for file in found]


def read_run(folder: Path) -> RunRecord:
    """The run in `folder`. Raises BadInput where there is none, or run.json is damaged."""
    document = _run_document(folder)
    name = folder.resolve().name
    parts = tuple(
        _within(name, read_run(folder / part)) for part in document.parts if _is_file(folder / part / "run.json")
    )
    lines, damaged = _json_lines(folder / "log.jsonl")
    rows, unreadable = _json_lines(folder / "labels.jsonl")
    pool_rows, _ = _json_lines(folder / "claims.jsonl")
    names = names_of(document.settings)
    journal = [line for record in lines if (line := journal_line(record, len(names))) is not None]
    skipped = damaged + unreadable + len(lines) - len(journal)
    claims = [_claim(row, names) for row in rows]
    if not claims and pool_rows:
        claims = with_journal_labels([_claim(row, names) for row in pool_rows], journal)
    if not claims:
        claims = [replace(claim, batch=batch_of(part.name)) for part in parts for claim in part.claims]
    return RunRecord(
        name=name,
        settings=document.settings,
        claims=tuple(claims),
        journal=tuple(journal),
        constraints=_constraints(pool_rows) if pool_rows else None,
        engine=document.engine,
        environment=document.environment,
        result=document.result,
        cost=document.cost or _summed_cost(journal, parts),
        model_api=document.model_api,
        started=document.started,
        finished=document.finished,
        left_out=document.left_out,
        skipped=skipped,
        parts=parts,
        testbed_file=document.testbed,
        prior_estimate=document.prior_estimate,
    )


def read_known_outside(folder: Path, run: RunRecord) -> list[LabelledClaim]:
    """The claims outside the pool of the run in `folder` whose label was known. Runs of earlier versions kept those
    that they labelled after the search. Raises BadInput where a line is damaged."""
    path = folder / "known.jsonl"
    if not _is_file(path):
        return [claim for claim in run.claims if claim.is_known and not claim.in_pool]
    rows, damaged = _json_lines(path)
    if damaged:
        raise BadInput(f"{path}: {damaged} lines are damaged")
    return [replace(_claim(row, run.names), outside=True) for row in rows]


def read_all(folders: Sequence[Path]) -> tuple[list[BaselineTable], list[RunRecord]]:
    """Every table and run of `folders`, in the order given."""
    tables, runs = [], []
    for folder in folders:
        if is_baselines(folder):
            table, searches = read_baselines(folder)
            tables.append(table)
            runs += searches
        else:
            runs.append(read_run(folder))
    return tables, runs


def a_cell_of(folder: Path) -> Path | None:
    """The first run in the folder of a sweep (docs/experiments.md); None where it is none."""
    if not _is_file(folder / "experiment.json") or _is_file(folder / "run.json") or is_baselines(folder):
        return None
    return min((file.parent for name in ("run.json", BASELINES) for file in folder.glob(f"*/{name}")), default=None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _within(parent: str, run: RunRecord) -> RunRecord:
    """The run, named after its parent too: every table has a seed-1."""
    return replace(run, name=f"{parent}/{run.name}")


def _run_document(folder: Path) -> RunDocument:
    path = folder / "run.json"
    if not folder.is_dir():
        there = next(
            (run for run in (Path("runs", folder.name), RUNS / folder.name) if _is_file(run / "run.json")), None
        )
        hint = f"did you mean {there}?" if there else "name a run's folder, as in runs/NAME"
        raise BadInput(f"{folder}: no such folder; {hint}")
    try:
        return RunDocument.model_validate(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        cell = a_cell_of(folder)
        what = f"is a sweep; name one of its cells, as in {cell}" if cell else "holds no run (it has no run.json)"
        raise BadInput(f"{folder}: {what}") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{path}: is damaged ({error})") from None
    except ValidationError as error:
        raise BadInput(f"{path}: is damaged ({first_complaint(error)})") from None


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of the complete lines, and how many lines hold none. A torn last line is still being written."""
    try:
        content = path.read_bytes()
    except OSError:
        return [], 0
    records, damaged = [], 0
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = _read_leniently(line)
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _read_leniently(line: bytes) -> object:
    """What Python reads of a line that orjson refuses (half characters, NaN); None where it cannot either."""
    try:
        return json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def _claim(row: dict[str, Any], names: Names) -> LabelledClaim:
    abstained = row.get("by") == ABSTAINED
    if abstained:
        row = labelled_row(row)
    choice_2 = row.get("choice_2")
    return LabelledClaim(
        row=_whole(row.get("row")),
        group=str(row.get("consistency_id", "")),
        question=str(row.get("question", "")),
        choice=str(row.get("choice", "")),
        choice_2=None if choice_2 is None else str(choice_2),
        label=read_label(row.get("label"), names),
        log_odds=read_odds(row, names),
        gold=read_label(row.get("gold"), names),
        by=str(row.get("by", "icm" if row.get("known") is None else KNOWN)),
        zero_shot=read_odds(row, names, "zero_shot"),
        shown=_shown(row.get("shown")),
        abstained=abstained,
        outside=row.get("outside") is True,
        batch=batch if isinstance(batch := row.get("batch"), int) else None,
    )


def _shown(value: object) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(text)) for name, text in value.items()) if isinstance(value, dict) else ()


def _whole(value: object) -> int:
    return value if isinstance(value, int) else -1


def _constraints(rows: Sequence[dict[str, Any]]) -> tuple[Constraint, ...]:
    known = {relation.value: relation for relation in Relation}
    found = []
    for first, row in enumerate(rows):
        listed = row.get("constraints")
        for constraint in listed if isinstance(listed, list) else []:
            match constraint:
                case [*others, str(relation)] if relation in known and _ascending([first, *others], len(rows)):
                    found.append(Constraint((first, *others), known[relation]))
    return tuple(found)


def _ascending(positions: Sequence[object], size: int) -> bool:
    """Whether these are two or more pool positions in order."""
    whole = [at for at in positions if type(at) is int and at < size]
    return len(whole) == len(positions) > 1 and whole == sorted(set(whole))


def _summed_cost(journal: Iterable[Mapping[str, Any]], parts: Iterable[RunRecord]) -> dict[str, float]:
    """The cost so far of a run that is not finished."""
    total: dict[str, float] = {}
    keys = ("asked", "from_cache", "tokens_sent", "tokens_cached", "tokens_computed", "seconds")
    for costs in (*journal, *(part.cost for part in parts)):
        for key in keys:
            value = costs.get(key)
            if value is not None:
                total[key] = total.get(key, 0) + value
    return total
