"""Which labels are handed over: the promise holds on random sets, and a rule without its correction breaks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.icm.testbeds import BadInput
from src.results.by_class import by_class_of
from src.results.charts import coverage_chart
from src.results.doubt import (
    Doubt,
    Wanted,
    coverage_of,
    doubt_of,
    given_margin,
    gold_checks,
    least_margin,
    with_doubt,
)
from src.results.doubt_words import doubt_lines
from src.results.exports import chosen_claims, plain_rows
from src.results.rows import abstained_row, labelled_row
from src.results.run_reader import read_run
from src.results.run_record import LabelledClaim, RunRecord
from src.results.run_view import view_of
from src.results.tables import results_of
from tests.run_examples import write_run

Rule = Callable[[Sequence[float], Sequence[tuple[float, bool]], float], float]
SETS = 1500


def plug_in(others: Sequence[float], checked: Sequence[tuple[float, bool]], risk: float) -> float:
    """The smallest margin at which the checked claims themselves have the share: no correction for a finite sample."""
    for threshold in sorted(others):
        wrong = [is_wrong for margin, is_wrong in checked if margin >= threshold]
        if wrong and sum(wrong) / len(wrong) <= risk:
            return threshold
    return math.inf


def share_of_wrong(rule: Rule, checked: int, others: int, risk: float, *, seed: int) -> tuple[float, float, float]:
    """Over SETS random sets of claims, less often wrong the larger their margin: the mean share of wrong labels among
    those kept of the claims that were not checked, its standard error, and the mean share that is kept."""
    rng = np.random.default_rng(seed)
    shares, coverage = [], []
    for _ in range(SETS):
        margins = rng.exponential(1.0, checked + others)
        wrong = rng.random(checked + others) < 1 / (1 + np.exp(1.5 * margins - 0.2))
        known = list(zip(margins[:checked].tolist(), wrong[:checked].tolist(), strict=True))
        kept = margins[checked:] >= rule(margins[checked:].tolist(), known, risk)
        shares.append(wrong[checked:][kept].sum() / max(1, kept.sum()))
        coverage.append(kept.mean())
    return float(np.mean(shares)), float(np.std(shares) / SETS**0.5), float(np.mean(coverage))


@pytest.mark.parametrize(("checked", "others", "risk"), [(10, 40, 0.1), (20, 44, 0.1), (20, 44, 0.2), (9, 9, 0.1)])
def test_the_expected_share_of_wrong_labels_among_the_kept_is_at_most_what_was_asked_for(
    checked: int, others: int, risk: float
) -> None:
    share, error, coverage = share_of_wrong(least_margin, checked, others, risk, seed=1)
    assert share <= risk + 3 * error
    assert coverage > 0.05, "it keeps the promise by keeping nothing"
    without, error, _ = share_of_wrong(plug_in, checked, others, risk, seed=1)
    if checked < 20 or risk < 0.2:
        assert without > risk + 3 * error, "this test would not notice a rule that is wrong"


def test_labels_of_whole_groups_count_once_a_group() -> None:
    """Pairs that are right or wrong together: n labels are worth n / 2."""
    rng, shares = np.random.default_rng(2), []
    for _ in range(600):
        margin, wrong = np.repeat(rng.exponential(1.0, 40), 2), np.repeat(rng.random(40) < 0.35, 2)
        claims = [
            claim(at, True, float(margin[at]), gold=(not wrong[at]) if at < 24 else None, group=str(at // 2))
            for at in range(80)
        ]
        doubt = doubt_of(run(*claims), Wanted(abstain=0.3, abstain_on="gold"))
        [part] = doubt.parts
        assert (part.by_group, part.checked) == (True, 12)
        kept = [at for at in range(24, 80) if at not in doubt.abstained]
        shares.append(sum(wrong[at] for at in kept) / max(1, len(kept)))
    assert np.mean(shares) <= 0.3 + 3 * np.std(shares) / 600**0.5


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 8), max_size=12),
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=12),
    st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]),
)
def test_the_threshold_is_the_smallest_at_which_the_bound_holds(
    others: list[int], checked: list[tuple[int, bool]], risk: float
) -> None:
    found = least_margin(others, checked, risk)

    def holds(threshold: float) -> bool:
        kept = sum(margin >= threshold for margin in others)
        wrong = 1 + sum(is_wrong and margin >= threshold for margin, is_wrong in checked)
        return kept > 0 and len(others) * wrong <= risk * kept * (len(checked) + 1) * (1 + 1e-12)

    tried = [*others, *(margin for margin, _ in checked)]
    assert found == min((margin for margin in tried if holds(margin)), default=math.inf)


def test_too_few_labels_keep_nothing_and_one_more_may() -> None:
    others = [5.0] * 10
    assert math.isinf(least_margin(others, [(1.0, False)] * 8, 0.1))
    assert least_margin(others, [(1.0, False)] * 9, 0.1) == 1.0
    assert Wanted(abstain=0.1).least_labels == 9
    assert Wanted(abstain=0.05).least_labels == 19
    assert Wanted(abstain=0.3).least_labels == 3


def claim(row: int, label: bool | None, log_odds: float | None = None, **more: Any) -> LabelledClaim:
    fields: dict[str, Any] = {"group": str(row), "question": "q", "choice": f"c{row}"} | more
    return LabelledClaim(row=row, label=label, log_odds=log_odds, **fields)


def run(*claims: LabelledClaim, **more: Any) -> RunRecord:
    return RunRecord("r", {"testbed": "mine.jsonl", "seed": 3, **more}, claims)


def test_a_margin_is_that_of_the_label_given_which_may_be_the_less_likely_one() -> None:
    assert given_margin(run(), claim(0, False, -2.0)) == 2.0
    assert given_margin(run(), claim(0, False, 2.0)) == -2.0
    assert given_margin(run(), claim(0, True)) == -math.inf
    below = doubt_of(run(claim(0, False, 2.0), claim(1, True, 2.0), claim(2, True)), Wanted(abstain_below=1.0))
    assert below.abstained == {0, 2}
    assert doubt_lines(below)[0].startswith(
        "1 of 3 claims in the pool keep their label, with a margin of at least 1 nat"
    )
    assert "promises nothing" in doubt_lines(below)[0]


def test_half_of_the_claims_are_drawn_where_all_have_gold_and_all_where_some_do() -> None:
    everyone = run(*(claim(at, True, 1.0 + at, gold=True) for at in range(40)))
    [part] = doubt_of(everyone, Wanted(abstain=0.1, abstain_on="gold")).parts
    assert (part.checked, part.compared, part.kept, part.claims) == (20, 20, 40, 40)
    [part] = doubt_of(everyone, Wanted(abstain=0.1, abstain_on="gold", abstain_labels=9)).parts
    assert part.checked == 9
    some = run(*(claim(at, True, 1.0 + at, gold=True if at < 12 else None) for at in range(40)))
    [part] = doubt_of(some, Wanted(abstain=0.1, abstain_on="gold")).parts
    assert (part.checked, part.compared) == (12, 0)
    again = doubt_of(everyone, Wanted(abstain=0.1, abstain_on="gold", abstain_labels=9))
    assert again == doubt_of(everyone, Wanted(abstain=0.1, abstain_on="gold", abstain_labels=9))


def test_half_of_the_claims_are_drawn_where_all_others_are_known() -> None:
    """Where all were checked, none would be left to keep."""
    known = [claim(at, True, 1.0, gold=True, by="known") for at in range(4)]
    whole = run(*known, *(claim(at, True, 1.0 + at, gold=True) for at in range(4, 44)))
    [part] = doubt_of(whole, Wanted(abstain=0.1, abstain_on="gold")).parts
    assert (part.checked, part.compared, part.kept) == (20, 20, 44)


def test_claims_outside_the_pool_have_a_threshold_of_their_own() -> None:
    inside = [claim(at, True, 3.0, gold=True if at < 12 else None) for at in range(30)]
    outside = [claim(at, True, 9.0, by="many-shot") for at in range(30, 40)]
    doubt = doubt_of(run(*inside, *outside), Wanted(abstain=0.1, abstain_on="gold"))
    assert [(part.in_pool, part.kept) for part in doubt.parts] == [(True, 30), (False, 0)]
    told = doubt_lines(doubt)
    assert "if the 12 claims whose label is checked (gold) are a random draw of all claims" in told[0]
    assert told[1].startswith(
        "no label outside the pool is kept: 0 claims whose label is checked (gold) cannot promise"
    )


def test_known_labels_are_kept_and_check_what_the_model_says_of_their_claims() -> None:
    known = [claim(at, at % 2 == 0, 2.0, by="known") for at in range(10)]  # the model says True of all
    doubt = doubt_of(run(*known, *(claim(at, True, 2.0) for at in range(10, 40))), Wanted(abstain=0.1))
    [part] = doubt.parts
    assert (part.checked, part.wrong, part.kept, doubt.abstained) == (10, 5, 10, frozenset(range(10, 40)))
    assert "5 of the 10 claims whose label is checked (known) are wrong" in doubt_lines(doubt)[0]
    assert "were shown to the search" in doubt_lines(doubt)[1]


def test_known_labels_outside_the_pool_check_claims_outside_it() -> None:
    inside = [claim(at, True, 3.0) for at in range(30)]
    others = [claim(at, True, 9.0, by="many-shot") for at in range(30, 40)]
    known = [claim(at, True, 9.0, by="known", outside=True) for at in range(40, 52)]
    doubt = doubt_of(run(*inside, *others, *known), Wanted(abstain=0.1))
    assert [(part.in_pool, part.checked, part.kept) for part in doubt.parts] == [(True, 0, 0), (False, 12, 22)]


def test_labels_handed_over_are_counted_by_class_without_the_known_ones() -> None:
    claims = [claim(at, at % 3 > 0, 1.0 + at, gold=at % 2 == 0) for at in range(12)]
    known = [claim(at, True, 9.0, gold=True, by="known") for at in range(12, 16)]
    doubted = with_doubt(run(*claims, *known), doubt_of(run(*claims, *known), Wanted(abstain_below=4.0)))
    [row] = [row for row in results_of(replace(doubted, result={})) if row.title == "handed over"]
    kept = [each for each in doubted.claims if not each.abstained and each.by == "icm"]
    assert row.compared == len(kept)
    assert row.by_class == by_class_of([(each.label, each.gold) for each in kept], 2)


def test_without_a_label_to_check_nothing_is_promised() -> None:
    for wanted in (Wanted(abstain=0.1), Wanted(abstain=0.1, abstain_on="gold")):
        with pytest.raises(BadInput, match="nothing can be promised"):
            doubt_of(run(claim(0, True, 1.0)), wanted)
    assert not gold_checks(run(claim(0, True, 1.0, by="known", gold=True)))


def test_a_line_without_a_label_says_what_it_would_have_been_and_is_read_so(tmp_path: Path) -> None:
    row = {"row": 1, "label": True, "log_odds": 0.1, "by": "predicted", "batch": 2}
    without = abstained_row(row)
    assert without == row | {
        "label": None, "by": "abstained", "abstained_label": True, "abstained_by": "predicted"
    }  # fmt: skip
    assert labelled_row(without) == row
    assert labelled_row(row) == row
    assert abstained_row(without) == without

    folder = write_run(tmp_path / "r", labels=[True, False] * 4, gold=[True] * 8)
    path = folder / "labels.jsonl"
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(orjson.dumps(abstained_row(each)) + b"\n" for each in rows))
    before = replace(read_run(write_run(tmp_path / "s", labels=[True, False] * 4, gold=[True] * 8)), name="r")
    assert with_doubt(before, Doubt(Wanted(), (), frozenset(range(8)))) == read_run(folder)


def test_coverage_is_the_agreement_of_the_surest_and_equal_margins_come_in_together() -> None:
    sure = [claim(0, True, 4.0, gold=True), claim(1, True, 3.0, gold=True), claim(2, False, -1.0, gold=True)]
    found = coverage_of(run(*sure, claim(3, True, 9.0)))
    assert found is not None
    assert found.points == ((1 / 3, 1.0), (2 / 3, 1.0), (1.0, 2 / 3))
    assert found.area == pytest.approx((1 + 1 + 2 / 3) / 3)
    tied = coverage_of(run(*(claim(at, True, 1.0, gold=at < 2) for at in range(4))))
    assert tied is not None
    assert (tied.points, tied.area) == (((1.0, 0.5),), pytest.approx(0.5))
    assert coverage_of(run(claim(0, True, 1.0))) is None


def test_reports_tables_and_exports_tell_handed_over_labels_from_others() -> None:
    claims = [claim(at, True, 1.0 + at, gold=at > 4) for at in range(10)]
    doubted = with_doubt(run(*claims), doubt_of(run(*claims), Wanted(abstain_below=6.0)))
    [row] = [row for row in results_of(replace(doubted, result={})) if row.title == "handed over"]
    assert (row.agreeing, row.compared, row.note) == (5, 5, "labels that are not withheld, 5 of 10")
    view = view_of(doubted)
    assert [each.by for each in view.claims] == ["abstained"] * 5 + ["icm"] * 5
    assert [tile.figure for tile in view.tiles if tile.name == "labels handed over"] == ["5"]
    chart = coverage_chart(doubted)
    assert chart is not None
    assert "Kept, 5 of 10: 1.000" in chart.description
    assert chart in [replace(each, figure=chart.figure) for each in view.calibration]
    rows = list(plain_rows(doubted, chosen_claims(doubted)))
    assert [row["label"] for row in rows] == [None] * 5 + [True] * 5
    assert [row["abstained_label"] for row in rows] == [True] * 5 + [None] * 5
    assert rows[0]["by"] == "abstained"
    assert rows[0]["probability"] == pytest.approx(0.731, abs=1e-3)
    assert [each.row for each in chosen_claims(doubted, abstained=False)] == [5, 6, 7, 8, 9]
    assert "abstained_label" not in next(iter(plain_rows(run(*claims), claims)))
