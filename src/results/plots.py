"""curves.png: how a run went, drawn from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from src.icm.consistency import Label
from src.icm.label_names import TRUE_FALSE_NAMES, Names, balance_of
from src.results.curves import curves_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_POINTS: Final = 12
"""With fewer than this, each is marked: a line through one point would not be seen."""


def plot_curves(
    records: Sequence[Mapping[str, Any]],
    gold: Sequence[Label],
    path: Path,
    title: str,
    names: Names = TRUE_FALSE_NAMES,
) -> None:
    """U, accuracy (where gold is known), pool size and label balance against the iteration, as a PNG."""
    from src.results.style import write_png

    write_png(draw_curves(records, gold, names), path, title)


def draw_curves(records: Sequence[Mapping[str, Any]], gold: Sequence[Label], names: Names = TRUE_FALSE_NAMES) -> Figure:
    """The figure that plot_curves writes, without its title."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator  # takes half a second, at the end of a search rather than before it

    from src.results.style import FAINT, SERIES, panels

    curves = curves_of(records, gold)
    figure, axes = panels(2, 2)
    marker = "." if len(curves.iteration) < FEW_POINTS else ""
    shown: tuple[tuple[Sequence[float | None], str, tuple[float, float] | None], ...] = (
        (curves.utility, "U(D)", None),
        (curves.accuracy, "agreement with gold", (0.0, 1.0)),
        (curves.labelled, "labelled claims", None),
        (curves.balance, balance_of(names), (0.0, 1.0)),
    )
    for axis, (values, label, limits) in zip(axes, shown, strict=True):
        if all(value is None for value in values):
            axis.text(0.5, 0.5, "no gold labels", ha="center", va="center", transform=axis.transAxes)
        axis.plot(curves.iteration, np.array(values, float), drawstyle="steps-post", color=SERIES[0], marker=marker)
        axis.set_ylabel(label)
        if limits:
            axis.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
            axis.axhline(1 / len(names), color=FAINT, linewidth=0.8, linestyle=":")
    axes[2].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if curves.rebuilds:
        axes[0].set_title("grey: the tree is built anew", fontsize="small", loc="right", color=FAINT)
    for iteration in curves.rebuilds:
        axes[0].axvline(iteration, color=FAINT, linewidth=0.6, alpha=0.5)
    for axis in axes[2:]:
        axis.set_xlabel("iteration")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure
