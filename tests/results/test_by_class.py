"""Balanced accuracy and F1: by hand, against their definitions on random tables, and how often the intervals hold."""

from __future__ import annotations

import numpy as np
import pytest

from src.icm.label_names import confusion
from src.icm.objective import wilson_interval
from src.results.by_class import NOTHING, by_class, by_class_of, measure_text, name_of_f1, over_seeds


def test_by_hand_of_skewed_labels() -> None:
    found = by_class([[2, 1], [4, 13]])  # gold in rows: of 3 False 2 are found, of 17 True 13
    assert found.balanced is not None
    assert found.f1 is not None
    assert found.balanced.value == pytest.approx((2 / 3 + 13 / 17) / 2)
    assert found.f1.value == pytest.approx(2 * 13 / (2 * 13 + 1 + 4))
    joint = wilson_interval(13, 18)
    assert found.f1.interval == pytest.approx(tuple(2 * share / (1 + share) for share in joint))
    low, high = found.balanced.interval
    assert 0 < low < found.balanced.value < high < 1


def test_one_label_for_all_is_chance_by_class_and_not_by_accuracy() -> None:
    found = by_class_of([(True, True)] * 95 + [(True, False)] * 5, 2)
    assert found.balanced is not None
    assert found.f1 is not None
    assert found.balanced.value == 0.5
    assert found.f1.value == pytest.approx(190 / 195)


def test_what_cannot_be_known_is_none() -> None:
    assert by_class([[0, 0], [0, 0]]) == NOTHING
    assert by_class([[0, 0], [2, 8]]).balanced is None  # gold has one class
    assert by_class([[10, 0], [0, 0]]).f1 is None  # no True anywhere
    assert over_seeds([], 0) == NOTHING
    assert over_seeds([[[0, 0], [0, 0]]], 0) == NOTHING
    assert measure_text(None) == "–"


def test_macro_over_more_than_two_labels_leaves_out_labels_that_do_not_occur() -> None:
    rng = np.random.default_rng(3)
    gold, said = rng.integers(3, size=200), rng.integers(3, size=200)
    found = by_class(confusion(zip(said.tolist(), gold.tolist(), strict=True), 4))
    assert found.balanced is not None
    assert found.f1 is not None
    recalls = [np.mean(said[gold == k] == k) for k in range(3)]
    f1 = [2 * np.sum((said == k) & (gold == k)) / (np.sum(said == k) + np.sum(gold == k)) for k in range(3)]
    assert found.balanced.value == pytest.approx(np.mean(recalls))
    assert found.f1.value == pytest.approx(np.mean(f1))
    assert name_of_f1(["a", "b", "c"]) == "macro F1"
    assert name_of_f1(["False", "True"]) == "F1 of True"


def test_seeds_are_averaged_and_intervals_count_distinct_claims() -> None:
    one, other = [[3, 1], [2, 14]], [[1, 3], [0, 16]]
    found, single = over_seeds([one, other], 20), over_seeds([one, one], 20)
    assert found.balanced is not None
    assert single.balanced is not None
    assert found.balanced.value == pytest.approx(((3 / 4 + 14 / 16) / 2 + (1 / 4 + 1) / 2) / 2)
    assert single == by_class(one)  # the same claims twice say no more than once


@pytest.mark.parametrize("size", [(6, 58), (32, 32)])
def test_intervals_hold_in_about_95_of_100_samples(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    recall, inside, trials = (0.7, 0.85), [0, 0], 2000
    for _ in range(trials):
        false, true = (int(rng.binomial(n, r)) for n, r in zip(size, recall, strict=True))
        found = by_class([[false, size[0] - false], [size[1] - true, true]])
        expected = size[1] * recall[1] / (size[1] + size[0] * (1 - recall[0]))  # TP / (TP + FP + FN)
        truth = sum(recall) / 2, 2 * expected / (1 + expected)
        for at, measure in enumerate((found.balanced, found.f1)):
            assert measure is not None
            inside[at] += measure.interval[0] <= truth[at] <= measure.interval[1]
    assert all(count / trials >= 0.93 for count in inside), inside
