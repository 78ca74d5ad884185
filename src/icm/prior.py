"""The share of True claims from a model's answers, without labels (`--prior auto`).

Log-odds of a pool are taken to be two normal distributions of one width, False claims below True ones, in unknown
parts; expectation maximization (Dempster, Laird and Rubin 1977) fits the parts. Log-odds are no probabilities, so
methods that correct known posteriors to a new prior (Saerens, Latinne and Decaestecker 2002) do not apply; the mixture
fits the scale along with the parts. It can only be told from one cluster where the model separates the classes: the
Bayesian information criterion (Schwarz 1978) decides whether there is an estimate at all. One cluster is a normal
distribution, or one of Student's t distributions, of which a few outliers need not be a second cluster. What is assumed
all the same is that clusters are the classes; a lopsided cluster can be taken for two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES: Final = 200
STARTS: Final = (0.03, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
"""Shares of claims below the cut that the fit starts from; the best of them is kept."""
STEPS: Final = 200
LEAST_EVIDENCE: Final = 2.0
"""Least BIC of one cluster less that of two: "positive" evidence by Kass and Raftery 1995."""
TAILS: Final = (3.0, 5.0, 8.0)
"""Degrees of freedom of the t distributions that one cluster may be."""
WIDEST: Final = 0.4
"""An interval wider than this says no more than that most claims, or few, are True."""
FEWEST: Final = 16
"""Claims below which nothing is estimated."""


@dataclass(frozen=True, slots=True)
class PriorEstimate:
    """share: of True claims, estimated; interval: 95%, percentile bootstrap over groups. evidence: BIC of one
    cluster less that of two. doubt: why the share is not used, as the end of a sentence; None where it is."""

    share: float
    interval: tuple[float, float]
    evidence: float
    claims: int
    doubt: str | None

    @property
    def prior(self) -> float | None:
        """What to calibrate to; None for the mean."""
        return None if self.doubt else self.share

    def record(self) -> dict[str, Any]:
        """For run.json."""
        numbers = {"share": self.share, "interval": list(self.interval), "evidence": self.evidence}
        return numbers | {"claims": self.claims, "doubt": self.doubt, "prior": self.prior}

    def sentence(self) -> str:
        """What was found and what is done with it, in one line."""
        low, high = self.interval
        found = f"share of True, estimated without labels: {self.share:.2f} (95% interval {low:.2f} to {high:.2f})"
        if self.doubt is None:
            return f"{found}; used as --prior {self.share:.3f}"
        return f"{found}; not used, because {self.doubt}: calibrated to the mean, as without --prior"


def read_estimate(record: object) -> PriorEstimate | None:
    """What `record` wrote; None where that is missing or damaged."""
    match record:
        case {
            "share": float(share),
            "interval": [float(low), float(high)],
            "evidence": float(evidence),
            "claims": int(claims),
            "doubt": (str() | None) as doubt,
        }:
            return PriorEstimate(share, (low, high), evidence, claims, doubt)
    return None


def estimate(scores: Sequence[float], groups: Sequence[str]) -> PriorEstimate:
    """The share of True claims among those with these scores (nats, shape [N]; any scale and offset that they share).

    groups: of each claim, drawn together by the bootstrap.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < FEWEST or float(values.std()) == 0:
        few = f"{len(values)} claims are fewer than {FEWEST}" if len(values) < FEWEST else "all answers are the same"
        return PriorEstimate(0.5, (0.0, 1.0), 0.0, len(values), few)
    once = np.ones((1, len(values)))
    fits = [_fit(values, once, *_cut(values, share)) for share in STARTS]
    best = max(fits, key=lambda fit: float(fit.likelihood[0]))
    evidence = _criterion_of_one(values) - (4 * np.log(len(values)) - 2 * float(best.likelihood[0]))
    drawn = _resamples(groups)
    means = (np.repeat(each, len(drawn)) for each in (best.share, best.low, best.high, best.variance))
    again = _fit(values, drawn, *means)
    low, high = np.quantile(again.share, [0.025, 0.975])
    doubt = None
    if evidence < LEAST_EVIDENCE:
        doubt = "the model's answers do not fall into two clusters"
    elif high - low > WIDEST:
        doubt = f"the interval is wider than {WIDEST:g}"
    share = float(np.clip(best.share[0], 0.5 / len(values), 1 - 0.5 / len(values)))
    return PriorEstimate(share, (float(low), float(high)), float(evidence), len(values), doubt)


