"""Rows become claims, and constraints come from what claims say, not from gold labels."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.consistency import Relation
from src.icm.testbeds import TESTBEDS, BadInput, Claim, custom_testbed, sample_pool, split_pools
from src.icm.values import parse_label

ROW = {"question": "Q?", "choice": "c", "label": 1, "consistency_id": 0}


def claims(name: str, *rows: dict[str, Any]) -> list[Claim]:
    return [TESTBEDS[name].claim({**ROW, **row}, i) for i, row in enumerate(rows)]


def relation(name: str, mode: Any, *rows: dict[str, Any]) -> Relation | None:
    constraints = TESTBEDS[name].consistency(claims(name, *rows), mode).constraints
    return constraints[0].relation if constraints else None


def test_templates_end_right_before_the_label() -> None:
    assert claims("truthfulQA", {})[0].text == "Question: Q?\nClaim: c\nI think this claim is"
    row = {"choice": "a\nb", "choice_2": "d\ne"}
    assert "Response 1: ab\nResponse 2: de\n" in claims("alpaca", row)[0].text
    for testbed in TESTBEDS.values():
        text = testbed.claim({**ROW, "choice_2": "d", "answer": "7"}, 0).text
        assert text == text.rstrip()


def test_braces_in_claims_are_text() -> None:
    assert "{label}" in claims("truthfulQA", {"choice": "{label}"})[0].text


@pytest.mark.parametrize(
    ("value", "label"), [(1, True), ("0", False), (True, True), ("FALSE", False), (None, None), ("", None), (1.0, True)]
)
def test_labels(value: object, label: bool | None) -> None:
    assert parse_label(value) is label


@pytest.mark.parametrize("value", [2, "yes", [1], -1])
def test_other_labels_are_refused(value: object) -> None:
    with pytest.raises(BadInput, match="neither"):
        parse_label(value)


def test_missing_columns_are_named() -> None:
    with pytest.raises(BadInput, match="choice_2"):
        TESTBEDS["alpaca"].claim(ROW, 0)
    with pytest.raises(BadInput, match="question, choice"):
        TESTBEDS["truthfulQA"].claim({}, 0)


def test_gold_free_truthfulqa_constrains_identical_claims_only() -> None:
    assert relation("truthfulQA", "gold-free", {"choice": "a"}, {"choice": "b"}) is None
    assert relation("truthfulQA", "gold-free", {"choice": "a"}, {"choice": "a"}) is Relation.AGREE


def test_comparisons_in_both_orders_have_one_truth() -> None:
    there, back = {"choice": "a", "choice_2": "b"}, {"choice": "b", "choice_2": "a"}
    for name in ("alpaca", "truthfulQA-preference"):
        assert relation(name, "gold-free", there, back) is Relation.EXACTLY_ONE
        assert relation(name, "gold-free", there, there) is Relation.AGREE
        assert relation(name, "gold-free", there, {"choice": "a", "choice_2": "c"}) is None


def test_solutions_with_other_answers_cannot_both_be_right() -> None:
    assert relation("gsm8k", "gold-free", {"answer": "7"}, {"answer": "8"}) is Relation.AT_MOST_ONE
    assert relation("gsm8k", "gold-free", {"answer": "7"}, {"answer": "7"}) is Relation.AGREE


@pytest.mark.parametrize("name", [name for name in TESTBEDS if name != "gsm8k"])
def test_gold_free_constraints_do_not_change_with_gold(name: str) -> None:
    rows = [
        {"choice": "a", "choice_2": "b"},
        {"choice": "b", "choice_2": "a"},
        {"choice": "a", "choice_2": "b"},
        {"choice": "c", "choice_2": "d"},
    ]
    found = set()
    for gold in product((0, 1), repeat=4):
        labelled = [{**row, "label": label} for row, label in zip(rows, gold, strict=True)]
        found.add(TESTBEDS[name].consistency(claims(name, *labelled), "gold-free").constraints)
    assert len(found) == 1


def test_upstream_keys_leak_gold_and_need_it() -> None:
    assert (
        relation("truthfulQA", "upstream", {"choice": "a", "label": 1}, {"choice": "b", "label": 1}) is Relation.AGREE
    )
    assert relation("truthfulQA", "upstream", {"label": 1}, {"label": 0}) is Relation.AT_MOST_ONE
    with pytest.raises(BadInput, match="gold"):
        relation("truthfulQA", "upstream", {"label": None}, {"label": 1})
    assert relation("truthfulQA", "none", {"choice": "a"}, {"choice": "a"}) is None


def test_a_testbed_can_say_that_exactly_one_claim_of_every_group_is_true() -> None:
    testbed = replace(TESTBEDS["truthfulQA"], relation=Relation.EXACTLY_ONE)
    rows = [{**ROW, "choice": str(n), "consistency_id": n // 4} for n in range(8)]
    found = testbed.consistency([testbed.claim(row, n) for n, row in enumerate(rows)], "gold-free").constraints
    assert [(c.claims, c.relation) for c in found] == [
        ((0, 1, 2, 3), Relation.EXACTLY_ONE),
        ((4, 5, 6, 7), Relation.EXACTLY_ONE),
    ]
    assert TESTBEDS["builtin"].relation is Relation.EXACTLY_ONE


def test_options_of_one_row_and_a_column_s_group_are_sets_of_their_own() -> None:
    testbed = custom_testbed({"question": "q", "choice": "c"})
    options = testbed.claims({**ROW, "choice": ["a", "b", "c"], "label": 0}, 0, 0)
    rows = [{**ROW, "choice": str(n), "consistency_relation": "exactly one"} for n in range(3)]
    found = testbed.consistency([*options, *(testbed.claim(row, n + 1) for n, row in enumerate(rows))], "gold-free")
    assert [c.claims for c in found.constraints] == [(0, 1, 2), (3, 4, 5)]


def test_custom_data_is_read_by_its_columns() -> None:
    comparison = custom_testbed({"choice_2": "b"})
    assert comparison.columns == ("question", "choice", "choice_2")
    single = custom_testbed({"question": "q", "choice": "c"})
    claim = single.claim({"question": "q", "choice": "c"}, 3)
    assert (claim.gold, claim.group) == (None, "row 3")


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=40),
    st.integers(2, 20),
    st.integers(0, 99),
)
def test_pools_hold_whole_groups_within_the_batch_size(groups: list[int], batch_size: int, seed: int) -> None:
    rows = [TESTBEDS["truthfulQA"].claim({**ROW, "consistency_id": g}, i) for i, g in enumerate(groups)]
    sizes = {str(g): groups.count(g) for g in groups}
    if min(sizes.values()) > batch_size:
        with pytest.raises(BadInput, match="smallest group"):
            sample_pool(rows, batch_size, np.random.default_rng(seed))
        return
    pool = sample_pool(rows, batch_size, np.random.default_rng(seed))
    taken = {claim.group for claim in pool}
    assert len(pool) == sum(sizes[g] for g in taken) <= batch_size
    assert all(sizes[g] > batch_size - len(pool) for g in sizes if g not in taken)
    assert pool == sample_pool(rows, batch_size, np.random.default_rng(seed))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 5) | st.none(),
    st.integers(0, 2**32),
)
def test_batches_are_whole_groups_that_share_no_claim(
    groups: list[int], batch_size: int, count: int | None, seed: int
) -> None:
    rows = claims("truthfulQA", *({"consistency_id": group} for group in groups))
    sizes = {str(group): groups.count(group) for group in groups}
    try:
        pools = split_pools(rows, batch_size, count, np.random.default_rng(seed))
    except BadInput:
        too_large = min(sizes.values()) > batch_size or (count is None and max(sizes.values()) > batch_size)
        fitting = sum(size <= batch_size for size in sizes.values())
        assert too_large or (count is not None and count > fitting)
        return
    taken = [claim.row for pool in pools for claim in pool]
    assert len(taken) == len(set(taken))
    assert all(0 < len(pool) <= batch_size for pool in pools)
    for pool in pools:
        for group in {claim.group for claim in pool}:
            assert sum(claim.group == group for claim in pool) == sizes[group]
    if count is None:
        assert len(taken) == len(rows)
    else:
        assert len(pools) == count


def test_batches_of_equal_groups_are_equally_large() -> None:
    rows = claims("truthfulQA", *({"consistency_id": i // 2} for i in range(100)))
    pools = split_pools(rows, 32, None, np.random.default_rng(1))
    assert [len(pool) for pool in pools] == [26, 26, 24, 24]
    [alone] = split_pools(rows, 32, 1, np.random.default_rng(1))
    assert alone == sample_pool(rows, 32, np.random.default_rng(1))
