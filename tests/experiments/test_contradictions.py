"""Flags that contradict each other are refused in one line that names both; everything that documents show is not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from src.experiments import ICM, ask, baselines, export
from src.experiments.arguments import Parser
from src.experiments.contradictions import RULES
from src.experiments.experiment_file import load_experiment, parser_of
from src.icm.searches import default_search

REPOSITORY = Path(__file__).resolve().parents[2]

AT_ONCE = [
    "--testbed builtin / --data mine.jsonl",
    "--data_dir there / --data mine.jsonl",
    "--use_vllm / --direct",
    "--no-use_vllm / --direct",
    "--prompts_per_request 8 / --direct",
    "--read_timeout 60 / --direct",
    "--prompts_per_request 8 / --no-use_vllm",
    "--lookahead 4 / --best_of 4",
    "--prior 0.9 / --calibrate none",
    "--gold_seeds 4 / --known answers.csv",
    "--gold_seeds 4 / --columns known=checked,label=gold",
    "--lookahead 4 / --search bootstrapping",
    "--lookahead 4 / --search gibbs",
    "--continue_from other / --search bootstrapping",
    "--is_complete / --check",
    "--metrics_port 9465 / --num_batches 2",
    "--metrics_port 9465 / --passes 3",
    "--log_to wandb / --check",
    "--abstain_below 1 / --abstain 0.1",
    "--prior 0.9 / --calibrate none",
]
OF_THE_SEARCH = [
    "--context_cap 8 / --layout upstream",
    "--anchors 4 / --layout upstream",
    "--max_tail 8 / --layout upstream",
    "--decay 0.9 / --scheduler log-upstream",
    "--patience 10 / --stop K",
    "--num_seed 9 / --batch_size 8",
    "--initial_T 0.1 / --final_T 0.2",
    "--final_T 0.2 / --initial_T 0.1",
]
OF_ONE_SEARCH = [
    "--num_seed 8 / --search bootstrapping",
    "--K 50 / --search bootstrapping",
    "--consistency_fix_K 5 / --search bootstrapping",
    "--decay 0.9 / --search bootstrapping",
    "--initial_T 5 / --search bootstrapping",
    "--final_T 0.1 / --search bootstrapping",
    "--scheduler exp / --search bootstrapping",
    "--stop K / --search bootstrapping",
    "--patience 10 / --search bootstrapping",
    "--max_tail 8 / --search bootstrapping",
    "--mirror / --search bootstrapping",
    "--best_of 4 / --search bootstrapping",
    "--local_gain / --search bootstrapping",
    "--bootstrap_rounds 2 / --search annealing",
    "--bootstrap_start zero-shot / --search annealing",
    "--ascent_starts 2 / --search annealing",
    "--ascent_sweeps 2 / --search bootstrapping",
    "--ascent_questions 5 / --search annealing",
    "--ascent_error 0.1 / --search annealing",
    "--K 5 / --search ascent",
    "--gibbs_sweeps 2 / --search ascent",
    "--gibbs_temperature 0.5 / --search bootstrapping",
    "--gibbs_cooling 1 / --search annealing",
    "--mirror / --search gibbs",
]
LIKE_DEFAULTS = [
    "--num_seed 300",
    "--initial_T 0.001",
    "--final_T 20",
]
TOGETHER = [
    "",
    "--layout upstream",
    "--layout upstream --anchors 0 --no-mirror --local_gain",
    "--prior 0.9 --calibrate mean",
    "--prior auto --calibrate mean",
    "--prior 0.9 --calibrate mean --start_share half",
    "--start_share half",
    "--layout tree --context_cap 8 --anchors 2 --max_tail 4",
    "--scheduler exp --decay 0.9",
    "--scheduler log-upstream",
    "--stop K --mirror",
    "--stop labelled --patience 4",
    "--local_gain --best_of 4",
    "--best_of 4 --lookahead 0",
    "--best_of 4 --lookahead auto",
    "--best_of 1 --lookahead 4",
    "--batch_size 4",
    "--initial_T 0.01 --final_T 0.01",
    "--direct --model there",
    "--use_vllm --prompts_per_request 8 --read_timeout 60",
    "--no-use_vllm --read_timeout 60",
    "--testbed truthfulQA --data_dir there",
    "--search bootstrapping --bootstrap_rounds 2 --bootstrap_start zero-shot --layout upstream --seed 3",
    "--search ascent --ascent_starts 2 --ascent_sweeps 2 --ascent_questions 5 --ascent_error 0 --no-mirror --seed 3",
    "--search gibbs --gibbs_sweeps 2 --gibbs_temperature 0 --gibbs_cooling 1 --continue_from other --seed 3",
    "--check --label_rest --lookahead 4 --metrics_port 9465",
    "--is_complete --label_rest",
    "--abstain 0.1 --abstain_on gold --abstain_labels 20",
    "--abstain_below 1.5",
    "--metrics_port 9465 --num_batches 1 --passes 1",
]


def flags(line: str) -> list[str]:
    return shlex.split(line.replace("/", ""))


def complaint(parser: Parser, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(flags(line))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("line", AT_ONCE)
def test_two_flags_that_contradict_each_other_are_refused_at_once(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(ICM.build_parser(), line, capsys)
    first, second = line.split(" / ")
    assert said.startswith(f"error: {first} and {second} contradict each other: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("line", OF_THE_SEARCH)
@pytest.mark.parametrize("command", [ICM, baselines])
def test_two_settings_of_the_search_that_contradict_each_other_are_told(line: str, command: object) -> None:
    parser = command.build_parser()  # type: ignore[attr-defined]
    parser.parse_args(flags(line))
    first, second = line.split(" / ")
    assert parser.contradiction is not None
    assert {first, second} <= set(re.findall(r"--\w+ \S+", parser.contradiction))
    # Whichever stands first.
    parser.parse_args(flags(f"{second} {first}"))
    assert parser.contradiction is not None
    # One parser's next command line is another matter.
    parser.parse_args([])
    assert parser.contradiction is None


@pytest.mark.parametrize("line", OF_ONE_SEARCH)
def test_a_setting_that_a_search_does_not_use_is_told(line: str) -> None:
    parser = ICM.build_parser()
    parser.parse_args(flags(line))
    first, second = line.split(" / ")
    assert f"{first} and {second} contradict each other: that search does not use it" == parser.contradiction
    if second.endswith(default_search({first.split()[0].removeprefix("--")})):
        parser.parse_args(flags(first))
        assert parser.contradiction is not None


@pytest.mark.parametrize("line", LIKE_DEFAULTS)
def test_a_value_that_its_counterparts_default_rules_out_is_told(line: str) -> None:
    parser = ICM.build_parser()
    parser.parse_args(flags(line))
    assert parser.contradiction is not None
    assert line in parser.contradiction


@pytest.mark.parametrize("command", [ICM, baselines])
def test_an_alpha_that_is_not_above_zero_is_told(command: object) -> None:
    parser = command.build_parser()  # type: ignore[attr-defined]
    for alpha in ("0", "-5"):
        parser.parse_args(["--alpha", alpha])
        assert f"--alpha {alpha} must be above 0" in (parser.contradiction or "")
    parser.parse_args(["--alpha", "1e101"])
    assert "--alpha 1e+101 must be at most 1e+100" in (parser.contradiction or "")
    for alpha in ("0.001", "1e100"):
        parser.parse_args(["--alpha", alpha])
        assert parser.contradiction is None


@pytest.mark.parametrize("line", TOGETHER)
def test_what_goes_together_and_defaults_are_taken(line: str) -> None:
    parser = ICM.build_parser()
    parser.parse_args(shlex.split(line))
    assert parser.contradiction is None


def test_a_share_of_true_claims_needs_a_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--prior 0.9 and --calibrate none contradict" in complaint(ICM.build_parser(), "--prior 0.9", capsys)


def test_first_labels_by_a_share_need_the_share(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(ICM.build_parser(), "--start_share prior", capsys)
    assert "--start_share prior and no --prior contradict each other" in said


def test_what_only_a_comparison_or_an_export_has(capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(baselines.build_parser(), "--chat_url http:there", capsys)
    assert "--chat_url http:there and no --chat_model" in said
    assert "--restarts 3 and no --rows" in complaint(baselines.build_parser(), "--restarts 3", capsys)
    said = complaint(baselines.build_parser(), "--restarts 3 --rows icm zero-shot", capsys)
    assert "--restarts 3 and --rows icm zero-shot contradict each other" in said
    said = complaint(baselines.build_parser(), "--chat_model x --rows icm zero-shot", capsys)
    assert "--chat_model x and --rows icm zero-shot contradict each other" in said
    for rows in ("", "--rows icm zero-shot-chat"):
        assert baselines.build_parser().parse_args(["--chat_model", "x", *rows.split()]).chat_model == "x"
    assert baselines.build_parser().parse_args(["--restarts", "3", "--rows", "bootstrap-best", "icm"]).restarts == 3
    assert "--pairs all and --format jsonl" in complaint(export.build_parser(), "run --pairs all", capsys)
    assert "--seed 3 and --by margin" in complaint(ask.build_parser(), "run --seed 3", capsys)
    ask.build_parser().parse_args(["run", "--seed", "3", "--by", "random"])
    assert "--bos x and --format sft" in complaint(export.build_parser(), "run --bos x --format sft", capsys)
    for line in ("--abstain_on gold", "--abstain_labels 9"):
        said = complaint(ICM.build_parser(), line, capsys)
        assert f"{line} and no --abstain contradict each other: it says how the other is kept" in said
        assert f"{line} and no --abstain contradict" in complaint(export.build_parser(), f"run {line}", capsys)
    assert "--hub x and --format jsonl" in complaint(export.build_parser(), "run --hub x", capsys)
    assert "--public and no --hub" in complaint(export.build_parser(), "run --format datasets --public", capsys)
    for flag, value in NOT_OF_A_WHOLE_RUN.items():
        said = complaint(export.build_parser(), f"run {flag} {value} --format mlflow", capsys)
        assert f"{flag} {value} and --format mlflow contradict each other: the whole run is logged" in said
    export.build_parser().parse_args(["run", "--format", "dpo", "--pairs", "all"])
    export.build_parser().parse_args(["run", "--format", "axolotl", "--bos", "x"])


NOT_OF_A_WHOLE_RUN = {"--only": "search", "--least": "1", "--abstain": "0.1", "--abstain_below": "1"}


def test_every_rule_is_tried_here() -> None:
    tried = {tuple(re.findall(r"--(?:no-)?(\w+)", line)) for line in AT_ONCE + OF_THE_SEARCH + OF_ONE_SEARCH}
    elsewhere = {("chat_url", "chat_model"), ("restarts", "rows"), ("pairs", "format"), ("bos", "format")}
    elsewhere |= {("hub", "format"), ("public", "hub")}
    elsewhere |= {("chat_model", "rows")}
    elsewhere |= {("seed", "by"), ("start_share", "prior")}
    elsewhere |= {("abstain_on", "abstain"), ("abstain_labels", "abstain")}
    elsewhere |= {(flag.removeprefix("--"), "format") for flag in NOT_OF_A_WHOLE_RUN}
    assert {(rule.flag, rule.other) for rule in RULES} == tried | elsewhere


def documented() -> list[list[str]]:
    """Command lines of `icm label` and `icm baselines` in the documents, as lists of words."""
    found = []
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(
            r"(?:icm (?:label|baselines)|ICM\.py)(?: [^`#\n|]*)? --[^`#\n|]*", text.replace("\n--", " --")
        )
    lines = [shlex.split(line.replace("...", "")) for line in found if "--help" not in line]
    # In running text, a last flag may stand without its value.
    return [line[:-1] if line[-1] in ("--data", "--model") else line for line in lines]


def test_no_command_line_of_a_document_is_refused() -> None:
    lines = documented()
    assert len(lines) >= 10
    for line in lines:
        parser = baselines.build_parser() if "baselines" in line[:2] else ICM.build_parser()
        parser.parse_args(line[1:] if line[0].endswith(".py") else line[2:])
        assert parser.contradiction is None, line


@pytest.mark.parametrize("path", sorted((REPOSITORY / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_experiment_is_refused(path: Path) -> None:
    loaded = load_experiment(path)
    parser = parser_of(loaded.experiment.command)
    parser.parse_args(loaded.arguments)
    assert parser.contradiction is None
