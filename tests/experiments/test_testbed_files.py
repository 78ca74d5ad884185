"""Testbed files on the command line: icm testbed, and runs with words of one's own against a fake server."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM, encode, label_distribution
from tests.experiments.test_icm_cli import Command, signed_by_words
from tests.pipeline.test_many_labels import MOODS, Model

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "docs" / "examples"
[NO], [YES] = encode(" no"), encode(" yes")


def by_words(tokens: Sequence[int]) -> dict[int, float]:
    """A model that knows yes and no, and gives True and False nothing to speak of."""
    yes, no = label_distribution(signed_by_words(tokens))
    return {YES: yes, NO: no}


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(distribution=by_words, trees=True) as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The examples, where a test can edit them."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples"))


@pytest.fixture
def icm(server: FakeVLLM, folder: Path, tmp_path: Path) -> Command:
    command = Command(server.url, folder, tmp_path / "runs")
    at = command.arguments.index("--data")
    command.arguments[at : at + 2] = ["--testbed", str(folder / "yes-no.yaml")]
    return command


def run_json(icm: Command, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((icm.runs / run / "run.json").read_text())
    return found


async def show(icm: Command, *words: str) -> tuple[int, str, str]:
    """`icm testbed ...`"""
    known = icm.arguments
    icm.arguments = [sys.executable, "-m", "src.experiments.commands", "testbed"]
    icm.environment["PYTHONPATH"] = str(REPOSITORY)
    try:
        return await icm(*words)
    finally:
        icm.arguments = known


async def test_words_template_and_separator_of_one_s_own_from_file_to_labels(icm: Command, server: FakeVLLM) -> None:
    code, out, err = await icm("--run", "a", "--label_rest")
    assert code == 0, err
    assert "agreement with gold" in out
    prompt = (icm.runs / "a" / "prompt.txt").read_text()
    assert re.fullmatch(r"(Statement: [^\n]+\nIs it so\? (yes|no)\n---\n){11}Statement: [^\n]+\nIs it so\?", prompt)
    asked = {tuple(body["logprob_token_ids"]) for body in server.pools}
    assert asked == {(YES, NO)}
    rows = [json.loads(line) for line in icm.labels("a").splitlines()]
    assert len(rows) == 12
    likeliest = [max(row["logprobs"], key=row["logprobs"].get) for row in rows if row["by"] == "icm"]
    assert [row["label"] for row in rows if row["by"] == "icm"] == likeliest
    assert [row["gold"] for row in sorted(rows, key=lambda row: row["row"])[:3]] == ["yes", "no", "no"]
    document = run_json(icm, "a")
    assert document["settings"]["testbed"] == "yes-no"
    assert len(document["settings"]["testbed_sha256"]) == 64
    assert document["tokens"]["labels"] == {" yes": YES, " no": NO}
    assert document["testbed"]["labels"] == [["no", " no"], ["yes", " yes"]]


async def test_an_edited_testbed_does_not_go_on_with_an_old_run(icm: Command, folder: Path) -> None:
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    file = folder / "yes-no.yaml"
    before = file.read_text()
    file.write_text(before + "# a comment changes nothing\nabout: statements\n")
    code, _, err = await icm("--run", "a", "--K", "2", "--is_complete")
    assert code == 0, err
    file.write_text(before.replace("Is it so?", "Is it?"))
    code, _, err = await icm("--run", "a", "--K", "2")
    assert code == 2
    assert "was started with another content of its testbed file yes-no (see " in err


async def test_words_are_part_of_what_a_cached_answer_is_for(icm: Command, folder: Path, server: FakeVLLM) -> None:
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    asked = len(server.pools)
    file = folder / "yes-no.yaml"
    file.write_text(file.read_text().replace("[no, yes]", '{no: " yes", yes: " no"}'))
    code, _, err = await icm("--run", "b", "--K", "2")
    assert code == 0, err
    assert len(server.pools) > asked
    a, b = ({row["row"]: row["zero_shot"] for row in map(json.loads, icm.labels(run).splitlines())} for run in "ab")
    other = {row: {"no": score["yes"], "yes": score["no"]} for row, score in b.items()}
    assert a == {row: pytest.approx(score) for row, score in other.items()}, "yes stands where no stood"


async def test_an_export_has_the_testbed_s_words_although_its_file_is_gone(icm: Command, folder: Path) -> None:
    assert (await icm("--run", "a"))[0] == 0
    (folder / "yes-no.yaml").unlink()
    output = folder / "rows.jsonl"
    command = ["-m", "src.experiments.commands", "export", str(icm.runs / "a"), "--format", "sft", "-o", str(output)]
    icm.arguments, icm.environment["PYTHONPATH"] = [sys.executable, *command], str(REPOSITORY)
    code, _, err = await icm()
    assert code == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["completion"] for row in rows} <= {" yes", " no"}
    assert all(re.fullmatch(r"Statement: [^\n]+\nIs it so\?", row["prompt"]) for row in rows)
    assert rows


async def test_data_replaces_the_data_of_a_testbed_file_and_of_no_other(icm: Command, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("statement,verdict\n" + "".join(f"The number {n} is large.,no\n" for n in range(8)))
    code, _, err = await icm("--run", "a", "--K", "2", "--data", str(other))
    assert code == 0, err
    claims = [json.loads(line) for line in (icm.runs / "a" / "claims.jsonl").read_text().splitlines()]
    assert {claim["choice"] for claim in claims} == {f"The number {n} is large." for n in range(8)}
    assert run_json(icm, "a")["settings"]["testbed"] == "yes-no"
    icm.arguments[icm.arguments.index("--testbed") + 1] = "builtin"
    code, _, err = await icm("--data", str(other))
    assert code == 2
    assert "contradict each other" in err


@pytest.mark.parametrize("flags", [["--columns", "choice=statement"], ["--map", "label=a:b"], ["--group_by", "none"]])
async def test_how_a_testbed_s_data_is_read_is_said_in_its_file(icm: Command, flags: list[str]) -> None:
    code, _, err = await icm(*flags)
    assert code == 2
    assert re.search(rf"{flags[0]} says how a --data file is read; here .*yes-no.yaml does", err)


def shared(words: dict[str, list[str]]) -> Callable[[Sequence[int]], dict[int, float]]:
    """A model that divides 0.9 of the probability between the tokens that may come next, by all tokens so far.

    words: by the text that a label has begun with ("" at its beginning), those that may follow.
    """

    def distribution(tokens: Sequence[int]) -> dict[int, float]:
        begun = max(
            (text for text in words if list(tokens[len(tokens) - len(encode(text)) :]) == encode(text)), key=len
        )
        ids = [encode(word)[0] for word in words[begun]]
        weights = [math.exp(signed_by_words([*tokens, token]) / 4) for token in ids]
        return {token: math.log(0.9 * weight / sum(weights)) for token, weight in zip(ids, weights, strict=True)}

    return distribution


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sentiment", {"": [" negative", " neutral", " positive"]}),
        ("multiple-choice", {"": [" A", " B", " C", " D"]}),
        (
            "fields",
            {"": [" natural", " social", " the"], " natural": [" science"], " social": [" science"], " the": [" arts"]},
        ),
    ],
)
async def test_three_labels_four_and_labels_of_several_tokens_from_file_to_labels(
    icm: Command, folder: Path, server: FakeVLLM, name: str, words: dict[str, list[str]]
) -> None:
    server.distribution = shared(words)
    icm.arguments[icm.arguments.index("--testbed") + 1] = str(folder / f"{name}.yaml")
    code, out, err = await icm("--run", "a")
    assert code == 0, err
    rows = [json.loads(line) for line in icm.labels("a").splitlines()]
    names = [label for label, _ in run_json(icm, "a")["testbed"]["labels"]]
    assert {row["label"] for row in rows} <= set(names)
    assert {row["gold"] for row in rows} == set(names)
    for row in rows:
        assert list(row["logprobs"]) == names
        assert sum(map(math.exp, row["logprobs"].values())) == pytest.approx(1)
    prompts = [prompt for body in server.pools for prompt in body["prompt"]]
    begun = [text for text in words if text and any(prompt[-1] == encode(text)[-1] for prompt in prompts)]
    assert begun == [text for text in words if text], "each beginning of a label is asked what follows it"
    assert "agreement with gold" in out


async def test_testbeds_that_are_not_there_are_one_line(icm: Command) -> None:
    for name, complaint in (
        ("nowhere.yaml", "nowhere.yaml: not found"),
        ("nothing", "invalid choice: 'nothing' (choose"),
        ("TruthfulQa", "invalid choice: 'TruthfulQa'; did you mean truthfulQA? (choose"),
    ):
        icm.arguments[icm.arguments.index("--testbed") + 1] = name
        code, _, err = await icm()
        assert code == 2
        assert complaint in err.strip().splitlines()[-1]


async def test_a_testbed_file_named_without_its_ending_is_pointed_to(
    icm: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    icm.arguments[icm.arguments.index("--testbed") + 1] = "yes-no"
    code, _, err = await icm()
    assert (code, "invalid choice: 'yes-no'; did you mean yes-no.yaml? (choose" in err) == (2, True)


async def test_a_testbed_file_called_as_a_built_in_one_is_its_own(icm: Command, folder: Path) -> None:
    file = folder / "builtin.yaml"
    file.write_text((folder / "yes-no.yaml").read_text())
    icm.arguments[icm.arguments.index("--testbed") + 1] = str(file)
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    code, _, err = await icm("--run", "b", "--K", "2", "--continue_from", "a")
    assert code == 0, err


async def test_labels_in_other_words_are_not_gone_on_with(icm: Command, folder: Path) -> None:
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    file = folder / "yes-no.yaml"
    file.write_text(file.read_text().replace("[no, yes]", "[yes, no]"))
    code, _, err = await icm("--run", "b", "--K", "2", "--continue_from", "a")
    assert code == 2
    assert "its labels are ' no' and ' yes', those of" in err


async def test_list_names_the_built_in_testbeds(icm: Command) -> None:
    code, out, _ = await show(icm, "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        *("builtin", "truthfulQA", "truthfulQA-preference", "gsm8k", "alpaca"),
    ]


async def test_show_prints_a_prompt_without_a_server(icm: Command, folder: Path) -> None:
    icm.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    code, out, err = await show(icm, str(folder / "multiple-choice.yaml"), "--show", "1")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        *("testbed", "data", "groups", "labels", "prompt", "tokens")
    ]
    assert lines[1].endswith("6 claims (1 A, 2 B, 2 C, 1 D)")
    assert [line[4:] for line in lines if line.startswith("  |")] == [
        *("Question: Which of these is a fruit?", "A. hammer", "B. apple", "C. river", "D. cloud", "Answer: A", ""),
        *("Question: How many legs has a spider?", "A. eight", "B. six", "C. four", "D. two"),
        "Answer:[ A| B| C| D]",
    ]
    assert "--model NAME" in lines[-1]


async def test_show_counts_groups_and_relations(icm: Command, folder: Path) -> None:
    code, out, _ = await show(icm, str(folder / "fields.yaml"))
    assert code == 0
    assert "groups  36 groups of 1 to 2 claims, made by the column consistency_id; constraints: 12 x agree" in out
    code, out, _ = await show(icm, "builtin")
    assert "128 groups of 2 claims, made by the column consistency_id; constraints: 128 x exactly one is true" in out
    code, _, err = await show(icm, "gsm8k", "--data_dir", str(folder))
    assert code == 2
    assert "gsm8k_verification.json: not found" in err


async def test_show_with_a_model_has_its_tokens_and_what_fits(icm: Command, folder: Path, server: FakeVLLM) -> None:
    server.max_model_len = 60
    code, out, err = await show(icm, str(folder / "fields.yaml"), "--model", "fake-8b")
    assert code == 0, err
    tokens = [line for line in out.splitlines() if line.startswith("tokens")]
    assert [line.rpartition("(label: ")[2] for line in tokens] == ["2 tokens)"] * 3
    [natural], [science] = encode(" natural"), encode(" science")
    assert f"[' natural' {natural} ' science' {science}]" in tokens[0]
    assert "queries 4 a prompt" in out
    [fits] = [line for line in out.splitlines() if line.startswith("fits")]
    assert re.fullmatch(r"fits +\d of 48 claims in one prompt of at most 60 tokens \(with all: \d+\)", fits)
    assert server.pools == [], "nothing is scored"


async def test_show_wants_more_claims_than_demonstrations(icm: Command, folder: Path) -> None:
    code, _, err = await show(icm, str(folder / "fields.yaml"), "--show", "48")
    assert code == 2
    assert "has 48 claims; a prompt with 48 demonstrations takes one more" in err
    code, _, err = await show(icm)
    assert code == 2
    assert "--list" in err


@pytest.fixture
async def moods() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(distribution=Model(MOODS), trees=True) as fake:
        yield fake


@pytest.fixture
def three(moods: FakeVLLM, folder: Path, tmp_path: Path) -> Command:
    """icm label on 24 claims of three labels, as many of each."""
    written = "".join(f"A review of thing {at},{at % 3 + 1}\n" for at in range(24))
    (folder / "sentiment.csv").write_text("text,stars\n" + written)
    command = Command(moods.url, folder, tmp_path / "runs")
    at = command.arguments.index("--data")
    command.arguments[at : at + 2] = ["--testbed", str(folder / "sentiment.yaml")]
    return command


def labels_of(icm: Command, run: str) -> dict[int, dict[str, Any]]:
    return {row["row"]: row for row in map(json.loads, icm.labels(run).splitlines())}


async def test_batches_of_three_labels_are_the_same_however_many_run_at_once(three: Command) -> None:
    batches = ("--num_batches", "all", "--batch_size", "8", "--num_seed", "3")
    for at_once in ("1", "3"):
        code, out, err = await three("--run", f"at-{at_once}", *batches, "--at_once", at_once)
        assert code == 0, err
        (three.runs / "responses.sqlite").unlink()
    assert three.labels("at-1") == three.labels("at-3")
    rows = labels_of(three, "at-1")
    assert sorted(rows) == list(range(24))
    result = run_json(three, "at-1")["result"]
    by_search = [row["label"] for row in rows.values() if row["by"] == "icm"]
    assert result["label_counts"] == {name: by_search.count(name) for name in MOODS.names}
    assert result["icm"][1] + sum(n for _, n in result["predicted"].values()) == 24
    assert f"{by_search.count('negative')} negative" in out
    code, again, err = await three("--run", "at-3", *batches)  # is complete, and only shown
    assert code == 0, err
    assert again == out


async def test_passes_of_three_labels_are_voted_on(three: Command) -> None:
    code, out, err = await three("--run", "votes", "--passes", "3", "--batch_size", "12", "--num_seed", "3")
    assert code == 0, err
    passes = [labels_of(three, f"votes/batch-000-pass-{n}") for n in range(3)]
    voted = labels_of(three, "votes")
    assert len(voted) == 12
    for at, row in voted.items():
        given = [labels[at]["label"] for labels in passes]
        assert row["by"] == "vote"
        assert row["votes"] == 3
        assert row["votes_of"] == {name: given.count(name) for name in MOODS.names}
        assert row["label"] == max(given, key=given.count)  # where all differ, the first pass's
        mean = {name: sum(labels[at]["logprobs"][name] for labels in passes) / 3 for name in MOODS.names}
        assert row["logprobs"] == pytest.approx(mean)
    result = run_json(three, "votes")["result"]
    given = [row["label"] for row in voted.values()]
    assert result["label_counts"] == {name: given.count(name) for name in MOODS.names}
    agreeing = sum(row["label"] == row["gold"] for row in voted.values())
    assert result["icm"] == [agreeing, 12]
    assert ", ".join(f"{given.count(name)} {name}" for name in MOODS.names) in out
    starts = [three.log(f"votes/batch-000-pass-{n}")[0]["labels"] for n in range(3)]
    assert len({json.dumps(labels) for labels in starts}) > 1, "each pass has its own random labels"


async def test_votes_of_three_labels_are_reported_and_exported(three: Command, folder: Path) -> None:
    code, _, err = await three("--run", "votes", "--passes", "3", "--batch_size", "12", "--num_seed", "3")
    assert code == 0, err
    whole, first = str(three.runs / "votes"), str(three.runs / "votes" / "batch-000-pass-0")
    output = folder / "out"
    for words in (["report", whole], ["report", whole, first], ["export", whole, "--format", "sft"]):
        three.arguments = [sys.executable, "-m", "src.experiments.commands", *words, "-o", str(output)]
        three.environment["PYTHONPATH"] = str(REPOSITORY)
        code, _, err = await three()
        assert code == 0, err
        assert any(name in output.read_text() for name in MOODS.names)
        output.unlink()
