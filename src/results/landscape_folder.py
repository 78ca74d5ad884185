"""runs/NAME/ of a landscape: landscape.json (every labeling with the model's answers), landscape.png and .html.

landscape.json is written anew after every batch, so that a stopped command goes on with what it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from core.files import write_atomically
from src.icm.label_names import Names, read_label, written_label
from src.icm.labelings import Evaluated, Labeling, Odds
from src.icm.testbeds import BadInput

FORMAT: Final = 1
PARTS: Final = {"settings", "engine", "environment", "started", "finished", "claims", "zero_shot", "labelings"}


class LandscapeFolder:
    """The files of one landscape."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document_path = path / "landscape.json"
        self.picture_path = path / "landscape.png"
        self.page_path = path / "landscape.html"

    def read(self) -> dict[str, Any] | None:
        """landscape.json; None where this landscape was never begun. Raises BadInput where it cannot be used."""
        try:
            document = orjson.loads(self.document_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, orjson.JSONDecodeError):
            raise self._damaged() from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BadInput(f"{self.document_path}: was written by another version; choose another --run")
        if not document.keys() >= PARTS:
            raise self._damaged()
        return document

    def _damaged(self) -> BadInput:
        return BadInput(f"{self.document_path}: cannot be read; move {self.path} away, or choose another --run")

    def labelings(self, document: Mapping[str, Any], names: Names) -> list[tuple[Labeling, Odds]]:
        """Every labeling of landscape.json with the log-odds of every claim. Raises BadInput where one is damaged."""
        try:
            found = [_labeling(record, names) for record in document["labelings"]]
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None
        return found

    def write(self, document: Mapping[str, Any]) -> None:
        """Replace landscape.json. Raises StorageFailed."""
        content = {"format": FORMAT, "kind": "landscape", **document}
        write_atomically(self.document_path, orjson.dumps(content))


def labeling_records(evaluated: Sequence[Evaluated], names: Names) -> list[dict[str, Any]]:
    """The labelings as landscape.json has them. log_odds: log P of each label against the first, nats, by claim."""
    return [
        {
            "name": each.labeling.name,
            "kind": each.labeling.kind,
            **({} if each.labeling.of is None else {"of": each.labeling.of}),
            "U": each.utility,
            "inconsistent": each.evaluation.inconsistent,
            "labels": [written_label(label, names) for label in each.labeling.labels],
            "log_odds": [each.evaluation.log_odds[claim] for claim in range(len(each.labeling.labels))],
        }
        for each in evaluated
    ]


def read_odds(values: Sequence[Any]) -> Odds:
    """Log-odds as they were before they were written."""
    return tuple(tuple(value) if isinstance(value, list) else float(value) for value in values)


def _labeling(record: Mapping[str, Any], names: Names) -> tuple[Labeling, Odds]:
    """Raises ValueError where a label is none of `names`."""
    labels = tuple(read_label(value, names) for value in record["labels"])
    odds = read_odds(record["log_odds"])
    if None in labels or len(labels) != len(odds):
        raise ValueError
    return Labeling(record["name"], record["kind"], labels, record.get("of")), odds
