"""Where exported labels come from: the run, its model, its settings, how far it agreed with gold; as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import orjson

from core.files import write_atomically
from src.results.rows import ABSTAINED
from src.results.run_record import LabelledClaim, RunRecord
from src.results.tables import results_of

METHOD: Final = "Internal Coherence Maximization (Wen et al. 2025, arXiv 2506.10139)"
FILE: Final = "provenance.json"
"""Its name in a folder that is exported."""
ENGINE: Final = ("kind", "model", "version", "revision", "dtype", "fingerprint", "config")
"""What is told of an engine: nothing that is only a path on the machine that it ran on."""


def provenance_of(run: RunRecord, claims: Iterable[LabelledClaim]) -> dict[str, Any]:
    """What made the labels of `claims`, which are exported of `run`.

    by: how many labels each origin gave: the search ("icm", "vote"), the pool's labels ("predicted", "many-shot"),
    people ("known"), or none, where a label is withheld ("abstained"). offset: of the log-odds, nats: what was
    subtracted to calibrate them; a list of numbers where there are more than two labels. U: null where the run holds
    several searches or is not finished. agreement: with gold, as (agreeing, compared) by what gave the labels.
    """
    written = list(claims)
    result = run.result or {}
    return {
        "run": run.name,
        "method": METHOD,
        "finished": run.finished,
        "model": run.model,
        "engine": {name: run.engine[name] for name in ENGINE if run.engine.get(name)},
        "search": run.search,
        "calibration": str(run.settings.get("calibrate", "none")),
        "prior": run.prior,
        "offset": run.offset,
        **({"offsets": {f"batch-{batch:03d}": offset for batch, offset in run.offsets.items()}} if run.offsets else {}),
        "U": None if run.parts else result.get("U"),
        "testbed": run.testbed,
        "labels": list(run.names),
        "label_texts": list(run.texts),
        "claims": len(written),
        "left_out": len(run.claims) - len(written),
        "by": dict(Counter(ABSTAINED if claim.abstained else claim.by for claim in written)),
        "agreement": {row.title: [row.agreeing, row.compared] for row in results_of(run) if row.compared},
        "code": run.environment.get("git"),
        "settings": dict(run.settings),
    }


def beside(path: Path) -> Path:
    """The provenance of an exported file: labels.jsonl has labels.provenance.json."""
    return path.with_name(f"{path.stem}.{FILE}")


def write_provenance(path: Path, run: RunRecord, claims: Iterable[LabelledClaim]) -> None:
    """Write provenance_of as a JSON file."""
    write_atomically(path, orjson.dumps(provenance_of(run, claims), option=orjson.OPT_INDENT_2) + b"\n")
