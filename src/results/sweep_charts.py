"""A sweep as small multiples: each figure over the settings that were varied, with its seeds and 95% intervals.

A setting of numbers runs along x, one line for each value of a second setting. Without numbers, values stand below each
other. All other settings make panels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from src.results.charts import STEPS, Chart
from src.results.style import PANEL, SERIES, panel
from src.results.sweep_table import Figure, SweepTable
from src.results.text import number, one_line, visible

MOST_CHARTS: Final = 48
APART: Final = 0.018  # of an axis of numbers: how far marks of two colours stand from each other
LONGEST_TICK: Final = 26  # characters of a value along an axis
ROW: Final = "row"
COSTED: Final = {
    "questions": "asked",
    "prompt tokens": "tokens_sent",
    "computed tokens": "tokens_computed",
    "seconds": "seconds",
}
"""Charts of costs, and where a cell's costs have them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One figure of one combination of settings. values: by setting, with ROW for a baseline."""

    values: Mapping[str, str]
    figure: Figure


@dataclass(frozen=True, slots=True)
class Roles:
    """Which setting is drawn how. along: the axis. colour: None where one colour is enough. numeric: whether `along`
    is of numbers."""

    along: str
    colour: str | None
    panels: Sequence[str]
    numeric: bool


def sweep_charts(table: SweepTable) -> list[Chart]:
    """Agreement with gold and U; no chart where only one combination was run."""
    charts, order = [], _order(table)
    for name in ("agreement", "held-out", "pool", "U"):
        marks = [
            Mark({**row.values, **({ROW: row.label} if row.label else {})}, figure)
            for row in table.rows
            if (figure := row.figures.get(name)) is not None
        ]
        charts += _multiples(name, "share of claims" if name != "U" else "U", marks, order, share=name != "U")
    return charts[:MOST_CHARTS]


def cost_charts(table: SweepTable) -> list[Chart]:
    """Questions, tokens and seconds of a cell, over the same settings."""
    charts, order = [], _order(table)
    for name, key in COSTED.items():
        found: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
        for cost in table.costs:
            if key in cost.costs:
                values = tuple((column, cost.values[column]) for column in table.columns)
                found.setdefault(values, {})[cost.name] = float(cost.costs[key])
        marks = [
            Mark(dict(values), figure)
            for values, by_cell in found.items()
            if (figure := Figure.of_values(by_cell)) is not None
        ]
        if not any(mark.figure.mean for mark in marks):
            continue  # the engine does not say, or the response cache answered everything
        charts += _multiples(name, f"{name} a cell", marks, order, share=False)
    return charts[:MOST_CHARTS]


def _order(table: SweepTable) -> dict[str, list[str]]:
    rows = [{**row.values, ROW: row.label} for row in table.rows]
    return {name: list(dict.fromkeys(row[name] for row in rows)) for name in (*table.columns, ROW)}


def roles_of(marks: Sequence[Mark]) -> Roles | None:
    """How the settings that vary are drawn; None where nothing varies."""
    names = list(dict.fromkeys(name for mark in marks for name in mark.values))
    varied = {name: list(dict.fromkeys(mark.values.get(name, "") for mark in marks)) for name in names}
    sizes = {name: len(values) for name, values in varied.items() if len(values) > 1}
    if not sizes:
        return None
    numeric = [name for name in sizes if all(map(_is_number, varied[name]))]
    if numeric:
        along = max(numeric, key=lambda name: sizes[name])
    else:
        along = ROW if ROW in sizes else max(sizes, key=lambda name: sizes[name])
    others = [name for name in sizes if name != along]
    colours = [name for name in others if sizes[name] <= len(SERIES)]
    colour = ROW if ROW in colours else max(colours, key=lambda name: sizes[name], default=None)
    if not numeric and along == ROW:
        colour = None  # each combination has its own panel: rows are compared within one
    return Roles(along, colour, tuple(name for name in others if name != colour), bool(numeric))


def _multiples(
    name: str, unit: str, marks: Sequence[Mark], order: Mapping[str, Sequence[str]], *, share: bool
) -> list[Chart]:
    """order: the values of each setting, of which each has the same colour in all charts."""
    roles = roles_of(marks)
    if roles is None:
        return []
    limits = (0.0, 1.0) if share else _limits(marks)
    series = order.get(roles.colour, [""]) if roles.colour else [""]
    places = list(dict.fromkeys(mark.values.get(roles.along, "") for mark in marks))
    by_panel: dict[tuple[str, ...], list[Mark]] = {}
    for mark in marks:
        by_panel.setdefault(tuple(mark.values.get(each, "") for each in roles.panels), []).append(mark)
    return [
        _chart(name, unit, dict(zip(roles.panels, key, strict=True)), found, roles, series, places, limits)
        for key, found in by_panel.items()
    ]


