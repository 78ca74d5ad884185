"""Which claims are asked about, and why: scores by hand, the order, groups, known labels; the file."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from src.icm.consistency import Constraint, Relation
from src.results.asking import Doubt, choose, doubts_of, reason, rounds_of
from src.results.asking_view import SCORES, buttons_of, grid_of, sheet_of
from src.results.run_reader import read_run
from src.results.run_record import LabelledClaim, RunRecord
from src.results.run_schema import journal_line
from tests.run_examples import write_run

ALPHA = 50.0


def claim(row: int, label: int | None, log_odds: Any, group: str | None = None, **more: Any) -> LabelledClaim:
    fields = {"group": group or f"row {row}", "question": f"q{row}", "choice": f"c{row}"} | more
    return LabelledClaim(row=row, label=label, log_odds=log_odds, **fields)


def run(*claims: LabelledClaim, constraints: Any = (), journal: Any = (), **settings: Any) -> RunRecord:
    shown = {"testbed": "mine.jsonl", "alpha": ALPHA, "data_sha256": "d", **settings}
    return RunRecord("r", shown, claims, journal=tuple(journal), constraints=tuple(constraints))


def questions(answers: dict[int, float], shown: dict[int, bool] | None = None) -> dict[str, Any]:
    line = {"event": "questions", "U": 0.0, "claims": list(answers), "answers": list(answers.values())}
    line["shown"] = {str(at): label for at, label in (shown or {}).items()}
    found = journal_line(line)
    assert found is not None
    return dict(found)


def evaluation(scores: dict[int, float], labels: dict[int, bool]) -> dict[str, Any]:
    line = {"event": "evaluation", "iteration": 1, "accepted": True, "U": 1.0, "labels": labels, "scores": scores}
    found = journal_line(line)
    assert found is not None
    return dict(found)


def by_row(record: RunRecord, *others: RunRecord) -> dict[int, Doubt]:
    return {doubt.claim.row: doubt for doubt in doubts_of(record, others).found}


def test_margin_is_of_the_label_found() -> None:
    found = by_row(run(claim(0, True, 2.0), claim(1, False, -0.5), claim(2, True, -1.0), claim(3, False, None)))
    assert [found[row].margin for row in range(4)] == [2.0, 0.5, -1.0, None]


def test_margin_is_measured_from_the_offset() -> None:
    found = by_row(run(claim(0, True, 3.0), claim(1, False, 0.0), calibrate="mean"))
    assert [found[row].margin for row in range(2)] == [1.5, 1.5]


def test_leverage_alone_is_what_the_other_label_is_worth() -> None:
    found = by_row(run(claim(0, True, 2.0), claim(1, False, -0.5), claim(2, True, -1.0), claim(3, False, -4.0)))
    assert [found[row].leverage for row in range(4)] == [ALPHA / 4 * gain for gain in (-4.0, -1.0, 2.0, -8.0)]
    assert all(doubt.follow == 0 for doubt in found.values())


def test_in_a_group_the_others_follow_into_what_breaks_no_constraint() -> None:
    one_true = [Constraint((0, 1, 2), Relation.EXACTLY_ONE)]
    claims = [claim(0, True, 0.1, "g"), claim(1, False, -3.0, "g"), claim(2, False, -1.0, "g"), claim(3, True, 1.0)]
    found = by_row(run(*claims, constraints=one_true))
    weight = ALPHA / 4
    # Without claim 0 the cheapest true one is claim 2; claim 1 True takes it from claim 0.
    assert found[0].leverage == pytest.approx(weight * (-0.2 - 2.0))
    assert found[1].leverage == pytest.approx(weight * (-6.0 - 0.2))
    assert found[2].leverage == pytest.approx(weight * (-2.0 - 0.2))
    assert [found[row].follow for row in range(4)] == [1, 1, 1, 0]


def test_leverage_counts_a_constraint_that_is_mended() -> None:
    agree = [Constraint((0, 1), Relation.AGREE)]
    found = by_row(run(claim(0, True, 1.0, "g"), claim(1, False, -3.0, "g"), constraints=agree))
    assert found[0].leverage == pytest.approx(ALPHA / 2 * -2.0 + 1)
    assert found[0].follow == 0


def test_leverage_of_three_labels() -> None:
    names = ["red", "green", "blue"]
    [doubt] = by_row(run(claim(0, 1, (2.0, 1.5)), labels=names)).values()
    margins = run(claim(0, 1, (2.0, 1.5)), labels=names).margins(claim(0, 1, (2.0, 1.5)))
    assert margins is not None
    assert doubt.leverage == pytest.approx(ALPHA * (margins[2] - margins[1]))


def test_disagreement_counts_rounds_of_the_journal() -> None:
    claims = [claim(0, True, 2.0), claim(1, False, -2.0), claim(2, True, 2.0), claim(3, False, -2.0)]
    journal = [
        questions({0: 1.0, 1: -1.0}),
        questions({2: -1.0, 3: -1.0}),  # the same round: claim 2 says False
        questions({0: -1.0, 1: -1.0, 2: 1.0, 3: -1.0}),  # another: claim 0 does
        questions({0: -1.0, 1: 1.0, 2: -1.0, 3: 1.0}),  # inverted labels: left out
        evaluation({0: 2.0, 1: -2.0, 2: 2.0, 3: -2.0}, {0: True, 1: False, 2: True, 3: False}),
    ]
    found = by_row(run(*claims, journal=journal))
    assert [(found[row].said, found[row].answers) for row in range(4)] == [(1, 3), (0, 3), (1, 3), (0, 3)]
    assert found[0].disagreement == pytest.approx(1 / 3)


def test_a_round_is_judged_against_its_own_mean() -> None:
    claims = [claim(at, at < 2, 2.0 if at < 2 else -2.0) for at in range(4)]
    journal = [questions({0: 9.0, 1: 9.0, 2: 7.0, 3: 7.0})]
    assert [doubt.said for doubt in by_row(run(*claims, journal=journal, calibrate="mean")).values()] == [0] * 4
    assert [doubt.said for doubt in by_row(run(*claims, journal=journal)).values()] == [0, 0, 1, 1]


def test_answers_known_before_make_no_round() -> None:
    same, labels = {0: 1.0, 1: 2.0}, {0: True, 1: True}
    lines = [questions({0: 1.0}, labels), questions({1: 2.0}, labels), evaluation(same, labels)]
    assert list(rounds_of(lines, 2)) == [same]
    assert list(rounds_of([{"event": "step", "claim": 3, "log_odds": 0.5, "U": 0.0}], 4)) == [{3: 0.5}]
    assert list(rounds_of([], 4)) == []


def test_starts_that_are_asked_by_turns_are_told_apart() -> None:
    one, other = dict.fromkeys(range(8), True), dict.fromkeys(range(8), False)
    near = one | {0: False}  # what became of it after its first answers
    lines = [
        *(questions({0: 1.0, 1: 1.5}, one), questions({0: -1.0, 1: -1.5}, other)),
        *(questions({2: 2.0, 3: 2.5}, near), questions({2: -2.0, 3: -2.5}, other)),
        questions({0: 3.0}, near),  # the next sweep
    ]
    assert list(rounds_of(lines, 8)) == [
        *({0: 1.0, 1: 1.5, 2: 2.0, 3: 2.5}, {0: -1.0, 1: -1.5, 2: -2.0, 3: -2.5}),
        {0: 3.0},
    ]


def test_other_runs_count_and_inverted_ones_do_not() -> None:
    claims = [claim(at, at % 2 == 0, 1.0 if at % 2 == 0 else -1.0) for at in range(4)]
    record = run(*claims)
    other = replace(run(*(replace(one, label=not one.label) if one.row == 3 else one for one in claims)), name="o")
    inverted = replace(run(*(replace(one, label=not one.label) for one in claims)), name="i")
    doubts = doubts_of(record, [other, inverted])
    assert [(doubt.differing, doubt.others, doubt.disagreement) for doubt in doubts.found] == [
        *[(0, 1, 0.0)] * 3,
        (1, 1, 1.0),
    ]
    assert doubts.unlike == (("i", 0.0),)
    assert by_row(record)[0].disagreement is None


def test_known_claims_are_not_asked_and_what_follows_from_them_is_settled() -> None:
    one_true = [Constraint((0, 1, 2), Relation.EXACTLY_ONE), Constraint((3, 4, 5), Relation.EXACTLY_ONE)]
    claims = [
        *(claim(0, True, 0.1, "g", by="known"), claim(1, False, -0.1, "g"), claim(2, False, -0.2, "g")),
        *(claim(3, False, 0.1, "h", by="known"), claim(4, True, 0.3, "h"), claim(5, False, -0.2, "h")),
        claim(6, True, 0.5),
    ]
    record = run(*claims, constraints=one_true)
    doubts = doubts_of(record)
    assert [doubt.claim.row for doubt in doubts.found] == [4, 5, 6]
    assert [one.row for one in doubts.settled] == [1, 2]
    assert [one.row for one in doubts.known] == [0, 3]
    # A group of which something is known waits for those of which nothing is.
    assert [doubt.claim.row for doubt in choose(doubts.found, 3, "margin")] == [6, 5, 4]


def test_the_least_sure_come_first_and_groups_take_turns() -> None:
    claims = [claim(at, True, float(at + 1), "g" if at < 3 else None) for at in range(6)]
    doubts = doubts_of(run(*claims)).found
    assert [doubt.claim.row for doubt in choose(doubts, 6, "margin")] == [0, 3, 4, 5, 1, 2]
    assert [doubt.claim.row for doubt in choose(doubts, 2, "margin")] == [0, 3]
    assert [doubt.claim.row for doubt in choose(doubts, 9, "leverage")] == [0, 3, 4, 5, 1, 2]


def test_by_all_is_the_mean_of_the_ranks() -> None:
    made = [
        Doubt(claim(0, True, 1.0), margin=0.1, said=0, answers=4, leverage=-9.0),
        Doubt(claim(1, True, 1.0), margin=0.2, said=3, answers=4, leverage=-2.0),
        Doubt(claim(2, True, 1.0), margin=0.3, said=1, answers=4, leverage=-1.0),
        Doubt(claim(3, None, None)),
    ]
    orders = {by: [doubt.claim.row for doubt in choose(made, 4, by)] for by in ("margin", "disagreement", "leverage")}
    assert orders == {"margin": [0, 1, 2, 3], "disagreement": [1, 2, 0, 3], "leverage": [2, 1, 0, 3]}
    assert [doubt.claim.row for doubt in choose(made, 4, "all")] == [1, 2, 0, 3]


def test_random_depends_on_the_seed_alone() -> None:
    doubts = doubts_of(run(*(claim(at, True, float(at)) for at in range(20)))).found
    drawn = [[doubt.claim.row for doubt in choose(doubts, 5, "random", seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_random_choice_takes_no_turns() -> None:
    """Of two groups of ten, three claims are of both as often as drawing says: 1 - 2 * C(10, 3) / C(20, 3) = 0.79."""
    doubts = doubts_of(run(*(claim(at, True, float(at), f"g{at % 2}") for at in range(20)))).found
    drawn = [{doubt.claim.group for doubt in choose(doubts, 3, "random", seed)} for seed in range(1000)]
    assert sum(len(groups) == 2 for groups in drawn) / 1000 == pytest.approx(0.79, abs=0.04)


def test_a_reason_says_what_is_unsure() -> None:
    one_true = [Constraint((0, 1), Relation.EXACTLY_ONE)]
    claims = [claim(0, True, -0.5, "g"), claim(1, False, -2.0, "g"), claim(2, True, 3.0)]
    journal = [questions({0: -1.0, 1: -1.0, 2: 1.0})]
    doubts = doubts_of(run(*claims, constraints=one_true, journal=journal), []).found
    assert reason(doubts[0], doubts) == (
        "margin -0.50 nat, number 1 of 3 from the least sure: the model says another label; 1 of 1 answer in the "
        "journal say another label; another label would lower U by 50.00 and change 1 more label of its group"
    )
    assert reason(Doubt(claim(9, None, None)), doubts) == "no label yet"
    assert reason(Doubt(claim(9, True, None, abstained=True)), doubts).endswith(
        "its label is not handed over (--abstain)"
    )


def test_batches_and_passes_are_put_together() -> None:
    claims = [claim(at, True, 1.0 + at) for at in range(4)]
    whole = run(*claims)
    parts = (replace(whole, claims=tuple(claims[:2])), replace(whole, claims=tuple(claims[2:])))
    found = by_row(replace(whole, parts=parts))
    assert [found[row].margin for row in range(4)] == [1.0, 2.0, 3.0, 4.0]
    other = replace(whole, claims=tuple(replace(one, log_odds=-1.0, label=False) for one in claims))
    passes = by_row(replace(whole, parts=(whole, other)))
    assert passes[1].margin == pytest.approx((2.0 - 1.0) / 2)


HOSTILE = ["=1+1", 'two\nlines, "quoted"', "<script>alert(1)</script>", "\u202eturned\x07", "مرحبا", "", "x" * 40_000]


def rows_of(content: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content, newline="")))


def test_the_file_holds_every_text_as_a_spreadsheet_may_see_it(tmp_path: Path) -> None:
    labels = [at % 2 == 0 for at in range(12)]
    texts = [{"question": text, "choice": text} for text in HOSTILE]
    record = read_run(write_run(tmp_path / "a", labels=labels, claims=texts))
    doubts = doubts_of(record).found
    sheet = sheet_of(record, choose(doubts, 12, "margin"), doubts, ())
    rows = sorted(rows_of(sheet.content), key=lambda row: int(row["row"]))
    assert list(rows[0]) == ["row", "label", "question", "choice", "found", *SCORES, "reason"]
    assert {row["label"] for row in rows} == {""}
    assert [row["found"] for row in rows] == [str(label) for label in labels]
    assert [rows[at]["choice"] for at in range(6)] == [
        *("'=1+1", HOSTILE[1], HOSTILE[2], "<U+202E>turned<U+0007>", HOSTILE[4], "")
    ]
    assert len(rows[6]["choice"]) == 32_767
    assert float(rows[0]["margin"]) == 2.0
    assert [f'{card.before}""{card.after}' for card in sheet.cards] == sheet.content.split("\r\n")[1:-1]


def test_columns_of_a_template_keep_their_names(tmp_path: Path) -> None:
    named = claim(0, True, 1.0, shown=(("reason", "because"), ("a", "b")))
    record = run(named, claim(1, False, -1.0))
    doubts = doubts_of(record).found
    [first, second] = rows_of(sheet_of(record, doubts, doubts, ()).content)
    assert (first["reason"], first["a"], second["a"]) == ("because", "b", "")
    assert first["reason_"].startswith("margin 1.00 nat")


def test_known_labels_stand_at_the_end() -> None:
    record = run(claim(0, True, 1.0, by="known"), claim(1, False, -1.0))
    doubts = doubts_of(record)
    rows = rows_of(sheet_of(record, doubts.found, doubts.found, doubts.known).content)
    assert [(row["row"], row["label"], row["reason"][:6]) for row in rows] == [
        ("1", "", "margin"),
        ("0", "True", "known"),
    ]


def test_the_table_shows_what_is_judged() -> None:
    """The built-in testbed's choice_2 is in no prompt."""
    doubts = doubts_of(run(claim(0, True, 1.0, choice_2="not this"), claim(1, True, 2.0), testbed="builtin")).found
    grid = grid_of(run(testbed="builtin"), choose(doubts, 2, "margin"), "margin")
    assert grid.rows[0] == ["q0 / c0", "0", "True", "1.00", "–", "-50.00"]


def test_buttons_of_two_and_of_many_labels() -> None:
    assert [(one.name, one.key, one.cell) for one in buttons_of(run())] == [
        *(("True", "1", '"True"'), ("False", "2", '"False"'), ("unsure", "u", '"unsure"'))
    ]
    names = [f"label {at}" for at in range(11)]
    keys = [one.key for one in buttons_of(run(labels=names))]
    assert keys == [*map(str, range(1, 10)), "", "", "u"]
