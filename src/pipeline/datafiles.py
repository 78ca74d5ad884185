"""From data files to claims: rows under our names, one claim a row or option.

Every error is a BadInput of one line that names the file and, where there is one, the line. file_kinds.py reads the
files, src/icm what a row says.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from core.flags import meant
from src.icm.columns import KNOWN, Reading
from src.icm.consistency import Relation
from src.icm.testbeds import TESTBEDS, BadInput, Claim, GroupedBy, Testbed, custom_testbed
from src.icm.testbeds.pools import BadRow, check_relations, grouped_by_question
from src.icm.values import UNSURE, BadLabel, is_missing, listed, options_of, parse_label, shown
from src.pipeline.data_warnings import (
    check_may_be_empty,
    meaning_of_labels,
    warn_of_near_misses,
    warn_of_odd_claims,
    warn_of_unused_values,
)
from src.pipeline.file_kinds import Row, is_csv
from src.pipeline.file_kinds import read_rows as read_rows

log = logging.getLogger(__name__)

OnBadRow = Callable[[str], None]
"""Called with the reason for every row that is left out."""


def claims_of(
    testbed: Testbed,
    rows: Sequence[Row],
    path: Path,
    reading: Reading | None = None,
    on_bad_row: OnBadRow | None = None,
) -> list[Claim]:
    """The claims of `rows`, read as `reading` says.

    on_bad_row: called for every unusable row, which is left out; without it the first one is a BadInput with file and
    line.
    """
    reading = reading or Reading()
    return _claims_of(testbed, _named(rows, path, reading), path, reading, on_bad_row)


def named_rows(path: Path, reading: Reading) -> list[Row]:
    """The rows of a file under our names and with our values; a claim's `of_row` is its index here."""
    return _named(read_rows(path, reading.columns.values()), path, reading)


def load_testbed(name: str, data_dir: Path, on_bad_row: OnBadRow | None = None) -> tuple[Testbed, list[Claim], Path]:
    """A built-in testbed, its claims, and their file: part of the package for `builtin`, else in data_dir."""
    testbed = TESTBEDS.get(name)
    if testbed is None:
        names = ", ".join(TESTBEDS)
        raise BadInput(
            f"unknown testbed {name!r}{meant(name, TESTBEDS)}; choose one of {names}, or give a file with --data"
        )
    if name == "builtin":
        path = Path(str(resources.files("src.icm") / "builtin_testbed.jsonl"))
    else:
        path = data_dir / testbed.file
    if not path.exists():
        raise BadInput(
            f"{path}: not found. Claims of your own are named with --data FILE. Of the testbed {name} say "
            "where the data sets are, with --data_dir, or fetch the public ones with: python scripts/prepare_data.py"
        )
    return testbed, claims_of(testbed, read_rows(path), path, on_bad_row=on_bad_row), path


def load_testbed_file(
    testbed: Testbed, file: Path, data_dir: Path, data: Path | None = None, on_bad_row: OnBadRow | None = None
) -> tuple[Testbed, list[Claim], Path]:
    """The testbed of a user's `file`, its claims, and the file that they are in.

    data: that file, by default the one that the testbed names (data_path). on_bad_row as in claims_of.
    """
    path = data or data_path(testbed, file, data_dir)
    rows = named_rows(path, testbed.reading)
    grouped_by = _grouped_by(rows, path, testbed.reading)
    if grouped_by == "question" and "question" not in testbed.columns:
        if testbed.reading.group_by is not None:
            raise BadInput(f"{file}: groups: question, and the template shows no {{question}}")
        grouped_by = "none"
    testbed = replace(testbed, grouped_by=grouped_by)
    _check_columns(testbed, testbed.reading, rows, path)
    claims = _claims_of(testbed, rows, path, testbed.reading, on_bad_row)
    warn_of_near_misses(testbed, testbed.reading, rows, claims, path)
    return testbed, claims, path


def data_path(testbed: Testbed, file: Path, data_dir: Path) -> Path:
    """The data file that a testbed file names, in the same folder or in data_dir. Raises BadInput without one."""
    if not testbed.file:
        raise BadInput(f"{file}: says no data file; write one as data: mine.jsonl, or name it with --data")
    places = (file.parent / testbed.file, data_dir / testbed.file)
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise BadInput(
            f"{file}: data: there is neither {' nor '.join(map(str, places))}. Paths are from the testbed file's "
            "folder, or from --data_dir; another file is named with --data"
        )
    return found


