"""icm run FILE: every file in experiments/ is valid, and a misspelt key is named with the nearest that exists."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fakes.vllm_server import FakeVLLM
from src.experiments.experiment_file import load_experiment, parser_of
from src.experiments.run_experiment import main
from src.icm.testbeds import BadInput
from tests.experiments.test_icm_cli import Command, data, icm, server  # noqa: F401 - fixtures

FILES = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.yaml"))
VALID = "title: t\ncommand: label\nsettings: {testbed: builtin, alpha: 3}\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_experiment_is_a_valid_command(path: Path) -> None:
    loaded = load_experiment(path)
    args = parser_of(loaded.experiment.command).parse_args(loaded.arguments)
    for name, value in loaded.experiment.settings.items():
        parsed = getattr(args, name)
        assert (parsed is None and value == "all") or parsed == value or str(parsed) == str(value)


def test_the_paper_s_testbeds_are_there_in_three_sizes() -> None:
    names = {path.stem for path in FILES}
    assert {f"{bed}-{size}" for bed in ("truthfulqa", "gsm8k", "alpaca") for size in ("8b", "70b", "405b")} <= names


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (VALID.replace("alpha", "alhpa"), "settings: there is no 'alhpa'; did you mean 'alpha'?"),
        (VALID + "hardwear: x\n", "there is no 'hardwear'; did you mean 'hardware'?"),
        (VALID + "paper: {sorce: a, source: b, read: c, accuracy: {}}\n", "did you mean 'source'?"),
        (VALID.replace("command: label", "command: lable"), "none of label, baselines"),
        (VALID.replace("title: t\n", ""), "title: is missing"),
        (VALID.replace("title: t", "title: 3"), "title: must be a text, not 3"),
        (VALID + "sweep: {seed: [1]}\nat_once: 0\n", "at_once: must be a whole number of at least 1, not 0"),
        (VALID + "sweep: {seed: [1]}\nat_once: many\n", "at_once: must be a whole number of at least 1, not 'many'"),
        (VALID + "sweep: {seed: [1]}\nservers: {m: [3]}\n", "servers: m: must be a URL, or a list of URLs, not"),
        (VALID + "sweep: 3\n", "sweep: must be settings with several values each, as in {alpha: [10, 50]}, not 3"),
        (VALID + "yours: {icm: good}\n", "yours: icm: must be a number, or null, not 'good'"),
        (VALID.replace("alpha: 3", "alpha: {a: 1}"), "settings: alpha: must be a value, or a list of"),
        (VALID.replace("alpha: 3", "alpha: true"), "alpha takes a value, not true"),
        (VALID.replace("alpha: 3", "label_rest: 1"), "label_rest is true or false"),
        (VALID.replace("alpha: 3", "alpha: [1, 2]"), "alpha takes one value"),
        (VALID.replace("alpha: 3", "is_complete: true"), "no 'is_complete'"),
        ("title: [", "is not YAML"),
        ("- a\n", "keys and values"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"e\.yaml") as refused:
        load_experiment(path)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert main(["--check_only", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_every_wrong_file_is_told_and_every_right_one_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "a": VALID.replace("alpha", "alhpa"),
        "b": VALID,
        "c": VALID.replace("alpha: 3", "prior: 0.9"),
        "d": VALID.replace("alpha: 3", "model: m") + "sweep: {alpha: [x]}\n",
        "e": VALID.replace("alpha: 3", "model: m") + "sweep: {alpha: [4]}\n",
    }
    paths = [tmp_path / f"{name}.yaml" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    assert main(["--check_only", *map(str, paths)]) == 2
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "icm label --testbed builtin --alpha 3",
        "icm label --testbed builtin --model m --alpha 4",
    ]
    lines = told.err.splitlines()
    assert [line.partition(".yaml:")[0].rpartition("/")[2] for line in lines] == ["a", "c", "d"]
    assert "--prior 0.9 and --calibrate none contradict each other" in lines[1]


def test_flags_before_the_file_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--at_once", "2", "mine.yaml"])
    assert ended.value.code == 2
    assert "name the file first, and then flags of its command such as --at_once" in capsys.readouterr().err


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not found"):
        load_experiment(tmp_path / "none.yaml")


def test_switches_lists_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(
        "title: t\ncommand: baselines\nsettings: {seeds: [1, 2], mirror: false, local_gain: true, max_tail: null}\n"
    )
    assert load_experiment(path).arguments == ["--seeds", "1", "2", "--no-mirror", "--local_gain"]


async def test_an_experiment_runs_and_says_where_it_comes_from(
    icm: Command,  # noqa: F811
    server: FakeVLLM,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"title: mine\ncommand: label\nsettings: {{data: {data}, model: fake-8b, num_seed: 4, batch_size: 8}}\n"
        "paper: {source: somewhere, read: table 1, accuracy: {icm: 0.5, zero-shot: null}}\n"
    )
    where = icm.arguments.index("--data") - 1
    icm.arguments[where:] = ["-m", "src.experiments.commands", "run", str(path)]
    icm.environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    code, out, err = await icm("--runs_dir", str(icm.runs), "--quiet", "--seed", "3")
    assert code == 0, err
    assert "the paper (somewhere; table 1)" in out
    record = json.loads((icm.runs / "mine" / "experiment.json").read_text())
    assert record["file"] == "mine.yaml"
    assert record["changed"][-2:] == ["--seed", "3"]
    assert (icm.runs / "mine" / "labels.jsonl").exists()
    assert os.path.getsize(icm.runs / "mine" / "run.json") > 0
