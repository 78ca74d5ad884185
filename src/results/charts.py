"""Charts as geometry: numbers in, coordinates of an SVG out. What they look like is the template's and the style's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from src.icm.consistency import Label
from src.icm.objective import wilson_interval
from src.results.curves import Curves
from src.results.run_record import LabelledClaim, RunRecord, probability
from src.results.text import visible

WIDTH, HEIGHT = 380.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 12.0, 34.0
MOST_POINTS = 600  # a line; more cannot be told apart at this width
BINS = 10  # of the calibration plot and the histogram


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: where, in the SVG's units, and what it says."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A series as the `d` of a path. series: number of its colour."""

    name: str
    series: int
    path: str


@dataclass(frozen=True, slots=True)
class Dot:
    """A point with an interval; low and high are y coordinates. told: what a reader hears or sees when pointing."""

    x: float
    y: float
    low: float
    high: float
    radius: float
    series: int
    told: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle of a histogram."""

    x: float
    y: float
    width: float
    height: float
    series: int
    told: str


@dataclass(frozen=True)
class Chart:
    """One figure. description: what it shows, for those who cannot see it."""

    title: str
    description: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    legend: list[tuple[str, int]] = field(default_factory=list)
    diagonal: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to SVG units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return round(self.start + (value - self.low) / span * (self.end - self.start), 2) if span else self.start


Values = Sequence[float | None]


def curve_charts(runs: Sequence[tuple[str, Curves]], balance: str = "share of True labels") -> list[Chart]:
    """The curves of one run, or of several in the same panels. balance: see label_names.balance_of."""

    def several(pick: str) -> list[tuple[str, Sequence[int], Values]]:
        return [(name, curves.iteration, getattr(curves, pick)) for name, curves in runs]

    marks = runs[0][1].rebuilds if len(runs) == 1 else []
    charts = [
        line_chart("U(D)", several("utility"), "units of U", marks=marks),
        line_chart("Agreement with gold", several("accuracy"), "share of labels", limits=(0, 1)),
        line_chart("Temperature", several("temperature"), "units of U", floor=0),
        line_chart("Acceptance", several("acceptance"), "share of the last 50 iterations", limits=(0, 1)),
        line_chart("Label balance", several("balance"), balance, limits=(0, 1)),
        line_chart("Labelled claims", several("labelled"), "claims", floor=0),
        line_chart("Inconsistent pairs", several("inconsistent"), "pairs", floor=0),
        line_chart("Prefix cache hit rate", several("hit_rate"), "share of prompt tokens", limits=(0, 1)),
        line_chart("Seconds a step", several("seconds"), "s, mean of 10", floor=0),
    ]
    return [chart for chart in charts if chart is not None]


def line_chart(
    title: str,
    series: Sequence[tuple[str, Sequence[int], Values]],
    unit: str,
    *,
    limits: tuple[float, float] | None = None,
    floor: float | None = None,
    marks: Sequence[int] = (),
) -> Chart | None:
    """A chart over iterations; None where no series has a value."""
    known = [value for _, _, values in series for value in values if value is not None]
    if not known:
        return None
    low, high = limits or (min(known) if floor is None else min(floor, *known), max(known))
    if low == high:  # a flat line stands in the middle, or on its floor
        low, high = (low, high + 1) if floor is not None else (low - 1, high + 1)
    x_ticks, y_ticks = ticks(0, max(max(xs) for _, xs, _ in series), 5), ticks(low, high, 5)
    x = Scale(0, max(x_ticks[-1], *(max(xs) for _, xs, _ in series), 1), LEFT, WIDTH - RIGHT)
    y = Scale(min(low, y_ticks[0]), max(high, y_ticks[-1]), HEIGHT - BOTTOM, TOP)
    digits = _digits(y_ticks)
    told = []
    for name, _, values in series:
        present = [value for value in values if value is not None]
        if present:
            told.append(
                f"{name}: from {present[0]:.{digits + 1}f} to {present[-1]:.{digits + 1}f}, "
                f"lowest {min(present):.{digits + 1}f}, highest {max(present):.{digits + 1}f}"
            )
    return Chart(
        title=title,
        description=f"{title} ({unit}) over iterations. " + "; ".join(told),
        x_label="iteration",
        x_ticks=[Tick(x(value), f"{value:g}") for value in x_ticks],
        y_ticks=[Tick(y(value), f"{value:.{digits}f}") for value in y_ticks],
        lines=[Line(name, n % 8, _path(xs, values, x, y)) for n, (name, xs, values) in enumerate(series)],
        marks=[x(iteration) for iteration in marks],
        legend=[(name, n % 8) for n, (name, _, _) in enumerate(series)] if len(series) > 1 else [],
        note=unit,
    )


def calibration_chart(run: RunRecord) -> Chart | None:
    """How often claims that were given a probability of True are True by gold; None without gold labels, and of more
    than two labels.

    Final log-odds against what they are compared with (the pool's mean where calibrated); zero-shot ones as they are.
    """
    final = [
        (probability(claim.odds - run.shift), bool(claim.gold))
        for claim in run.claims
        if claim.odds is not None and claim.gold is not None
    ]
    alone = [
        (probability(claim.odds_alone), bool(claim.gold))
        for claim in run.claims
        if claim.odds_alone is not None and claim.gold is not None
    ]
    if not final or run.num_labels > 2:
        return None
    yes = visible(run.names[1])
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    dots, legend, told = [], [], []
    for number, (name, pairs) in enumerate((("final", final), ("zero-shot", alone))):
        if not pairs:
            continue
        found = _calibration_dots(name, yes, pairs, number, x, y)
        dots += found
        legend.append((name, number))
        told.append(f"{calibration_error(pairs):.3f} {name} ({len(pairs)} claims)")
    at = ticks(0, 1, 5)
    return Chart(
        title="Calibration",
        description=f"Share of claims that are {yes} by gold over the probability of {yes} that they were given. "
        "Expected calibration error: " + "; ".join(told),
        x_label=f"predicted probability of {yes}",
        x_ticks=[Tick(x(value), f"{value:g}") for value in at],
        y_ticks=[Tick(y(value), f"{value:.1f}") for value in at],
        dots=dots,
        legend=legend,
        diagonal=f"M{x(0)} {y(0)}L{x(1)} {y(1)}",
        note=f"share {yes} by gold; error " + ", ".join(told),
    )


def calibration_error(pairs: Sequence[tuple[float, bool]]) -> float:
    """Expected calibration error over BINS bins of equal width: mean distance of share and probability, by claims."""
    error = 0.0
    for found in _binned(pairs):
        share = sum(gold for _, gold in found) / len(found)
        mean = sum(value for value, _ in found) / len(found)
        error += abs(share - mean) * len(found)
    return error / len(pairs)


def margin_chart(run: RunRecord) -> Chart | None:
    """How log-odds are spread, by gold label where that is known, else by the label that was given.

    None of more than two labels.
    """
    claims = [claim for claim in run.claims if claim.odds is not None]
    if not claims or run.num_labels > 2:
        return None
    by_gold = any(claim.gold is not None for claim in claims)

    def side(claim: LabelledClaim) -> Label:
        return claim.gold if by_gold else claim.label

    values = [(claim.odds or 0.0) - run.shift for claim in claims]
    reach = max(max(abs(value) for value in values), 0.5)
    bins = 2 * BINS
    x = Scale(-reach, reach, LEFT, WIDTH - RIGHT)
    counts: dict[int, list[int]] = {True: [0] * bins, False: [0] * bins}
    for claim, value in zip(claims, values, strict=True):
        one = side(claim)
        if one is not None:
            counts[one][min(bins - 1, int((value + reach) / (2 * reach) * bins))] += 1
    most = max(max(counts[True]), max(counts[False]), 1)
    at = ticks(0, most, 4)
    y = Scale(0, max(most, at[-1]), HEIGHT - BOTTOM, TOP)
    bars = []
    step = 2 * reach / bins
    for number, one in enumerate((True, False)):
        for index, count in enumerate(counts[one]):
            if count:
                left, right = x(-reach + index * step), x(-reach + (index + 1) * step)
                half = (right - left) / 2
                begin = -reach + index * step
                told = f"{count} {visible(run.names[one])} claims between {begin:.2f} and {begin + step:.2f} nat"
                bars.append(
                    Bar(
                        round(left + number * half, 2),
                        y(count),
                        round(half - 0.6, 2),
                        round(y(0) - y(count), 2),
                        number,
                        told,
                    )
                )
    basis = "gold" if by_gold else "label"
    no, yes = map(visible, run.names)
    return Chart(
        title="Log-odds",
        description=f"Histogram of the final log-odds, by {basis}: {sum(counts[True])} {yes} and {sum(counts[False])} "
        f"{no} claims.",
        x_label="nat" + (f", against {run.offset_told}" if run.shift else ""),
        x_ticks=[Tick(x(value), f"{value:g}") for value in ticks(-reach, reach, 6) if abs(value) <= reach],
        y_ticks=[Tick(y(value), f"{value:g}") for value in at],
        bars=bars,
        legend=[(f"{yes} ({basis})", 0), (f"{no} ({basis})", 1)],
        note="claims",
    )


def contrast_chart(run: RunRecord) -> Chart | None:
    """Zero-shot against final log-odds, claim by claim, by the label given.

    None where zero-shot was not recorded, and of more than two labels.
    """
    claims = [c for c in run.claims if c.odds is not None and c.odds_alone is not None and c.label is not None]
    if not claims or run.num_labels > 2:
        return None
    claims = claims[:: math.ceil(len(claims) / MOST_POINTS)]
    no, yes = map(visible, run.names)
    across, up = [c.odds_alone or 0.0 for c in claims], [c.odds or 0.0 for c in claims]
    x_ticks, y_ticks = _padded(across), _padded(up)
    x, y = Scale(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT), Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    dots = []
    for claim, alone, final in zip(claims, across, up, strict=True):
        told = f"row {claim.row}, {visible(run.name_of(claim.label))}: {alone:.2f} alone, {final:.2f} with the others"
        dots.append(Dot(x(alone), y(final), y(final), y(final), 2.6, 0 if claim.label else 1, told))
    return Chart(
        title="Alone and in context",
        description=f"Final over zero-shot log-odds of {len(claims)} claims. The labels follow what the model says "
        f"alone as far as the {yes} ones lie to the right.",
        x_label="zero-shot log-odds, nat",
        x_ticks=[Tick(x(value), f"{value:g}") for value in x_ticks],
        y_ticks=[Tick(y(value), f"{value:g}") for value in y_ticks],
        dots=dots,
        legend=[(f"labelled {yes}", 0), (f"labelled {no}", 1)],
        note="final log-odds, nat",
    )


def _padded(values: Sequence[float]) -> list[float]:
    """Ticks that have every value between the first and the last."""
    found = ticks(min(values), max(values), 5)
    step = found[1] - found[0] if len(found) > 1 else max(1.0, abs(found[0]))
    while found[0] > min(values):
        found.insert(0, round(found[0] - step, 12))
    while found[-1] < max(values) or len(found) < 2:
        found.append(round(found[-1] + step, 12))
    return found


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values that cover low to high: about that many, at steps of 1, 2 or 5 times a power of ten.

    A span too small for steps that can be told apart counts as one value.
    """
    span = high - low
    if span <= 1e-9 * max(1.0, abs(low), abs(high)):
        return [low]
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)] or [low]


def _calibration_dots(
    name: str, yes: str, pairs: Sequence[tuple[float, bool]], series: int, x: Scale, y: Scale
) -> list[Dot]:
    dots = []
    for found in _binned(pairs):
        trues, mean = sum(gold for _, gold in found), sum(value for value, _ in found) / len(found)
        low, high = wilson_interval(trues, len(found))
        told = f"{name}, P {mean:.2f}: {trues} of {len(found)} are {yes} (95% interval {low:.2f} to {high:.2f})"
        radius = round(2.5 + 4 * math.sqrt(len(found) / len(pairs)), 2)
        dots.append(Dot(x(mean), y(trues / len(found)), y(low), y(high), radius, series, told))
    return dots


def _binned(pairs: Sequence[tuple[float, bool]]) -> list[list[tuple[float, bool]]]:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for value, gold in pairs:
        bins[min(BINS - 1, int(value * BINS))].append((value, gold))
    return [found for found in bins if found]


def _path(xs: Sequence[int], values: Values, x: Scale, y: Scale) -> str:
    """Straight pieces between known values; a gap where a value is missing beside others."""
    points = [(at, value) for at, value in zip(xs, values, strict=True) if value is not None]
    points = _thinned(points)
    pieces = [f"{'M' if n == 0 else 'L'}{x(at):g} {y(value):g}" for n, (at, value) in enumerate(points)]
    return "".join(pieces)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about MOST_POINTS of them: of every stretch its first, lowest, highest and last point."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) * 4 / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = (min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1]))
        kept += sorted({stretch[0], *extremes, stretch[-1]})
    return kept


def _digits(values: Sequence[float]) -> int:
    step = min((abs(b - a) for a, b in pairwise(values)), default=1.0)
    return max(0, min(4, -math.floor(math.log10(step)))) if step else 0
