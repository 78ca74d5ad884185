"""A mistyped flag is told with the one that is meant, by every command; a value that is no number in plain words."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from core.flags import FlagParser, meant, number, whole_number
from src.experiments.commands import COMMANDS, main


def told(parser: FlagParser, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def parser() -> FlagParser:
    parser = FlagParser(prog="tool")
    parser.add_argument("--alpha", type=number)
    parser.add_argument("--count", type=whole_number)
    commands = parser.add_subparsers()
    commands.add_parser("prune").add_argument("--older_than")
    return parser


def test_the_nearest_flag_is_named_also_that_of_a_command(
    parser: FlagParser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unrecognized arguments: --alhpa; did you mean --alpha? (see --help)\n" in told(parser, ["--alhpa"], capsys)
    assert "unrecognized arguments: --alhpa=3; did you mean --alpha? (see --help)\n" in told(
        parser, ["--alhpa=3"], capsys
    )
    assert "did you mean --older_than?" in told(parser, ["prune", "--odler_than", "3"], capsys)
    assert "did you mean" not in told(parser, ["--nothing_like_it"], capsys)
    parser.also = ("--dry_run",)
    assert "did you mean --alpha, --dry_run?" in told(parser, ["--alhpa", "--dry-run"], capsys)


def test_a_mistyped_flag_that_is_required_is_told(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--dir", required=True)
    assert "are required: --model; did you mean --model? (see" in told(parser, ["--modle=x", "--dir", "y"], capsys)
    assert "are required: --model (see --help)" in told(parser, ["--dir", "y", "--alp", "3"], capsys)


def test_scripts_and_benchmarks_have_this_parser() -> None:
    """But for the report that is run with vLLM alone, without this project."""
    root = Path(__file__).resolve().parents[2]
    files = [file for folder in ("scripts", "benchmarks") for file in (root / folder).glob("*.py")]
    plain = {file.name for file in files if "argparse.ArgumentParser(" in file.read_text()}
    assert plain == {"upstream_report.py"}


@pytest.mark.parametrize("script", ["scripts/prepare_model.py", "benchmarks/planner.py"])
def test_a_script_tells_a_wrong_flag_in_one_line(script: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / script), "--hlep"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --hlep; did you mean --help? (see --help)\n"


@pytest.mark.parametrize(
    "words",
    [
        ["scripts/prepare_data.py", "--dir"],
        ["scripts/prepare_model.py", "--dir"],
        ["benchmarks/make_shape.py", "tiny"],
        ["scripts/test_determinism.py", "--quick", "--json"],
    ],
)
def test_a_script_that_cannot_write_says_so_in_one_line(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / words[0]), *words[1:], str(tmp_path / "file" / "below")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    told = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert str(tmp_path / "file") in told[-1]
    assert len(told) == 1


def test_the_nearest_of_the_choices_is_named(parser: FlagParser, capsys: pytest.CaptureFixture[str]) -> None:
    parser.add_argument("--search", choices=("ascent", "annealing"))
    assert (
        "argument --search: invalid choice: 'asccent'; did you mean ascent? (choose from 'ascent', 'annealing') (see"
        in told(parser, ["--search", "asccent"], capsys)
    )
    assert "invalid choice: 'xyz' (choose from" in told(parser, ["--search", "xyz"], capsys)


def test_the_nearest_name_whatever_its_capitals() -> None:
    assert meant("TRUTHFULqa", ["gsm8k", "truthfulQA"]) == "; did you mean truthfulQA?"
    assert meant("nothing", ["gsm8k", "truthfulQA"]) == meant("", ["a"]) == meant("a", []) == ""


def test_a_right_line_is_parsed_as_ever(parser: FlagParser) -> None:
    found = parser.parse_args(["--alpha", "2.5", "--count", "3"])
    assert (found.alpha, found.count) == (2.5, 3)


def test_what_is_no_number_is_told_without_a_function_s_name(
    parser: FlagParser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "argument --alpha: must be a number, not 'many'" in told(parser, ["--alpha", "many"], capsys)
    assert "argument --count: must be a whole number, not '2.5'" in told(parser, ["--count", "2.5"], capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_flag_that_is_meant(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = import_module(COMMANDS[name][0]).build_parser()
    assert isinstance(parser, FlagParser)
    flags = [each for action in parser._actions for each in action.option_strings if each.startswith("--")]
    flag = "--older_than" if name == "cache" else flags[-1]  # --help where there is no other
    places = {"cache": ["prune"], "compare": ["a", "b"], "testbed": []}.get(name, ["a"])
    line = [*places, f"{flag[:-1]}_{flag[-1]}"]
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(line)
    assert ended.value.code == 2
    assert f"; did you mean {flag}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["label", "--alpha", "many"], "argument --alpha: must be a number, not 'many'"),
        (["label", "--ascent_error", "no"], "argument --ascent_error: must be a number, not 'no'"),
        (["label", "--abstain", "much"], "argument --abstain: must be a number, not 'much'"),
        (["export", "run", "--least", "much"], "argument --least: must be a number, not 'much'"),
        (["watch", "run", "--interval", "often"], "argument --interval: must be a number, not 'often'"),
        (["cache", "prune", "--older_than", "long"], "argument --older_than: must be a number, not 'long'"),
        (["serve", "--concurrent", "some"], "argument --concurrent: must be a whole number, not 'some'"),
        (["metrics", "--port", "any"], "argument --port: must be between 0 (any that is free) and 65535, not any"),
        (["metrics", "--port", "65536"], "argument --port: must be between 0 (any that is free) and 65535, not 65536"),
        (["check-direct", "--max_model_len", "x"], "argument --max_model_len: must be a whole number, not 'x'"),
    ],
)
def test_a_wrong_value_is_one_line_without_the_name_of_a_function(
    line: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {said} (see --help)\n"


def test_a_mistyped_command_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lable"]) == 2
    assert "error: no command 'lable'; did you mean label? There are: label, " in capsys.readouterr().err
