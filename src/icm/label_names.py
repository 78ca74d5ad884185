"""How a run's files write labels: True and False as true and false, with one number for log-odds; others by name.

Names are those of a label space, in its order. Log-odds are as in objective.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from src.icm.consistency import Label
from src.icm.objective import LogOdds

TRUE_FALSE_NAMES: Final = ("False", "True")
Names = tuple[str, ...]


def names_of(settings: Mapping[str, Any]) -> Names:
    """The names of a run's labels, from its settings; without any there they are False and True."""
    found = settings.get("labels")
    if isinstance(found, list) and len(found) > 1 and all(isinstance(name, str) for name in found):
        return tuple(found)
    return TRUE_FALSE_NAMES


def written_label(label: Label, names: Names) -> bool | str | None:
    """true or false, the name of any other label, None for none."""
    if label is None:
        return None
    return bool(label) if names == TRUE_FALSE_NAMES else names[label]


def read_label(value: object, names: Names) -> Label:
    """The label that a file names; None where it names none."""
    if names == TRUE_FALSE_NAMES:
        return value if isinstance(value, bool) else None
    if not isinstance(value, str) or value not in names:
        return None
    return bool(names.index(value)) if len(names) == 2 else names.index(value)


def written_odds(log_odds: LogOdds | None, names: Names, key: str = "log_odds") -> dict[str, Any]:
    """{key: nats} of True and False; of other labels log P by name, under "logprobs" where key is "log_odds"."""
    if names == TRUE_FALSE_NAMES:
        return {key: log_odds}
    key = "logprobs" if key == "log_odds" else key
    return {key: None if log_odds is None else dict(zip(names, logprobs(log_odds), strict=True))}


def read_odds(row: Mapping[str, Any], names: Names, key: str = "log_odds") -> LogOdds | None:
    """What `written_odds` wrote, up to rounding; None where it is missing or damaged."""
    if names == TRUE_FALSE_NAMES:
        return _number(row.get(key))
    found = row.get("logprobs" if key == "log_odds" else key)
    values = [_number(found.get(name)) for name in names] if isinstance(found, dict) else [None]
    first, *others = values
    if first is None or not others:
        return None
    odds = tuple(value - first for value in others if value is not None)
    if len(odds) < len(others):
        return None
    return odds[0] if len(names) == 2 else odds


def logprobs(log_odds: LogOdds) -> list[float]:
    """log P(label) in nats, shape [K], normalized over the labels."""
    z = np.array([0.0, *(log_odds if isinstance(log_odds, tuple) else (log_odds,))])
    shares: list[float] = (z - np.logaddexp.reduce(z)).tolist()
    return shares


def counts_of(labels: Iterable[Label], names: Names) -> dict[str, Any]:
    """How many claims have which label: {"true_labels": n} of True and False, {"label_counts": {name: n}} of others."""
    known = [label for label in labels if label is not None]
    if names == TRUE_FALSE_NAMES:
        return {"true_labels": sum(known)}
    return {"label_counts": {name: known.count(label) for label, name in enumerate(names)}}


def balance_of(names: Names) -> str:
    """What the curve `balance` shows, in words."""
    return f"share of {names[1]} labels" if len(names) == 2 else "share of the commonest label"


def describe_counts(counts: Mapping[str, Any]) -> str:
    """What `counts_of` gives, in words: "12 True", or "9 red, 11 green, 10 blue"."""
    by_name = counts.get("label_counts") or {"True": counts["true_labels"]}
    return ", ".join(f"{count} {name}" for name, count in by_name.items())


def confusion(pairs: Iterable[tuple[Label, Label]], num_labels: int) -> list[list[int]]:
    """How many claims have which gold label (row) and which label (column), shape [K, K], where both are known."""
    table = [[0] * num_labels for _ in range(num_labels)]
    for label, gold in pairs:
        if label is not None and gold is not None:
            table[gold][label] += 1
    return table


def confusion_lines(table: Sequence[Sequence[int]], names: Names) -> list[str]:
    """The table for a terminal: a heading, and a line for each gold label."""
    width = max(len(name) for name in (*names, "gold")) + 2
    widths = [max(len(name), *(len(str(row[at])) for row in table)) for at, name in enumerate(names)]
    rows = [("gold", names), *((name, tuple(map(str, row))) for name, row in zip(names, table, strict=True))]
    return [
        first.ljust(width) + "  ".join(cell.rjust(wide) for cell, wide in zip(cells, widths, strict=True))
        for first, cells in rows
    ]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
