"""The job of `make icm` with stand-ins for ICM.py and for the server."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import pytest

from core.errors import ServerUnreachable
from core.vllm_server import ServerFailed
from fakes.vllm_server import FakeVLLM
from scripts import run_local
from scripts.run_local import DEFAULTS, begun_size, icm_command, main, run_icm
from src.experiments.ICM import build_parser
from src.experiments.loading import pool_of
from src.experiments.request import RunRequest
from src.experiments.run_settings import run_name, settings_of
from src.icm import searches
from src.results.run_folder import RunFolder

REPO_ROOT = Path(__file__).resolve().parents[2]


class FakeServer:
    started: ClassVar[list[str]] = []
    stopped = 0
    fails = False
    url = "http://127.0.0.1:1"

    def __init__(self, *, model: str, log: Path) -> None:
        self.model = model

    def __enter__(self) -> Self:
        if FakeServer.fails:
            raise ServerFailed("the vLLM server ended with exit code 1")
        FakeServer.started.append(self.model)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        FakeServer.stopped += 1


@pytest.fixture
def icm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for ICM.py that writes its arguments down; a file `complete` beside it makes the run complete."""
    script = tmp_path / "ICM.py"
    script.write_text(
        textwrap.dedent("""
            import os, pathlib, sys
            here = pathlib.Path(__file__).parent
            if "--bad" in sys.argv:
                sys.exit(2)
            if "--is_complete" in sys.argv:
                sys.exit(0 if (here / "complete").exists() else 1)
            (here / "called").write_text(os.environ["VLLM_BASE_URL"] + " " + " ".join(sys.argv[1:]))
            sys.exit(int(os.environ.get("FAKE_EXIT", "0")))
        """)
    )
    monkeypatch.setattr(run_local, "ICM", script)
    monkeypatch.setattr(run_local, "VLLMServer", FakeServer)
    monkeypatch.setattr(run_local, "REPO_ROOT", tmp_path)

    def parser() -> argparse.ArgumentParser:  # not the runs of whoever works here
        made = build_parser()
        made.set_defaults(runs_dir=tmp_path / "runs")
        return made

    monkeypatch.setattr(run_local, "build_parser", parser)

    async def fitting(model: str, given: Sequence[str], url: str, deadline: float) -> int:
        (tmp_path / "measured").write_text(f"{deadline - time.monotonic():.0f}")
        return 32

    monkeypatch.setattr(run_local, "fitting_size", fitting)
    (tmp_path / "models" / "gemma-3-270m").mkdir(parents=True)
    (tmp_path / "models" / "gemma-3-270m" / "provenance.json").touch()
    monkeypatch.setattr(FakeServer, "started", [])
    monkeypatch.setattr(FakeServer, "stopped", 0)
    monkeypatch.setattr(FakeServer, "fails", False)
    return tmp_path


def test_the_built_in_claims_are_the_default_and_only_that() -> None:
    builtin = ["--testbed", "builtin", "--label_rest"]
    pool = ["--batch_size", "64", *DEFAULTS]
    assert icm_command("m", ["--seed", "2"])[2:] == ["--model", "m", *builtin, *pool, "--seed", "2"]
    assert icm_command("m", ["--testbed=gsm8k"])[2:] == ["--model", "m", *pool, "--testbed=gsm8k"]
    assert icm_command("m", ["--data", "f.csv"])[2:] == ["--model", "m", *pool, "--data", "f.csv"]


def test_given_flags_win_over_the_defaults() -> None:
    args = build_parser().parse_args(icm_command("m", ["--alpha", "7"], 16)[2:])
    assert (args.alpha, args.batch_size, args.calibrate) == (7, 16, "mean")
    assert build_parser().parse_args(icm_command("m", ["--batch_size", "9"], 16)[2:]).batch_size == 9


def test_a_run_gets_a_server_and_its_arguments(icm: Path) -> None:
    assert main(["--seed", "2"]) == 0
    expected = " ".join(icm_command("gemma-3-270m", ["--seed", "2"], 32)[2:])
    assert (icm / "called").read_text() == f"{FakeServer.url} {expected}"
    assert (FakeServer.started, FakeServer.stopped) == (["gemma-3-270m"], 1)


