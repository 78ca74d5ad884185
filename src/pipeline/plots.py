"""curves.png: how a run went, drawn from its journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from src.icm.consistency import Label


def plot_curves(records: Iterable[Mapping[str, Any]], gold: Sequence[Label], path: Path, title: str) -> None:
    """U, accuracy (where gold is known), pool size and label balance against the iteration, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = _curves(records, gold)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    figure.suptitle(title, parse_math=False)  # a name with $ in it is not a formula
    panels = (
        ("U", "U(D)", None),
        ("accuracy", "agreement with gold", (0.0, 1.0)),
        ("labelled", "labelled claims", None),
        ("true_share", "share of True labels", (0.0, 1.0)),
    )
    for axis, (key, label, limits) in zip(axes.flat, panels, strict=True):
        values = curves[key]
        if all(value is None for value in values):
            axis.text(0.5, 0.5, "no gold labels", ha="center", va="center", transform=axis.transAxes)
        axis.plot(curves["iteration"], values, drawstyle="steps-post", color="tab:blue")
        axis.set_ylabel(label)
        if limits:
            axis.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
            axis.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    for iteration in curves["rebuilds"]:
        axes[0, 0].axvline(iteration, color="grey", linewidth=0.6, alpha=0.5)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _curves(records: Iterable[Mapping[str, Any]], gold: Sequence[Label]) -> dict[str, list[Any]]:
    curves: dict[str, list[Any]] = {
        key: [] for key in ("iteration", "U", "accuracy", "labelled", "true_share", "rebuilds")
    }
    labels: dict[int, bool] = {}
    for record in records:
        iteration = record.get("iteration", 0)
        if record["event"] == "rebuild":
            curves["rebuilds"].append(iteration)
        labels |= {int(i): label for i, label in (record.get("labels") or record.get("changes") or {}).items()}
        compared = [label == gold[i] for i, label in labels.items() if gold[i] is not None]
        curves["iteration"].append(iteration + (record["event"] == "step"))
        curves["U"].append(record["U"])
        curves["accuracy"].append(sum(compared) / len(compared) if compared else None)
        curves["labelled"].append(len(labels))
        curves["true_share"].append(sum(labels.values()) / len(labels) if labels else None)
    return curves
