"""Rows of tables: files of cells, what is measured again, GPUs shared, what ended, and the markdown. No server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine_row, engine_rows
from benchmarks.engine_cells import BadCells, Cell, read_cells
from benchmarks.engine_row import Row, determinism_result, measure, step_result, telling_lines
from benchmarks.engine_table import table
from benchmarks.step_report import CaseResult, Repetition, Report

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "benchmarks" / "cells").glob("*.yaml"))
FAKE = REPOSITORY / "tests" / "scripts" / "fake_vllm.py"

STUB = """
import json, os, sys, time
cell, folder, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
with open(os.path.join(os.path.dirname(out), "order.txt"), "a") as order:
    print(cell["name"], os.environ.get("CUDA_VISIBLE_DEVICES", "-"), os.path.basename(folder), file=order, flush=True)
time.sleep(600 if "hangs" in cell["name"] else 0.3)
if "dies" in cell["name"]:
    sys.exit(9)
row = {"name": cell["name"], "cell": cell, "state": "failed" if "fails" in cell["name"] else "done", "failure": "",
       "date": "2026-01-01", "commit": "", "versions": {}, "hardware": {}, "command": [], "seconds": {"start": 1.0},
       "log": [], "smoke": None, "determinism": None, "step": None}
open(out, "w").write(json.dumps(row))
"""
SHAPE_STUB = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
print("made by the stub", file=sys.stderr)
if "405B-fp8" in sys.argv:
    sys.exit("no room")
(folder / "config.json").write_text(" ".join(sys.argv[1:-1]))
with (folder.parent / "made.txt").open("a") as made:
    print(folder.name, file=made)
time.sleep(0.3)
"""


def cells_file(folder: Path, document: Any) -> Path:
    path = folder / "cells.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
def test_the_files_that_come_along_are_read(path: Path) -> None:
    cells = read_cells(path)
    assert len(cells) >= 9
    assert all(cell.inexact is False for cell in cells)


def test_an_inexact_cell_follows_its_exact_one_and_defaults_hold(tmp_path: Path) -> None:
    path = cells_file(
        tmp_path,
        {
            "defaults": {"prompts": 3, "options": ["--a"], "inexact": ["step"]},
            "cells": [{"name": "x", "shape": "8B", "layers": 2}, {"name": "y", "model": "/m", "inexact": False}],
        },
    )
    x, inexact, y = read_cells(path)
    assert (x.name, x.options, x.prompts, x.checks) == ("x", ("--a",), 3, ("smoke", "determinism", "step"))
    assert (inexact.name, inexact.options, inexact.checks) == ("x, inexact", ("--a", "--no-deterministic"), ("step",))
    assert y.folder(tmp_path) == "/m"
    assert x.folder(tmp_path) == inexact.folder(tmp_path) == str(tmp_path / "8B-2-layers")


def test_the_folder_stands_in_options_and_environment() -> None:
    cell = Cell(name="x", shape="8B", adapter=True, tiny=True, options=("a={folder}/b",), env={"C": "{folder}"})
    filled = cell.filled(cell.folder(Path("/s")))
    assert filled.options == ("a=/s/8B-tiny-adapter/b",)
    assert filled.env == {"C": "/s/8B-tiny-adapter"}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("cells: [", "is not YAML"),
        ({"cells": []}, "must be a list with an entry"),
        ({"rows": []}, "expected `cells`"),
        ({"cells": ["x"]}, "cell 1: must be a mapping"),
        ({"cells": [{"name": "x"}]}, "cell x: Value error, give either shape or model"),
        ({"cells": [{"name": "x", "shape": "9B"}]}, "there is no shape '9B'"),
        ({"cells": [{"name": "x", "model": "m", "layers": 3}]}, "layers, tiny and adapter are for a shape"),
        ({"cells": [{"name": "x", "shape": "8B", "gpu": 1}]}, "cell x: gpu: Extra inputs are not permitted"),
        ({"cells": [{"name": "x", "shape": "8B", "checks": ["smok"]}]}, "cell x: checks.0"),
        ({"cells": [{"name": "x", "shape": "8B"}, {"name": "x", "shape": "8B"}]}, "two cells are called 'x'"),
        ({"cells": [{"name": "../x", "shape": "8B"}]}, "cell ../x: name"),
    ],
)
def test_wrong_files_get_one_line(
    document: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cells_file(tmp_path, document)
    assert engine_rows.main([str(path), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "z"], "there is no cell 'z': 'x'"),
        (["--limit", "0"], "--limit must be above 0"),
        (["--gpus", "1", "1"], "--gpus names one twice"),
    ],
)
def test_wrong_arguments_get_one_line(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "shape": "8B"}]})
    assert engine_rows.main([str(path), "--out", str(tmp_path / "o"), *more]) == 2
    assert words in capsys.readouterr().err


