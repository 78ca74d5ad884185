"""At most C demonstrations a question, balanced, and the same search when it is resumed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.engines.vllm_group import server_for
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


@given(st.integers(2, 5), st.integers(0, 2**32))
def test_every_server_is_asked_about_its_part_of_a_capped_pool(servers: int, seed: int) -> None:
    labels = (np.random.default_rng(seed).random(256) < 0.5).tolist()
    laid_out = layout(256, 16, labels)
    places = [laid_out.place(claim) for claim in laid_out.questions]
    assert all(0 <= place < 1 for place in places)
    asked = Counter(server_for(place, servers, range(servers)) for place in places)
    assert max(asked.values()) <= 1.1 * 256 / servers
    assert min(asked.values()) >= 0.9 * 256 / servers


@given(st.integers(4, 30), st.integers(2, 8))
def test_a_claims_place_stays_as_others_are_appended(size: int, cap: int) -> None:
    groups = [str(claim) for claim in range(size)]
    laid_out = CappedLayout.build(range(size // 2), None, groups, np.random.default_rng(1), cap=cap)
    for claim in range(size // 2, size):
        before = {other: laid_out.place(other) for other in laid_out.questions}
        laid_out = laid_out.append(claim)
        assert {other: laid_out.place(other) for other in before} == before
