"""Answers kept across runs, keyed by everything that determines them: SQLite, safe for several processes at once.

A key is the SHA-256 of who was asked (EngineIdentity), what (the prompt's digest) and for which labels; no run name, no
iteration, so an edited template or a restarted server with other weights can never read a stale score. A row carries a
checksum; a row that fails it is a miss, counted, and answered anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from core.llm_api.completions import PARSER_VERSION
from core.llm_api.errors import ConfigurationError
from core.llm_api.types import EngineIdentity, LabelLogprobs, LabelTokens

log = logging.getLogger(__name__)

FORMAT_VERSION: Final = 1
"""Of the database's layout, kept in PRAGMA user_version."""
BUSY_TIMEOUT: Final = 30.0
"""Seconds to wait for another process that is writing."""
_KEYS_PER_QUERY: Final = 500  # SQLite before 3.32 takes at most 999 parameters

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY,
    true_logprob REAL NOT NULL,
    false_logprob REAL NOT NULL,
    floored INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID
"""


def cache_key(identity: EngineIdentity, labels: LabelTokens, prompt_digest: str) -> bytes:
    """SHA-256, 32 bytes, of the canonical JSON of all that determines an answer.

    max_model_len is left out: it decides whether a prompt is answered, not what is answered.
    """
    content = {
        "engine": {
            "kind": identity.kind,
            "model": identity.model,
            "root": identity.root,
            "revision": identity.revision,
            "version": identity.version,
            "determinism": identity.determinism,
            "fingerprint": identity.fingerprint,
        },
        "labels": [labels.true, labels.false, labels.true_id, labels.false_id],
        "prompt": prompt_digest,
        "parser": PARSER_VERSION,
    }
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).digest()


class ResponseCache:
    """A SQLite file of answers, opened (and created) at once; use from one thread. `damaged` counts bad rows met."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.damaged = 0
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def __repr__(self) -> str:
        return f"ResponseCache({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, LabelLogprobs]:
        """The answers that are there, by key; one query for every 500 keys. Raises ConfigurationError on a bad file."""
        found: dict[bytes, LabelLogprobs] = {}
        with self._named_errors():
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                some = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(some))
                query = f"SELECT * FROM answers WHERE key IN ({marks})"  # noqa: S608 - only question marks
                for key, true, false, floored, checksum in self._db.execute(query, some):
                    answer = _decode(key, true, false, floored, checksum)
                    if answer is None:
                        self._report_damage()
                    else:
                        found[key] = answer
        return found

    def put_many(self, answers: Mapping[bytes, LabelLogprobs]) -> None:
        """Store answers in one transaction, over what was there. Raises ConfigurationError where it cannot."""
        rows = [
            (key, a.true, a.false, int(a.floored), _checksum(key, a.true, a.false, a.floored))
            for key, a in answers.items()
        ]
        if rows:
            with self._named_errors(), self._transaction():
                self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        """Number of rows, damaged ones included."""
        with self._named_errors():
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    def _prepare(self) -> None:
        _enter_wal(self._db)
        # A power cut may lose the last answers but not corrupt the file; they are asked for again.
        self._db.execute("PRAGMA synchronous=NORMAL")
        with self._transaction():
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version > FORMAT_VERSION:
                raise ConfigurationError(
                    f"{self.path} was written by a newer version (format {version}, this one reads {FORMAT_VERSION}).",
                    hint="Upgrade, or use another cache_path.",
                )
            if version == 0 and self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                raise ConfigurationError(
                    f"{self.path} is a SQLite database of something else.", hint="Use another cache_path."
                )
            self._db.execute(_CREATE)
            self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock first: a lock taken halfway fails at once instead of waiting.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it by itself
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, read-only, disk full, no such directory
            raise ConfigurationError(
                f"cannot use the cache {self.path}: {error}.", hint="Free it, or use another cache_path."
            ) from error
        except sqlite3.DatabaseError as error:
            raise ConfigurationError(
                f"the cache {self.path} is damaged or no database: {error}.", hint="Move it away; a new one is made."
            ) from error
        except OSError as error:
            raise ConfigurationError(f"cannot use the cache {self.path}: {error.strerror}.") from error

    def _report_damage(self) -> None:
        self.damaged += 1
        if self.damaged == 1:
            log.warning("%s holds damaged rows; they are asked for again", self.path)


def _enter_wal(db: sqlite3.Connection) -> None:
    """Switch to write-ahead logging. Two processes that create the file at once may collide here, where SQLite does
    not wait for the other by itself."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _checksum(key: bytes, true: float, false: float, floored: bool) -> int:
    # SQLite gives -0.0, the logprob of a certain token, back as 0.0; adding 0.0 makes both the same bits.
    return zlib.crc32(key + struct.pack(">dd?", true + 0.0, false + 0.0, floored))


def _decode(key: Any, true: Any, false: Any, floored: Any, checksum: Any) -> LabelLogprobs | None:
    try:
        if checksum != _checksum(key, true, false, bool(floored)):
            return None
        return LabelLogprobs(true, false, bool(floored))
    except (TypeError, ValueError, struct.error):
        return None