def test_a_file_of_another_kind_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "shape": "8B"}]})
    (tmp_path / "rows.json").write_text('{"benchmark": "step"}')
    assert engine_rows.main([str(path), "--out", str(tmp_path)]) == 2
    assert "not a result of engine_rows.py" in capsys.readouterr().err


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What makes shapes and measures cells, replaced; the folder of results."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    (folder / "engine_row.py").write_text(STUB)
    (folder / "make_shape.py").write_text(SHAPE_STUB)
    monkeypatch.setattr(engine_rows, "HERE", folder)
    return tmp_path / "out"


def run(path: Path, out: Path, *more: str) -> int:
    return engine_rows.main([str(path), "--out", str(out), "--shapes_dir", str(path.parent / "shapes"), *more])


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((out / "rows.json").read_text())["rows"]}


def test_cells_are_measured_on_the_gpus_given_and_not_twice(stubs: Path, tmp_path: Path) -> None:
    cells = [{"name": "two", "model": "m", "gpus": 2}, *({"name": f"c{n}", "shape": "8B"} for n in range(3))]
    path = cells_file(tmp_path, {"cells": [*cells, {"name": "three", "model": "m", "gpus": 3}]})
    assert run(path, stubs, "--gpus", "4", "5") == 1  # one does not fit
    order = [line.split() for line in (stubs / "order.txt").read_text().splitlines()]
    assert order[0] == ["two", "4,5", "m"]
    assert {gpu for name, gpu, _ in order[1:]} == {"4", "5"}
    assert (tmp_path / "shapes" / "made.txt").read_text() == "8B\n"
    assert set(rows_of(stubs)) == {"two", "c0", "c1", "c2"}
    assert "shape" in rows_of(stubs)["c0"]["seconds"]
    assert run(path, stubs, "--gpus", "4", "5") == 1
    assert len((stubs / "order.txt").read_text().splitlines()) == 4


def test_a_changed_cell_is_measured_again_and_a_failed_one_when_asked(stubs: Path, tmp_path: Path) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "fails", "model": "m"}, {"name": "x", "model": "m"}]})
    assert run(path, stubs) == 1
    assert run(path, stubs) == 1
    assert len((stubs / "order.txt").read_text().splitlines()) == 2
    assert run(path, stubs, "--again") == 1
    assert (stubs / "order.txt").read_text().splitlines()[2:] == ["fails 0 m"]
    cells_file(tmp_path, {"cells": [{"name": "x", "model": "m", "prompts": 5}]})
    assert run(path, stubs) == 0
    assert (stubs / "order.txt").read_text().splitlines()[3:] == ["x 0 m"]
    assert rows_of(stubs)["x"]["cell"]["prompts"] == 5
    assert set(rows_of(stubs)) == {"fails", "x"}


def test_a_cell_that_hangs_is_stopped_and_one_that_dies_says_so(stubs: Path, tmp_path: Path) -> None:
    cells = [{"name": "hangs", "model": "m", "limit": 1.0}, {"name": "dies", "model": "m"}, {"name": "x", "model": "m"}]
    path = cells_file(tmp_path, {"cells": cells})
    assert run(path, stubs) == 1
    rows = rows_of(stubs)
    assert rows["hangs"]["state"] == "out of time"
    assert (rows["dies"]["state"], rows["dies"]["failure"]) == ("failed", "its process ended with exit code 9")
    assert rows["x"]["state"] == "done"


def test_a_shape_that_cannot_be_made_says_why(stubs: Path, tmp_path: Path) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "big", "shape": "405B-fp8"}]})
    assert run(path, stubs) == 1
    assert rows_of(stubs)["big"]["failure"] == "the shape was not made: made by the stub / no room"


def test_half_of_a_shape_is_made_again(stubs: Path, tmp_path: Path) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "shape": "8B", "layers": 3}]})
    half = tmp_path / "shapes" / "8B-3-layers"
    half.mkdir(parents=True)
    (half / "model-00001.safetensors").write_text("half")
    (half / engine_rows.MADE).write_text("null\n")
    assert run(path, stubs) == 0
    assert not (half / "model-00001.safetensors").exists()
    assert (half / "config.json").read_text() == "8B --layers 3 --weights"


def test_a_folder_of_someone_elses_is_left_alone(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "shape": "8B"}]})
    theirs = tmp_path / "shapes" / "8B" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("weights")
    assert run(path, stubs) == 2
    assert "is no shape of this command" in capsys.readouterr().err
    assert theirs.read_text() == "weights"
    theirs.unlink()
    assert run(path, stubs) == 0


