from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from scripts import prepare_data
from scripts.prepare_data import (
    final_number,
    main,
    read_gsm8k,
    read_truthfulqa,
    truthfulqa_claims,
    truthfulqa_comparisons,
)
from src.pipeline.datafiles import load_testbed

# The columns and manners of the published file: answers joined by "; ", quoted where they hold commas, best ones
# without a full stop now and then, a category and a source that nothing here needs.
TRUTHFULQA = (
    "Type,Category,Question,Best Answer,Best Incorrect Answer,Correct Answers,Incorrect Answers,Source\n"
    "Adversarial,Misconceptions,Is glass a liquid?,Glass is a solid,Glass is a liquid,"
    '"Glass is a solid; Glass, in short, is solid; No","Glass is a liquid; Glass flows slowly; Yes",https://example.org\n'
    'Non-Adversarial,Law,"What, if anything, is owed?",Nothing is owed,A fee is owed,Nothing is owed,'
    '"A fee is owed; A tax; A toll; A tithe",https://example.org\n'
    "Adversarial,Odd,Only true ones?,Yes,,Yes; Indeed,,https://example.org\n"
)
GSM8K = (
    json.dumps({"question": "Ann has 2 bags of 8. How many?", "answer": "She has 2*8=<<2*8=16>>16.\n#### 16"})
    + "\n"
    + json.dumps({"question": "A car costs $1,000 and a half more. How much?", "answer": "1000*1.5=1500\n#### 1,500"})
    + "\n"
)
SOLUTIONS = [
    ("Ann has 2 bags of 8. How many?", "2 * 8 = 16. The answer is 16."),
    ("Ann has 2 bags of 8. How many?", "2 + 8 = 10. The answer is 10."),
    ("A car costs $1,000 and a half more. How much?", "So it is $1,500.00"),
    ("A car costs $1,000 and a half more. How much?", "No idea."),
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "TruthfulQA.csv").write_text("\ufeff" + TRUTHFULQA)
    (folder / "test.jsonl").write_text(GSM8K)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def run(data: Path, *arguments: str | Path) -> int:
    return main(["--dir", str(data), *map(str, arguments)])


def test_truthfulqa_claims_have_two_answers_of_each_kind_where_there_are() -> None:
    rows = truthfulqa_claims(read_truthfulqa(TRUTHFULQA))
    labels = Counter((row["question"], row["label"]) for row in rows)
    assert labels == {
        ("Is glass a liquid?", 1): 2,
        ("Is glass a liquid?", 0): 2,
        ("What, if anything, is owed?", 1): 1,
        ("What, if anything, is owed?", 0): 3,
    }
    assert {row["choice"] for row in rows if row["label"] == 1} == {
        "Glass is a solid.", "Glass, in short, is solid.", "Nothing is owed.",
    }  # fmt: skip


def test_comparisons_come_in_both_orders() -> None:
    first, second, *rest = truthfulqa_comparisons(read_truthfulqa(TRUTHFULQA))
    assert (first["choice"], first["choice_2"]) == (second["choice_2"], second["choice"])
    assert {first["label"], second["label"]} == {True, False}
    assert first["consistency_id"] == second["consistency_id"]
    assert len(rest) == 2


def test_an_older_file_without_best_incorrect_answers_is_read() -> None:
    old = "Question,Best Answer,Correct Answers,Incorrect Answers\nIs it?,Yes,Yes,No; Never\n"
    assert read_truthfulqa(old) == [("Is it?", ["Yes."], ["No.", "Never."])]


def test_what_is_written_is_what_the_testbeds_read(published: Path, data: Path) -> None:
    assert run(data, "--from", published) == 0
    for name, claims in (("truthfulQA", 8), ("truthfulQA-preference", 4)):
        assert len(load_testbed(name, data)[1]) == claims
    assert not (data / "gsm8k_verification.json").exists(), "GSM8K alone has no wrong solutions"
    assert len((data / "gsm8k_questions.jsonl").read_text().splitlines()) == 2


def test_the_same_files_give_the_same_bytes(published: Path, data: Path, tmp_path: Path) -> None:
    assert run(data, "--from", published) == run(tmp_path / "again", "--from", published) == 0
    for path in data.glob("*.json*"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_sampled_solutions_become_gsm8k_claims(published: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = published / "solutions.jsonl"
    samples.write_text("".join(json.dumps({"question": q, "solution": s}) + "\n" for q, s in SOLUTIONS))
    assert run(data, "--from", published, "--only", "gsm8k", "--solutions", samples) == 0
    claims = load_testbed("gsm8k", data)[1]
    assert [(claim.answer, claim.gold) for claim in claims] == [("16", True), ("10", False), ("1500", True)]
    assert "1 solutions without a final number" in capsys.readouterr().out


def test_calculator_annotations_are_taken_out() -> None:
    assert read_gsm8k(GSM8K)[0]["solution"] == "She has 2*8=16."


@pytest.mark.parametrize(
    ("solution", "number"),
    [
        ("... #### 1,234", "1234"),
        ("The answer is $5.00.", "5"),
        ("the answer is: -3 apples, not 7", "-3"),
        ("first 4, then 2.5", "2.5"),
        ("nothing", None),
        ("The answer is unknown", None),
    ],
)
def test_final_numbers(solution: str, number: str | None) -> None:
    assert final_number(solution) == number


def test_hashes_are_recorded_and_compared(published: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--from", published, "--only", "gsm8k") == 0
    digest = hashlib.sha256(GSM8K.encode()).hexdigest()
    assert (data / "SHA256SUMS").read_text() == f"{digest}  raw/test.jsonl\n"
    assert run(data, "--verify") == 0
    (data / "raw" / "test.jsonl").write_text("changed")
    assert run(data, "--verify") == 2
    (published / "test.jsonl").write_text(GSM8K + GSM8K)
    assert run(data, "--from", published, "--only", "gsm8k") == 2
    assert "was recorded at its first fetch" in capsys.readouterr().err


def test_verify_before_anything_was_fetched(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--verify") == 2
    assert "fetch the data first" in capsys.readouterr().err


def test_without_a_network_it_says_what_to_fetch(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = prepare_data.Source("TruthfulQA.csv", "http://127.0.0.1:9/TruthfulQA.csv")
    monkeypatch.setattr(prepare_data, "TRUTHFULQA", nowhere)
    assert run(data) == 2
    error = capsys.readouterr().err
    assert nowhere.url in error
    assert "--from FOLDER" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("TruthfulQA.csv", "<html>404</html>", "has no column"),
        ("TruthfulQA.csv", "Question,Best Answer,Correct Answers,Incorrect Answers\n", "holds no questions"),
        ("TruthfulQA.csv", "Question,Best Answer,Correct Answers,Incorrect Answers\na\n", "line 2"),
        ("test.jsonl", "not json\n", "line 1: not a JSON object"),
        ("test.jsonl", '{"question": "q", "answer": "no final number"}\n', "line 1: expected"),
        ("test.jsonl", "", "holds no questions"),
    ],
)
def test_a_wrong_file_is_named(
    published: Path, data: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, complaint: str
) -> None:
    (published / name).write_text(text)
    assert run(data, "--from", published) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert name in error


def test_a_missing_file_is_named(published: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published / "TruthfulQA.csv").unlink()
    assert run(data, "--from", published) == 2
    assert "TruthfulQA.csv: not found. Fetch https://" in capsys.readouterr().err