def test_the_check_is_kept_where_the_run_looks_for_it(icm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = icm / "check.py"
    script.write_text("import pathlib, sys; pathlib.Path(__file__).with_name('checked').write_text(' '.join(sys.argv))")
    monkeypatch.setattr(run_local, "DETERMINISM", script)
    assert main(["--runs_dir", str(icm / "others")]) == 0
    assert f"--url {FakeServer.url} --runs_dir {icm / 'others'} " in (icm / "checked").read_text()


@pytest.mark.parametrize("given", [["--batch_size", "48"], ["--batch_size=48"], ["--num_batches", "2"]])
def test_a_pool_that_was_asked_for_is_taken_whatever_the_machine(icm: Path, given: list[str]) -> None:
    assert main(given) == 0
    assert not (icm / "measured").exists()
    assert (icm / "called").read_text().endswith(" ".join(given))


def test_the_minutes_are_what_the_pool_is_chosen_by(icm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--minutes", "2.5"]) == 0
    assert (icm / "measured").read_text() == "150"
    assert "--minutes" not in (icm / "called").read_text()
    for wrong in ("0", "-1", "inf", "nan", "soon"):
        with pytest.raises(SystemExit):
            main([f"--minutes={wrong}"])
        assert "--minutes" in capsys.readouterr().err


@pytest.mark.parametrize("named", [[], ["--run", "mine"]])
def test_a_run_goes_on_with_the_pool_that_it_has(
    icm: Path, capsys: pytest.CaptureFixture[str], named: list[str]
) -> None:
    given = ["--runs_dir", str(icm / "runs"), "--seed", "3", *named]
    assert begun_size("gemma-3-270m", given) is None
    request = RunRequest.of(build_parser().parse_args(icm_command("gemma-3-270m", given, 16)[2:]))
    settings = settings_of(request, pool_of(request))
    folder = RunFolder(request.output.runs_dir / run_name(request, settings))
    folder.path.mkdir(parents=True)
    assert begun_size("gemma-3-270m", given) is None  # nothing was asked yet
    folder.write_run({"settings": settings})
    assert begun_size("gemma-3-270m", given) == 16
    assert named or begun_size("gemma-3-270m", [*given, "--alpha", "20"]) is None
    assert main([*given, "--minutes", "9"]) == 0
    assert not (icm / "measured").exists()
    assert "--batch_size 16" in (icm / "called").read_text()
    told = capsys.readouterr().err
    assert "going on with the run of --batch_size 16" in told
    assert "--minutes is for a new run: these options began one with --batch_size 16" in told
    folder.run_path.write_text("{")
    assert begun_size("gemma-3-270m", given) is None  # ICM.py says what is wrong with it


def test_a_run_that_was_begun_by_annealing_is_found_when_another_search_is_the_default(
    icm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--runs_dir", str(icm / "runs")]
    request = RunRequest.of(build_parser().parse_args([*icm_command("gemma-3-270m", given, 16)[2:], "--K", "3000"]))
    settings = settings_of(request, pool_of(request))
    assert "search" not in settings
    folder = RunFolder(request.output.runs_dir / run_name(request, settings))
    folder.path.mkdir(parents=True)
    folder.write_run({"settings": settings})
    for default in ("annealing", "ascent"):
        monkeypatch.setattr(searches, "DEFAULT", default)
        assert begun_size("gemma-3-270m", given) == 16
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("flag", "value"), [("--data", "nowhere.csv"), ("--alhpa", "7"), ("--K", "many")])
def test_input_that_cannot_be_right_has_begun_nothing(
    capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    assert begun_size("gemma-3-270m", [flag, value]) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("minutes", "context", "size", "told"),
    [
        (60.0, 8192, 64, "a pool of 64 of 256"),
        (0.001, 8192, 16, "a pool of 16 of 256"),
        (60.0, 900, 32, "a pool of 32 of"),
    ],
)
async def test_the_pool_follows_the_machines_speed_and_the_models_context(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    minutes: float,
    context: int,
    size: int,
    told: str,
) -> None:
    monkeypatch.setattr(run_local, "REPO_ROOT", tmp_path)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    async with FakeVLLM(trees=True, dtype="float32", max_model_len=context, api_key="secret") as server:
        server.latency = 0.01
        found = await run_local.fitting_size(server.model, [], server.url, time.monotonic() + 60 * minutes)
    assert found == size
    said = capsys.readouterr().err
    assert told in said
    assert "tokens a second in float32" in said
    assert "without a label" not in said  # the built-in ones are labelled from the pool


@pytest.mark.parametrize(
    ("rows", "minutes", "size", "told"),
    [
        (10, 60.0, 64, "a pool of 10 of 10 claims"),
        (10, 0.001, 64, "a pool of 10 of 10 claims"),
        (20, 0.001, 16, "a pool of 16 of 20 claims"),
        (100, 60.0, 64, "a pool of 64 of 100 claims"),
    ],
)
async def test_the_pool_of_a_small_file_is_the_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: int,
    minutes: float,
    size: int,
    told: str,
) -> None:
    monkeypatch.setattr(run_local, "REPO_ROOT", tmp_path)
    data = tmp_path / "mine.csv"
    data.write_text("question,choice\n" + "".join(f"Is {n} even?,yes\n" for n in range(rows)))
    async with FakeVLLM() as server:
        deadline = time.monotonic() + 60 * minutes
        assert await run_local.fitting_size(server.model, ["--data", str(data)], server.url, deadline) == size
    said = capsys.readouterr().err
    assert told in said
    assert ("stay without a label: --label_rest" in said) == (f"of {rows} of" not in said)


async def test_a_pool_is_not_chosen_smaller_than_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_local, "REPO_ROOT", tmp_path)
    data = tmp_path / "mine.csv"
    rows = [f"Is {n} even?,yes,{n // 20}\n" for n in range(60)]
    data.write_text("question,choice,consistency_id\n" + "".join(rows))
    async with FakeVLLM() as server:
        assert await run_local.fitting_size(server.model, ["--data", str(data)], server.url, time.monotonic()) == 32


