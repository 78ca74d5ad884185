"""Following a run's files while another process writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from src.results.run_schema import journal_line, part_names

CHUNK = 1 << 20


class JournalTail:
    """The complete lines of a journal as they come. Survives a file that is not there yet, is replaced or cut.

    A last line without a line end is still being written, and is read later. A file that was replaced, or is now
    shorter than what was read, is read again from its start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Mapping[str, Any]] = []
        self._file: tuple[int, int] | None = None
        self._read = 0
        self._num_labels = 2

    def poll(self) -> bool:
        """Read what is new; returns whether anything changed."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                found, changed = (status.st_dev, status.st_ino), False
                if found != self._file or status.st_size < self._read:
                    changed = bool(self.records)
                    self._file, self._read, self.records = found, 0, []
                    self._num_labels = 2
                file.seek(self._read)
                while new := file.read(CHUNK):
                    end = new.rfind(b"\n") + 1
                    if not end and len(new) == CHUNK:
                        new += file.readline()
                        end = len(new) if new.endswith(b"\n") else 0
                    if not end:
                        break
                    self._read += end
                    changed |= self._take(new[:end])
                    file.seek(self._read)
                return changed
        except OSError:  # not there yet, or between two names
            return False

    def _take(self, lines: bytes) -> bool:
        before = len(self.records)
        for line in lines.splitlines():
            try:
                found = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(found, dict) and isinstance(count := found.get("num_labels"), int):
                self._num_labels = count
            record = journal_line(found, self._num_labels)
            if record is not None:
                self.records.append(record)
        return len(self.records) > before


def searches_in(folder: Path) -> list[Path]:
    """The folders that hold journals: of a run of several parts its parts, of a table of baselines its seeds."""
    document = run_document(folder)
    parts = document.get("parts") if document else None
    if isinstance(parts, list) and parts:
        return [folder / part for part in part_names(parts)]
    if document and "rows" in document:
        return sorted((path.parent for path in folder.glob("seed-*/run.json")), key=lambda p: (len(p.name), p.name))
    return [folder]


def run_document(folder: Path) -> dict[str, Any] | None:
    """run.json, or else baselines.json; None where neither can be read."""
    for name in ("run.json", "baselines.json"):
        try:
            document = orjson.loads((folder / name).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(document, dict):
            return document
    return None


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has a result, or its table of baselines every seed."""
    document = run_document(folder) or {}
    return "result" in document or bool(document.get("complete"))
