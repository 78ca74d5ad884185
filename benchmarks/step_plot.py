"""The PNG of benchmarks/step.py: seconds and computed tokens of every case over N. Only this needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
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
SHOWN: Final = ("a", "b", "c", "f", "d", "e")


def draw(report: Report, path: Path) -> None:
    """Two panels, both axes logarithmic: seconds (median, whiskers from least to most) and computed tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    _panel(left, report, lambda r: r.seconds, "seconds a step", whiskers=True)
    _panel(right, report, lambda r: r.computed_tokens, "prompt tokens computed a step", whiskers=False)
    figure.suptitle(report.title or _default_title(report), parse_math=False, fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _panel(
    axis: Any, report: Report, value: Callable[[Repetition], float | None], label: str, *, whiskers: bool
) -> None:
    sizes = sorted({entry.size for entry in report.cases})
    for case in SHOWN:
        entries = sorted((e for e in report.cases if e.case == case and e.repetitions), key=lambda e: e.size)
        points = [(e, v) for e in entries if (v := middle(e, value)) is not None and v > 0]
        if not points:
            continue
        xs, ys = [e.size for e, _ in points], [v for _, v in points]
        p = growth(report, case, value)
        axis.plot(xs, ys, marker="o", markersize=4, color=COLOURS[case], label=f"{case}: {CASES[case]}")
        if whiskers:
            every = [[v for r in e.repetitions if (v := value(r)) is not None] for e, _ in points]
            below = [y - min(v) for y, v in zip(ys, every, strict=True)]
            above = [max(v) - y for y, v in zip(ys, every, strict=True)]
            axis.errorbar(xs, ys, yerr=[below, above], fmt="none", ecolor=COLOURS[case], capsize=3, alpha=0.7)
        text = case if p is None else f"{case}  N^{p:.2f}"
        axis.annotate(
            text, (xs[-1], ys[-1]), xytext=(7, 0), textcoords="offset points", va="center", color=COLOURS[case],
            fontsize=9, parse_math=False,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sizes))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.22)
    axis.set_xlabel("labelled claims N")
    axis.set_title(label, fontsize=11)
    axis.grid(alpha=0.3)


def _default_title(report: Report) -> str:
    gpus = report.hardware.get("gpus") or []
    where = gpus[0] if gpus else report.hardware.get("cpu", "")
    return f"One step of a search: {report.engine.get('model', '')}, vLLM {report.engine.get('version', '')}, {where}"