def _criterion_of_one(values: Array) -> float:
    """The lowest BIC of one cluster: normal (two parameters), or a t distribution (three)."""
    size = len(values)
    found = [2 * np.log(size) + size * (np.log(2 * np.pi * values.var()) + 1)]
    for freedom in TAILS:
        centre, spread = float(np.median(values)), float(values.var()) / 2
        for _ in range(STEPS):
            weights = (freedom + 1) / (freedom + (values - centre) ** 2 / spread)
            centre = float(weights @ values / weights.sum())
            spread = max(float(np.mean(weights * (values - centre) ** 2)), 1e-9 * float(values.var()))
        scale = lgamma((freedom + 1) / 2) - lgamma(freedom / 2) - np.log(freedom * np.pi * spread) / 2
        tails = (freedom + 1) / 2 * np.log1p((values - centre) ** 2 / spread / freedom).sum()
        found.append(3 * np.log(size) - 2 * (size * scale - tails))
    return float(min(found))


@dataclass(frozen=True, slots=True)
class _Fit:
    """Of R weightings of the scores, each shape [R]. likelihood: log, nats. share: of the higher component."""

    likelihood: Array
    share: Array
    low: Array
    high: Array
    variance: Array


def _cut(values: Array, below: float) -> tuple[Array, Array, Array, Array]:
    """A start with the lowest `below` of the values as one component."""
    order = np.sort(values)
    at = min(max(1, round(below * len(order))), len(order) - 1)
    first, rest = order[:at], order[at:]
    within = (first.var() * len(first) + rest.var() * len(rest)) / len(order)
    start = (1 - at / len(order), first.mean(), rest.mean(), max(within, 1e-6 * order.var()))
    a, b, c, d = (np.array([value]) for value in start)
    return a, b, c, d


def _fit(values: Array, weights: Array, share: Array, low: Array, high: Array, variance: Array) -> _Fit:
    """EM of two normal distributions with one variance, for each of R weightings, shape [R, N], at once."""
    total = weights.sum(axis=1)
    least = 1e-4 * values.var()
    likelihood = np.full(len(weights), -np.inf)
    for _ in range(STEPS):
        logs = [
            np.log(part)[:, None] - (values - mean[:, None]) ** 2 / (2 * variance[:, None])
            for part, mean in ((share, high), (1 - share, low))
        ]
        both = np.logaddexp(*logs)
        found = (weights * (both - np.log(2 * np.pi * variance)[:, None] / 2)).sum(axis=1)
        of_high = weights * np.exp(logs[0] - both)
        of_low = weights - of_high
        count = np.clip(of_high.sum(axis=1), 0.25, total - 0.25)
        share, high = count / total, (of_high @ values) / count
        low = (of_low @ values) / (total - count)
        squares = of_high * (values - high[:, None]) ** 2 + of_low * (values - low[:, None]) ** 2
        variance = np.maximum(squares.sum(axis=1) / total, least)
        if np.all(found - likelihood < 1e-6):
            likelihood = found
            break
        likelihood = found
    swapped = high < low
    return _Fit(
        likelihood,
        np.where(swapped, 1 - share, share),
        np.where(swapped, high, low),
        np.where(swapped, low, high),
        variance,
    )


def _resamples(groups: Sequence[str]) -> Array:
    """How often each claim is in each of RESAMPLES draws of whole groups, shape [RESAMPLES, N]."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    found: Array = drawn[:, member].astype(np.float64)
    return found
