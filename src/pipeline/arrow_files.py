"""Parquet and Arrow files, and data sets that the `datasets` library saved, read by pyarrow (the extra `arrow`).

Labels that a Hugging Face schema numbers (ClassLabel) are read as their names: only the schema says what 0 means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from src.icm.values import BadInput

if TYPE_CHECKING:
    import pyarrow

STATE: Final = "state.json"
SPLITS: Final = "dataset_dict.json"
MAGIC: Final = b"ARROW1"
"""How an Arrow file with an index begins."""
Records = list[dict[str, Any]]


def parquet_rows(path: Path, most_bytes: int) -> Records:
    """The rows of a Parquet file. most_bytes: the largest size, unpacked, that is read."""
    with _readable(path, "Parquet"):
        from pyarrow import parquet

        with parquet.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(at).total_byte_size for at in groups)
            if size > most_bytes:
                raise BadInput(f"{path}: {size / 1e6:.0f} MB unpacked; over {most_bytes / 1e6:.0f} MB are not read")
            return _rows(file.read())


def arrow_rows(path: Path, most_bytes: int) -> Records:
    """The rows of an Arrow file, as a stream (how `datasets` keeps them) or with an index (Feather)."""
    with _readable(path, "Arrow"):
        import pyarrow
        from pyarrow import ipc

        with pyarrow.OSFile(str(path)) as file:
            indexed = file.read(len(MAGIC)) == MAGIC
            file.seek(0)
            return _rows((ipc.open_file(file) if indexed else ipc.open_stream(file)).read_all())


READERS: Final[Mapping[str, Callable[[Path, int], Records]]] = {
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
}


def is_saved_dataset(folder: Path) -> bool:
    """Whether save_to_disk wrote a data set there."""
    return (folder / STATE).is_file()


def splits_of(folder: Path) -> list[Path]:
    """The data sets in a folder that holds several (a DatasetDict); empty for any other folder."""
    return sorted(file.parent for file in folder.glob(f"*/{STATE}")) if (folder / SPLITS).is_file() else []


def files_of(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, in order. Raises BadInput where its state.json does not name them."""
    state = folder / STATE
    try:
        names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except OSError as error:
        raise BadInput(f"{state}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadInput(f"{state}: does not name the data set's files as save_to_disk does") from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BadInput(f"{state}: names files outside its folder")
    return [folder / name for name in names]


def saved_rows(folder: Path) -> Records:
    """The rows of a data set that save_to_disk wrote."""
    return [row for file in files_of(folder) for row in arrow_rows(file, 0)]


def _rows(table: pyarrow.Table) -> Records:
    """The rows of a table. Raises ArrowInvalid for buffers that do not fit its schema, which reading does not check."""
    table.validate(full=True)
    rows: Records = table.to_pylist()
    for column, known in _label_names(table.schema.metadata).items():
        for row in rows:
            if isinstance(at := row.get(column), int) and 0 <= at < len(known):
                row[column] = known[at]
    return rows


def _label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of every column of numbered labels, from the schema that `datasets` writes into its files."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Raises BadInput where pyarrow is missing, and for its errors within the block."""
    try:
        import pyarrow
    except ImportError:
        raise BadInput(f"{path}: Parquet and Arrow files need pyarrow: pip install 'icm-elicitation[arrow]'") from None
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        raise BadInput(f"{path}: is a damaged {kind} file ({' '.join(str(error).split())[:200]})") from None
