"""The PNG of benchmarks/step.py: seconds and computed tokens of every case over N. Only this needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from benchmarks.step_report import CASES, Repetition, Report, growth, middle

COLOURS: Final = {
    "a": "#b30000",
    "b": "#e6762e",
    "c": "#1b6ca8",
    "d0": "#9aa5b1",
    "d": "#2a9d4b",
    "e": "#6b7280",
    "f": "#8e44ad",
}
LINE: Final = 11.0
"""Points from one label to the next."""
SHOWN: Final = ("a", "b", "c", "d", "e", "f")


@dataclass(frozen=True)
class _Curve:
    """The last point of a curve, where its label is."""

    x: float
    y: float
    text: str
    colour: str


def draw(report: Report, path: Path) -> None:
    """Two panels, both axes logarithmic: seconds (median, whiskers from least to most) and computed tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    curves = {
        left: _panel(left, report, lambda r: r.seconds, "seconds a step", whiskers=True),
        right: _panel(right, report, lambda r: r.computed_tokens, "prompt tokens computed a step", whiskers=False),
    }
    figure.suptitle(report.title or _default_title(report), parse_math=False, fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.canvas.draw()  # only now it is known where the curves end on the page
    for axis, ends in curves.items():
        _label(axis, ends)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _panel(
    axis: Any, report: Report, value: Callable[[Repetition], float | None], label: str, *, whiskers: bool
) -> list[_Curve]:
    sizes = sorted({entry.size for entry in report.cases})
    ends = []
    for case in SHOWN:
        entries = sorted((e for e in report.cases if e.case == case and e.repetitions), key=lambda e: e.size)
        points = [(e, v) for e in entries if (v := middle(e, value)) is not None and v > 0]
        if not points:
            continue
        xs, ys = [e.size for e, _ in points], [v for _, v in points]
        colour = COLOURS[case]
        # a and b compute the same tokens: dashes let both be seen.
        style = "--" if case == "b" else "-"
        axis.plot(xs, ys, style, marker="o", markersize=4, color=colour, label=f"{case}: {CASES[case]}")
        if whiskers:
            every = [[v for r in e.repetitions if (v := value(r)) is not None] for e, _ in points]
            below = [y - min(v) for y, v in zip(ys, every, strict=True)]
            above = [max(v) - y for y, v in zip(ys, every, strict=True)]
            axis.errorbar(xs, ys, yerr=[below, above], fmt="none", ecolor=colour, capsize=3, alpha=0.6)
        # With a full cache, computed tokens depend on the lengths modulo the block, and do not grow as a power.
        p = None if case == "e" and not whiskers else growth(report, case, value)
        ends.append(_Curve(xs[-1], ys[-1], case if p is None else f"{case}  N^{p:.2f}", colour))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(min(sizes) / 1.2, max(sizes) * (max(sizes) / min(sizes)) ** 0.25 * 1.1)
    axis.set_ylim(top=axis.get_ylim()[1] * 1.5)  # for a label that moved up
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("labelled claims N")
    axis.set_title(label, fontsize=11)
    axis.grid(alpha=0.3)
    return ends


def _label(axis: Any, curves: list[_Curve]) -> None:
    """Write each curve's name at its end, moved up where it would overlap another one."""
    pixels_a_point = axis.figure.dpi / 72
    lowest = float("-inf")
    for curve in sorted(curves, key=lambda c: c.y):
        height = axis.transData.transform((curve.x, curve.y))[1] / pixels_a_point
        lowest = max(height, lowest + LINE)
        axis.annotate(
            curve.text,
            (curve.x, curve.y),
            xytext=(8, lowest - height),
            textcoords="offset points",
            va="center",
            color=curve.colour,
            fontsize=9,
            parse_math=False,
        )


def _default_title(report: Report) -> str:
    gpus = report.hardware.get("gpus") or []
    where = gpus[0] if gpus else report.hardware.get("cpu", "")
    return f"One step of a search: {report.engine.get('model', '')}, vLLM {report.engine.get('version', '')}, {where}"
