"""Missing quotes in a CSV file: where a quote opens that never closes, and which rows became part of a cell.

A cell whose closing quote is missing goes on to the next quote in the file, which may close it as if all were well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from src.icm.values import shown


def last_opened(lines: Sequence[str], separator: str, spaced: bool) -> int:
    """On which of a record's lines (from 0) its last quoted cell opens. spaced: whether spaces follow separators."""
    opened, inside, starts = 0, False, True
    for number, line in enumerate(lines):
        for character in line:
            if character == '"' and (inside or starts):
                opened = opened if inside else number
                inside, starts = not inside, inside  # a quote right after a closing one is a quote of the text
            elif not inside:
                starts = character == separator or (starts and spaced and character == " ")
        starts = starts or not inside
    return opened


def swallowed_rows(
    records: Collection[tuple[int, Sequence[str]]], columns: int, separator: str, spaced: bool
) -> dict[int, str]:
    """Records that are really several rows: an error message by line. records: each with its line and cells.

    A text with line breaks can have commas too, so two things must hold. Every line of the record divides into exactly
    as many cells as the header has. And of the cells that the text divides into, all those of some column are values
    that the column has in other rows, as labels and short answers are.
    """
    suspects: dict[int, tuple[int, list[tuple[int, str]]]] = {}
    for line, cells in records:
        broken = [at for at, cell in enumerate(cells) if "\n" in cell]
        if len(cells) == columns and len(broken) == 1:
            at = broken[0]
            inner = _inner_cells(cells[at].split("\n"), at, columns, separator, spaced)
            if inner:
                suspects[line] = (at, inner)
    if not suspects:
        return {}
    values: dict[int, set[str]] = defaultdict(set)
    for line, cells in records:
        for at, cell in enumerate(cells):
            if line not in suspects or at != suspects[line][0]:
                values[at].add(cell.strip())
    found = {}
    cells_of = dict(records)
    for line, (at, inner) in suspects.items():
        within: dict[int, set[str]] = defaultdict(set)
        for column, text in inner:
            within[column].add(text.strip())
        if any("" not in texts and texts <= values[column] for column, texts in within.items() if column != at):
            text = cells_of[line][at]
            found[line] = (
                f"the quote that opens before {shown(text.split(chr(10))[0])} closes {text.count(chr(10))} lines "
                "further down, and all these lines are rows by themselves: the quote that should close it is missing "
                "(if it is one text, save the file as JSON lines)"
            )
    return found


def _inner_cells(lines: Sequence[str], at: int, columns: int, separator: str, spaced: bool) -> list[tuple[int, str]]:
    """The cells, each with its column, that a text in column `at` divides into; none where its lines are no rows."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        first, last = (at if number == 0 else 0), (at if number == len(lines) - 1 else columns - 1)
        parts = line.split(separator)
        texts_only = not spaced and separator == "," and any(part.startswith(" ") for part in parts[1:])
        if len(parts) != last - first + 1 or texts_only:
            return []
        found += zip(range(first, last + 1), parts, strict=True)
    return found