def load_data_file(
    path: Path, reading: Reading | None = None, on_bad_row: OnBadRow | None = None
) -> tuple[Testbed, list[Claim], Path]:
    """The claims of a user's file, read as `reading` says, and their testbed. on_bad_row as in claims_of."""
    reading = reading or Reading()
    rows = named_rows(path, reading)
    known = [row for row in rows if not row.unread]
    compares = [not is_missing(row.fields.get("choice_2")) for row in known]
    comparison = 2 * sum(compares) > len(known) or (2 * sum(compares) == len(known) and compares[0])
    typical = known[compares.index(comparison)].fields
    if any(each != comparison for each in compares):
        is_one, others = ("a single claim", "comparisons") if comparison else ("a comparison", "single claims")
        bad = f"is {is_one} (by its choice_2), and most rows, or the first of as many, are {others}"
        rows = [
            row if row.bad or is_missing(row.fields.get("choice_2")) != comparison else replace(row, bad=bad)
            for row in rows
        ]
    testbed = custom_testbed(typical, _grouped_by(rows, path, reading))
    _check_columns(testbed, reading, rows, path)
    claims = _claims_of(testbed, rows, path, reading, on_bad_row)
    warn_of_near_misses(testbed, reading, rows, claims, path)
    return testbed, claims, path


def _named(rows: Sequence[Row], path: Path, reading: Reading) -> list[Row]:
    """The rows under our names. Raises BadInput where --columns or --map do not fit the rows' columns."""
    names: dict[tuple[str, ...], dict[str, str]] = {}
    found = []
    for row in rows:
        columns = tuple(row.fields)
        if columns not in names:
            try:
                names[columns] = reading.names(columns)
            except BadInput as error:
                raise BadInput(f"{path}:{row.line}: {error}") from None
        fields = reading.row(row.fields, names[columns])
        label = next((row.fields[theirs] for theirs, ours in names[columns].items() if ours == "label"), None)
        found.append(replace(row, fields=fields, written=None if label is fields.get("label") else label))
    try:
        reading.check(list(dict.fromkeys(name for columns in names for name in columns)))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    if any(map(reading.finds_labels_of_a_run, names)):
        log.warning(
            "%s: holds a run's labels (columns label, gold, by): gold labels are read from gold; to read those of the "
            "run as gold, say %s",
            *(path, reading.says("columns", "label=label")),
        )
    warn_of_unused_values(rows, names, path, reading)
    return _with_lists(found, path) if is_csv(path) else found


def _check_columns(testbed: Testbed, reading: Reading, rows: Sequence[Row], path: Path) -> None:
    """Raises BadInput where no row has a column that a claim needs."""
    has = list(dict.fromkeys(name for row in rows for name in row.fields))
    lacking = [column for column in testbed.columns if column not in has]
    if lacking:
        unread = next((row for row in rows if row.unread), None)
        if unread is not None:
            raise BadInput(f"{path}:{unread.line}: {unread.bad}")
        several = "s" if len(lacking) > 1 else ""
        raise BadInput(
            f"{path}: lacks the column{several} {', '.join(lacking)}; it has "
            f"{listed([reading.columns.get(column, column) for column in has])}. "
            f"Say which of them is meant {_how_to_say(reading, lacking)}"
        )


def _how_to_say(reading: Reading, columns: Sequence[str]) -> str:
    if reading.in_file:
        return f"in the testbed file, as in columns: {{{', '.join(f'{column}: THEIRS' for column in columns)}}}"
    return f"by --columns {','.join(f'{column}=THEIRS' for column in columns)}"


def _with_lists(rows: Sequence[Row], path: Path) -> list[Row]:
    """CSV rows, their choices as lists where all of them are lists written as text."""
    choices = [str(row.fields["choice"]).strip() for row in rows if not is_missing(row.fields.get("choice"))]
    if not choices or not all(text.startswith("[") and text.endswith("]") for text in choices):
        return list(rows)
    return [replace(row, fields=row.fields | _lists(row, path)) for row in rows]


def _lists(row: Row, path: Path) -> dict[str, Any]:
    found = {}
    for column in ("choice", "label"):
        text = row.fields.get(column)
        if isinstance(text, str) and text.strip().startswith("["):
            try:
                found[column] = _list(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                raise BadInput(
                    f"{path}:{row.line}: every choice is in [brackets], and {shown(text)} is no list as JSON or Python "
                    "write it; save the options as JSON lines, where lists stay lists"
                ) from None
    return found


def _list(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _grouped_by(rows: Sequence[Row], path: Path, reading: Reading) -> GroupedBy:
    """What makes groups: as `reading` says, else consistency_id where the file has that column, else question."""
    wanted = reading.group_by
    has_ids = any("consistency_id" in row.fields for row in rows)
    if wanted is None:
        return "consistency_id" if has_ids else "question"
    if wanted == "consistency_id" and not has_ids:
        raise BadInput(
            f"{path}: has no column consistency_id to {reading.says('group_by')}; name it by "
            f"{reading.says('columns', 'consistency_id=THEIRS')}"
        )
    if wanted == "none" and has_ids:
        raise BadInput(
            f"{path}: has a column consistency_id, which makes the groups; {reading.says('group_by', 'none')} is for "
            "files without one. To use no constraints, say --consistency none"
        )
    return wanted


def _claims_of(
    testbed: Testbed, rows: Sequence[Row], path: Path, reading: Reading, on_bad_row: OnBadRow | None
) -> list[Claim]:
    claims: list[Claim] = []
    bad: list[tuple[int, str]] = []
    number, meanings = 0, ""
    for index, row in enumerate(rows):
        try:
            if row.bad is not None:
                raise BadInput(row.bad)
            found = testbed.claims(row.fields, index, number)
            if KNOWN in reading.columns:
                found = _with_known(found, row.fields, testbed, reading)
        except BadInput as error:
            place = f"{path}:{row.line}:" if row.bad is not None else f"{path}:{row.line}: row {index}"
            message = f"{place} {error}"
            if isinstance(error, BadLabel) and row.written is not None:
                message += f" ({reading.says('map', 'label')} makes it of {shown(row.written)})"
            if isinstance(error, BadLabel) and not meanings:
                meanings = meaning_of_labels(rows, testbed, reading)
                message += meanings
            if on_bad_row is None:
                raise BadInput(message) from None
            bad.append((index, message))
            number += 1  # left out or not, the rows behind it keep their numbers
            continue
        claims += found
        number += len(found)
    if not claims:
        raise BadInput(f"{bad[0][1]}; none of the {len(bad)} rows can be used" if len(bad) > 1 else bad[0][1])
    if on_bad_row is not None:
        for _, message in bad:
            on_bad_row(message)
    if testbed.grouped_by == "question":
        claims = grouped_by_question(claims)
    if testbed.relation is None:
        try:
            claims = _without_lost(claims, [rows[index] for index, _ in bad], testbed.grouped_by)
            check_relations(claims)
        except BadRow as error:
            raise BadInput(f"{path}:{rows[error.of_row].line}: {error}") from None
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    check_may_be_empty(testbed, rows, path)
    warn_of_odd_claims(testbed, claims, rows, path)
    return claims


def _with_known(claims: Sequence[Claim], row: Mapping[str, Any], testbed: Testbed, reading: Reading) -> list[Claim]:
    """The claims of a row with their known labels, written as gold ones are, or "unsure" for none."""
    value = row.get(KNOWN)
    if str(value).strip().casefold() == UNSURE and UNSURE not in map(str.casefold, testbed.space.names):
        return list(claims)
    try:
        if claims[0].option is None:
            return [replace(claim, known=parse_label(value, testbed.space)) for claim in claims]
        options = options_of(row.get("choice"), value) or ()
    except BadInput as error:
        raise BadInput(f"in the column {reading.columns[KNOWN]}: {error}") from None
    return [replace(claim, known=option.gold) for claim, option in zip(claims, options, strict=True)]


def _without_lost(claims: Sequence[Claim], lost: Sequence[Row], grouped_by: GroupedBy) -> list[Claim]:
    """The claims, with "at most one" in place of "exactly one" in groups that lost a row, maybe the true one.

    A row whose columns could not be read may have been of any group.
    """
    if any(row.unread for row in lost):
        groups = {claim.group for claim in claims}
    elif grouped_by == "question":
        questions = {str(row.fields.get("question")).strip() for row in lost}
        groups = {claim.group for claim in claims if claim.question.strip() in questions}
    else:
        groups = {str(row.fields.get("consistency_id")) for row in lost}
    return [
        replace(claim, relation=Relation.AT_MOST_ONE)
        if claim.relation is Relation.EXACTLY_ONE and claim.option is None and claim.group in groups
        else claim
        for claim in claims
    ]
