"""Rows for other tools."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.results.exports import (
    FORMULA,
    chosen_claims,
    mended,
    plain_rows,
    preference_pairs,
    spreadsheet_cell,
    training_rows,
)
from src.results.provenance import provenance_of
from src.results.run_reader import read_run
from src.results.run_record import LabelledClaim, RunRecord
from tests.run_examples import write_run


def claim(row: int, label: bool | None, log_odds: float | None = None, **more: Any) -> LabelledClaim:
    fields = {"group": "g", "question": "q", "choice": f"c{row}"} | more
    return LabelledClaim(row=row, label=label, log_odds=log_odds, **fields)


def run(*claims: LabelledClaim, **settings: Any) -> RunRecord:
    return RunRecord("r", {"testbed": "mine.jsonl", **settings}, claims)


def test_claims_are_chosen_by_label_origin_and_margin() -> None:
    claims = claim(0, True, 3.0), claim(1, False, -0.5), claim(2, None, 1.0), claim(3, True, 2.0, by="predicted")
    rows = [found.row for found in chosen_claims(run(*claims))]
    assert rows == [0, 1, 3]
    assert [found.row for found in chosen_claims(run(*claims), only="search")] == [0, 1]
    assert [found.row for found in chosen_claims(run(*claims), least=1.0)] == [0, 3]


def test_a_margin_is_the_distance_from_what_decides_the_label() -> None:
    claims = claim(0, True, 6.0), claim(1, False, 4.0), claim(2, True, 5.2)
    kept = chosen_claims(run(*claims, calibrate="mean"), least=0.9)
    assert [found.row for found in kept] == [0, 1]
    [row, *_] = plain_rows(run(*claims, calibrate="mean"), kept)
    assert row["probability"] == pytest.approx(1 / (1 + 2.718281828459045 ** -(6.0 - 5.0666667)), abs=1e-6)


def batches(folder: Path, *, passes: int = 1, finished: bool = True) -> Path:
    """A run of two batches, whose log-odds lie around +5 and -5, each labelled by sign against its own mean."""
    parts, rows = [], []
    for batch, middle in enumerate((5.0, -5.0)):
        odds = [middle + each for each in (2.0, -1.0, 1.0, -2.0)]
        labels = [value > middle for value in odds]
        for number in range(passes):
            parts.append(f"batch-{batch:03d}" + (f"-pass-{number}" if passes > 1 else ""))
            write_run(folder / parts[-1], labels=labels, log_odds=odds, settings={"calibrate": "mean"})
        lines = (folder / parts[-1] / "labels.jsonl").read_text().splitlines()
        rows += [json.loads(line) | {"batch": batch} for line in lines]
    settings = {"testbed": "claims.jsonl", "calibrate": "mean", "num_batches": 2}
    (folder / "run.json").write_text(json.dumps({"format": 2, "kind": "parts", "settings": settings, "parts": parts}))
    if finished:
        (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(("passes", "finished"), [(1, True), (1, False), (3, True)])
def test_probabilities_of_batches_are_against_the_offset_of_each(passes: int, finished: bool, tmp_path: Path) -> None:
    whole = read_run(batches(tmp_path / "a", passes=passes, finished=finished))
    each = [1 / (1 + math.exp(-value)) for value in (2.0, -1.0, 1.0, -2.0)]
    found = [row["probability"] for row in plain_rows(whole, whole.claims)]
    assert found == pytest.approx([*each, *each])
    assert [claim.label for claim in whole.claims] == [value > 0.5 for value in found]
    assert [row["probability"] for row in training_rows(whole, whole.claims)] == pytest.approx(
        [max(value, 1 - value) for value in [*each, *each]]
    )
    assert len(chosen_claims(whole, least=1.5)) == 4
    assert provenance_of(whole, whole.claims)["offsets"] == {"batch-000": 5.0, "batch-001": -5.0}
    if passes == 1:
        alone = [row["probability"] for part in whole.parts for row in plain_rows(part, part.claims)]
        assert found == alone


def test_the_margin_of_a_pair_of_two_batches_is_of_what_each_is_against(tmp_path: Path) -> None:
    whole = read_run(batches(tmp_path / "a"))
    claims = [replace(claim, question="the same") for claim in whole.claims]
    pairs = preference_pairs(replace(whole, claims=tuple(claims)), claims, "all").pairs
    assert {pair["margin"] for pair in pairs} == {2.0, 3.0, 4.0}


def test_with_a_known_share_a_margin_is_the_distance_from_what_decides_the_label_too() -> None:
    claims = [claim(row, row > 0, score) for row, score in enumerate((1.0, 5.0, 5.5, 6.0, 9.0))]
    calibrated = run(*claims, calibrate="mean", prior=0.8)
    assert calibrated.offset == pytest.approx(1.0 + 0.8 * 4.0)
    assert [found.row for found in chosen_claims(calibrated, least=1.0)] == [0, 2, 3, 4]
    assert "80%" in calibrated.offset_in_words
    assert run(*claims, calibrate="mean").offset_in_words == "the pool's mean"
    assert run(*claims, prior=0.8).offset == 0.0


def test_single_claims_make_pairs_of_one_question() -> None:
    claims = (
        claim(0, True, 3.0), claim(1, True, 1.0), claim(2, False, -1.0), claim(3, False, -2.0),
        claim(4, True, 1.0, question="lonely"),
    )  # fmt: skip
    best = preference_pairs(run(*claims), claims, "best")
    assert [(p["prompt"], p["chosen"], p["rejected"], p["margin"]) for p in best.pairs] == [("q", "c0", "c3", 5.0)]
    assert best.unpaired == 1
    every = preference_pairs(run(*claims), claims, "all")
    assert {(p["chosen"], p["rejected"]) for p in every.pairs} == {(a, b) for a in ("c0", "c1") for b in ("c2", "c3")}


def test_comparisons_become_one_pair_whichever_way_round_they_are_told() -> None:
    claims = (
        claim(0, True, 1.0, choice="a", choice_2="b"),
        claim(1, False, -1.0, choice="b", choice_2="a"),
        claim(2, True, 1.0, question="r", choice="x", choice_2="y"),
        claim(3, True, 1.0, question="r", choice="y", choice_2="x"),
    )
    found = preference_pairs(run(*claims), claims)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in found.pairs] == [("q", "a", "b")]
    assert found.contradicting == 1


def test_a_pair_says_how_sure_its_labels_are_and_what_gave_them() -> None:
    claims = claim(0, True, 3.0), claim(1, False, -1.0, by="predicted")
    [pair] = preference_pairs(run(*claims), claims).pairs
    assert pair["chosen_probability"] == pytest.approx(0.9526, abs=1e-4)
    assert pair["rejected_probability"] == pytest.approx(0.7311, abs=1e-4)
    assert (pair["chosen_by"], pair["rejected_by"], pair["chosen_row"], pair["rejected_row"]) == (
        "icm", "predicted", 0, 1,
    )  # fmt: skip
    [told] = preference_pairs(run(claim(4, False, -2.0, choice="b", choice_2="a")), [
        claim(4, False, -2.0, choice="b", choice_2="a")
    ]).pairs  # fmt: skip
    assert (told["chosen"], told["chosen_row"], told["rejected_row"]) == ("a", 4, 4)
    assert told["chosen_probability"] == told["rejected_probability"] == pytest.approx(0.8808, abs=1e-4)


def test_what_else_a_template_shows_has_columns_of_its_own() -> None:
    claims = [claim(row, True, 1.0, shown=(("place", f"p{row}"), ("choice[0]", "x"))) for row in range(2)]
    rows = list(plain_rows(run(*claims), claims))
    assert [(row["place"], row["choice[0]"]) for row in rows] == [("p0", "x"), ("p1", "x")]
    assert list(rows[0]) == list(rows[1])


def test_training_rows_ask_as_the_run_asked() -> None:
    claims = (
        claim(0, True, 2.0, question="Is it?", choice="Yes."),
        claim(1, False, question="Is it?", choice="No.", by="predicted"),
    )
    sure, unknown = training_rows(run(*claims), claims)
    assert sure.pop("probability") == pytest.approx(1 / (1 + 2.718281828459045**-2))
    assert sure == {
        "prompt": "Question: Is it?\nClaim: Yes.\nI think this claim is", "completion": " True",
        "by": "icm", "row": 0, "run": "r",
    }  # fmt: skip
    assert unknown == {
        "prompt": "Question: Is it?\nClaim: No.\nI think this claim is", "completion": " False",
        "probability": None, "by": "predicted", "row": 1, "run": "r",
    }  # fmt: skip
    [row, _] = training_rows(run(*claims, testbed="builtin"), claims)
    assert row["prompt"] == "Review: Yes.\nPositive:"


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "＝1", "'=1", "|cmd", "%0A=1"]
)
def test_no_cell_is_a_formula(text: str) -> None:
    assert spreadsheet_cell(text)[0] == "'"


@settings(deadline=None)
@given(st.text(st.sampled_from("=+-@;\t\r\n 'ax＝"), max_size=12))
def test_what_a_spreadsheet_could_split_off_is_no_formula_either(text: str) -> None:
    cell = spreadsheet_cell(text)
    assert not FORMULA.match(cell) or cell.startswith("'")
    for piece in cell.replace("\t", ";").split(";")[1:]:
        assert piece.lstrip(" \r\n")[:1] not in ("=", "+", "-", "@", "＝") or not piece.strip()


def test_plain_text_stays_as_it_is() -> None:
    assert spreadsheet_cell("The earth is round; it's so - mostly.") == "The earth is round; it's so - mostly."


def test_half_characters_are_replaced() -> None:
    assert mended("a\ud800b") == "a\ufffdb"
