"""Caches as earlier versions wrote them, column by column."""

from __future__ import annotations

import sqlite3
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from core.llm_api.response_cache import MIGRATIONS
from core.llm_api.types import TokenLogprobs


def old_cache(path: Path, answers: Mapping[bytes, TokenLogprobs], version: int = 1) -> None:
    """A cache of format 1, 2 or 3: its rows have a column for each of two labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path)
    for migration in MIGRATIONS[:version]:
        db.execute(migration)
    rows = [
        (key, *answer.values, int(answer.floored), checksum(key, *answer.values, answer.floored))
        for key, answer in answers.items()
    ]
    columns = "key, true_logprob, false_logprob, floored, checksum"
    db.executemany(f"INSERT INTO answers ({columns}) VALUES (?, ?, ?, ?, ?)", rows)
    db.execute(f"PRAGMA user_version={version}")
    db.commit()
    db.close()


def checksum(key: bytes, true: float, false: float, floored: bool) -> int:
    """As versions before labels were counted made it."""
    return zlib.crc32(key + struct.pack(">dd?", true + 0.0, false + 0.0, floored))
