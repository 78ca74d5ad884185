"""The last check of an engine, kept beside the runs: whether a search can trust this engine's scores to the last bit.

One JSON file an engine, named by a hash of what identifies it, without its fingerprint, which is in the file: so an
engine whose answer to the canary changed since its check is told from one that was never checked, and a model whose
folder was moved is found by its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from core.determinism.asking import Listed
from core.determinism.matrix import Material, Row
from core.files import write_atomically
from core.llm_api.types import EngineIdentity

FORMAT: Final = 1
_NAMED_BY: Final = ("kind", "model", "root", "revision", "version", "determinism")


class Record(BaseModel):
    """A finished check. material: SHA-256 of what was asked. references: logprobs, nats, by token id, a prompt each.

    not_reached: names of rows for which the time was too short.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: int
    engine: dict[str, str | int | None]
    finished: str
    quick: bool
    passed: bool
    rows: list[dict[str, Any]]
    material: str
    references: list[dict[int, float]]
    not_reached: list[str] = []

    @property
    def failed_rows(self) -> list[str]:
        """Names of the rows in which something differed."""
        return [row["name"] for row in self.rows if row["compared"]["differing"]]

    def failed_in(self, rows: Sequence[str], identity: EngineIdentity) -> bool:
        """Whether one of these rows failed when this engine, as it answers now, was checked."""
        return self.engine.get("fingerprint") == identity.fingerprint and not set(self.failed_rows).isdisjoint(rows)

    def summary(self) -> dict[str, object]:
        """For a run's manifest."""
        summary: dict[str, object] = {"finished": self.finished, "quick": self.quick, "passed": self.passed}
        return {
            **summary,
            "failed_rows": self.failed_rows,
            **({"not_reached": self.not_reached} if self.not_reached else {}),
        }


def record_path(folder: Path, identity: EngineIdentity) -> Path:
    """Where the last check of this engine is kept."""
    named = [getattr(identity, name) for name in _NAMED_BY]
    if identity.unusual_dtype:
        named.append(identity.unusual_dtype)
    return folder / f"{hashlib.sha256(orjson.dumps(named)).hexdigest()[:16]}.json"


def read_record(folder: Path, identity: EngineIdentity) -> Record | None:
    """The last check of an engine with this content, under any path and name; else the one under this engine's name.

    None where no such file exists, or this version cannot read it.
    """
    own = record_path(folder, identity)
    named = _read(own)
    if named is not None and _is_of(named, identity):
        return named
    others = [_read(path) for path in sorted(folder.glob("*.json")) if path != own]
    alike = [record for record in others if record is not None and _is_of(record, identity)]
    return max(alike, key=lambda record: record.finished, default=named)


def _is_of(record: Record, identity: EngineIdentity) -> bool:
    unusual = str(record.engine.get("dtype", "")).replace("bfloat16", "")
    return unusual == identity.unusual_dtype and identity.has_content_of(record.engine)


def _read(path: Path) -> Record | None:
    try:
        record = Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return record if record.format == FORMAT else None


def write_record(
    folder: Path,
    identity: EngineIdentity,
    material: Material,
    rows: Sequence[Row],
    references: Sequence[Listed],
    *,
    finished: str,
    quick: bool,
    not_reached: Sequence[str] = (),
) -> Record:
    """Keep a finished check; returns it."""
    record = Record(
        format=FORMAT,
        engine=asdict(identity),
        finished=finished,
        quick=quick,
        passed=all(not row.compared.differing for row in rows),
        rows=[row_record(row) for row in rows],
        material=material.digest,
        references=[dict(listed) for listed in references],
        not_reached=list(not_reached),
    )
    write_atomically(record_path(folder, identity), orjson.dumps(record.model_dump(), option=orjson.OPT_NON_STR_KEYS))
    return record


def row_record(row: Row) -> dict[str, Any]:
    """One row for JSON, with None for infinity."""
    compared = asdict(row.compared) | {"acceptance_changed": row.compared.acceptance_changed}
    finite = {name: value if value != float("inf") else None for name, value in compared.items()}
    return {"name": row.name, "cached": row.cached, "compared": finite}


def doubt(record: Record | None, identity: EngineIdentity) -> str | None:
    """What a user should know before trusting this engine's scores to the last bit; None: it passed its check."""
    how = "python scripts/test_determinism.py checks it (--quick: in a minute)"
    if record is None:
        return f"this engine was never checked for determinism; {how}"
    if record.engine.get("fingerprint") != identity.fingerprint:
        return f"this engine's answers have changed since it was checked on {record.finished}; {how}"
    if not record.passed:
        return (
            f"this engine failed its determinism check on {record.finished} in {len(record.failed_rows)} of "
            f"{len(record.rows)} rows: scores depend on what else it computes (docs/determinism.md)"
        )
    if record.not_reached:
        return (
            f"this engine passed {len(record.rows)} rows of its determinism check on {record.finished}, and "
            f"its time did not allow {len(record.not_reached)} more; {how}"
        )
    return None


def needs_check(record: Record | None, identity: EngineIdentity, *, whole: bool = True) -> bool:
    """Whether this engine, as it answers now, lacks a passed check. whole: a check that was cut short is not enough."""
    if record is not None and not whole:
        record = record.model_copy(update={"not_reached": []})
    return doubt(record, identity) is not None


def manifest_entry(identity: EngineIdentity, record: Record | None) -> Mapping[str, object]:
    """The last check as a run's manifest holds it."""
    return {"doubt": doubt(record, identity), **(record.summary() if record is not None else {})}
