"""Data files as rows with their lines: JSON, JSON lines, CSV, and through pyarrow Parquet and data sets that the
`datasets` library saved.

Every error is a BadInput of one line that names the file and, where there is one, the line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from src.icm.columns import OURS, fold
from src.icm.values import BadInput
from src.pipeline import arrow_files, csv_quotes

MAX_BYTES: Final = 256 * 1024 * 1024
KINDS: Final = ".json, .jsonl, .csv or .tsv (also .gz of these), .parquet, or a folder by save_to_disk"
NOT_READ: Final = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet; save the sheet as CSV UTF-8"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".xz", ".bz2", ".zst"), "is packed; unpack it first"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy"), "may hold code, and is not opened; save it as JSON lines"),
}
SEPARATORS: Final = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
PANDAS_NAN: Final = frozenset(("nan", "NaN", "<NA>"))
"""What pandas writes into a CSV for a missing value, where it does not leave the cell empty."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file and the line it starts on (1-based; of a file without lines, its number).

    bad: why it is unusable, where the reader finds that; it has no fields where even its columns could not be read.
    written: the label as the file has it, where --map gave it another value.
    """

    line: int
    fields: dict[str, Any]
    bad: str | None = None
    written: object = None

    @property
    def unread(self) -> bool:
        """Whether not even its columns are known."""
        return self.bad is not None and not self.fields


def read_rows(path: Path, also: Iterable[str] = ()) -> list[Row]:
    """All records of a file (KINDS), in order. also: columns that show which separator a CSV has, besides OURS."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[-2:-1] if packed else suffixes[-1:]) or [""]
    reader = _text_reader(kind[0], also)
    if path.is_dir():
        rows = _saved_dataset(path)
    elif reader is not None:
        rows = list(reader(path, _read_text(path, packed)))
    elif kind[0] in arrow_files.READERS and not packed:
        rows = _numbered(arrow_files.READERS[kind[0]](_sized(path), MAX_BYTES))
    else:
        why = NOT_READ.get(suffixes[-1] if suffixes else "", f"unknown kind of file; use {KINDS}")
        raise BadInput(f"{path}: {why}")
    if not rows:
        raise BadInput(f"{path}: holds no rows")
    if all(row.unread for row in rows):
        raise BadInput(f"{path}:{rows[0].line}: {rows[0].bad}")
    return rows


def is_csv(path: Path) -> bool:
    """Whether a file is CSV or TSV, so that all its cells are texts."""
    return path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))


def digest_of(path: Path) -> str:
    """SHA-256 of a data file; of a saved data set, of its files' names and content."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in arrow_files.files_of(path):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


TextReader = Callable[[Path, str], Iterator[Row]]


def _text_reader(kind: str, also: Iterable[str]) -> TextReader | None:
    if kind in (".csv", ".tsv"):
        return lambda path, text: _csv_rows(path, text, {fold(name) for name in (*OURS, *also)})
    readers: dict[str, TextReader] = {".json": _json_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows}
    return readers.get(kind)


def _saved_dataset(path: Path) -> list[Row]:
    splits = arrow_files.splits_of(path)
    if splits:
        raise BadInput(f"{path}: holds several data sets; name one of them: {', '.join(map(str, splits))}")
    if not arrow_files.is_saved_dataset(path):
        raise BadInput(f"{path}: is a folder, not a data file (one written by save_to_disk has a state.json in it)")
    for file in arrow_files.files_of(path):
        _sized(file)
    return _numbered(arrow_files.saved_rows(path))


def _numbered(rows: Iterable[dict[str, Any]]) -> list[Row]:
    return [Row(number, fields) for number, fields in enumerate(rows, start=1)]


def _sized(path: Path) -> Path:
    """The file's path, where the file is there and not too large."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if size > MAX_BYTES:
        raise BadInput(f"{path}: {size / 1e6:.0f} MB; files over {MAX_BYTES / 1e6:.0f} MB are not read")
    return path


