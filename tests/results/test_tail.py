"""Following a journal while it is written, torn, cut and replaced."""

from __future__ import annotations

import json
from pathlib import Path

from src.results.tail import CHUNK, JournalTail, is_finished, searches_in


def line(number: int, padding: int = 0) -> bytes:
    step = {"event": "step", "iteration": number, "accepted": False, "U": float(number), "x": "x" * padding}
    return json.dumps(step).encode() + b"\n"


def utilities(tail: JournalTail) -> list[float]:
    return [record["U"] for record in tail.records]


def test_lines_come_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    tail = JournalTail(path)
    assert not tail.poll()
    path.write_bytes(line(1))
    assert tail.poll()
    assert not tail.poll()
    whole = line(2)
    for cut in range(1, len(whole)):  # torn at every byte
        path.write_bytes(line(1) + whole[:cut])
        assert not tail.poll()
    path.write_bytes(line(1) + whole + line(3))
    assert tail.poll()
    assert utilities(tail) == [1.0, 2.0, 3.0]


def test_a_file_that_was_cut_or_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1) + line(2))
    tail = JournalTail(path)
    tail.poll()
    path.write_bytes(line(7))
    assert tail.poll()
    assert utilities(tail) == [7.0]
    path.rename(tmp_path / "log.1")
    assert not tail.poll()
    assert utilities(tail) == [7.0]  # what is known stays shown until there is a new file
    path.write_bytes(line(8) + line(9))
    assert tail.poll()
    assert utilities(tail) == [8.0, 9.0]


def test_damaged_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"{\n[]\n" + line(1) + b'{"event": "new kind"}\n{"event": "step", "U": 2}\n\n')
    tail = JournalTail(path)
    tail.poll()
    assert utilities(tail) == [1.0]


def test_lines_longer_than_a_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1, padding=3 * CHUNK) + line(2) + line(3, padding=2 * CHUNK)[:-1])
    tail = JournalTail(path)
    tail.poll()
    assert utilities(tail) == [1.0, 2.0]
    with path.open("ab") as file:
        file.write(b"\n")
    tail.poll()
    assert utilities(tail) == [1.0, 2.0, 3.0]


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert searches_in(tmp_path) == [tmp_path]
    assert not is_finished(tmp_path)
    (tmp_path / "run.json").write_text('{"parts": ["batch-000", "batch-001"]}')
    assert [path.name for path in searches_in(tmp_path)] == ["batch-000", "batch-001"]
    (tmp_path / "run.json").write_text('{"result": {}}')
    assert is_finished(tmp_path)
