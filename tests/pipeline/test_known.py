"""Files of known labels: every way of naming a claim, and every way of getting it wrong, in one line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.llm_api.labels import LabelSpace
from src.icm import testbeds
from src.icm.columns import Reading, parse_columns, parse_values
from src.icm.consistency import Consistency, Constraint, Relation
from src.icm.testbeds import BadInput, Claim
from src.icm.testbeds.definition import parse_testbed
from src.pipeline.datafiles import load_data_file, load_testbed, load_testbed_file
from src.pipeline.known import KnownLabels, check_known, gold_seeds, known_labels, merged, read_known

BUILTIN, BUILTIN_CLAIMS, BUILTIN_PATH = load_testbed("builtin", Path())


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def builtin(path: Path) -> KnownLabels:
    return read_known(path, BUILTIN, BUILTIN_CLAIMS, BUILTIN_PATH, Reading())


def texts(claim: Claim) -> dict[str, Any]:
    return {"question": claim.question, "choice": claim.choice, "choice_2": claim.choice_2}


@pytest.mark.parametrize("name", ["known.csv", "known.json", "known.jsonl"])
def test_claims_are_found_by_row_by_text_or_by_both(tmp_path: Path, name: str) -> None:
    some = BUILTIN_CLAIMS[4:9]
    for columns in (lambda c: {"row": c.row}, texts, lambda c: {"row": c.row, **texts(c), "reason": "small margin"}):
        rows = [{"label": label, **columns(c)} for c, label in zip(some, [1, 0, "", "unsure", "TRUE"], strict=True)]
        found = builtin(write(tmp_path / name, rows))
        assert dict(found.labels) == {some[0].row: True, some[1].row: False, some[4].row: True}
        assert found.sources == (name,)


def test_the_labels_of_a_run_are_a_file_of_known_ones(tmp_path: Path) -> None:
    row = {"row": 3, "question": "x", "choice": BUILTIN_CLAIMS[3].choice, "label": True, "gold": False, "by": "icm"}
    assert dict(builtin(write(tmp_path / "labels.jsonl", [row])).labels) == {3: True}


def test_space_that_an_editor_changes_does_not_count(tmp_path: Path) -> None:
    rows = [{"label": 1, "choice": f"  {BUILTIN_CLAIMS[7].choice.replace(' ', '  ')} "}]
    assert dict(builtin(write(tmp_path / "k.csv", rows)).labels) == {7: True}


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no label column": (
        [{"row": 1, "truth": 1}],
        "k.jsonl:1: has no column label (empty where it is not known); it has 'row', 'truth'",
    ),
    "no name": ([{"label": 1, "reason": "?"}], "k.jsonl:1: names no claim: it has no row, and nothing in choice"),
    "no such row": ([{"label": 1, "row": 999}], "names row 999, and "),
    "no number": ([{"label": 1, "row": "three"}], "has the row 'three', which is no number of a row"),
    "below": ([{"label": 1, "row": -1}], "has the row -1, which is no number of a row"),
    "true": ([{"label": 1, "row": True}], "has the row True, which is no number of a row"),
    "half": ([{"label": 1, "row": 1.5}], "has the row 1.5, which is no number of a row"),
    "no label": ([{"label": "maybe", "row": 1}], "has the label 'maybe', which is neither 0/1 nor true/false"),
    "no such claim": ([{"label": 1, "choice": "Never written."}], "names a claim that is not in"),
    "another text": (
        [{"label": 1, "row": 1, "choice": BUILTIN_CLAIMS[2].choice}],
        "k.jsonl:1: names row 1 with the choice ",
    ),
    "two labels": (
        [{"label": 1, "row": 1}, {"label": "", "row": 1}, {"label": 0, "row": 1}],
        " has two labels, True on line 1 and False on line 3",
    ),
    "nothing said": ([{"label": "", "row": 1}, {"label": "unsure", "row": 2}], "gives no label: all of its 2 rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_one_line(tmp_path: Path, name: str) -> None:
    rows, complaint = WRONG[name]
    with pytest.raises(BadInput) as raised:
        builtin(write(tmp_path / "k.jsonl", rows))
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / "k.jsonl"))


def test_the_same_claim_twice_with_one_label_is_fine(tmp_path: Path) -> None:
    rows = [{"label": 1, "row": 1}, {"label": "true", "row": "1.0"}, {"label": "", "row": 1}]
    assert dict(builtin(write(tmp_path / "k.csv", rows)).labels) == {1: True}


def users_file(
    tmp_path: Path, columns: str, values: str | None = None
) -> tuple[testbeds.Testbed, list[Claim], Path, Reading]:
    rows = [
        {"prompt": f"Is {n} even?", "text": answer, "ok": "yes" if n % 2 else "no", "sure": sure}
        for n, (answer, sure) in enumerate([("yes", "1"), ("no", ""), ("no", "0"), ("no", "unsure")])
    ]
    reading = Reading(parse_columns(columns), {} if values is None else parse_values([values]))
    return (*load_data_file(write(tmp_path / "mine.csv", rows), reading), reading)


def test_a_column_of_the_data_where_it_is_named(tmp_path: Path) -> None:
    names = "question=prompt,choice=text"
    testbed, claims, path, reading = users_file(tmp_path, f"{names},known=sure")
    found = known_labels(None, testbed, claims, path, reading)
    assert found is not None
    assert (dict(found.labels), found.sources) == ({0: True, 2: False}, ("the column sure of mine.csv",))
    testbed, claims, path, reading = users_file(tmp_path, names)
    assert known_labels(None, testbed, claims, path, reading) is None


def test_a_column_that_is_called_known_and_not_named_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", [{"question": "q", "choice": str(n), "known": "whatever"} for n in range(2)])
    assert [claim.known for claim in load_data_file(path)[1]] == [None, None]


def test_a_file_beside_a_column_must_not_contradict_it(tmp_path: Path) -> None:
    testbed, claims, path, reading = users_file(tmp_path, "question=prompt,choice=text,known=sure")
    more = write(tmp_path / "k.csv", [{"label": 1, "row": 3}])
    found = known_labels(more, testbed, claims, path, reading)
    assert found is not None
    assert dict(found.labels) == {0: True, 2: False, 3: True}
    other = write(tmp_path / "k.csv", [{"label": 0, "row": 0}])
    with pytest.raises(BadInput, match=r"row 0 has the label False, and True in the column sure"):
        known_labels(other, testbed, claims, path, reading)


def test_a_column_with_a_label_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"mine.csv:2: row 0 in the column ok: has the label 'no'"):
        users_file(tmp_path, "question=prompt,choice=text,known=ok")


def test_the_file_may_have_the_columns_and_values_of_the_data(tmp_path: Path) -> None:
    testbed, claims, path, reading = users_file(
        tmp_path, "question=prompt,choice=text,label=ok", "label=yes:true,no:false"
    )
    rows = [{"prompt": claims[2].question, "text": claims[2].choice, "label": "Yes"}]
    found = read_known(write(tmp_path / "k.jsonl", rows), testbed, claims, path, reading)
    assert dict(found.labels) == {2: True}


def test_options_of_a_list_are_claims_of_their_own(tmp_path: Path) -> None:
    rows = [{"question": "Which is prime?", "choice": ["7", "9"], "mine": "A"}, {"question": "?", "choice": ["1", "2"]}]
    testbed, claims, path = load_data_file(write(tmp_path / "d.jsonl", rows), Reading({"known": "mine"}))
    assert [claim.known for claim in claims] == [True, False, None, None]
    known = write(tmp_path / "k.jsonl", [{"question": "?", "choice": "2", "label": 1}])
    assert dict(read_known(known, testbed, claims, path, Reading()).labels) == {3: True}


MANY = "template: '{question} {source}:'\ncolumns: {known: theirs}\nlabels: [yes, no, unsure]\n"


def test_labels_of_a_testbed_file_are_names_even_where_one_is_unsure(tmp_path: Path) -> None:
    testbed = parse_testbed(MANY, "three")
    assert testbed.space == LabelSpace(("yes", "no", "unsure"), (" yes", " no", " unsure"))
    rows = [{"question": f"q{n}", "source": "s", "theirs": each} for n, each in enumerate(["Unsure", "", "no", "yes"])]
    path = write(tmp_path / "d.csv", rows)
    testbed, claims, _ = load_testbed_file(testbed, tmp_path / "three.yaml", tmp_path, path)
    assert [claim.known for claim in claims] == [2, None, 1, 0]
    known = write(tmp_path / "k.csv", [{"question": "q1", "source": "s", "label": "unsure"}])
    assert dict(read_known(known, testbed, claims, path, testbed.reading).labels) == {1: 2}


def test_labels_that_break_a_constraint_are_named() -> None:
    claims = BUILTIN_CLAIMS[:4]
    consistency = BUILTIN.consistency(claims, "gold-free")
    check_known((True, None, False, True), claims, consistency, ("False", "True"))
    with pytest.raises(BadInput) as raised:
        check_known((True, True, None, None), claims, consistency, ("False", "True"))
    said = str(raised.value)
    assert f"row {claims[0].row} (" in said
    assert f"row {claims[1].row} (" in said
    assert said.endswith("what must hold between them: exactly one is true")


def test_labels_that_leave_others_no_way_out_are_named() -> None:
    claims = BUILTIN_CLAIMS[:3]
    chain = Consistency([Constraint((0, 1), Relation.AGREE), Constraint((1, 2), Relation.DIFFERENT)])
    check_known((True, None, False), claims, chain, ("False", "True"))
    with pytest.raises(BadInput, match="can have no labels that break no constraint"):
        check_known((True, None, True), claims, chain, ("False", "True"))


def test_constraints_that_cannot_be_kept_to_anyway_are_no_fault_of_the_labels() -> None:
    claims = BUILTIN_CLAIMS[:3]
    three = Consistency([Constraint(pair, Relation.DIFFERENT) for pair in ((0, 1), (1, 2), (0, 2))])
    check_known((True, None, None), claims, three, ("False", "True"))


def test_gold_seeds_are_drawn_by_the_seed_and_fewer_are_the_first_of_more() -> None:
    pool = BUILTIN_CLAIMS[:32]
    consistency = BUILTIN.consistency(pool, "gold-free")
    few, many = (gold_seeds(pool, consistency, count, np.random.default_rng(1)) for count in (4, 16))
    assert few.labels.items() <= many.labels.items()
    assert (len(few.labels), len(many.labels)) == (4, 16)
    assert all(BUILTIN_CLAIMS[row].gold == label for row, label in many.labels.items())
    assert gold_seeds(pool, consistency, 4, np.random.default_rng(2)) != few
    with pytest.raises(BadInput, match="--gold_seeds 33: only 32 of the pool's 32 claims have a gold label"):
        gold_seeds(pool, consistency, 33, np.random.default_rng(1))


def test_gold_that_contradicts_itself_is_passed_over() -> None:
    pool = [replace(claim, gold=True) for claim in BUILTIN_CLAIMS[:8]]  # of each pair exactly one is true
    consistency = BUILTIN.consistency(pool, "gold-free")
    found = gold_seeds(pool, consistency, 4, np.random.default_rng(1))
    assert sorted(row // 2 for row in found.labels) == [0, 1, 2, 3]
    check_known(found.of(pool) or (), pool, consistency, ("False", "True"))
    with pytest.raises(BadInput, match="--gold_seeds 5: only 4 of the pool's 8 claims"):
        gold_seeds(pool, consistency, 5, np.random.default_rng(1))


def test_of_two_sources_the_second_counts() -> None:
    both = merged(KnownLabels({1: True, 2: True}, ("a",)), KnownLabels({2: False}, ("b",)))
    assert both == KnownLabels({1: True, 2: False}, ("a", "b"))
    assert merged(None, None) is None
