"""Charts of runs, drawn with matplotlib, each with a description in words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from src.icm.objective import wilson_interval
from src.results.curves import Curves
from src.results.doubt import KNOWN, coverage_of
from src.results.plots import FEW_POINTS
from src.results.run_record import RunRecord, probability
from src.results.style import FAINT, INK, SERIES, page_svg, panel
from src.results.text import one_line, visible

MOST_POINTS: Final = 600  # of a line; more cannot be seen at this width
BINS: Final = 10  # of the calibration plot; the histogram has twice as many
LONGEST_LABEL: Final = 34  # characters along an axis
STEPS: Final = (1, 2, 5, 10)  # of ticks, times a power of ten


@dataclass(frozen=True, slots=True)
class Point:
    """One dot of a scatter plot. title: shown by a page when the mouse is over it."""

    x: float
    y: float
    title: str = ""


Points = Mapping[str, Sequence[Point]]
Values = Sequence[float | None]
Series = tuple[str, Sequence[int], Values]
"""Its name, iterations, and a value at each."""


@dataclass(frozen=True)
class Chart:
    """One figure. description: what it shows, for those who cannot see it. legend: (name, number of its colour).

    titles: by gid of an artist, a text for each shape that it draws. note: a line below the figure.
    """

    title: str
    description: str
    figure: Figure
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""
    titles: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def svg(self, prefix: str) -> str:
        """As an element of a page (see page_svg) in which no other id begins with `prefix`."""
        return page_svg(self.figure, prefix, self.description, self.titles)


def curve_charts(runs: Sequence[tuple[str, Curves]], balance: str = "share of True labels") -> list[Chart]:
    """The curves of one run, or of several in the same panels. balance: see label_names.balance_of."""

    def several(pick: str) -> list[Series]:
        return [(name, curves.iteration, getattr(curves, pick)) for name, curves in runs]

    marks = runs[0][1].rebuilds if len(runs) == 1 else []
    charts = [
        line_chart("U(D)", several("utility"), "units of U", marks=marks),
        line_chart("Agreement with gold", several("accuracy"), "share of labels", limits=(0, 1)),
        line_chart("Temperature", several("temperature"), "units of U", floor=0),
        line_chart("Acceptance", several("acceptance"), "share of the last 50", limits=(0, 1)),
        line_chart("Label balance", several("balance"), balance, limits=(0, 1)),
        line_chart("Labelled claims", several("labelled"), "claims", floor=0),
        line_chart("Inconsistent pairs", several("inconsistent"), "pairs", floor=0),
        line_chart("Prefix cache hit rate", several("hit_rate"), "share of prompt tokens", limits=(0, 1)),
        line_chart("Seconds a step", several("seconds"), "s, mean of 10", floor=0),
    ]
    return [chart for chart in charts if chart is not None]


def line_chart(
    title: str,
    series: Sequence[Series],
    unit: str,
    *,
    limits: tuple[float, float] | None = None,
    floor: float | None = None,
    marks: Sequence[int] = (),
) -> Chart | None:
    """A chart over iterations; None where no series has a value. marks: iterations that get a dotted line."""
    lines = [(name, [(at, value) for at, value in zip(xs, values, strict=True) if value is not None])
             for name, xs, values in series]  # fmt: skip
    known = [value for _, points in lines for _, value in points]
    if not known:
        return None
    low, high = limits or (min(known) if floor is None else min(floor, *known), max(known))
    figure, axes = _panel("iteration", unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=STEPS))
    axes.set_xlim(0, max(1, *(max(xs) for _, xs, _ in series)))
    _set_y_limits(axes, low, high, lifted=floor is not None)
    if marks:
        axes.vlines(marks, 0, 1, transform=axes.get_xaxis_transform(), color=FAINT, linewidth=1, linestyle=":")
    for number, (name, points) in enumerate(lines):
        thinned = _thinned(points)
        marker = "." if len(points) < FEW_POINTS else ""
        axes.plot([x for x, _ in thinned], [y for _, y in thinned], color=_color(number), marker=marker,
                  label=visible(name))  # fmt: skip
    return Chart(
        title=title,
        description=f"{title} ({unit}) over iterations. " + "; ".join(_range(*line) for line in lines if line[1]),
        figure=figure,
        legend=[(name, number % len(SERIES)) for number, (name, _) in enumerate(lines)] if len(lines) > 1 else (),
    )


def scatter(
    title: str, points: Points, x_label: str, y_label: str, description: str, marks: Mapping[str, Point] | None = None
) -> Chart:
    """Dots, one colour a kind, such as U of labelings against their agreement with gold.

    points: by kind, at most len(SERIES) of them. marks: single points that stand out, each with its name beside it,
    such as gold and what a search found.
    """
    figure, axes = _panel(x_label, y_label)
    titles: dict[str, Sequence[str]] = {}
    for number, (kind, dots) in enumerate(points.items()):
        drawn = axes.scatter([dot.x for dot in dots], [dot.y for dot in dots], s=22, linewidths=0, alpha=0.75,
                             color=_color(number), label=kind, gid=f"dots{number}")  # fmt: skip
        titles[str(drawn.get_gid())] = [dot.title for dot in dots]
    for number, (name, mark) in enumerate((marks or {}).items()):
        marker = "*DsP"[number % 4]
        axes.scatter([mark.x], [mark.y], s=90, marker=marker, color=INK, gid=f"mark {name}", zorder=3)
        left = mark.x > sum(axes.get_xlim()) / 2  # a name stays inside
        axes.annotate(name, (mark.x, mark.y), (-9 if left else 9, -7 if number % 2 else 7), textcoords="offset points",
                      ha="right" if left else "left", va="center", color=INK)  # fmt: skip
        titles[f"mark {name}"] = [mark.title or name]
    return Chart(title, description, figure, [(kind, number) for number, kind in enumerate(points)], titles=titles)


def calibration_chart(run: RunRecord) -> Chart | None:
    """The share of claims that are True by gold, by their predicted probability of True; None without gold labels, and
    for more than two labels.

    Final log-odds are taken less the run's offset, zero-shot log-odds as they are.
    """
    known = [claim for claim in run.claims if claim.gold is not None]
    final = [(probability(c.odds - run.shift_of(c)), bool(c.gold)) for c in known if c.odds is not None]
    zero_shot = [(probability(c.zero_shot_odds), bool(c.gold)) for c in known if c.zero_shot_odds is not None]
    if not final or run.num_labels > 2:
        return None
    yes = visible(run.names[1])
    figure, axes = _panel(f"predicted probability of {yes}", f"share {yes} by gold")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
    titles: dict[str, list[str]] = {}
    legend, errors = [], []
    for number, (name, pairs) in enumerate((("final", final), ("zero-shot", zero_shot))):
        if not pairs:
            continue
        titles |= _draw_bins(axes, name, yes, pairs, number)
        legend.append((name, number))
        errors.append(f"{calibration_error(pairs):.3f} {name} ({len(pairs)} claims)")
    return Chart(
        title="Calibration",
        description=f"Share of claims that are {yes} by gold over the probability of {yes} that they were given. "
        "Expected calibration error: " + "; ".join(errors),
        figure=figure,
        legend=legend,
        note="error " + ", ".join(errors),
        titles=titles,
    )


def calibration_error(pairs: Sequence[tuple[float, bool]]) -> float:
    """Expected calibration error over BINS bins of equal width: |share - mean probability|, weighted by claims."""
    error = 0.0
    for found in _binned(pairs):
        share = sum(gold for _, gold in found) / len(found)
        mean = sum(value for value, _ in found) / len(found)
        error += abs(share - mean) * len(found)
    return error / len(pairs)


def margin_chart(run: RunRecord) -> Chart | None:
    """A histogram of log-odds, by gold label where any is known, else by the label that was given.

    None for more than two labels.
    """
    claims = [claim for claim in run.claims if claim.odds is not None]
    if not claims or run.num_labels > 2:
        return None
    by_gold = any(claim.gold is not None for claim in claims)
    basis = "gold" if by_gold else "label"
    values = [(claim.odds or 0.0) - run.shift_of(claim) for claim in claims]
    reach = max(max(abs(value) for value in values), 0.5)
    bins, step = 2 * BINS, reach / BINS
    counts: dict[int, Counter[int]] = {1: Counter(), 0: Counter()}
    for claim, value in zip(claims, values, strict=True):
        label = claim.gold if by_gold else claim.label
        if label is not None:
            counts[int(label)][min(bins - 1, int((value + reach) / (2 * reach) * bins))] += 1
    figure, axes = _panel("nat" + (f", against {run.offset_in_words}" if run.shift else ""), "claims")
    axes.set_xlim(-reach, reach)
    axes.set_ylim(0, max(1, *counts[0].values(), *counts[1].values()))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=STEPS))
    names = [visible(name) for name in run.names]
    titles = {}
    for number, label in enumerate((1, 0)):  # the two labels' bars stand side by side in each bin
        for index, count in sorted(counts[label].items()):
            begin, gid = -reach + index * step, f"bar{number}.{index}"
            axes.bar(begin + (number + 0.5) * step / 2, count, 0.45 * step, color=_color(number), gid=gid)
            titles[gid] = [f"{count} {names[label]} claims between {begin:.2f} and {begin + step:.2f} nat"]
    return Chart(
        title="Log-odds",
        description=f"Histogram of the final log-odds, by {basis}: {counts[1].total()} {names[1]} and "
        f"{counts[0].total()} {names[0]} claims.",
        figure=figure,
        legend=[(f"{names[1]} ({basis})", 0), (f"{names[0]} ({basis})", 1)],
        titles=titles,
    )


def contrast_chart(run: RunRecord) -> Chart | None:
    """Zero-shot against final log-odds, claim by claim, by the label given.

    None where zero-shot was not recorded, and for more than two labels.
    """
    claims = [c for c in run.claims if c.odds is not None and c.zero_shot_odds is not None and c.label is not None]
    if not claims or run.num_labels > 2:
        return None
    claims = claims[:: math.ceil(len(claims) / MOST_POINTS)]
    no, yes = map(visible, run.names)
    points: dict[str, list[Point]] = {f"labelled {yes}": [], f"labelled {no}": []}
    for c in claims:
        x, y, name = c.zero_shot_odds or 0.0, c.odds or 0.0, visible(run.name_of(c.label))
        title = f"row {c.row}, {name}: {x:.2f} zero-shot, {y:.2f} with the others shown"
        points[f"labelled {name}"].append(Point(x, y, title))
    return scatter(
        "Zero-shot and in context",
        points,
        "zero-shot log-odds, nat",
        "final log-odds, nat",
        f"Final over zero-shot log-odds of {len(claims)} claims. The labels follow what the model says without "
        f"demonstrations as far as the {yes} ones lie to the right.",
    )


def coverage_chart(run: RunRecord) -> Chart | None:
    """How often labels are right among the surest ones, by what share of the claims these are; None without gold.

    The dotted line is what a draw without regard to margins would have; a mark says what a run with doubt kept.
    """
    found = coverage_of(run)
    if found is None or found.claims < 2:
        return None
    figure, axes = _panel("share of claims, the surest first", "agreement with gold")
    axes.set_xlim(0, 1)
    low = min(y for _, y in found.points)
    _set_y_limits(axes, min(0.95, low), 1, lifted=False)
    share, last = found.points[-1]
    points = found.points[:: math.ceil(len(found.points) / MOST_POINTS)]
    axes.plot([x for x, _ in points], [y for _, y in points], color=_color(0), drawstyle="steps-pre")
    axes.plot([0, share], [last, last], color=FAINT, linewidth=1, linestyle="--")
    kept = [claim for claim in run.claims if claim.agrees is not None and not claim.abstained and claim.by != KNOWN]
    said = f"All {found.claims}: {last:.3f}. Mean over all shares (area): {found.area:.3f}"
    titles = {}
    if 0 < len(kept) < found.claims:
        right = sum(bool(claim.agrees) for claim in kept)
        x, y = len(kept) / found.claims, right / len(kept)
        axes.scatter([x], [y], s=90, marker="*", color=INK, gid="kept", zorder=3)
        titles = {"kept": [f"kept: {right} of {len(kept)} are as gold says"]}
        said += f". Kept, {len(kept)} of {found.claims}: {y:.3f}"
    return Chart(
        title="Coverage and agreement",
        description=f"Agreement with gold of the surest labels over the share of claims that these are. {said}",
        figure=figure,
        note=f"area {found.area:.3f}, all {last:.3f}",
        titles=titles,
    )


def _panel(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure, axes = panel()
    axes.set_xlabel(one_line(x_label, LONGEST_LABEL))
    axes.set_ylabel(one_line(y_label, LONGEST_LABEL))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=STEPS))
    return figure, axes


def _set_y_limits(axes: Axes, low: float, high: float, *, lifted: bool) -> None:
    """From low to high, with room for the line's width. A flat line is in the middle, or at the bottom (lifted)."""
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):  # ticks would have the same numbers
        room = max(1.0, abs(high) * 1e-3)
        low, high = low - (0 if lifted else room), high + room
    room = 0.02 * (high - low)
    axes.set_ylim(low - room, high + room)


