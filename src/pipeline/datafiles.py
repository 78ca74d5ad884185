"""Data files into claims: their rows under our names, one claim a row or option, and what is odd about them said aloud.

Every complaint is a BadInput of one line that names the file and, where there is one, the line. What can be read of a
file as a whole, and of which kinds, is in file_kinds.py; what a row says, in src/icm.
"""

from __future__ import annotations

import ast
import json
import logging
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from src.icm.columns import OURS, Reading, as_written, near_misses
from src.icm.consistency import Relation
from src.icm.testbeds import (
    TESTBEDS,
    BadInput,
    Claim,
    GroupedBy,
    Testbed,
    check_relations,
    custom_testbed,
    grouped_by_question,
)
from src.icm.values import BadLabel, is_missing, listed, parse_label, shown
from src.pipeline.file_kinds import Row, is_csv
from src.pipeline.file_kinds import read_rows as read_rows

log = logging.getLogger(__name__)

OnBadRow = Callable[[str], None]
"""Told why a row is left out."""

ALL_ONE_QUESTION: Final = 5
"""Rows of one question, and of no other, from more of which on it looks like an instruction that stands in every row.

Multiple-choice questions seldom have more options.
"""

LONGEST_WORD: Final = 40
"""Characters of a label that a refusal still shows how to map."""

TRUE_WORDS: Final = frozenset(("yes", "y", "t", "correct", "right", "positive", "pos", "valid", "good"))
FALSE_WORDS: Final = frozenset(("no", "n", "f", "incorrect", "wrong", "negative", "neg", "invalid", "bad", "-1"))


def claims_of(
    testbed: Testbed,
    rows: Sequence[Row],
    path: Path,
    reading: Reading | None = None,
    on_bad_row: OnBadRow | None = None,
) -> list[Claim]:
    """The claims of `rows`, read as `reading` says.

    on_bad_row: told of every row that is left out because it is unusable; without it the first one is a BadInput with
    file and line.
    """
    reading = reading or Reading()
    return _claims_of(testbed, _named(rows, path, reading), path, reading, on_bad_row)


def named_rows(path: Path, reading: Reading) -> list[Row]:
    """The rows of a file under our names and with our values; a claim's `of_row` is its index here."""
    return _named(read_rows(path, reading.columns.values()), path, reading)


def load_testbed(name: str, data_dir: Path, on_bad_row: OnBadRow | None = None) -> tuple[Testbed, list[Claim], Path]:
    """A testbed that ships with the package, and its claims. The builtin one's too; others are files in data_dir."""
    testbed = TESTBEDS.get(name)
    if testbed is None:
        raise BadInput(f"unknown testbed {name!r}; choose one of {', '.join(TESTBEDS)}, or give a file with --data")
    if name == "builtin":
        path = Path(str(resources.files("src.icm") / "builtin_testbed.jsonl"))
    else:
        path = data_dir / testbed.file
    if not path.exists():
        raise BadInput(
            f"{path}: not found. Say where the data sets are with --data_dir, "
            "or fetch the public ones with: python scripts/prepare_data.py"
        )
    return testbed, claims_of(testbed, read_rows(path), path, on_bad_row=on_bad_row), path


def load_testbed_file(
    testbed: Testbed, file: Path, data_dir: Path, data: Path | None = None, on_bad_row: OnBadRow | None = None
) -> tuple[Testbed, list[Claim], Path]:
    """The testbed of a user's `file` and its claims, from where it says they are: beside it, or in data_dir.

    data: the file of claims in place of that. on_bad_row as in claims_of.
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
    _tell_near_misses(testbed, testbed.reading, rows, claims, path)
    return testbed, claims, path


def data_path(testbed: Testbed, file: Path, data_dir: Path) -> Path:
    """Where a testbed file's claims are. Raises BadInput where it says none, or there are none."""
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
    """The claims of a user's own file, read as `reading` says. on_bad_row as in claims_of."""
    reading = reading or Reading()
    rows = named_rows(path, reading)
    told = [row for row in rows if not row.unread]
    compares = [not is_missing(row.fields.get("choice_2")) for row in told]
    comparison = 2 * sum(compares) > len(told) or (2 * sum(compares) == len(told) and compares[0])
    typical = told[compares.index(comparison)].fields
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
    _tell_near_misses(testbed, reading, rows, claims, path)
    return testbed, claims, path


