"""Labelings to compare: how many labels each changes, and which there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.labelings import (
    DEGREES,
    ROUNDS,
    Labeling,
    Plan,
    constant_labelings,
    corrupted,
    corrupted_gold,
    mirrored,
    random_labelings,
    whole,
)

YES_NO = ("no", "yes")
MOODS = ("negative", "neutral", "positive")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@given(st.integers(2, 5), st.integers(1, 40), st.data())
def test_a_corrupted_labeling_differs_in_exactly_as_many_claims_as_it_says(
    num_labels: int, size: int, data: st.DataObject
) -> None:
    labels = data.draw(st.lists(st.integers(0, num_labels - 1), min_size=size, max_size=size))
    count = data.draw(st.integers(0, size))
    changed = corrupted(labels, count, num_labels, rng())
    assert sum(a != b for a, b in zip(labels, changed, strict=True)) == count
    assert all(0 <= label < num_labels for label in changed if label is not None)


def test_gold_is_corrupted_by_whole_degrees_which_are_stated() -> None:
    gold = [n % 2 == 0 for n in range(32)]
    found = corrupted_gold(gold, Plan(draws=3, randoms=2, chains=2, mirrors=3), 2, rng())
    counts = [sum(a != b for a, b in zip(gold, each.labels, strict=True)) for each in found]
    # 5, 10, 15, 20, 30, 40, 50% of 32 to the nearest whole claim.
    assert counts == [n for n in (2, 3, 5, 6, 10, 13, 16) for _ in range(3)]
    assert found[0].name == "gold, 2 of 32 labels changed (5%), draw 1"
    assert len({each.labels for each in found}) == len(found)
    assert len({each.name for each in found}) == len(found)
    assert {each.kind for each in found} == {"corrupted gold"}


def test_a_small_pool_has_one_label_changed_at_least() -> None:
    found = corrupted_gold([True, False, True], Plan(1, 1, 2, 3), 2, rng())
    assert sum(a != b for a, b in zip((True, False, True), found[0].labels, strict=True)) == 1


def test_random_labelings_have_as_many_of_each_label() -> None:
    found = random_labelings(12, Plan(0, 5, 2, 3), 3, rng())
    assert len(found) == 5
    assert all(each.labels.count(label) == 4 for each in found for label in range(3))


def test_constant_labelings_are_one_for_each_label() -> None:
    assert [(each.name, each.labels) for each in constant_labelings(2, MOODS)] == [
        ("all negative", (0, 0)), ("all neutral", (1, 1)), ("all positive", (2, 2)),
    ]  # fmt: skip


def test_a_mirror_of_two_labels_flips_all() -> None:
    originals = [Labeling("gold", "gold", (True, False, True)), Labeling("same", "random", (True, False, True))]
    [found] = mirrored([*originals], 9, YES_NO, rng())
    assert found == Labeling("mirror of gold", "mirrored", (False, True, False), "gold")


def test_a_mirror_of_three_labels_swaps_two_that_are_there() -> None:
    for seed in range(10):
        [found] = mirrored([Labeling("a", "random", (0, 0, 2))], 1, MOODS, np.random.default_rng(seed))
        assert found.labels in {(1, 1, 2), (2, 2, 0), (0, 0, 1)}
        assert found.of == "a"
        assert found.name in {f"{swap} swapped of a" for swap in (
            "negative and neutral", "negative and positive", "neutral and positive")}  # fmt: skip


def test_no_more_mirrors_than_asked_for() -> None:
    originals = random_labelings(8, Plan(0, 20, 2, 3), 2, rng())
    assert len(mirrored(originals, 4, YES_NO, rng())) == 4


@pytest.mark.parametrize("gold", [True, False])
@pytest.mark.parametrize("labelings", [30, 60, 100, 250])
def test_a_plan_has_about_as_many_labelings_as_asked_for(labelings: int, gold: bool) -> None:
    plan = Plan.of(labelings, gold=gold)
    assert plan.most(2, gold=gold, found=0) == pytest.approx(labelings, rel=0.1, abs=5)
    assert plan.randoms >= plan.chains - 1 >= 1
    assert bool(plan.draws) == gold
    assert plan.most(3, gold=gold, found=2) == plan.most(2, gold=gold, found=0) + 3
    assert ROUNDS * plan.chains + len(DEGREES) * plan.draws < labelings + 5


def test_gold_is_a_labeling_where_all_of_it_is_known() -> None:
    assert whole((True, False)) == (True, False)
    assert whole((True, None)) is None
