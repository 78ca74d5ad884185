"""Run folders made by hand: small searches whose every number is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_run(
    folder: Path,
    *,
    labels: Sequence[bool],
    gold: Sequence[bool | None] | None = None,
    log_odds: Sequence[float] | None = None,
    zero_shot: Sequence[float] | None = None,
    claims: Sequence[dict[str, Any]] = (),
    constraints: dict[int, list[tuple[int, str]]] | None = None,
    finished: bool = True,
    seeds: int = 4,
    refused: int = 0,
    mirror: float | None = None,
    settings: dict[str, Any] | None = None,
    data: str = "d" * 64,
) -> Path:
    """A search that began with `seeds` random labels (the final ones) and took in one claim an iteration.

    refused: proposals after that which changed nothing. mirror: U of the flipped labels, tried at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = len(labels)
    gold = list(gold) if gold is not None else [None] * size
    odds = list(log_odds) if log_odds is not None else [2.0 if label else -2.0 for label in labels]
    rows: list[dict[str, Any]] = [
        {"row": at, "consistency_id": str(at // 2), "question": f"question {at // 2}", "choice": f"choice {at}"}
        for at in range(size)
    ]
    for row, more in zip(rows, claims, strict=False):
        row.update(more)
    journal: list[dict[str, Any]] = [
        {
            "event": "start",
            "labels": {str(at): labels[at] for at in range(seeds)},
            "scores": {str(at): odds[at] for at in range(seeds)},
            "U": 10.0,
            "asked": seeds,
            "from_cache": 0,
            "tokens_sent": 100,
            "tokens_cached": 40,
            "tokens_computed": 60,
            "seconds": 0.5,
        }
    ]
    for at in range(seeds, size):
        journal.append(_step(at - seeds, at, labels, odds, accepted=True, utility=10.0 + at))
    for extra in range(refused):
        journal.append(_step(size - seeds + extra, 0, labels, odds, accepted=False, utility=10.0 + size - 1))
    last = journal[-1]["U"]
    if mirror is not None:
        journal.append({"event": "mirror", "iteration": size, "U_proposed": mirror, "accepted": False, "U": last})
    shown = {
        "testbed": "claims.jsonl",
        "data_sha256": data,
        "model": "fake-8b",
        "alpha": 50.0,
        "seed": 1,
        "calibrate": "none",
    }
    agreeing = [label == g for label, g in zip(labels, gold, strict=True) if g is not None]
    document: dict[str, Any] = {
        "format": 2,
        "settings": shown | (settings or {}),
        "engine": {"kind": "vllm", "model": "fake-8b", "version": "0.26.0"},
        "environment": {"git": "abc", "packages": {"numpy": "2"}},
        "started": "2026-11-21T19:00:00+0000",
    }
    if finished:
        alone = zero_shot or []
        right = [(value > 0) == g for value, g in zip(alone, gold, strict=False) if g is not None]
        document |= {
            "finished": "2026-11-21T19:10:00+0000",
            "result": {
                "icm": [sum(agreeing), len(agreeing)],
                "zero_shot": [sum(right), len(right)],
                "zero_shot_calibrated": [sum(right), len(right)],
                "predicted": {},
                "U": last,
                "inconsistent": 0,
                "warning": None,
            },
            "cost": {
                "asked": 1000,
                "from_cache": 10,
                "tokens_sent": 100_000,
                "tokens_cached": 90_000,
                "tokens_computed": 10_000,
                "seconds": 60.0,
            },
            "model_api": {"prompt_tokens": 110_000, "engine_prompts": 1100, "requests": 20},
        }
    (folder / "run.json").write_text(json.dumps(document))
    _write_lines(folder / "log.jsonl", journal)
    _write_lines(
        folder / "claims.jsonl",
        [
            row | {"gold": g, "constraints": [list(one) for one in (constraints or {}).get(at, [])]}
            for at, (row, g) in enumerate(zip(rows, gold, strict=True))
        ],
    )
    if finished:
        alone = list(zero_shot) if zero_shot else [None] * size
        _write_lines(
            folder / "labels.jsonl",
            [
                row
                | {"label": labels[at], "log_odds": odds[at], "gold": gold[at], "by": "icm"}
                | ({} if alone[at] is None else {"zero_shot": alone[at]})
                for at, row in enumerate(rows)
            ],
        )
    return folder


def _step(
    iteration: int, claim: int, labels: Sequence[bool], odds: Sequence[float], *, accepted: bool, utility: float
) -> dict[str, Any]:
    taken = range(claim + 1) if accepted else range(len(labels))
    record: dict[str, Any] = {
        "event": "step",
        "iteration": iteration,
        "claim": claim,
        "log_odds": odds[claim],
        "U_proposed": utility if accepted else utility - 3.0,
        "T": 10.0 / (1 + iteration),
        "accepted": accepted,
        "U": utility,
        "predictability": 1.0,
        "inconsistent": 0,
        "labelled": len(taken),
        "true_labels": sum(labels[at] for at in taken),
        "asked": 5,
        "from_cache": 0,
        "tokens_sent": 100,
        "tokens_cached": 90,
        "tokens_computed": 10,
        "seconds": 0.25,
    }
    if accepted:
        record["changes"] = {str(claim): labels[claim]}
        record["scores"] = {str(at): odds[at] for at in taken}
    return record


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