@pytest.mark.parametrize("given", [[], ["--batch_size", "64"]])
def test_a_server_that_does_not_answer_ends_the_job(
    icm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    async def lost(*_: object) -> int:
        raise ServerUnreachable("nobody answers.", hint="Start one.")

    monkeypatch.setattr(run_local, "fitting_size", lost)
    assert main(given) == (0 if given else 2)
    assert ("error: nobody answers. Start one." in capsys.readouterr().err) != bool(given)
    assert FakeServer.stopped == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_icm_which_gets_the_time_to_save(tmp_path: Path, number: signal.Signals) -> None:
    icm = tmp_path / "icm.py"
    icm.write_text(
        textwrap.dedent("""
            import pathlib, signal, sys, time
            def save(number, frame):
                time.sleep(0.5)
                pathlib.Path(sys.argv[1]).write_text(f"saved on {number}")
                sys.exit(130)
            signal.signal(signal.SIGINT, save)
            signal.signal(signal.SIGTERM, save)
            print("ready", flush=True)
            time.sleep(60)
        """)
    )
    saved = tmp_path / "saved"
    owner = textwrap.dedent(f"""
        import signal, sys
        from scripts.run_local import run_icm
        def leave(number, frame):
            raise SystemExit(143)
        signal.signal(signal.SIGTERM, leave)  # as VLLMServer does
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        sys.exit(run_icm([sys.executable, {str(icm)!r}, {str(saved)!r}], "http://x"))
    """)
    process = subprocess.Popen([sys.executable, "-c", owner], cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(20) == (130 if number == signal.SIGINT else 143)
    assert saved.read_text() == f"saved on {int(number)}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["run_local", "with_server"])
async def test_a_run_that_is_stopped_says_once_how_to_start_everything_again(
    tmp_path: Path, number: signal.Signals, script: str
) -> None:
    (tmp_path / "models" / "fake-8b").mkdir(parents=True)
    (tmp_path / "models" / "fake-8b" / "provenance.json").touch()
    flags = ["--batch_size", "64", "--runs_dir", str(tmp_path / "runs"), "--quiet"]
    given = ["--model", "fake-8b", *flags]
    if script == "with_server":
        icm = [sys.executable, str(run_local.ICM), "--testbed", "builtin", "--model", "fake-8b", *flags]
        given = ["--", *icm]
    async with FakeVLLM() as server:
        server.latency = 0.2
        owner = textwrap.dedent(f"""
            import signal, sys
            from pathlib import Path
            from scripts import run_local, {script}
            class Server:
                url = {server.url!r}
                def __init__(self, **options): ...
                def __enter__(self):
                    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # as VLLMServer does
                    return self
                def __exit__(self, *error): ...
            {script}.VLLMServer = Server
            run_local.REPO_ROOT = Path({str(tmp_path)!r})
            run_local.check_once = lambda url, runs_dir: None
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
            sys.exit({script}.main({given!r}))
        """)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", owner),
            cwd=REPO_ROOT,
            env={**os.environ, "ICM_SECRETS": os.devnull},
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        while not list(tmp_path.glob("runs/*/log.jsonl")):
            assert process.returncode is None
            await asyncio.sleep(0.05)
        process.send_signal(number)
        _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    lines = err.decode().splitlines()
    [at] = [at for at, line in enumerate(lines) if "go on with" in line]
    expected = [sys.executable, str(REPO_ROOT / "scripts" / f"{script}.py"), *given]
    assert shlex.split(lines[at + 1]) == expected
    assert lines[at + 2 :] == []


def test_icm_is_told_the_server_and_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_VLLM", "false")
    check = (
        "import os, sys; sys.exit(0 if (os.environ['VLLM_BASE_URL'], os.environ['USE_VLLM']) == ('u', 'true') else 9)"
    )
    assert run_icm([sys.executable, "-c", check], "u") == 0
