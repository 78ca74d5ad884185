"""Intervals and tests against values worked out by other means."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.icm.objective import wilson_interval
from src.results.statistics import (
    RESAMPLES,
    Judged,
    mcnemar_exact,
    paired_difference,
    rank_correlation,
    rank_correlation_interval,
    ranks,
    share_right,
)


def judged(seed: int, rights: list[bool], groups: int | None = None) -> list[Judged]:
    return [Judged(seed, claim, f"g{claim // 2 if groups else claim}", right) for claim, right in enumerate(rights)]


def test_the_interval_counts_distinct_claims_not_seeds() -> None:
    once = share_right(judged(1, [True, True, False, True]))
    twice = share_right([*judged(1, [True, True, False, True]), *judged(2, [True, True, False, True])])
    assert once is not None
    assert twice is not None
    assert once.interval == twice.interval == wilson_interval(3, 4)
    assert twice.by_seed == {1: (3, 4), 2: (3, 4)}
    assert (once.deviation, twice.deviation) == (None, 0.0)
    assert share_right([]) is None


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (5, 5, 1.0)])
def test_mcnemar_is_the_exact_binomial(b: int, c: int, p: float) -> None:
    assert mcnemar_exact(b, c).p == pytest.approx(p)
    assert mcnemar_exact(c, b).p == pytest.approx(p)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_counts_the_splits_that_are_as_rare(first: int, second: int) -> None:
    total = first + second
    as_rare = [k for k in range(total + 1) if comb(total, k) <= comb(total, first)]
    assert mcnemar_exact(first, second).p == pytest.approx(sum(comb(total, k) for k in as_rare) / 2**total)


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_counts_the_splits_at_least_as_uneven(b: int, c: int) -> None:
    outcomes = [sum(sides) for sides in product((0, 1), repeat=b + c)]
    expected = sum(abs(2 * k - b - c) >= abs(b - c) for k in outcomes) / len(outcomes)
    assert mcnemar_exact(b, c).p == pytest.approx(expected)


def test_a_clear_difference_is_told_from_none() -> None:
    better = paired_difference(judged(1, [True] * 40), judged(1, [True, False] * 20))
    assert better is not None
    assert better.mean == 0.5
    assert better.interval[0] > 0.3
    assert better.p == 1 / RESAMPLES
    assert (better.mcnemar[1].only_first, better.mcnemar[1].only_second) == (20, 0)
    same = paired_difference(judged(1, [True, False] * 20), judged(1, [False, True] * 20))
    assert same is not None
    assert same.mean == 0
    assert same.interval[0] < 0 < same.interval[1]
    assert same.p > 0.5


def test_only_what_both_rows_judged_is_compared() -> None:
    one = paired_difference(judged(1, [True, True, False]), judged(1, [False]))
    assert one is not None
    assert one.mean == 1
    assert paired_difference(judged(1, [True]), judged(2, [True])) is None


def test_claims_of_a_group_are_drawn_together() -> None:
    first, second = [True, True, False, False] * 10, [False, False, True, True] * 10
    alone = paired_difference(judged(1, first), judged(1, second))
    grouped = paired_difference(judged(1, first, groups=2), judged(1, second, groups=2))
    assert alone is not None
    assert grouped is not None
    width = [high - low for low, high in (alone.interval, grouped.interval)]
    assert width[1] > 1.2 * width[0]


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert ranks([30.0, 10.0, 20.0, 20.0, 20.0]).tolist() == [5, 1, 3, 3, 3]


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: differences 1, 1, 1, 1, 0; 1 - 6 * 4 / (5 * 24) = 0.8.
    assert rank_correlation([1, 10, 100, 1000, 10_000], [0.2, 0.1, 0.4, 0.3, 0.5]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [9, 5, 1]) == pytest.approx(-1.0)
    # With ties: ranks 1.5 1.5 3 against 1 2 3: covariance 1.5, variances 1.5 and 2.
    assert rank_correlation([0, 0, 7], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


def test_no_rank_correlation_where_one_does_not_vary() -> None:
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert rank_correlation_interval([1, 1, 1], [1, 2, 3]) is None


def test_the_interval_of_a_rank_correlation_holds_it_and_narrows_with_more_pairs() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    widths = []
    for size in (25, 400):
        low, high = rank_correlation_interval(x[:size].tolist(), y[:size].tolist()) or (0.0, 0.0)
        assert low < (rank_correlation(x[:size].tolist(), y[:size].tolist()) or 0.0) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
