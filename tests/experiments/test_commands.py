"""`icm COMMAND`: every command is there, explains itself, and refuses what it does not know."""

import os
import shutil
import subprocess
import sys
from collections.abc import Coroutine
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from src.experiments.commands import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


LONG = "a" * 300
"""Longer than a file's name can be."""


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"icm {metadata.version('icm-elicitation')}\n"


def test_contrib_is_not_needed_to_label() -> None:
    """None in sys.modules makes every import of contrib fail."""
    blocked = (
        "import sys; sys.modules['contrib'] = None\n"
        "from src.experiments import ICM, baselines, export, run_experiment, testbed\n"
        "for command in (ICM, baselines, export, run_experiment, testbed): command.build_parser()\n"
        "assert sys.modules['contrib'] is None\n"
    )
    ended = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", ["label", "baselines"])
def test_the_command_that_goes_on_is_the_commands_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the process was started: sys.argv[0] says nothing."""
    resumes = []

    def run(job: Coroutine[Any, Any, int], resume: str) -> int:
        job.close()
        resumes.append(resume)
        return 0

    monkeypatch.setattr(sys, "argv", ["icm baselines", "--of", "somebody"])
    monkeypatch.setattr(f"{COMMANDS[name][0]}.run_resumable", run)
    assert main([name, "--testbed", "builtin", "--run", "a-name"]) == 0
    assert resumes == [f"icm {name} --testbed builtin --run a-name"]


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: icm" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lable"]) == 2
    assert "lable" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["somebody's program"])
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: icm {name}" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """icm ... | head: the pipe closes before everything is written."""
    program = (
        "import sys\n"
        "from src.experiments import commands\n"
        "class Closed:\n"
        "    @staticmethod\n"
        "    def main(arguments):\n"
        "        print('x' * 100_000, flush=True)\n"
        "        print('x' * 100_000, flush=True)\n"
        "        return 0\n"
        "commands.import_module = lambda name: Closed\n"
        "sys.exit(commands.main(['diagnose']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (141, "")


def test_stopped_while_it_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("src.experiments.commands.import_module", stopped)
    assert main(["run", "any.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--seed", "abc"], "argument --seed: must be a whole number, not 'abc'"),
        (["--read_timeout", "0"], "argument --read_timeout: must be above 0, not 0"),
        (["--prior", "half"], "argument --prior: must be auto, or a share above 0 and below 1, not 'half'"),
    ],
)
def test_a_value_is_refused_in_words(flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["label", *flags])
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(["diagnose", LONG], ["watch", LONG, "--once"], ["report", LONG], ["ask", LONG], ["export", LONG]),
        *(["testbed", LONG], ["label", "--testbed", LONG], ["label", "--data", LONG], ["run", LONG]),
    ],
)
def test_a_path_that_is_too_long_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_what_ask_requires(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ask"])
    assert "required: RUN (see" in capsys.readouterr().err


def test_an_installed_package_keeps_nothing_in_its_own_folder(tmp_path: Path) -> None:
    """What lies beside its modules goes with the next version. In a checkout it is the checkout, from any folder."""
    asked = (
        "from src.experiments import cache_command, request\n"
        "from src.results import run_reader\n"
        "print(request.OutputRequest().runs_dir, request.DataRequest().data_dir, cache_command.DEFAULT)\n"
        "print(run_reader.RUNS)"
    )
    installed = tmp_path / "site-packages"
    for package in ("contrib", "core", "icm_vllm", "src"):
        shutil.copytree(ROOT / package, installed / package, ignore=shutil.ignore_patterns("__pycache__"))
    for root, home in ((ROOT, ROOT), (installed, Path())):
        environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", asked], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        runs = home / "runs"
        assert done.stdout.split() == [str(runs), str(home / "data"), str(runs / "responses.sqlite"), str(runs)]
