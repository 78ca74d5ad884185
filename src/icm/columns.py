"""How a user's data file is read: which column is which (--columns), and what its values mean (--map)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, Literal

from src.icm.values import BadInput, is_missing, listed, shown

GroupedBy = Literal["consistency_id", "question", "none"]

OURS: Final = ("question", "choice", "choice_2", "answer", "label", "consistency_id", "consistency_relation")
"""Every column that is read. A testbed's template can show others."""
OPTIONAL: Final = OURS[2:]
"""Those that a claim can do without: no error shows that one of them is misspelled."""
KNOWN: Final = "known"
"""A label that is known, and kept by the search: read only where --columns or a testbed file names its column."""
LABELS_OF_A_RUN: Final = frozenset(("label", "gold", "by"))
"""Columns by which labels.jsonl and its exports are recognized."""
LIKE_GOLD: Final = frozenset(("gold", "correct", "truth", "target", "labels", "label"))
"""Words in the name of a column that probably holds gold labels."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read a file. columns: the file's name of a column by ours. values: by our column, our value by the file's
    (folded).

    group_by: what makes rows one group; None: consistency_id where the file has it, else question. in_file: whether
    this comes from a testbed file, and not from flags; error messages name the one or the other.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    group_by: GroupedBy | None = None
    in_file: bool = False

    def says(self, name: str, what: str = "") -> str:
        """How an error message names a setting. name: columns, map or group_by; what: its value."""
        if self.in_file:
            return f"{'groups' if name == 'group_by' else name}: {what.replace('=', ': ')}".removesuffix(": ")
        return f"--{name} {what}".rstrip()

    def names(self, columns: Sequence[str]) -> dict[str, str]:
        """Our name of each of a row's columns, without those that another column replaces.

        Case and space around a name do not count. In a file of a run's labels, `gold` is the gold label, and `label`,
        what the run found, is not read. Raises BadInput where two columns have the same name.
        """
        named: dict[str, str] = {}
        given = self.columns
        if self.finds_labels_of_a_run(columns):
            given = {**given, "label": next(name for name in columns if fold(name) == "gold")}
        for ours, theirs in given.items():
            found = [theirs] if theirs in columns else [name for name in columns if fold(name) == fold(theirs)]
            if len(found) > 1:
                said = self.says("columns", f"{ours}={theirs}")
                raise BadInput(f"has the columns {' and '.join(map(repr, found))}, and {said}")
            named |= dict.fromkeys(found, ours)
        for name in columns:
            ours = fold(name)
            if name in named or ours in given:
                continue
            if ours in OURS and ours in named.values():
                other = next(each for each, taken in named.items() if taken == ours)
                raise BadInput(f"has the columns {other!r} and {name!r}, which are both {ours}")
            named[name] = ours if ours in OURS else name
        return named

    def finds_labels_of_a_run(self, columns: Iterable[str]) -> bool:
        """Whether these are columns of a run's labels, and --columns does not name the gold label."""
        return "label" not in self.columns and {fold(name) for name in columns} >= LABELS_OF_A_RUN

    def row(self, fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        """A row with our names and values. names: what `names` gives for its columns."""
        renamed = {ours: fields[theirs] for theirs, ours in names.items()}
        for column, meanings in self.values.items():
            value = renamed.get(column)
            if not is_missing(value) and not isinstance(value, list | dict):
                renamed[column] = meanings.get(as_written(value), value)
        return renamed

    def check(self, columns: Sequence[str]) -> None:
        """Raises BadInput where --columns or --map names a column that no row has. columns: those of all rows."""
        folded = {fold(name) for name in columns}
        for ours, theirs in self.columns.items():
            if fold(theirs) not in folded:
                said = self.says("columns", f"{ours}={theirs}")
                raise BadInput(f"{said}: there is no column {theirs!r}{nearest(theirs, columns)}")
        for ours in self.values:
            if ours not in self.columns and ours not in folded:
                raise BadInput(f"{self.says('map', ours)}: there is no column {ours!r}{nearest(ours, columns)}")


def fold(name: str) -> str:
    """A column's name without case and space around it."""
    return name.strip().strip("\ufeff").casefold()


def as_written(value: object) -> str:
    """A value as --map names it: in lower case, without space around it or the .0 of a whole number."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    return text.strip().casefold()


def parse_columns(text: str) -> dict[str, str]:
    """'question=prompt,choice=answer' by our names. Raises BadInput."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not equals or not theirs:
            raise BadInput(f"--columns {text}: {part!r} is not OURS=THEIRS, as in question=prompt")
        _check_ours(f"--columns {text}", ours)
        if ours in columns or theirs in columns.values():
            raise BadInput(f"--columns {text}: names {ours if ours in columns else theirs!r} twice")
        columns[ours] = theirs
    return columns


def parse_values(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """'label=yes:true,no:false', one a column, by our column and their value (folded). Raises BadInput."""
    values: dict[str, dict[str, str]] = {}
    for text in texts:
        column, equals, rest = text.partition("=")
        column = column.strip()
        _check_ours(f"--map {text}", column)
        meanings = values.setdefault(column, {})
        for part in rest.split(","):
            theirs, colon, ours = part.rpartition(":")
            if not equals or not colon or not theirs.strip() or not ours.strip():
                raise BadInput(f"--map {text}: {part!r} is not THEIRS:OURS, as in label=yes:true,no:false")
            if as_written(theirs) in meanings:
                raise BadInput(f"--map {text}: says twice what {theirs.strip()!r} means")
            meanings[as_written(theirs)] = ours.strip()
    return values


def nearest(name: str, columns: Iterable[str]) -> str:
    """The end of an error message about a name that does not exist: the most similar one, or all there are."""
    found = list(columns)
    close = get_close_matches(name, found, n=1, cutoff=0.6)
    return f"; did you mean {shown(close[0])}?" if close else f"; there are: {listed(found)}"


def near_misses(columns: Sequence[str], read: Collection[str], has_gold: bool) -> dict[str, str]:
    """Columns that are not read and look like one that is missing: its name, by theirs.

    columns: with our names. read: those that are read. has_gold: whether gold labels were found in any column.
    """
    missing = [name for name in OPTIONAL if name not in columns and not (has_gold and name == "label")]
    found: dict[str, str] = {}
    for name in columns:
        if name in read:
            continue
        close = get_close_matches(fold(name), missing, n=1, cutoff=0.8)
        if "label" in missing and not LIKE_GOLD.isdisjoint(re.split(r"[^a-z0-9]+", fold(name))):
            close = ["label"]
        if close and close[0] not in found.values():
            found[name] = close[0]
    return found


def _check_ours(flag: str, name: str) -> None:
    if name not in (*OURS, KNOWN):
        raise BadInput(f"{flag}: no column {name!r} is read{nearest(name, (*OURS, KNOWN))}")