def test_results_cannot_be_kept_in_a_file(stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "model": "m"}]})
    assert run(path, path) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_time_for_all_stops_what_runs_and_begins_nothing_more(
    stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "hangs", "model": "m"}, {"name": "late", "model": "m"}]})
    assert run(path, stubs, "--limit", "1") == 1
    assert rows_of(stubs)["hangs"]["state"] == "out of time"
    assert "late" not in rows_of(stubs)
    assert "1 cells not begun: late" in capsys.readouterr().out


def test_an_interrupt_ends_the_cells_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder, out = tmp_path / "stubs", tmp_path / "out"
    folder.mkdir()
    (folder / "engine_row.py").write_text(STUB)
    path = cells_file(tmp_path, {"cells": [{"name": "first", "model": "m"}, {"name": "hangs", "model": "m"}]})
    code = f"from pathlib import Path; from benchmarks import engine_rows; engine_rows.HERE = Path({str(folder)!r}); "
    code += f"raise SystemExit(engine_rows.main([{str(path)!r}, '--out', {str(out)!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE
    )
    order = out / "order.txt"
    deadline = time.monotonic() + 60
    while not (order.exists() and "hangs" in order.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command goes on" in said
    assert set(rows_of(out)) == {"first"}
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(p)]
    assert not running


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def cell(**more: Any) -> Cell:
    return Cell.model_validate({"name": "x", "model": "/m/tiny", "checks": ["smoke", "determinism", "step"]} | more)


