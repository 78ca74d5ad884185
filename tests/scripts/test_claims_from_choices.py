"""Multiple-choice files as claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.claims_from_choices import main
from src.pipeline.datafiles import load_data_file

ARC = {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
HELLASWAG = {"ctx": "c", "endings": ["x", "y", "z"], "label": "2"}
PIQA = {"goal": "g", "sol1": "s", "sol2": "t", "label": 0}
WINOGRANDE = {"sentence": "Tom met Bob, but _ left.", "option1": "Tom", "option2": "Bob", "answer": "2"}
TRUTHFULQA = {"question": "q", "mc1_targets": {"choices": ["m", "n"], "labels": [1, 0]}}


def claims(tmp_path: Path, row: dict[str, Any], *flags: str) -> list[tuple[str, str, bool | None]]:
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert main([str(tmp_path / "in.jsonl"), *flags, "-o", str(tmp_path / "out.jsonl")]) == 0
    _, found, _ = load_data_file(tmp_path / "out.jsonl")
    return [(claim.question, claim.choice, claim.gold) for claim in found]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("arc", ARC, [("q", "a", False), ("q", "b", True)]),
        ("hellaswag", HELLASWAG, [("c", "x", False), ("c", "y", False), ("c", "z", True)]),
        ("hellaswag", HELLASWAG | {"label": ""}, [("c", "x", None), ("c", "y", None), ("c", "z", None)]),
        ("piqa", PIQA, [("g", "s", True), ("g", "t", False)]),
        ("winogrande", WINOGRANDE, [
            (WINOGRANDE["sentence"], "Tom met Bob, but Tom left.", False),
            (WINOGRANDE["sentence"], "Tom met Bob, but Bob left.", True),
        ]),
        ("truthfulqa", TRUTHFULQA, [("q", "m", True), ("q", "n", False)]),
    ],
)  # fmt: skip
def test_every_form(tmp_path: Path, form: str, row: dict[str, Any], expected: list[Any]) -> None:
    assert claims(tmp_path, row, "--form", form) == expected


def test_exactly_one_choice_of_a_question_is_true(tmp_path: Path) -> None:
    claims(tmp_path, HELLASWAG, "--form", "hellaswag")
    testbed, found, _ = load_data_file(tmp_path / "out.jsonl")
    assert [c.claims for c in testbed.consistency(found, "gold-free").constraints] == [(0, 1, 2)]
    claims(tmp_path, TRUTHFULQA | {"mc1_targets": {"choices": ["m", "n"], "labels": [1, 1]}}, "--form", "truthfulqa")
    testbed, found, _ = load_data_file(tmp_path / "out.jsonl")
    assert testbed.consistency(found, "gold-free").constraints == ()


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "right"])
def test_fields_of_ones_own(tmp_path: Path, answer: object) -> None:
    row = {"stem": "q", "options": ["wrong", "right"], "key": answer}
    found = claims(tmp_path, row, "--question", "stem", "--choices", "options", "--answer", "key")
    assert found == [("q", "wrong", False), ("q", "right", True)]


@pytest.mark.parametrize("made", ["additions", "larger"])
def test_made_claims_are_true_where_they_say_so(tmp_path: Path, made: str) -> None:
    path = tmp_path / "out.jsonl"
    assert main(["--made", made, "--count", "50", "--seed", "3", "-o", str(path)]) == 0
    _, found, _ = load_data_file(path)
    assert len(found) == 100
    for claim in found:
        text = claim.choice.replace(" is larger than ", ">").replace("=", "==")
        assert eval(text) is claim.gold
    again = path.read_bytes()
    main(["--made", made, "--count", "50", "--seed", "3", "-o", str(path)])
    assert path.read_bytes() == again


@pytest.mark.parametrize(
    ("row", "flags", "complaint"),
    [
        ({"question": "q"}, ["--form", "arc"], "in.jsonl:1: lacks the field 'choices'"),
        (PIQA | {"label": 5}, ["--form", "piqa"], "is not among 2 choices"),
        (ARC | {"choices": "a"}, ["--form", "arc"], "is not of this form"),
        (ARC, [], "--form"),
        (ARC, ["--form", "arc", "--question", "q", "--choices", "c"], "--form"),
        (ARC, ["--form", "arc", "--answer", "key"], "leave out --answer"),
        (ARC, ["--made", "larger", "--form", "arc"], "file, --form would read some"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, row: dict[str, Any], flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    assert main([str(tmp_path / "in.jsonl"), *flags, "-o", str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