def _named(rows: Sequence[Row], path: Path, reading: Reading) -> list[Row]:
    """The rows under our names. Raises BadInput where --columns, --map or a row's columns cannot be meant."""
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
    _tell_unused(rows, names, path, reading)
    return _with_lists(found, path) if is_csv(path) else found


def _check_columns(testbed: Testbed, reading: Reading, rows: Sequence[Row], path: Path) -> None:
    """Raises BadInput where no row has a column that a claim needs."""
    has = list(dict.fromkeys(name for row in rows for name in row.fields))
    lacking = [column for column in testbed.columns if column not in has]
    if lacking:
        untold = next((row for row in rows if row.unread), None)
        if untold is not None:
            raise BadInput(f"{path}:{untold.line}: {untold.bad}")
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


def _tell_unused(
    rows: Sequence[Row], names: dict[tuple[str, ...], dict[str, str]], path: Path, reading: Reading
) -> None:
    for column, meanings in reading.values.items():
        present = {
            as_written(row.fields[theirs])
            for row in rows
            for theirs, ours in names[tuple(row.fields)].items()
            if ours == column
        }
        for value in meanings.keys() - present:
            log.warning("%s: %s: no row has %r there", path, reading.says("map", column), value)


def _tell_near_misses(
    testbed: Testbed, reading: Reading, rows: Sequence[Row], claims: Sequence[Claim], path: Path
) -> None:
    """Warn of columns that are not read and were perhaps meant to be: what they say would be lost in silence."""
    columns = list(dict.fromkeys(name for row in rows for name in row.fields))
    has_gold = any(claim.gold is not None for claim in claims)
    near = near_misses(columns, {*OURS, *testbed.columns}, has_gold)
    if near:
        pairs = ",".join(f"{ours}={theirs}" for theirs, ours in near.items())
        log.warning(
            "%s: columns not read: %s; did you mean %s? Then say %s",
            *(path, ", ".join(near), ", ".join(near.values()), reading.says("columns", pairs)),
        )


def _with_lists(rows: Sequence[Row], path: Path) -> list[Row]:
    """CSV rows whose choices are all lists, written as text because a cell holds nothing else, with those lists."""
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
    """What makes groups: as wanted, else consistency_id where the file has that column, else question."""
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
            "files without one. Constraints alone are taken away by --consistency none"
        )
    return wanted


def _claims_of(
    testbed: Testbed, rows: Sequence[Row], path: Path, reading: Reading, on_bad_row: OnBadRow | None
) -> list[Claim]:
    claims: list[Claim] = []
    bad: list[tuple[int, str]] = []
    number, meant = 0, ""
    for index, row in enumerate(rows):
        try:
            if row.bad is not None:
                raise BadInput(row.bad)
            found = testbed.claims(row.fields, index, number)
        except BadInput as error:
            place = f"{path}:{row.line}:" if row.bad is not None else f"{path}:{row.line}: row {index}"
            complaint = f"{place} {error}"
            if isinstance(error, BadLabel) and row.written is not None:
                complaint += f" ({reading.says('map', 'label')} makes it of {shown(row.written)})"
            if isinstance(error, BadLabel) and not meant:
                meant = _meant(rows, testbed, reading)
                complaint += meant
            if on_bad_row is None:
                raise BadInput(complaint) from None
            bad.append((index, complaint))
            number += 1  # left out or not, the rows behind it keep their numbers
            continue
        claims += found
        number += len(found)
    if not claims:
        raise BadInput(f"{bad[0][1]}; none of the {len(bad)} rows can be used" if len(bad) > 1 else bad[0][1])
    if on_bad_row is not None:
        for _, complaint in bad:
            on_bad_row(complaint)
    if testbed.grouped_by == "question":
        claims = grouped_by_question(claims)
    if testbed.relation is None:
        try:
            claims = _without_lost(claims, [rows[index] for index, _ in bad], testbed.grouped_by)
            check_relations(claims)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
    _check_partly(testbed, rows, path)
    _tell_odd_claims(testbed, claims, rows, path)
    return claims


