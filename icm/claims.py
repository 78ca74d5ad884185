"""Claims as a program has them: dicts, texts or a data frame -> rows, and the data file that a run reads.

The file is named by its content, so the same claims are the same run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Any, Final
from uuid import UUID

from core.files import write_atomically
from src.icm.values import BadInput, is_missing, shown

FOLDER: Final = "data"
"""Under runs_dir: the files that are made of a program's claims."""
NOTHING: Final = frozenset(("NAType", "NaTType"))
"""Types of pandas' missing values, which equal nothing and are neither true nor false."""


@dataclass(frozen=True)
class Given:
    """The claims of a call. rows: one mapping a row, with every column. index: of a pandas data frame. texts: whether
    they were plain texts, now rows with the one column `choice`."""

    rows: Sequence[Mapping[str, Any]]
    index: Sequence[Any] | None = None
    texts: bool = False

    @property
    def lists_options(self) -> bool:
        """Whether a row may be several claims, one for each option that it lists."""
        return any(not isinstance(row.get("choice"), str | None) for row in self.rows)

    def write(self, folder: Path, name: str = "claims") -> Path:
        """The rows as JSON lines in `folder`, under `name` and a part made from their content; written only once.

        Values that no file can hold (objects, say) are left out; they are given back with the labels all the same.
        """
        lines = [json.dumps(plain_row(row)) for row in self.rows]
        content = "".join(f"{line}\n" for line in lines).encode()
        path = folder / f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.jsonl"
        write_once(path, content)
        return path


def given(claims: Any) -> Given:
    """The rows of a list of dicts or texts, a data frame of pandas or polars, a table of pyarrow, or a data set of
    Hugging Face. Raises BadInput for what is none of these."""
    if isinstance(claims, Mapping):
        raise BadInput("claims: are a dict; give a list of dicts, one a claim")
    index = None
    if hasattr(claims, "to_dicts"):  # polars
        rows = claims.to_dicts()
    elif hasattr(claims, "to_dict") and hasattr(claims, "columns"):  # pandas
        if not claims.columns.is_unique:
            raise BadInput("claims: two columns of the data frame have one name")
        rows, index = claims.to_dict(orient="records"), list(claims.index)
    elif hasattr(claims, "to_pylist"):  # pyarrow
        rows = claims.to_pylist()
    elif isinstance(claims, Iterable):
        rows = list(claims)
    else:
        raise BadInput(
            f"claims: are of type {type(claims).__name__}; give a list of dicts or texts, a data frame or a path"
        )
    if not rows:
        raise BadInput("claims: there are none")
    texts = isinstance(rows[0], str)
    for number, row in enumerate(rows):
        if isinstance(row, str) != texts or not isinstance(row, str | Mapping):
            raise BadInput(f"claims: row {number} is {shown(row)}; give dicts, or texts only")
        if isinstance(row, Mapping) and (wrong := next((name for name in row if not isinstance(name, str)), None)):
            raise BadInput(f"claims: row {number} has a column {shown(wrong)}, which is no text")
    return Given([{"choice": row} for row in rows] if texts else rows, index, texts)


def known(labels: Any, claims: Given | None) -> Given | None:
    """Known labels as rows that `--known` reads; None where there is none.

    labels: by row number, as a dict; one a claim in the order of the claims (None: not known), as a list, array or
    series; or rows with a column `label`, as `given` takes them. Raises BadInput where a list has another length.
    """
    if isinstance(labels, Mapping):
        found = list(labels.items())
    elif hasattr(labels, "columns") or not isinstance(labels, Iterable):
        return given(labels)
    else:
        each = list(labels)
        if each and isinstance(each[0], Mapping):
            return given(each)
        if claims is not None and not claims.lists_options and len(each) != len(claims.rows):
            raise BadInput(f"known: has {len(each)} labels, and there are {len(claims.rows)} claims (None: not known)")
        found = list(enumerate(each))
    rows = [{"row": _plain(row), "label": label} for row, label in found if not is_missing(_plain(label))]
    return Given(rows) if rows else None


def write_once(path: Path, content: bytes) -> None:
    """Write a file whose name says its content, unless it is there. Raises StorageFailed where it cannot be written."""
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file can hold of a row."""
    found = {name: _plain(value) for name, value in row.items()}
    return {name: value for name, value in found.items() if value is not _Unwritable}


class _Unwritable:
    """In place of a value that no file can hold."""


def _plain(value: Any) -> Any:
    """The value as JSON has it; missing ones as null. _Unwritable for what would not read the same again."""
    if type(value).__name__ in NOTHING:
        return None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        found = {str(name): _plain(each) for name, each in value.items()}
        return _Unwritable if _Unwritable in found.values() else found
    if isinstance(value, list | tuple):
        items = [_plain(each) for each in value]
        return _Unwritable if _Unwritable in items else items
    if isinstance(value, Decimal | UUID | PurePath):
        return str(value)
    if hasattr(value, "isoformat"):  # dates and times
        return value.isoformat()
    if hasattr(value, "tolist"):  # numbers and arrays of numpy
        return _plain(value.tolist())
    return _Unwritable
