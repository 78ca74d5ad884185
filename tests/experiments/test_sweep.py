"""Sweeps: cells and their names, wrong files in one line, kills that change nothing, cells that fail alone."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from src.experiments.experiment_file import load_experiment
from src.experiments.run_experiment import main
from src.experiments.sweep import planned, run_sweep, stages
from src.experiments.sweep_cells import Sweep, sweep_of
from src.experiments.sweep_estimate import dry_run
from src.icm.testbeds import BadInput
from tests.experiments.program import Program
from tests.experiments.test_icm_cli import data, server, signed_by_words  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("table.txt", "table.csv", "table.json")


class Run(Program):
    """`icm run FILE` in a process of its own."""

    def __init__(self, url: str, file: Path, runs: Path) -> None:
        self.file, self.runs = file, runs
        command = (sys.executable, "-m", "src.experiments.commands", "run", str(file), "--runs_dir", str(runs))
        super().__init__(command, url, PYTHONPATH=str(ROOT))

    async def inside(self, *more: str, dry: bool = False) -> tuple[int, str, str]:
        """The same in this process, which is faster: what `icm run` does once the file is read."""
        sweep = sweep_of(load_experiment(self.file), ["--runs_dir", str(self.runs), *more])
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.delenv("VLLM_BASE_URL", raising=False)
            for name in self.environment.keys() & {"VLLM_BASE_URL", "ICM_SECRETS", "ICM_MAX_ATTEMPTS"}:
                patch.setenv(name, self.environment[name])
            code = await (dry_run(sweep) if dry else run_sweep(sweep, at_once=None, quiet=True))
        return code, out.getvalue(), err.getvalue()

    def finished(self, name: str) -> int:
        """How many cells hold a result."""
        return sum('"result"' in path.read_text() for path in (self.runs / name).glob("*/run.json"))

    def tables(self, name: str) -> list[bytes]:
        return [(self.runs / name / table).read_bytes() for table in TABLES]

    async def ended_after(self, signal_number: int, cells: int, name: str) -> str:
        """Start it, signal it as soon as so many cells are finished, and return what it said."""
        process = await self.start("--quiet", "--run", name)
        reading = asyncio.create_task(process.communicate())
        while self.finished(name) < cells:
            assert process.returncode is None, (await reading)[1].decode()
            await asyncio.sleep(0.02)
        process.send_signal(signal_number)
        _, err = await reading
        assert self.finished(name) < 24
        return err.decode()


def write(path: Path, data: Path, sweep: str, command: str = "label", more: str = "") -> Path:  # noqa: F811
    path.write_text(
        f"title: A sweep\ncommand: {command}\n"
        f"settings: {{data: {data}, model: fake-8b, num_seed: 2, batch_size: 6, K: 8}}\n{more}sweep:\n{sweep}"
    )
    return path


@pytest.fixture
def run(server: FakeVLLM, data: Path, tmp_path: Path) -> Run:  # noqa: F811
    file = write(
        tmp_path / "many.yaml", data, "  alpha: [10, 30, 50]\n  calibrate: [none, mean]\n  seed: [1, 2, 3, 4]\n"
    )
    return Run(server.url, file, tmp_path / "runs")


def cells_of(path: Path, *more: str) -> Sweep:
    return sweep_of(load_experiment(path), more)


async def test_24_cells_killed_twice_end_in_the_same_table_to_the_byte(run: Run) -> None:
    code, out, err = await run.inside("--run", "whole")
    assert code == 0, err
    assert "24 cells: 3 alpha x 2 calibrate x 4 seed, 4 at once on each engine; in " in err
    await run.ended_after(signal.SIGKILL, 3, "killed")
    await run.ended_after(signal.SIGKILL, 12, "killed")
    before = run.finished("killed")
    code, again, err = await run("--quiet", "--run", "killed", "--at_once", "2")
    assert code == 0, err
    assert f"{before} finished before" in err
    assert run.tables("killed") == run.tables("whole")
    assert again.replace("/runs/killed/", "/runs/whole/") == out
    [head, *rows] = csv.reader((run.runs / "whole" / "table.csv").read_text().splitlines())
    assert head[:8] == [
        "alpha",
        "calibrate",
        "cells",
        "of",
        "agreement",
        "agreement_sd",
        "agreement_low",
        "agreement_high",
    ]
    assert [row[:4] for row in rows] == [[a, c, "4", "4"] for a in ("10", "30", "50") for c in ("none", "mean")]
    page = (run.runs / "whole" / "index.html").read_text()
    assert 'href="alpha-10_calibrate-none_seed-1/labels.jsonl"' in page
    assert "<svg" in page
    assert json.loads((run.runs / "killed" / "experiment.json").read_text())["file"] == "many.yaml"


async def test_sigterm_stops_all_cells_and_says_how_to_go_on(run: Run) -> None:
    err = await run.ended_after(signal.SIGTERM, 2, "stopped")
    assert "Nothing is lost; go on with:" in err
    assert f"icm run {run.file}" in err
    assert "Traceback" not in err
    assert not (run.runs / "stopped" / "table.csv").exists()


async def test_a_cell_is_what_icm_label_makes_of_its_command_line(run: Run, data: Path, tmp_path: Path) -> None:  # noqa: F811
    write(run.file, data, "  alpha: [10]\n  seed: [5]\n")
    assert (await run.inside())[0] == 0
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "src.experiments.commands", "label", *cells_of(run.file).cells[0].arguments),
        *("--runs_dir", str(tmp_path / "other"), "--run", "alone", "--quiet"),
        env=run.environment,
        stderr=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    cell, alone = run.runs / "many" / "alpha-10_seed-5", tmp_path / "other" / "alone"
    assert (cell / "labels.jsonl").read_bytes() == (alone / "labels.jsonl").read_bytes()
    assert (cell / "prompt.txt").read_bytes() == (alone / "prompt.txt").read_bytes()
    settings = [json.loads((folder / "run.json").read_text())["settings"] for folder in (cell, alone)]
    assert settings[0] == settings[1]


async def test_a_cell_that_fails_stops_no_other_and_is_run_again(run: Run, data: Path, tmp_path: Path) -> None:  # noqa: F811
    missing = tmp_path / "later.jsonl"
    sweep = f"  claims:\n    here: {{data: {data}}}\n    later: {{data: {missing}}}\n  seed: [1, 2]\n"
    run.file.write_text(
        "title: A sweep\ncommand: label\nsettings: {model: fake-8b, num_seed: 2, batch_size: 6}\nsweep:\n" + sweep
    )
    code, out, err = await run.inside()
    assert code == 1
    assert "2 cells not finished; the same command runs only them:" in err
    assert f"  claims-later_seed-2: {missing}: not found" in err
    assert "Traceback" not in err
    assert out.splitlines()[3].split()[:4] == ["later", "0", "of", "2"]
    assert "later.jsonl: not found" in (run.runs / "many" / "index.html").read_text()
    before = (run.runs / "many" / "claims-here_seed-1" / "run.json").stat().st_mtime_ns
    missing.write_bytes(data.read_bytes())
    code, out, err = await run.inside()
    assert code == 0, err
    assert "2 finished before" in err
    assert (run.runs / "many" / "claims-here_seed-1" / "run.json").stat().st_mtime_ns == before
    assert json.loads((run.runs / "many" / "table.json").read_text())["missing"] == []


async def test_a_setting_that_changed_since_is_told_by_each_cell(run: Run, data: Path) -> None:  # noqa: F811
    write(run.file, data, "  alpha: [10, 30]\n")
    assert (await run.inside())[0] == 0
    code, _, err = await run.inside("--K", "30")
    assert code == 1
    assert "alpha-10: " in err
    assert "was started with --K 8, now 30" in err


async def test_each_model_is_asked_at_its_own_server(run: Run, server: FakeVLLM, data: Path) -> None:  # noqa: F811
    async with FakeVLLM(model="other-1b") as other:
        run.environment.pop("VLLM_BASE_URL")
        write(run.file, data, "  model: [fake-8b, other-1b]\n  seed: [1, 2]\n",
              more=f"servers: {{fake-8b: {server.url}, other-1b: {other.url}}}\n")  # fmt: skip
        run.file.write_text(run.file.read_text().replace("model: fake-8b, ", ""))
        code, out, err = await run.inside()
        assert code == 0, err
        assert [line.split()[0] for line in out.splitlines()[2:4]] == ["fake-8b", "other-1b"]
        asked = {body["model"] for body in other.completions}
    assert asked == {"other-1b"}


async def test_a_server_that_does_not_answer_fails_its_own_cells_only(run: Run, server: FakeVLLM, data: Path) -> None:  # noqa: F811
    write(run.file, data, "  model: [fake-8b, other-1b]\n  seed: [1, 2]\n",
          more=f"servers: {{fake-8b: {server.url}, other-1b: http://127.0.0.1:9}}\n")  # fmt: skip
    run.file.write_text(run.file.read_text().replace("model: fake-8b, ", ""))
    code, _, err = await run.inside()
    assert code == 1
    assert run.finished("many") == 2
    assert err.count("http://127.0.0.1:9") == 2
    assert "other-1b_seed-1: " in err


async def test_after_a_server_is_lost_nothing_is_begun_and_another_server_goes_on(run: Run, data: Path) -> None:  # noqa: F811
    run.environment["ICM_MAX_ATTEMPTS"] = "2"
    write(run.file, data, "  alpha: [10, 30]\n  seed: [1, 2, 3, 4]\n", more="at_once: 2\n")
    async with FakeVLLM(log_odds=signed_by_words) as first:
        first.latency = 0.005
        run.environment["VLLM_BASE_URL"] = first.url
        task = asyncio.create_task(run.inside())
        while run.finished("many") < 2:
            assert not task.done()
            await asyncio.sleep(0.01)
    code, _, err = await task
    assert code == 1, err
    assert 2 <= run.finished("many") < 6
    assert err.count(first.url) == 8 - run.finished("many")
    assert f"{8 - run.finished('many')} cells not finished" in err
    begun = [path.name for path in (run.runs / "many").iterdir() if path.is_dir()]
    assert len(begun) <= run.finished("many") + 2
    async with FakeVLLM(log_odds=signed_by_words) as second:
        run.environment["VLLM_BASE_URL"] = second.url
        code, _, err = await run.inside()
        assert code == 0, err
    assert run.finished("many") == 8


def test_models_in_this_process_come_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("title: t\ncommand: label\nsettings: {testbed: builtin}\nsweep: {seed: [1, 2], model: [a, b]}\n")
    _, cells, _ = planned(cells_of(path, "--direct", "--runs_dir", str(tmp_path)))
    assert [[each.cell.name for each in stage] for stage in stages(cells)] == [
        ["seed-1_a", "seed-2_a"],
        ["seed-1_b", "seed-2_b"],
    ]
    _, cells, _ = planned(cells_of(path, "--runs_dir", str(tmp_path)))
    assert [len(stage) for stage in stages(cells)] == [4]


async def test_batches_and_baselines_are_cells_too(run: Run, data: Path, tmp_path: Path) -> None:  # noqa: F811
    write(run.file, data, "  alpha: [10, 30]\n", more="")
    code, out, err = await run.inside("--num_batches", "all", "--run", "batches")
    assert code == 0, err
    assert (run.runs / "batches" / "alpha-10" / "batch-003" / "labels.jsonl").exists()
    rows = "  alpha: [10, 30]\n  seeds: [1, 2]\n  rows: [[zero-shot, icm]]\n"
    file = write(tmp_path / "held.yaml", data, rows, command="baselines")
    tried = Run(run.environment["VLLM_BASE_URL"], file, run.runs)
    code, out, err = await tried.inside()
    assert code == 0, err
    found = json.loads((run.runs / "held" / "table.json").read_text())
    assert [(row["values"], row["row"], row["cells"]) for row in found["rows"]] == [
        ({"alpha": alpha, "rows": "zero-shot icm"}, row, 2) for alpha in ("10", "30") for row in ("zero-shot", "icm")
    ]
    assert list(found["rows"][0]["figures"]["held-out"]["seeds"]) == ["1", "2"]
    code, again, _ = await tried.inside()
    assert (code, again) == (0, out)


async def test_a_dry_run_tells_questions_and_tokens_and_asks_no_pool(run: Run, server: FakeVLLM, data: Path) -> None:  # noqa: F811
    write(run.file, data, "  batch_size: [6, 12]\n  seed: [1, 2]\n")
    run.file.write_text(run.file.read_text().replace("batch_size: 6, K: 8", "alpha: 40"))
    code, out, err = await run.inside(dry=True)
    assert code == 0, err
    assert not run.runs.exists()
    assert "up to 6 times as many where the model had random weights" in out
    told = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:4]] for line in out.splitlines()[2:6]}
    assert [claims for claims, _, _ in told.values()] == [6, 6, 12, 12]
    assert (await run.inside())[0] == 0
    for name, (claims, questions, tokens) in told.items():
        cost = json.loads((run.runs / "many" / name / "run.json").read_text())["cost"]
        assert questions / 4 < cost["asked"] + claims < 3 * questions, name
        fresh = (cost["asked"] - cost["from_cache"]) / cost["asked"]
        assert tokens / 4 < cost["tokens_sent"] / fresh < 4 * tokens, name
    shutil.rmtree(run.runs / "many" / "batch-size-6_seed-2")
    code, out, _ = await run.inside(dry=True)
    lines = {line.split()[0]: line.split()[-2:] for line in out.splitlines() if "_seed-" in line}
    assert lines["batch-size-6_seed-1"] == ["–", "finished"]
    assert lines["batch-size-6_seed-2"] == ["1", "finished"]
    run.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    shutil.rmtree(run.runs)
    code, out, _ = await run.inside(dry=True)
    assert code == 0
    assert "no tokens for fake-8b: no server answers at http://127.0.0.1:9" in out


def test_a_dry_run_of_one_experiment_and_of_what_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")
    rows = (
        "settings: {testbed: builtin, batch_size: 32, seeds: [1, 2], search: annealing, "
        "rows: [zero-shot, many-shot-gold, icm]}\n"
    )
    path = tmp_path / "one.yaml"
    path.write_text(f"title: t\ncommand: baselines\n{rows}")
    assert main([str(path), "--runs_dir", str(tmp_path / "runs"), "--dry_run"]) == 0
    [line] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  one ")]
    assert line[1:3] == ["32", "4,700"]  # of each seed: 3 x (32 + 224), and the search
    path.write_text("title: t\ncommand: label\nsettings: {data: gone.jsonl}\nsweep: {alpha: [1]}\n")
    assert main([str(path), "--dry_run"]) == 1
    said = capsys.readouterr()
    assert "alpha-1: gone.jsonl: not found" in said.err
    assert "cannot run" in said.out


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("  alpha: [1, 2.5]\n", ["alpha-1", "alpha-2.5"]),
        ("  model: [google/gemma-3-270m, b]\n", ["gemma-3-270m", "b"]),
        ("  mirror: [true, false]\n  max_tail: [null, 4]\n",
         [f"mirror-{mirror}_max-tail-{tail}" for mirror in ("true", "false") for tail in ("default", "4")]),
        ("  size:\n    small: {batch_size: 4, K: 5}\n    large: {batch_size: 8, K: 9}\n", ["size-small", "size-large"]),
        ("  testbed:\n    first: {consistency: none}\n    two: {alpha: 3}\n", ["first", "two"]),
    ],
)  # fmt: skip
def test_cells_have_speaking_names(sweep: str, names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"title: t\ncommand: label\nsettings: {{testbed: builtin, num_seed: 2}}\nsweep:\n{sweep}".replace(
        "testbed: builtin, ", "" if "testbed:" in sweep else "testbed: builtin, "))  # fmt: skip
    assert [cell.name for cell in cells_of(path).cells] == names


def test_settings_that_change_together_reach_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(
        "title: t\ncommand: label\nsettings: {model: m}\nsweep:\n  size:\n    small: {batch_size: 16, mirror: false}\n"
    )
    [cell] = cells_of(path, "--K", "7").cells
    assert list(cell.arguments) == ["--model", "m", "--batch_size", "16", "--no-mirror", "--K", "7"]


@pytest.mark.parametrize(
    ("sweep", "more", "told"),
    [
        ("{alhpa: [1]}", [], "sweep: there is no 'alhpa'; did you mean 'alpha'?"),
        ("{size: {small: {bacth_size: 4}}}", [], "sweep: size: small: there is no 'bacth_size'; did you mean"),
        ("{size: {small: 4}}", [], "sweep: size: small: holds no settings"),
        ("{alpha: 3}", [], "sweep: alpha is a list of values, or names with their settings, not 3"),
        ("{alpha: []}", [], "alpha is a list of values"),
        ("{alpha: [1, 1]}", [], "alpha: 1 stands there twice"),
        ("{alpha: [[1, 2]]}", [], "alpha takes one value, not a list"),
        ("{alpha: [{a: 1}]}", [], "is not a value"),
        ("{alpha: [x]}", [], "cell alpha-x: argument --alpha"),
        ("{alpha: [1, -1]}", [], "cell alpha-minus1: --alpha -1 must be above 0"),
        ("{model: [m]}", [], "model stands in settings and in sweep: model"),
        ("{alpha: [1], a: {b: {alpha: 2}}}", [], "alpha stands in sweep: alpha and in sweep: a"),
        ("{alpha: [1]}", ["--alpha", "2"], "--alpha is varied by the sweep"),
        ("{run: [a, b]}", [], "run is of the whole sweep"),
        ("{alpha: [1]}", ["--metrics_port", "9"], "metrics_port: of several runs none has the port"),
        ("{testbed: [a/t.yaml, b/t.yaml]}", [], "two cells would have the folder 't'"),
        (
            "{prior: [0.2, 0.3], calibrate: [none, mean]}",
            [],
            "cell prior-0.2_calibrate-none: --prior 0.2 and --calibrate none contradict each other",
        ),
        ("{prior: [0.2], calibrate: [none, mean], seed: [1, 2]}", [], "and 1 more: --prior 0.2 and --calibrate none"),
        ("{}", [], "sweep: names no setting"),
        ("{row: {a: {alpha: 1}}}", [], "sweep: row is a column of the table already"),
        ("{alpha: [1]}", ["--is_complete"], "--is_complete is of a single run"),
        ("{seed: [1, 2], alpha: [1, 2], K: [" + ", ".join(map(str, range(3000))) + "]}", [], "12,000 cells; at most"),
    ],
)
def test_a_wrong_sweep_is_told_in_one_line_before_anything_runs(
    sweep: str, more: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"title: t\ncommand: label\nsettings: {{model: m}}\nsweep: {sweep}\n")
    with pytest.raises(BadInput) as refused:
        cells_of(path, *more)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert main([str(path), "--runs_dir", str(tmp_path / "runs"), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("at_once: 3\n", "at_once: is for a sweep, and there is no sweep"),
        ("servers: {m: 'http://a'}\n", "servers: is for a sweep"),
        ("at_once: 0\nsweep: {alpha: [1]}\n", "at_once: must be a whole number of at least 1, not 0"),
        (
            "servers: {m: 'gpu1:8000'}\nsweep: {alpha: [1]}\n",
            "servers: m: must start with http:// or https://",
        ),
        ("swep: {alpha: [1]}\n", "there is no 'swep'; did you mean 'sweep'?"),
        ("servers: {other: 'http://a'}\nsweep: {alpha: [1]}\n", "servers: no cell asks 'other'"),
    ],
)
def test_wrong_keys_around_a_sweep(lines: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(f"title: t\ncommand: label\nsettings: {{model: m, testbed: builtin}}\n{lines}")
    assert main([str(path), "--runs_dir", str(tmp_path)]) == 2
    said: Any = capsys.readouterr().err
    assert told in said


def test_check_only_prints_a_command_line_for_each_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("title: t\ncommand: label\nsettings: {testbed: builtin}\nsweep: {alpha: [1, 2]}\n")
    assert main([str(path), "--check_only"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "icm label --testbed builtin --alpha 1",
        "icm label --testbed builtin --alpha 2",
    ]


@pytest.mark.parametrize("url", ["", "gpu1:8000"])
def test_a_sweep_without_a_usable_server_does_not_begin(
    url: str,
    data: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("VLLM_BASE_URL", "LLAMA_SERVER_URL", "LLAMA_API_BASE", "USE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    if url:
        monkeypatch.setenv("VLLM_BASE_URL", url)
    path = write(tmp_path / "e.yaml", data, "  alpha: [10, 50]\n")
    assert main([str(path), "--runs_dir", str(tmp_path / "runs")]) == 2
    told = capsys.readouterr().err
    assert "error: no model server is configured" in told if not url else "must start with http:// or https://" in told
    assert "cells" not in told
    assert not (tmp_path / "runs").exists()
