"""Writing a run's labels in the formats of other tools."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import yaml

from core.files import write_atomically
from src.results.exports import dataset_rows, spreadsheet_text
from src.results.provenance import FILE, provenance_of, write_provenance
from src.results.run_record import LabelledClaim, RunRecord
from src.results.tables import result_text, results_of
from src.results.text import one_line

DATASET: Final = ("data/train.jsonl", FILE, "README.md")
"""The files of write_dataset."""


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """One JSON object a line; returns how many."""
    lines = [orjson.dumps(row) + b"\n" for row in rows]
    write_atomically(path, b"".join(lines))
    return len(lines)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """A table for spreadsheets, UTF-8 with a byte order mark: no cell is a formula, all texts are quoted."""
    listed = list(rows)
    columns = list(dict.fromkeys(column for row in listed for column in row))
    lines = [_line(columns), *(csv_line([row.get(column) for column in columns]) for row in listed)]
    write_atomically(path, "".join(lines).encode("utf-8-sig"))
    return len(listed)


def csv_line(values: Iterable[object]) -> str:
    """One row of such a table, with its line end."""
    return _line([_cell(value) for value in values])


def write_dataset(folder: Path, run: RunRecord, claims: Iterable[LabelledClaim]) -> int:
    """A folder for datasets.load_dataset(folder): data/train.jsonl, its provenance, and a card.

    Does not need that library.
    """
    written = list(claims)
    count = write_jsonl(folder / "data" / "train.jsonl", dataset_rows(run, written))
    write_provenance(folder / FILE, run, written)
    write_atomically(folder / "README.md", _card(run, written))
    return count


def _line(cells: Iterable[object]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC).writerow(cells)
    return buffer.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        return value
    return spreadsheet_text(str(value))


def _in_table(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def _card(run: RunRecord, claims: Sequence[LabelledClaim]) -> str:
    """The data set's README.md: how to load it, what made it, and how far it can be trusted."""
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train.jsonl"}]}],
        "tags": ["icm", "unsupervised-elicitation"],
    }
    model = one_line(run.model)
    settings = "\n".join(f"| {_in_table(name)} | {_in_table(str(value))} |" for name, value in run.settings.items())
    results = "\n".join(
        f"- {one_line(row.title)}: {result_text(row, run.names)}" for row in results_of(run) if row.compared
    )
    origins = provenance_of(run, claims)["by"]
    by = "\n".join(f"- {one_line(name)}: {count}" for name, count in origins.items())
    sure = "`log_odds`" if run.says_true else "the logprob columns"
    return f"""---
{yaml.safe_dump(head, sort_keys=False).rstrip()}
---

# {one_line(run.name)}

{len(claims)} claims of {one_line(run.testbed)}, labelled by {model} through Internal Coherence Maximization
(Wen et al. 2025, arXiv 2506.10139), without human labels. `label` is the model's, `gold` the known one where there is
one; {sure} (nats) and `probability` say how sure the model is. The claims' own licence is that of their source.
`{FILE}` holds the model, its fingerprint, all settings and U.

What gave the labels (`by`): `icm` and `vote` are the search's, `predicted` and `many-shot` follow from the search's
labels, `known` were given; `abstained` have none, because it would have been too doubtful.

{by}

Agreement with gold labels:

{results or "no gold labels are known"}

| setting | value |
| --- | --- |
{settings}
"""
