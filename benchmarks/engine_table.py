"""Rows of benchmarks/engine_rows.py as markdown. Nothing here asks a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.engine_cells import INEXACT

SHOWN: Final = {
    "b": "upstream's order",
    "c": "tree, cold",
    "d": "a label appended",
    "e": "all cached",
    "f": "both labels",
}
"""Cases of step.py that have a column, where a row measured them."""
HEAD: Final = ("", "rows that differ", "largest, nats", "tokens computed")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, one line a row, seconds as exact / inexact where both were measured; below it what failed, and why."""
    exact = [row for row in rows if not row["name"].endswith(INEXACT)]
    inexact = {row["name"]: row for row in rows}
    cases = [case for case in SHOWN if any(_case(row, case) for row in rows)]
    lines = [
        _line([*HEAD, *(SHOWN[case] for case in cases)]),
        _line(["---"] * (len(HEAD) + len(cases))),
    ]
    notes: list[str] = []
    for row in exact:
        beside = inexact.get(row["name"] + INEXACT)
        lines.append(_line([row["name"], *_determinism(row), _tokens(row), *(_both(row, beside, c) for c in cases)]))
        if beside is not None and (beside["determinism"] is not None or beside["state"] != "done"):
            lines.append(_line([beside["name"], *_determinism(beside), _tokens(beside), *("" for _ in cases)]))
        notes += _notes(row) + (_notes(beside) if beside is not None else [])
    names = {row["name"] for row in exact}
    for row in rows:  # inexact ones whose exact one is not here
        if row["name"].endswith(INEXACT) and row["name"].removesuffix(INEXACT) not in names:
            lines.append(_line([row["name"], *_determinism(row), _tokens(row), *(_both(row, None, c) for c in cases)]))
            notes += _notes(row)
    heading = _heading(rows)
    return "\n".join([*([heading, ""] if heading else []), *lines, *([""] if notes else []), *notes])


def _heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """Versions, hardware and dates of all rows."""
    versions = sorted({f"{name} {found}" for row in rows for name, found in row["versions"].items()})
    gpus = sorted({gpu for row in rows for gpu in row["hardware"].get("gpus", [])})
    cpus = sorted({row["hardware"]["cpu"] for row in rows if row["hardware"].get("cpu")})
    dates = sorted({row["date"] for row in rows if row["date"]})
    sizes = sorted({str(entry["size"]) for row in rows if row["step"] for entry in row["step"]["cases"]})
    parts = [*versions, *(gpus or cpus), " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]]))]
    if sizes:
        parts.append(f"{' and '.join(sizes)} claims; seconds, exact / inexact where both were measured")
    return "; ".join(part for part in parts if part)


def _determinism(row: Mapping[str, Any]) -> tuple[str, str]:
    found = row["determinism"]
    if found is None:
        return _state(row), ""
    which = f"{found['differing']} of {found['rows']}" + ("" if found["whole"] else " (cut short)")
    largest = "other tokens" if found["other_tokens"] else f"{found['largest']:.3g}" if found["differing"] else "0"
    return f"**{which}**" if found["differing"] == 0 and found["whole"] else which, largest


def _state(row: Mapping[str, Any]) -> str:
    if "determinism" not in row["cell"]["checks"] and row["state"] == "done":
        return "not asked"
    return "not measured" if row["state"] == "done" else str(row["state"])


def _tokens(row: Mapping[str, Any]) -> str:
    step = row["step"]
    if step is None:
        return ""
    if not step["bounds"]:
        return "unknown"
    return "as the tree should" if not step["broken"] else f"{len(step['broken'])} of {step['bounds']} bounds broken"


def _case(row: Mapping[str, Any], case: str) -> Mapping[str, Any] | None:
    if row["step"] is None:
        return None
    found = [entry for entry in row["step"]["cases"] if entry["case"] == case and entry["seconds"] is not None]
    return found[-1] if found else None


def _both(row: Mapping[str, Any], beside: Mapping[str, Any] | None, case: str) -> str:
    first, second = _case(row, case), _case(beside, case) if beside is not None else None
    words = " / ".join("-" if found is None else f"{found['seconds']:.2f}" for found in (first, second))
    if second is None:
        return "" if first is None else f"{first['seconds']:.2f}"
    if first is None:
        return words
    return f"{words} ({100 * (first['seconds'] / second['seconds'] - 1):+.0f}%)"


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What is said below the table: why a row is missing, failing smoke checks, broken bounds."""
    notes = []
    if row["failure"]:
        notes.append(f"{row['state']}: {' / '.join(line.strip() for line in row['failure'].splitlines())[:600]}")
    if row["smoke"] and row["smoke"]["failed"]:
        notes += [f"smoke check, {name}: {found}" for name, found in row["smoke"]["failed"].items()]
    if row["step"] and row["step"]["broken"]:
        notes += [f"computed tokens, {broken}" for broken in row["step"]["broken"]]
    return [f"- {row['name']}: {note}" for note in notes]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