def _meant(rows: Iterable[Row], testbed: Testbed, reading: Reading) -> str:
    """What the file's column of labels holds, and how to say what its values mean; nothing where it holds lists."""
    column = (row.fields.get("label") if row.written is None else row.written for row in rows)
    counts = Counter(text for each in column if (text := _plain(each)) is not None)
    if not counts:
        return ""
    given = reading.values.get("label", {})
    told = ", ".join(f"{shown(text)} ({count})" for text, count in counts.most_common(3))
    said = f". The column's commonest values: {told}"
    unknown = [
        text for text, _ in counts.most_common() if not _is_label(given.get(as_written(text), text), testbed.space)
    ]
    if not unknown:  # the label is a list with something else in it
        return said
    if testbed.digest:
        names = testbed.space.names
        return (
            f"{said}; say in the testbed file which label each means, as in "
            f"map: {{label: {{{shown(unknown[0])}: {shown(names[-1])}}}}} (there are: {', '.join(names)})"
        )
    unknown = unknown[:2]
    if any(set(",:") & set(text) or not text.isprintable() or len(text) > LONGEST_WORD for text in unknown):
        return said
    sides = [_side(text) for text in unknown]
    sure = all(sides) and len(set(sides)) == len(sides)
    if not sure:
        sides = ["false", "true"] if sides[0] == "false" or sides[1:] == ["true"] else ["true", "false"]
    other = "" if sure else ", or the other way round"
    kept = [(theirs, ours) for theirs, ours in given.items() if _is_label(ours)]
    pairs = [*kept, *zip(unknown, sides, strict=False)]
    flag = shlex.quote(f"label={','.join(map(':'.join, pairs))}")
    return f"{said}; say what they mean, as by --map {flag}{other}"


def _plain(value: object) -> str | None:
    return None if is_missing(value) or isinstance(value, list | dict) else str(value).strip()


def _is_label(text: str, space: LabelSpace = TRUE_FALSE) -> bool:
    try:
        parse_label(text, space)
    except BadLabel:
        return False
    return True


def _side(text: str) -> str:
    """The label that a word looks like: true, false, or nothing."""
    word = as_written(text)
    return "true" if word in TRUE_WORDS else "false" if word in FALSE_WORDS else ""


def _without_lost(claims: Sequence[Claim], lost: Sequence[Row], grouped_by: GroupedBy) -> list[Claim]:
    """Of a group that has lost a row, which may have been the true one, only "at most one" is still known.

    A row whose cells cannot be told may have been of any group.
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


def _check_partly(testbed: Testbed, rows: Sequence[Row], path: Path) -> None:
    for column in testbed.partly:
        if not any(column in row.fields for row in rows):
            raise BadInput(
                f"{path}: lacks the column {column}, which says what the claims of a group are to each other"
            )
        without = [row.line for row in rows if not row.unread and is_missing(row.fields.get(column))]
        if without:
            log.warning(
                "%s:%d: has nothing in %s (%d such rows): a claim that is in no relation to others by it",
                *(path, without[0], column, len(without)),
            )


def _tell_odd_claims(testbed: Testbed, claims: Sequence[Claim], rows: Sequence[Row], path: Path) -> None:
    """Warn of what is read as it is and may not be meant."""
    forged = [rows[claim.of_row].line for claim in claims if testbed.imitates(claim)]
    if forged:
        log.warning(
            "%s:%d: holds a line that begins like the prompt's own (%d such rows): the model may read that claim as "
            "several demonstrations, labels included (docs/security.md)",
            *(path, forged[0], len(forged)),
        )
    golds: dict[str, Claim] = {}
    known = [claim for claim in claims if claim.gold is not None]
    twice = [(golds[c.text], c) for c in known if golds.setdefault(c.text, c).gold != c.gold]
    if twice:
        first, second = (rows[claim.of_row].line for claim in twice[0])
        log.warning(
            "%s:%d: is the same claim as line %d, with the other gold label (%d such rows): agreement with gold cannot "
            "be whole",
            *(path, second, first, len(twice)),
        )
    sets: dict[tuple[str, Relation], list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.relation is not None and claim.option is None:
            sets[claim.group, claim.relation].append(claim)
    broken = [each for (_, holds), each in sets.items() if holds.inconsistencies([claim.gold for claim in each])]
    if broken:
        log.warning(
            "%s:%d: is of a group whose gold labels break its consistency_relation (%d such groups): one of the two is "
            "wrong",
            *(path, rows[broken[0][0].of_row].line, len(broken)),
        )
    used = len({claim.of_row for claim in claims})
    if testbed.grouped_by == "question" and used > ALL_ONE_QUESTION and len({c.group for c in claims}) == 1:
        log.warning(
            "%s: all %d rows have one question, which makes them one group; if it is an instruction and no question, "
            "use --group_by none",
            *(path, used),
        )