def _color(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _range(name: str, points: Sequence[tuple[int, float]]) -> str:
    values = [value for _, value in points]
    first, last, lowest, highest = (f"{v:.4g}" for v in (values[0], values[-1], min(values), max(values)))
    return f"{name}: from {first} to {last}, lowest {lowest}, highest {highest}"


def _draw_bins(
    axes: Axes, name: str, yes: str, pairs: Sequence[tuple[float, bool]], number: int
) -> dict[str, list[str]]:
    """A dot a bin with its 95% interval, larger the more claims it has; returns their titles by gid."""
    bins = _binned(pairs)
    means = [sum(value for value, _ in found) / len(found) for found in bins]
    trues = [sum(gold for _, gold in found) for found in bins]
    intervals = [wilson_interval(count, len(found)) for count, found in zip(trues, bins, strict=True)]
    color = _color(number)
    gids = f"interval{number}", f"bin{number}"
    axes.vlines(means, *zip(*intervals, strict=True), color=color, gid=gids[0], clip_on=False)
    axes.scatter(
        means,
        [count / len(found) for count, found in zip(trues, bins, strict=True)],
        s=[(5 + 8 * math.sqrt(len(found) / len(pairs))) ** 2 for found in bins],
        color=color,
        linewidths=0,
        gid=gids[1],
        label=name,
        clip_on=False,
    )
    titles = [
        f"{name}, P {mean:.2f}: {count} of {len(found)} are {yes} (95% interval {low:.2f} to {high:.2f})"
        for mean, count, found, (low, high) in zip(means, trues, bins, intervals, strict=True)
    ]
    return dict.fromkeys(gids, titles)


def _binned(pairs: Sequence[tuple[float, bool]]) -> list[list[tuple[float, bool]]]:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for value, gold in pairs:
        bins[min(BINS - 1, int(value * BINS))].append((value, gold))
    return [found for found in bins if found]


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
