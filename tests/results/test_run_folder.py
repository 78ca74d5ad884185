"""Run folders: torn journals, damaged files, two processes on one run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from src.icm.testbeds import BadInput
from src.results import run_folder
from src.results.run_folder import FORMAT, RunFolder, environment


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        folder.append_log({"n": 1})
        folder.append_log({"n": 2})
    path = tmp_path / "r" / "log.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        with RunFolder(tmp_path / "r") as folder:
            assert folder.read_log() == [{"n": 1}]
            folder.append_log({"n": 3})
            assert folder.read_log() == [{"n": 1}, {"n": 3}]


def test_a_damaged_middle_line_is_refused_with_its_number(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        folder.log_path.write_bytes(b'{"n": 1}\n{"n"\n{"n": 3}\n')
        with pytest.raises(BadInput, match=r"log\.jsonl:2: is damaged"):
            folder.read_log()


def test_a_run_waits_for_the_last_child_of_one_that_was_killed(tmp_path: Path) -> None:
    before = RunFolder(tmp_path / "r")
    before.__enter__()
    ending = threading.Timer(0.2, before.__exit__, (None, None, None))
    ending.start()
    with RunFolder(tmp_path / "r") as folder:
        assert folder.read_log() == []
    ending.join()


def test_two_processes_cannot_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.1)
    with RunFolder(tmp_path / "r"):
        with pytest.raises(BadInput, match="another process"):
            RunFolder(tmp_path / "r").__enter__()
    with RunFolder(tmp_path / "r"):
        pass


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r") as folder:
        folder.write_prompt("what is shown first")
    assert not (tmp_path / "r").exists()
    for file in ("run.json", "table.json", "log.jsonl"):
        with RunFolder(tmp_path / file) as folder:
            (folder.path / file).write_text("{}")
        assert (tmp_path / file / file).exists()


def test_a_lock_of_a_removed_folder_is_none(tmp_path: Path) -> None:
    before = RunFolder(tmp_path / "r")
    before.__enter__()
    ending = threading.Timer(0.2, before.__exit__, (None, None, None))  # removes it while the next one waits
    ending.start()
    with RunFolder(tmp_path / "r") as folder:
        ending.join()
        folder.append_log({"n": 1})
        assert folder.read_log() == [{"n": 1}]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format": 99}'])
def test_damaged_or_newer_run_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"run\.json"):
        RunFolder(tmp_path).read_run()


def test_run_json_round_trip_and_absence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    assert folder.read_run() is None
    folder.write_run({"settings": {"alpha": 1.5}})
    assert folder.read_run() == {"format": FORMAT, "settings": {"alpha": 1.5}}
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["run.json"]  # no temporary file left


def test_environment_names_versions() -> None:
    assert environment()["packages"]["numpy"]