@pytest.mark.parametrize(("manner", "words"), [("dies", "No module named vllm"), ("fails", "Insufficient space")])
def test_a_server_that_does_not_start_leaves_its_last_lines(
    manner: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "launch.sh"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" {manner} "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(engine_row, "LAUNCHER", launcher)
    row = measure(cell(), "/m/tiny", tmp_path / "x.json", cpu=False)
    assert row.state == "failed"
    assert words in row.failure
    assert json.loads((tmp_path / "x.json").read_text())["failure"] == row.failure
    assert row.command == ["scripts/launch_vllm_server.sh", "tiny"]


def test_checks_that_cannot_run_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is up and answers nothing of vLLM's."""
    launcher = tmp_path / "launch.sh"
    launcher.write_text(f'#!/bin/sh\necho "$ICM_TEST" \nexec "{sys.executable}" "{FAKE}" up "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(engine_row, "LAUNCHER", launcher)
    asked = cell(env={"ICM_TEST": "exact scores: from here"}, checks=["smoke", "step"], step=["--sizes", "2"])
    row = measure(asked, "/m/tiny", tmp_path / "x.json", cpu=False)
    assert row.state == "failed"
    assert "step.py ended with exit code 2" in row.failure
    assert "error: --sizes must be at least 4" in row.failure
    assert row.smoke is not None
    assert set(row.smoke["failed"]) == {"reachable"}
    assert row.log == ["exact scores: from here"]
    assert set(row.seconds) == {"start", "smoke", "step", "stop"}


def test_a_row_holds_what_every_check_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, against a server that behaves like vLLM."""
    launcher = tmp_path / "launch.sh"
    fake = Path(__file__).with_name("fake_server.py")
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" "{fake}" "$@"\n')
    launcher.chmod(0o755)
    monkeypatch.setattr(engine_row, "LAUNCHER", launcher)
    asked = cell(prompts=2, step=["--quick", "--cases", "c", "d", "e", "--claim_tokens", "12"])
    row = measure(asked, "/m/tiny", tmp_path / "x.json", cpu=False)
    assert (row.state, row.failure) == ("done", "")
    assert row.smoke == {"checks": 8, "failed": {}}
    assert row.determinism is not None
    assert row.determinism["whole"]
    assert row.determinism["rows"] > 20
    assert row.determinism["differing"] == 0
    assert row.step is not None
    assert row.step["bounds"] == 6
    assert row.step["broken"] == []
    assert row.log == ["Using FLASH_ATTN attention backend out of ['A']"]
    assert list(row.seconds) == ["start", "smoke", "determinism", "step", "stop"]
    shown = table([json.loads((tmp_path / "x.json").read_text())]).splitlines()[-1]
    assert shown.startswith(f"| x | **0 of {row.determinism['rows']}** | 0 | as the tree should | 0.")


PRINTED = """Determinism check: each row asks the same prompts in another way.
                                                differ largest, nats  labels  U moves decisions  cached
100 times, 10 at a time                           0/12             0       0        0      0.50
half of each prompt cached, as a list             3/12       0.03125       1     0.26      0.61     50%
texts of 100 tokens, greedy                       1/12  other tokens       0        0      0.50
"""


def test_rows_of_the_determinism_check_are_read_whole_and_cut_short() -> None:
    cut = determinism_result(PRINTED)
    assert cut is not None
    assert {name: cut[name] for name in ("rows", "whole", "differing", "largest", "other_tokens")} == {
        "rows": 3,
        "whole": False,
        "differing": 2,
        "largest": 0.03125,
        "other_tokens": True,
    }
    whole = determinism_result(PRINTED + "2 of 3 rows differ; 12 s\n")
    assert whole is not None
    assert whole["whole"]
    assert determinism_result("error: nothing answers\n") is None


def test_telling_lines_are_kept_without_stamps() -> None:
    log = (
        "(EngineCore pid=8) INFO 11-21 13:17:29 [cuda.py:2] Using FLASH_ATTN attention backend out of ['A', 'B']\n"
        "(EngineCore pid=9) INFO 11-21 13:17:30 [cuda.py:2] Using FLASH_ATTN attention backend out of ['A', 'B']\n"
        "INFO: something else\n(Worker pid=3) exact scores: in place are RMS norms\n"
        "env A=exact scores /x/python -m vllm\nUsing the kernel of /opt/site/vllm/tuned.json at http://a/b/c and a/b\n"
    )
    assert telling_lines(log) == [
        "Using FLASH_ATTN attention backend out of ['A', 'B']",
        "exact scores: in place are RMS norms",
        "Using the kernel of tuned.json at http://a/b/c and a/b",
    ]


def repetition(seconds: float, computed: int | None) -> Repetition:
    return Repetition(seconds, 0.1, 64, 6400, computed, 1, 0, 100, 100)


def report(seconds: float, computed: int | None) -> Report:
    made = Report(block_tokens=16, kv_cache_tokens=1000)
    for name in "cd":
        entry = CaseResult(name, 64, [repetition(seconds, computed)], "", 40.0, 45, 40.0, 45)
        made.cases.append(entry)
    made.cases.append(CaseResult("e", 64))
    return made


def result(name: str, **more: Any) -> dict[str, Any]:
    row = Row(name, {"checks": ["determinism", "step"]}, "done", versions={"vllm": "0.33.0"}, date="2026-01-02")
    row.hardware = {"cpu": "C", "gpus": ["NVIDIA H200"]}
    return {**vars(row), **more}


def test_the_table_shows_exact_beside_inexact_and_says_what_failed() -> None:
    same = determinism_result(PRINTED.splitlines()[2] + "\nall 1 rows are the same to the last bit; 3 s\n")
    rows = [
        result("A", determinism=same, step=step_result(report(2.2, 900))),
        result("A, inexact", determinism=determinism_result(PRINTED), step=step_result(report(2.0, 900))),
        result("B", state="failed", failure="the server ended.\n  because"),
        result("C", determinism=same, step=step_result(report(1.0, 10**7)), smoke={"failed": {"ready": "no"}}),
        result("D, inexact", step=step_result(report(1.0, None))),
    ]
    lines = table(rows).splitlines()
    assert lines[0].startswith("vllm 0.33.0; NVIDIA H200; 2026-01-02; 64 claims")
    assert lines[2] == "|  | rows that differ | largest, nats | tokens computed | tree, cold | a label appended |"
    assert lines[4:9] == [
        "| A | **0 of 1** | 0 | as the tree should | 2.20 / 2.00 (+10%) | 2.20 / 2.00 (+10%) |",
        "| A, inexact | 2 of 3 (cut short) | other tokens | as the tree should |  |  |",
        "| B | failed |  |  |  |  |",
        "| C | **0 of 1** | 0 | 2 of 2 bounds broken | 1.00 | 1.00 |",
        "| D, inexact | not measured |  | 2 of 2 bounds broken | 1.00 | 1.00 |",
    ]
    assert "- B: failed: the server ended. / because" in lines
    assert "- C: smoke check, ready: no" in lines


def test_list_and_table_measure_nothing(stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cells_file(tmp_path, {"cells": [{"name": "x", "model": "m"}]})
    assert run(path, stubs, "--list") == 0
    assert "not measured" in capsys.readouterr().out
    assert run(path, stubs, "--table") == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not stubs.exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "no.yaml"
    assert engine_rows.main([str(path), "--out", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err == f"error: {path}: not found\n"


def test_no_cell_of_a_name_is_an_error() -> None:
    with pytest.raises(BadCells):
        engine_rows.chosen([cell()], ["y*"])
    assert engine_rows.chosen([cell(name="xa"), cell(name="b"), cell(name="xb")], ["b", "x*"])[0].name == "b"
