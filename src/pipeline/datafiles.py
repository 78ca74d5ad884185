"""Reading data files (.json, .jsonl, .csv) into rows that know their line, and rows into claims.

Every complaint is a BadInput of one line that names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from src.icm.testbeds import TESTBEDS, BadInput, Claim, Testbed, custom_testbed

log = logging.getLogger(__name__)

MAX_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file and the line it starts on (1-based)."""

    line: int
    fields: dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All records of a .json list, .jsonl or .csv file, in order."""
    text = _read_text(path)
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: unknown kind of file; use .json, .jsonl or .csv")
    rows = list(reader(path, text))
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    return rows


def claims_of(testbed: Testbed, rows: list[Row], path: Path) -> list[Claim]:
    """The claims of `rows`. Raises BadInput with file and line for the first row that lacks a column."""
    claims = []
    for index, row in enumerate(rows):
        try:
            claims.append(testbed.claim(row.fields, index))
        except BadInput as error:
            raise BadInput(f"{path}:{row.line}: row {index} {error}") from None
    forged = [row.line for row, claim in zip(rows, claims, strict=True) if testbed.imitates(claim)]
    if forged:
        log.warning(
            "%s:%d: holds a line that begins like the prompt's own (%d such rows): the model may read that claim as "
            "several demonstrations, labels included (docs/security.md)",
            *(path, forged[0], len(forged)),
        )
    return claims


def load_testbed(name: str, data_dir: Path) -> tuple[Testbed, list[Claim], Path]:
    """A named testbed and its claims. The built-in one ships with the package; others are files in data_dir."""
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
    return testbed, claims_of(testbed, read_rows(path), path), path


def load_data_file(path: Path) -> tuple[Testbed, list[Claim], Path]:
    """The claims of a user's own file."""
    rows = read_rows(path)
    testbed = custom_testbed(rows[0].fields)
    comparison = "choice_2" in testbed.columns
    for row in rows:
        if (row.fields.get("choice_2") not in (None, "")) != comparison:
            kinds = ("a single claim", "a comparison") if comparison else ("a comparison", "a single claim")
            raise BadInput(f"{path}:{row.line}: is {kinds[0]} (by its choice_2), and the first row is {kinds[1]}")
    return testbed, claims_of(testbed, rows, path), path


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadInput(f"{path}: {size / 1e6:.0f} MB; files over {MAX_BYTES / 1e6:.0f} MB are not read")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, not a data file") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    return text


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # Decoded element by element, so that a row's complaint can name its line.
    decoder = json.JSONDecoder()
    start = _skip_space(text, 0)
    if not text.startswith("[", start):
        raise BadInput(f"{path}:1: is not a JSON list of rows")
    position, counted, line = _skip_space(text, start + 1), 0, 1
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            at = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else f"{path}:{line}"
            raise BadInput(f"{at}: is not valid JSON ({_reason(error)})") from None
        yield _row(path, line, value)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise BadInput(f"{path}:{1 + text.count(chr(10), 0, position)}: expected , or ] after a row")
    if text[position + 1 :].strip():
        raise BadInput(f"{path}: has text after its closing ]")


def _jsonl_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{path}:{number}: is not valid JSON ({_reason(error)})") from None
            yield _row(path, number, value)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 2
    try:
        for fields in reader:
            if None in fields:
                raise BadInput(f"{path}:{line}: has more fields than the header")
            yield Row(line, dict(fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: is not valid CSV ({error})") from None


def _reason(error: Exception) -> str:
    return getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))


def _row(path: Path, line: int, value: object) -> Row:
    if not isinstance(value, dict):
        raise BadInput(f"{path}:{line}: holds a {type(value).__name__}, not a row with named columns")
    return Row(line, value)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