def _read_text(path: Path, packed: bool) -> str:
    try:
        content = _unpacked(path) if packed else _sized(path).read_bytes()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise BadInput(f"{path}: is UTF-16 text, not UTF-8; save it as UTF-8")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise BadInput(f"{path}:{line}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _unpacked(path: Path) -> bytes:
    try:
        with gzip.open(_sized(path)) as file:
            content = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: is a damaged gzip file ({error})") from None
    if len(content) > MAX_BYTES:
        raise BadInput(f"{path}: holds more than {MAX_BYTES / 1e6:.0f} MB, and such files are not read")
    return content


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    # Decoded element by element, so that a row's error message can name its line.
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    start = _skip_space(text, 0)
    if text.startswith("{", start) and _holds_more(text, start):
        yield from _jsonl_rows(path, text)  # JSON lines under another name
        return
    if not text.startswith("[", start):
        raise BadInput(f"{path}:1: is not a JSON list of rows{_advice_on(text)}")
    position, counted, line = _skip_space(text, start + 1), 0, 1
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also integers of thousands of digits
            at = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else f"{path}:{line}"
            raise BadInput(f"{at}: is not valid JSON ({_reason(error)})") from None
        yield _row(line, value)
        position = _skip_space(text, position)
        if text.startswith(",", position):
            position = _skip_space(text, position + 1)
        elif not text.startswith("]", position):
            raise BadInput(f"{path}:{1 + text.count(chr(10), 0, position)}: expected , or ] after a row")
    if text[position + 1 :].strip():
        raise BadInput(f"{path}: has text after its closing ]")


def _holds_more(text: str, start: int) -> bool:
    """Whether another object follows the one that begins at `start`."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return False
    return text.startswith("{", _skip_space(text, end))


def _advice_on(text: str) -> str:
    """The end of an error message about a file that is one JSON object: what to do about it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    lists = [name for name, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    if lists:
        return f"; save the list under {lists[0]!r} as a file"
    by_column = isinstance(content, dict) and any(isinstance(value, dict) for value in content.values())
    return "; pandas writes one with to_json(orient='records')" if by_column else ""


def _jsonl_rows(_: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"is not valid JSON ({_reason(error)})")
            else:
                yield _row(number, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in one object")
    return fields


def _csv_rows(path: Path, text: str, known: set[str]) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # the file's size is the limit
    separator, spaced = _csv_dialect(text, known)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=spaced, strict=True)
    header: list[str] = []
    line = 1
    found: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if not header:
                header = cells
                named = [name for name in header if name.strip()]
                if twice := [name for name in named if named.count(name) > 1]:
                    raise BadInput(f"{path}:{line}: the header names {twice[0]!r} twice")
            elif cells:
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        lines = text.split("\n")[line - 1 : reader.line_num]
        opens = line + csv_quotes.last_opened(lines, separator, spaced)
        if str(error) == "unexpected end of data":
            raise BadInput(f"{path}:{opens}: is not valid CSV (the quote that opens here is never closed)") from None
        since = f"; the quote before it opens on line {opens}" if opens < reader.line_num else ""
        raise BadInput(f"{path}:{reader.line_num}: is not valid CSV ({error}{since})") from None
    swallowed = csv_quotes.swallowed_rows(found, len(header), separator, spaced)
    for line, cells in found:
        bad = swallowed.get(line)
        if len(cells) > len(header):
            bad = (
                f"has more fields than the header: {len(cells)} and {len(header)}, separated by {SEPARATORS[separator]}"
            )
        if bad is not None:
            yield Row(line, {}, bad)
            continue
        if len(cells) < len(header):
            bad = f"has {len(cells)} fields, and the header {len(header)} (a line break without quotes?)"
        yield Row(line, {name: _cell(cell) for name, cell in zip(header, cells, strict=False)}, bad)


def _csv_dialect(text: str, known: Collection[str]) -> tuple[str, bool]:
    """(separator, whether a space follows it), from the header only.

    The separator is the one that gives the header most of the `known` columns. csv.Sniffer also counts the commas of
    sentences in the cells.
    """
    headers = {}
    for separator in SEPARATORS:
        try:
            headers[separator] = next(filter(None, csv.reader(io.StringIO(text, newline=""), delimiter=separator)), [])
        except csv.Error:
            headers[separator] = []
    best = max(SEPARATORS, key=lambda by: (len({fold(name) for name in headers[by]} & set(known)), len(headers[by])))
    following = headers[best][1:]
    return best, bool(following) and all(name.startswith(" ") for name in following)


def _cell(text: str) -> str | float:
    return math.nan if text in PANDAS_NAN else text


def _reason(error: Exception) -> str:
    return getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else str(error))


def _row(line: int, value: object) -> Row:
    if not isinstance(value, dict):
        return Row(line, {}, f"holds a {type(value).__name__}, not a row with named columns")
    return Row(line, value)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
