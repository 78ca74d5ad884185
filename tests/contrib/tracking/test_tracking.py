"""Logging runs to tools: what is sent, that a run that goes on is sent once, and that no tool stops a search."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from contrib.tracking import tracking as module
from contrib.tracking.tracker import TOOLS, Point, Points, Tool, TrackedRun, check_installed, results_as_values
from contrib.tracking.tracking import Tracking, track_files
from fakes.vllm_server import FakeVLLM
from src.experiments.ICM import _run, build_parser
from src.experiments.request import TRACKERS, RunRequest
from src.icm.testbeds import BadInput
from src.results.curves import curves_of
from src.results.run_reader import read_run
from tests.run_examples import write_run

LABELS = [True, False] * 4


class Notebook:
    """A tracker that writes down what it is told, in the order in which it is."""

    opened: ClassVar[list[Notebook]] = []
    fail_at: ClassVar[str] = ""
    slow_s: ClassVar[float] = 0.0
    held_at_first: ClassVar[int] = 0
    where = "notebook"

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.points, self.results, self.ended = run, [], {}, None
        self.held = Notebook.held_at_first
        self.opened.append(self)
        self._may_fail("open")

    def log(self, point: Point) -> None:
        time.sleep(self.slow_s)
        self._may_fail("log")
        self.points.append(point)

    def finish(self, results: Any, curves: Path) -> None:
        self._may_fail("finish")
        self.results, self.curves = results, curves.is_file()

    def close(self, *, finished: bool) -> None:
        self._may_fail("close")
        self.ended = finished

    def _may_fail(self, what: str) -> None:
        if self.fail_at == what:
            raise OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    """A fourth tool, and in place of TensorBoard, so that the command line takes it."""
    stand_in = ModuleType("notebook_run")
    stand_in.open_run = lambda run, place: Notebook(run)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "notebook_run", stand_in)
    for name in ("notebook", "other"):
        monkeypatch.setitem(TOOLS, name, Tool(name.capitalize(), "json", "none", "notebook_run"))
    for name, value in (("opened", []), ("fail_at", ""), ("slow_s", 0.0), ("held_at_first", 0)):
        monkeypatch.setattr(Notebook, name, value)
    return Notebook


def test_every_name_of_the_flag_is_a_tool() -> None:
    assert set(TRACKERS) <= set(TOOLS)


def test_a_line_says_what_the_curves_say(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=LABELS, gold=[*LABELS[:7], True], refused=2))
    points = list(Points(run).of(run.journal))
    curves = curves_of(run.journal, run.gold)
    assert [point.step for point in points] == list(range(len(curves.utility)))
    assert [point.values["U"] for point in points] == curves.utility
    assert [point.values.get("agreement") for point in points] == curves.accuracy
    assert points[-1].values["agreement"] == 7 / 8
    assert [point.values["labelled"] for point in points] == [4, 5, 6, 7, 8, 8, 8]
    assert [point.values["tokens_computed"] for point in points] == [60, *[10] * 6]
    assert points[-1].values["total_tokens_computed"] == 120
    assert points[-1].values["total_seconds"] == 0.5 + 6 * 0.25
    assert points[0].time == 1795287600.5  # 2026-11-21T19:00:00+0000, and the half second of the first line
    assert "temperature" not in points[0].values
    assert points[1].values["temperature"] == 10.0


def test_without_gold_no_agreement_is_told(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=LABELS))
    assert not any("agreement" in point.values for point in Points(run).of(run.journal))
    assert not any("agreement" in name for name in results_as_values(run))


def test_a_finished_run_is_sent_with_its_settings_and_results(tmp_path: Path, notebook: type[Notebook]) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS, gold=LABELS, settings={"label_texts": [" no", " yes"]})
    assert track_files("notebook", folder, read_run(folder), None) == ["notebook"]
    [told] = notebook.opened
    assert [point.step for point in told.points] == [0, 1, 2, 3, 4]
    assert told.ended is True
    assert told.results["final/agreement_ICM"] == 1.0
    assert told.results["final/tokens_computed"] == 10_000
    assert told.run.settings["alpha"] == 50.0
    assert told.run.settings["engine_version"] == "0.26.0"
    assert told.run.settings["label_texts"] == "[' no', ' yes']"
    assert (told.run.name, told.run.started) == ("a", 1795287600.0)


def test_a_run_that_is_not_finished_is_left_open(tmp_path: Path, notebook: type[Notebook]) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS, finished=False)
    track_files("notebook", folder, read_run(folder), None)
    [told] = notebook.opened
    assert (len(told.points), told.results, told.ended) == (5, {}, False)


def test_what_a_tool_has_is_not_sent_again_and_the_run_is_found_by_the_same_key(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    track_files("notebook", folder, read_run(folder), None)
    monkeypatch.setattr(Notebook, "held_at_first", 3)
    track_files("notebook", folder, read_run(folder), None)
    first, second = notebook.opened
    assert [point.step for point in second.points] == [3, 4]
    assert first.run.key == second.run.key
    (tmp_path / "moved").mkdir()
    moved = folder.rename(tmp_path / "moved" / "a")
    track_files("notebook", moved, read_run(moved), None)
    assert notebook.opened[-1].run.key == first.run.key


@pytest.mark.parametrize("step", ["open", "log", "finish", "close"])
def test_a_tool_that_fails_is_warned_of_once_and_others_go_on(
    tmp_path: Path,
    notebook: type[Notebook],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    monkeypatch.setattr(Notebook, "fail_at", step)
    tracking = Tracking(["notebook", "other", "notebook"], folder, "a")
    tracking.finish()
    tracking.wait()
    assert tracking.where == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # one for each of the two
    [line] = [line for line in said if "Notebook" in line]
    assert "No space left on device" in line
    assert f"icm export {folder} --format notebook" in line


def test_a_tool_that_does_not_answer_is_left_behind(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SAY_S", 0.1)
    monkeypatch.setattr(Notebook, "slow_s", 3.0)
    folder = write_run(tmp_path / "a", labels=LABELS)
    tracking = Tracking(["notebook"], folder, "a")
    begun = time.monotonic()
    tracking.finish()
    tracking.wait(0.5)
    assert time.monotonic() - begun < 2.5
    said = capsys.readouterr().err
    assert "waiting until Notebook took in the run" in said
    assert "warning: Notebook did not take in everything in 0.5 s" in said
    assert tracking.where == []
    monkeypatch.setattr(Notebook, "fail_at", "log")
    [worker] = tracking._workers
    worker._thread.join(30)
    assert not worker.busy
    assert capsys.readouterr().err == ""  # it was left behind: what becomes of it is not told again


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOOLS, "absent", Tool("Absent", "no_such_package", "absent", "none"))
    with pytest.raises(BadInput, match=r"no_such_package, which is not installed: pip install '.\[absent\]'"):
        check_installed(["absent"])


async def label(server: FakeVLLM, folder: Path, *more: str) -> int:
    """`icm label` without its signal handlers."""
    flags = ["--testbed", "builtin", "--batch_size", "16", "--num_seed", "2", "--model", server.model,
             "--runs_dir", str(folder), "--run", "mine", "--stop", "K", "--K", "12", "--quiet", *more]  # fmt: skip
    return await _run(RunRequest.of(build_parser().parse_args(flags)))


async def test_a_search_is_sent_line_by_line_and_one_that_goes_on_is_sent_whole(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOOLS, "tensorboard", TOOLS["notebook"])
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM() as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        assert await label(server, tmp_path, "--log_to", "tensorboard") == 0
        [whole] = notebook.opened
        # As a search that is killed after its sixth line leaves it.
        log, document = tmp_path / "mine" / "log.jsonl", tmp_path / "mine" / "run.json"
        log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:6]))
        begun = {name: value for name, value in json.loads(document.read_text()).items() if name not in ENDS}
        document.write_text(json.dumps(begun))
        monkeypatch.setattr(Notebook, "held_at_first", 4)
        assert await label(server, tmp_path, "--log_to", "tensorboard") == 0
        _, rest = notebook.opened
        assert await label(server, tmp_path, "--log_to", "tensorboard") == 0  # is finished, and sent as it is
    assert (rest.run.key, rest.ended, rest.curves) == (whole.run.key, True, True)
    assert [point.step for point in rest.points] == [point.step for point in whole.points][4:]
    assert [point.values["U"] for point in rest.points] == [point.values["U"] for point in whole.points][4:]
    assert rest.results["final/U"] == whole.results["final/U"] == whole.points[-1].values["U"]
    assert len(notebook.opened) == 3


ENDS = ("finished", "result", "cost")


async def test_a_search_ends_as_it_would_without_a_tool_that_fails(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TOOLS, "tensorboard", TOOLS["notebook"])
    monkeypatch.setattr(Notebook, "fail_at", "log")
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM() as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        assert await label(server, tmp_path / "a", "--log_to", "tensorboard") == 0
        assert await label(server, tmp_path / "b") == 0
    assert capsys.readouterr().err.count("Notebook failed") == 1
    labels = [(tmp_path / name / "mine" / "labels.jsonl").read_bytes() for name in "ab"]
    assert labels[0] == labels[1]


async def test_every_search_of_several_is_a_run_of_its_own(
    tmp_path: Path, notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOOLS, "tensorboard", TOOLS["notebook"])
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM() as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        assert await label(server, tmp_path, "--num_batches", "2", "--log_to", "tensorboard") == 0
    live = {told.run.name: told.run.key for told in notebook.opened}
    assert set(live) == {"mine/batch-000", "mine/batch-001"}
    notebook.opened.clear()
    folder = tmp_path / "mine"
    assert len(track_files("tensorboard", folder, read_run(folder), None)) == 2
    assert {told.run.name: told.run.key for told in notebook.opened} == live