def _chart(
    name: str,
    unit: str,
    panel_of: Mapping[str, str],
    marks: Sequence[Mark],
    roles: Roles,
    series: Sequence[str],
    places: Sequence[str],
    limits: tuple[float, float],
) -> Chart:
    figure, axes = panel() if roles.numeric else _rows_panel(places, len(series))
    titles: dict[str, Sequence[str]] = {}
    for at, one in enumerate(series):
        own = [mark for mark in marks if not roles.colour or mark.values.get(roles.colour, "") == one]
        if own:
            shift = at - (len(series) - 1) / 2
            titles |= _draw(axes, own, roles, places, at, one, shift, len(series))
    if roles.numeric:
        axes.set_xlabel(one_line(roles.along, LONGEST_TICK))
        axes.set_ylabel(one_line(unit, LONGEST_TICK))
        axes.set_ylim(*_with_room(limits))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        _number_axis(axes, [float(place) for place in places])
    else:
        axes.set_xlabel(one_line(unit, LONGEST_TICK))
        axes.set_xlim(*_with_room(limits))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    where = ", ".join(f"{key} {value}" for key, value in panel_of.items())
    told = "; ".join(_in_words(mark, roles) for mark in marks)
    return Chart(
        title=f"{name}: {where}" if where else name,
        description=f"{name} ({unit}) by {roles.along}{f', {where}' if where else ''}. {told}",
        figure=figure,
        legend=[
            (one if roles.colour == ROW else f"{roles.colour} {one}", at)
            for at, one in enumerate(series)
            if any(mark.values.get(roles.colour, "") == one for mark in marks)
        ]
        if roles.colour
        else (),
        titles=titles,
    )


def _draw(
    axes: Axes,
    marks: Sequence[Mark],
    roles: Roles,
    places: Sequence[str],
    number_of: int,
    name: str,
    shift: float,
    of: int,
) -> dict[str, list[str]]:
    """One colour's marks; returns titles by gid. shift: from the middle of `of` colours."""
    color = SERIES[number_of % len(SERIES)]
    if roles.numeric:
        numbers = [float(place) for place in places]
        spots = [(_beside(float(mark.values[roles.along]), numbers, shift), mark) for mark in marks]
        spots.sort(key=lambda found: found[0])
    else:
        spots = [(places.index(mark.values.get(roles.along, "")) + 0.7 * shift / of, mark) for mark in marks]
    gid, seeds, spans = f"mean{number_of}", f"seeds{number_of}", f"interval{number_of}"
    means = [mark.figure.mean for _, mark in spots]
    at = [spot for spot, _ in spots]
    if roles.numeric and len(spots) > 1:
        axes.plot(at, means, color=color, alpha=0.6)
    known = [(spot, mark.figure.interval) for spot, mark in spots if mark.figure.interval is not None]
    several = [(spot, seed, value) for spot, mark in spots if len(mark.figure.by_seed) > 1
               for seed, value in mark.figure.by_seed.items()]  # fmt: skip
    titles = {gid: [_in_words(mark, roles) for _, mark in spots]}
    if known:
        draw = axes.vlines if roles.numeric else axes.hlines
        lows, highs = [low for _, (low, _) in known], [high for _, (_, high) in known]
        draw([spot for spot, _ in known], lows, highs, color=color, gid=spans, clip_on=False)
        titles[spans] = [_in_words(mark, roles) for _, mark in spots if mark.figure.interval is not None]
    for size, alpha, group, values in (
        (14, 0.45, seeds, [(spot, value) for spot, _, value in several]),
        (44, 1.0, gid, list(zip(at, means, strict=True))),
    ):
        if values:
            xs, ys = [spot for spot, _ in values], [value for _, value in values]
            if not roles.numeric:
                xs, ys = ys, xs
            axes.scatter(xs, ys, s=size, alpha=alpha, color=color, linewidths=0, gid=group, zorder=3, clip_on=False)
    if several:
        titles[seeds] = [f"{f'{visible(name)}, ' if name else ''}{visible(seed)}: {number(value, 3)}"
                         for _, seed, value in several]  # fmt: skip
    return titles


def _rows_panel(places: Sequence[str], series: int) -> tuple[Drawing, Axes]:
    """A panel with a line of its own for each value, as high as they need."""
    width = PANEL[0]
    height = max(PANEL[1], 50 + len(places) * max(20, 11 * series))
    figure, axes = panel()
    ticks = [one_line(place or "all", LONGEST_TICK) for place in places]
    left = min(0.5 * width, 16 + 6.4 * max(map(len, ticks)))
    figure.set_size_inches(width / 72, height / 72)
    figure.subplots_adjust(left / width, 38 / height, 1 - 12 / width, 1 - 12 / height)
    axes.yaxis.set_major_locator(FixedLocator(range(len(places))))
    axes.set_yticklabels(ticks)
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    return figure, axes


def _number_axis(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values themselves; a scale of powers where they span more than a factor of 20."""
    low, high = min(values), max(values)
    if _is_wide(values):
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if len(values) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(sorted(values)))
        axes.set_xticklabels([f"{value:g}" for value in sorted(values)])


def _is_wide(values: Sequence[float]) -> bool:
    """Whether they are drawn on a scale of powers."""
    return min(values) > 0 and max(values) / min(values) > 20


def _beside(value: float, values: Sequence[float], shift: float) -> float:
    """A value moved a little, so that intervals of several colours stand beside each other."""
    low, high = min(values), max(values)
    if _is_wide(values):
        return float(value * (high / low) ** (APART * shift))
    return value + APART * shift * (high - low)


def _limits(marks: Sequence[Mark]) -> tuple[float, float]:
    values = [value for mark in marks for value in (mark.figure.mean, *mark.figure.by_seed.values())]
    return min(0.0, *values), max(values)


def _with_room(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    room = 0.03 * (high - low) or 1.0
    return low - room, high + room


def _in_words(mark: Mark, roles: Roles) -> str:
    named = [mark.values.get(name, "") for name in (roles.colour, roles.along) if name]
    digits = 3 if mark.figure.interval is not None or fmean([abs(mark.figure.mean)]) < 1 else 1
    text = f"{', '.join(map(visible, named))}: {number(mark.figure.mean, digits)}"
    if mark.figure.interval is not None:
        low, high = mark.figure.interval
        text += f" ({low:.3f} to {high:.3f})"
    return text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
