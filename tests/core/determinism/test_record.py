"""What is kept of a check, and what a run is told about its engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import orjson

from core.determinism.bits import Compared
from core.determinism.matrix import Row
from core.determinism.record import (
    Record,
    doubt,
    manifest_entry,
    needs_check,
    read_record,
    record_path,
    write_record,
)
from core.llm_api.types import EngineIdentity
from tests.core.determinism.test_matrix import MATERIAL

ENGINE = EngineIdentity("vllm", "llama", root="/llama", version="0.26.0", fingerprint="abc", max_model_len=4096)


def keep(folder: Path, differing: int = 0, not_reached: tuple[str, ...] = ()) -> Record:
    rows = [Row("alone, again", Compared(9, 0), 0.0), Row("shuffled", Compared(9, differing, float("inf")))]
    references = [{7: -1.0, 8: -2.0}]
    return write_record(
        folder,
        ENGINE,
        MATERIAL,
        rows,
        references,
        finished="2026-11-21T10:00:00+0000",
        quick=True,
        not_reached=not_reached,
    )


def test_a_check_is_read_as_it_was_written(tmp_path: Path) -> None:
    kept = keep(tmp_path)
    assert read_record(tmp_path, ENGINE) == kept
    assert kept.references == [{7: -1.0, 8: -2.0}]
    assert kept.rows[1]["compared"]["largest"] is None


def test_an_engine_that_passed_raises_no_doubt(tmp_path: Path) -> None:
    keep(tmp_path)
    assert doubt(read_record(tmp_path, ENGINE), ENGINE) is None


def test_another_engine_was_never_checked(tmp_path: Path) -> None:
    keep(tmp_path)
    qwen = replace(ENGINE, model="qwen", root="/qwen", fingerprint="def")
    for other in (qwen, replace(ENGINE, version="0.27.0"), replace(ENGINE, determinism="x=1")):
        assert "never checked" in str(doubt(read_record(tmp_path, other), other))


def test_another_fingerprint_is_another_way_to_compute(tmp_path: Path) -> None:
    keep(tmp_path)
    other = replace(ENGINE, fingerprint="def")
    assert "answers have changed" in str(doubt(read_record(tmp_path, other), other))


def test_a_failed_check_is_told_with_its_rows(tmp_path: Path) -> None:
    record = keep(tmp_path, differing=2)
    assert "in 1 of 2 rows" in str(doubt(record, ENGINE))
    assert manifest_entry(ENGINE, record)["failed_rows"] == ["shuffled"]


def test_rows_that_were_not_reached_leave_a_doubt(tmp_path: Path) -> None:
    record = keep(tmp_path, not_reached=("as a search asks",))
    assert record.passed
    assert "passed 2 rows" in str(doubt(record, ENGINE))
    assert "its time did not allow 1 more" in str(doubt(record, ENGINE))
    assert needs_check(record, ENGINE)
    assert not needs_check(record, ENGINE, whole=False)
    assert needs_check(record, replace(ENGINE, fingerprint="def"), whole=False)
    assert needs_check(keep(tmp_path, differing=1, not_reached=("as a search asks",)), ENGINE, whole=False)
    assert needs_check(None, ENGINE, whole=False)
    assert manifest_entry(ENGINE, record)["not_reached"] == ["as a search asks"]
    assert "not_reached" not in manifest_entry(ENGINE, keep(tmp_path))


def test_a_failure_is_known_by_its_row_and_by_who_failed(tmp_path: Path) -> None:
    record = keep(tmp_path, differing=1)
    assert record.failed_in(["alone, again", "shuffled"], ENGINE)
    assert not record.failed_in(["alone, again"], ENGINE)
    assert not record.failed_in(["shuffled"], replace(ENGINE, fingerprint="def"))


def test_another_type_is_another_engine_but_for_the_one_of_old_records(tmp_path: Path) -> None:
    keep(tmp_path)
    assert doubt(read_record(tmp_path, ENGINE), replace(ENGINE, dtype="bfloat16")) is None
    assert read_record(tmp_path, replace(ENGINE, dtype="bfloat16")) is not None
    assert read_record(tmp_path, replace(ENGINE, dtype="float32")) is None


def test_a_damaged_or_newer_record_counts_as_none(tmp_path: Path) -> None:
    keep(tmp_path)
    path = record_path(tmp_path, ENGINE)
    newer = orjson.loads(path.read_bytes()) | {"format": 99}
    for content in (b"{", b"[]", orjson.dumps(newer)):
        path.write_bytes(content)
        assert read_record(tmp_path, ENGINE) is None


def test_a_model_that_was_moved_or_renamed_stays_checked(tmp_path: Path) -> None:
    kept = keep(tmp_path)
    for moved in (replace(ENGINE, root="/elsewhere"), replace(ENGINE, model="my-name", root="/x", config="c")):
        assert read_record(tmp_path, moved) == kept
        assert doubt(kept, moved) is None
    for other in ({"fingerprint": "def"}, {"version": "1"}, {"fingerprint": ""}, {"kind": "vllm-direct"}):
        assert read_record(tmp_path, replace(ENGINE, root="/elsewhere", **other)) is None


def test_a_record_by_content_wins_over_that_of_another_model_in_its_place(tmp_path: Path) -> None:
    kept = keep(tmp_path)
    there = replace(ENGINE, root="/elsewhere", fingerprint="def")
    write_record(tmp_path, there, MATERIAL, [], [], finished="2026-11-22T10:00:00+0000", quick=True)
    swapped = replace(ENGINE, root="/elsewhere")
    assert read_record(tmp_path, swapped) == kept
    assert read_record(tmp_path, there).engine["fingerprint"] == "def"  # type: ignore[union-attr]


def test_the_context_length_does_not_make_another_engine(tmp_path: Path) -> None:
    assert record_path(tmp_path, ENGINE) == record_path(tmp_path, replace(ENGINE, max_model_len=8192))
