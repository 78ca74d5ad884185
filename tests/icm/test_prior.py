"""The estimated share of True: on clusters that are known, on answers without any, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from src.icm.prior import FEWEST, PriorEstimate, estimate, read_estimate


def two_clusters(trues: int, falses: int, *, apart: float, seed: int = 0) -> list[float]:
    """Log-odds of which those of True claims are `apart` standard deviations higher."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(apart, 1, trues), rng.normal(0, 1, falses)])
    return rng.permutation(values).tolist()


def rows(count: int) -> list[str]:
    return [f"row {at}" for at in range(count)]


@pytest.mark.parametrize("trues", [4, 13, 32, 51, 60])
def test_well_separated_clusters_give_their_share(trues: int) -> None:
    found = estimate(two_clusters(trues, 64 - trues, apart=7.0), rows(64))
    assert found.prior == pytest.approx(trues / 64, abs=0.01)
    assert found.interval[0] <= trues / 64 <= found.interval[1]
    assert 0 < found.interval[1] - found.interval[0] < 0.4


def test_scale_and_offset_do_not_count_and_mirrored_answers_mirror_the_share() -> None:
    scores = two_clusters(51, 13, apart=6.0)
    found = estimate(scores, rows(64))
    moved = estimate([3 * value - 20 for value in scores], rows(64))
    assert moved.share == pytest.approx(found.share, abs=1e-3)
    turned = estimate([-value for value in scores], rows(64))
    assert turned.share == pytest.approx(1 - found.share, abs=1e-3)


def test_it_is_the_same_every_time() -> None:
    scores = two_clusters(51, 13, apart=4.0)
    assert estimate(scores, rows(64)) == estimate(scores, rows(64))


def test_one_cluster_gives_no_share_in_nearly_all_samples() -> None:
    found = [estimate(two_clusters(64, 0, apart=0.0, seed=seed), rows(64)) for seed in range(20)]
    used = [each for each in found if each.prior is not None]
    assert len(used) <= 2, [each.sentence() for each in used]
    assert any("do not fall into two clusters" in (each.doubt or "") for each in found)
    assert all("not used, because" in each.sentence() for each in found if each.prior is None)


def test_a_few_outliers_are_no_second_cluster() -> None:
    drawn = [np.random.default_rng(seed).standard_t(3, size=64).tolist() for seed in range(20)]
    used = [found for scores in drawn if (found := estimate(scores, rows(64))).prior is not None]
    assert len(used) <= 2, [each.sentence() for each in used]


def test_groups_widen_the_interval_where_their_claims_are_alike() -> None:
    scores = np.repeat(two_clusters(12, 4, apart=8.0), 4).tolist()
    alone = estimate(scores, rows(64))
    together = estimate(scores, [f"group {at // 4}" for at in range(64)])
    assert together.interval[1] - together.interval[0] > alone.interval[1] - alone.interval[0]


def test_few_or_equal_answers_give_no_share() -> None:
    few = estimate(two_clusters(10, FEWEST - 11, apart=9.0), rows(FEWEST - 1))
    assert few.prior is None
    assert "fewer than" in few.sentence()
    same = estimate([1.5] * 40, rows(40))
    assert same.prior is None
    assert "all answers are the same" in same.sentence()


def test_a_record_is_read_as_it_was_written() -> None:
    for found in (estimate(two_clusters(51, 13, apart=6.0), rows(64)), PriorEstimate(0.5, (0.0, 1.0), 0.0, 9, "why")):
        assert read_estimate(found.record()) == found
        assert found.record()["prior"] == found.prior
    assert read_estimate(None) is None
    assert read_estimate({"share": "0.5"}) is None
