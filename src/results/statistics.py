"""How sure a comparison is: intervals over distinct claims, exact McNemar, a paired bootstrap over groups; and how two
measures order the same things.

A claim that is tested under several seeds is one claim: intervals count distinct claims, and the bootstrap draws whole
groups (a question with all its answers, under all seeds), because their errors are correlated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import fmean, stdev
from typing import Final

import numpy as np
import numpy.typing as npt

from src.icm.objective import wilson_interval

RESAMPLES: Final = 10_000
RANK_RESAMPLES: Final = 2_000
FEWEST_PAIRS: Final = 10
Key = tuple[int, int]  # seed, claim


@dataclass(frozen=True, slots=True)
class Judged:
    """Whether one claim's label under one seed agrees with gold. group: claims of a group are resampled together."""

    seed: int
    claim: int
    group: str
    right: bool


@dataclass(frozen=True, slots=True)
class Share:
    """How often a row is right: mean and standard deviation (None for one seed) of the seeds' shares.

    interval: Wilson's 95% for the mean share, on the number of distinct `claims`. It does not cover the choice of
    seeds, whose effect is `deviation`.
    """

    by_seed: dict[int, tuple[int, int]]
    mean: float
    deviation: float | None
    claims: int
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class McNemar:
    """Claims that only one of two rows labels rightly, and the two-sided p of so uneven a split."""

    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True, slots=True)
class Difference:
    """First row's share right minus the second's on the same claims: mean, bootstrapped 95% interval and p."""

    mean: float
    interval: tuple[float, float]
    p: float
    mcnemar: dict[int, McNemar]


def share_right(judged: Sequence[Judged]) -> Share | None:
    """The Share of one row; None where nothing was compared."""
    if not judged:
        return None
    seeds: dict[int, list[bool]] = defaultdict(list)
    for each in judged:
        seeds[each.seed].append(each.right)
    by_seed = {seed: (sum(rights), len(rights)) for seed, rights in sorted(seeds.items())}
    shares = [right / compared for right, compared in by_seed.values()]
    claims = len({each.claim for each in judged})
    mean = fmean(shares)
    return Share(
        by_seed, mean, stdev(shares) if len(shares) > 1 else None, claims, wilson_interval(mean * claims, claims)
    )


def mcnemar_exact(only_first: int, only_second: int) -> McNemar:
    """McNemar's test with the exact binomial: of n discordant pairs, each falls to either side with chance 1/2."""
    discordant = only_first + only_second
    tail = sum(comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**discordant))


def paired_difference(first: Sequence[Judged], second: Sequence[Judged], seed: int = 0) -> Difference | None:
    """`first` against `second` on the claims and seeds that both have; None where there are none.

    The bootstrap (Efron and Tibshirani 1993) draws groups with replacement, RESAMPLES times, percentile interval; p is
    twice the share of resamples on the other side of no difference, and at least 1 / RESAMPLES. seed: of the draws.
    """
    others: Mapping[Key, Judged] = {(each.seed, each.claim): each for each in second}
    pairs = [(each, others[each.seed, each.claim]) for each in first if (each.seed, each.claim) in others]
    if not pairs:
        return None
    gains: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    split: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for one, other in pairs:
        gains[one.group] += one.right - other.right
        counts[one.group] += 1
        split[one.seed][0] += one.right and not other.right
        split[one.seed][1] += other.right and not one.right
    gain, count = np.array(list(gains.values())), np.array([counts[group] for group in gains])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(gain), np.full(len(gain), 1 / len(gain)), size=RESAMPLES)
    means = (drawn @ gain) / (drawn @ count)
    low, high = np.quantile(means, [0.025, 0.975])
    p = 2 * min(float((means <= 0).mean()), float((means >= 0).mean()))
    return Difference(
        float(gain.sum() / count.sum()),
        (float(low), float(high)),
        min(1.0, max(p, 1 / RESAMPLES)),
        {seed: mcnemar_exact(*both) for seed, both in sorted(split.items())},
    )


def ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """The rank of each value, from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return found


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks; None where one of the two does not vary."""
    a, b = (found - found.mean() for found in (ranks(first), ranks(second)))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 0 else None


def rank_correlation_interval(
    first: Sequence[float], second: Sequence[float], seed: int = 0
) -> tuple[float, float] | None:
    """95% percentile interval of rank_correlation over RANK_RESAMPLES draws of the pairs with replacement; None where
    the correlation is, or where fewer than FEWEST_PAIRS were compared, of which draws say little. seed: of the
    draws."""
    if len(first) < FEWEST_PAIRS:
        return None
    x, y, rng = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64), np.random.default_rng(seed)
    draws = rng.integers(len(x), size=(RANK_RESAMPLES, len(x)))
    found = [value for drawn in draws if (value := rank_correlation(x[drawn], y[drawn])) is not None]
    if rank_correlation(first, second) is None or not found:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
