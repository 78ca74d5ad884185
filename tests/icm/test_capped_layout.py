"""At most C demonstrations a question, balanced, and the same search when it is resumed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from src.icm.capped_layout import CappedLayout, balanced_sample


def layout(size: int, cap: int, labels: list[bool] | None = None, group: int = 2) -> CappedLayout:
    groups = [str(i // group) for i in range(size)]
    return CappedLayout.build(range(size), labels, groups, np.random.default_rng(1), cap=cap)


@given(st.integers(1, 40), st.integers(2, 20), st.integers(0, 2**32))
def test_no_question_sees_more_than_the_cap_or_itself(size: int, cap: int, seed: int) -> None:
    labels = (np.random.default_rng(seed).random(size) < 0.3).tolist()
    laid_out = layout(size, cap, labels)
    assert sorted(laid_out.questions) == list(range(size))
    assert len(laid_out.demonstrations) == min(cap, size)
    for claim in range(size):
        context = laid_out.context(claim)
        assert len(context) == len(set(context)) <= cap
        assert claim not in context


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 20))
def test_a_sample_has_as_many_of_each_label_as_it_can(labels: list[bool], count: int) -> None:
    sample = balanced_sample(range(len(labels)), labels, count, np.random.default_rng(0))
    counts = Counter(labels[claim] for claim in sample)
    there = Counter(labels)
    assert len(sample) == len(set(sample)) == min(count, len(labels))
    rarer = min((True, False), key=lambda label: there[label])
    assert counts[rarer] >= min(there[rarer], count // 2)


def test_new_claims_are_shown_until_the_sample_is_full() -> None:
    grown = layout(4, 6, [True, False] * 2)
    grown = CappedLayout.build([0, 1], None, ["a", "b", "c", "d", "e"], np.random.default_rng(1), cap=3)
    for claim in (2, 3, 4):
        grown = grown.append(claim)
    assert set(grown.demonstrations) == {0, 1, 2}
    assert sorted(grown.questions) == [0, 1, 2, 3, 4]
    assert grown.built_with == 2
    assert grown.questions[-len(grown.tail) :] == grown.tail
