"""docs/testbeds.md shows the files of docs/examples as they are, what icm testbed prints of them, and every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from src.experiments.testbed import main
from src.icm import testbeds
from src.icm.testbeds.definition import Relations, Upstream
from src.pipeline.datafiles import load_testbed_file
from src.pipeline.testbed_files import read_testbed

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "testbeds.md").read_text()
EXAMPLES = REPOSITORY / "docs" / "examples"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_files_that_are_shown_are_the_examples() -> None:
    shown = {each["data"].partition(".")[0]: each for each in map(yaml.safe_load, blocks("yaml"))}
    assert shown == {file.stem: yaml.safe_load(file.read_text()) for file in EXAMPLES.glob("*.yaml")}
    [code] = blocks("python")
    assert code in (EXAMPLES / "sums.py").read_text()


def test_what_is_shown_of_a_testbed_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main(["docs/examples/yes-no.yaml", "--show", "1"]) == 0
    assert f"\n```\n{capsys.readouterr().out}```\n" in PAGE


@pytest.mark.parametrize(
    ("name", "labels", "gold", "last"),
    [
        ("yes-no", 2, [6, 6], "Statement: Fire needs water.\nIs it so?"),
        ("sentiment", 3, [20, 20, 20], "Review: We will be back.\nThe review is"),
        (
            "multiple-choice",
            4,
            [1, 2, 2, 1],
            "Question: Which of these can fly?\nA. a stone\nB. a whale\nC. a swallow\nD. a mole\nAnswer:",
        ),
        (
            "three-answers",
            3,
            [20, 20, 20],
            "Note: Two of the five lamps are broken.\nStatement: The lamps hang in the hall.\n"
            "By the note the statement is",
        ),
        ("fields", 3, [16, 16, 16], "Title: How towns grow\nShelf:"),
        ("questions", 4, [15, 15, 15, 15], "Question: When will the comet come back?\nIt asks for a"),
    ],
)
def test_examples_have_their_prompts_and_gold_labels(name: str, labels: int, gold: list[int], last: str) -> None:
    file = EXAMPLES / f"{name}.yaml"
    testbed, claims, _ = load_testbed_file(read_testbed(file), file, Path("nowhere"))
    assert len(testbed.space) == labels
    assert [sum(claim.gold == label for claim in claims) for label in range(labels)] == gold
    assert claims[-1].text == last


def test_every_key_relation_and_published_key_is_explained() -> None:
    keys, relations = PAGE.partition("## Keys")[2].partition("| `relations` | between")[::2]
    assert all(f"| `{key}` |" in keys for key in testbeds.Definition.model_fields)
    assert all(f"`{name}`" in relations for name in get_args(Relations))
    assert all(f"`{name}`" in keys for name in get_args(Upstream))
