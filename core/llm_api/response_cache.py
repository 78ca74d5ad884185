"""Answers kept across runs, keyed by everything that determines them: SQLite, safe for several processes at once.

A key is the SHA-256 of who was asked (EngineIdentity), what (the prompt's digest) and for which tokens; no run name, no
iteration, so an edited template or a restarted server with other weights can never read an outdated score. A model is
known by its content, not by where its folder lies (cache_keys). A row carries a checksum; a row that fails it is a
miss, counted, and answered anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import orjson

from core.errors import APIError, ConfigurationError, StorageFailed
from core.llm_api.http.completions import PARSER_VERSION
from core.llm_api.types import EngineIdentity, NextTokens, TokenLogprobs

log = logging.getLogger(__name__)

BUSY_TIMEOUT: Final = 30.0
"""Seconds to wait for another process that is writing."""
CHECKPOINT_PAGES: Final = 4000
"""Pages of 4 KiB in the log until they are moved into the file and synced. Keys are random, so every answer changes a
page; with SQLite's default of 1000 writing a row took 62 us in place of 37, measured together on a busy disk."""
_PAIR: Final = struct.Struct(">dd?")
_COLUMNS: Final = "key, first_logprob, last_logprob, logprobs, floored, checksum"
_KEYS_PER_QUERY: Final = 500  # SQLite before 3.32 takes at most 999 parameters

MIGRATIONS: Final = (
    """
    CREATE TABLE answers (
        key BLOB PRIMARY KEY,
        true_logprob REAL NOT NULL,
        false_logprob REAL NOT NULL,
        floored INTEGER NOT NULL,
        checksum INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    # Unix seconds; 0 for answers that were there before.
    "ALTER TABLE answers ADD COLUMN stored INTEGER NOT NULL DEFAULT 0",
    # How many answers were stored under earlier_keys before keys by content were introduced.
    "CREATE TABLE earlier AS SELECT count(*) AS answers FROM answers",
    # Log-probabilities of any number of tokens. Two are in the columns of the former two labels, which are renamed; of
    # another number these hold the first and the last, and `logprobs` all of them.
    "ALTER TABLE answers RENAME COLUMN true_logprob TO first_logprob",
    "ALTER TABLE answers RENAME COLUMN false_logprob TO last_logprob",
    "ALTER TABLE answers ADD COLUMN logprobs BLOB",
)
"""Number n (from 0) turns format n into format n + 1, which PRAGMA user_version tells. Only ever appended to."""
FORMAT_VERSION: Final = len(MIGRATIONS)


@dataclass(frozen=True, slots=True)
class CacheState:
    """What a cache holds. damaged: rows that fail their checksum. floored: see TokenLogprobs. oldest, newest: Unix
    seconds, of rows that have a time. bytes: of the file and its log. faults: of the file itself, in SQLite's words."""

    rows: int
    damaged: int
    floored: int
    oldest: int | None
    newest: int | None
    bytes: int
    faults: tuple[str, ...]


def can_be_made(path: Path) -> bool:
    """Whether there is no file yet, and the nearest folder above that exists can be written to."""
    try:
        if os.path.lexists(path):
            return False
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        return above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    except (OSError, ValueError):  # such as a name that is too long
        return False


def cache_keys(identity: EngineIdentity, tokens: NextTokens, prompt_digests: Sequence[str]) -> list[bytes]:
    """SHA-256, 32 bytes, of the canonical JSON of all that determines each prompt's answer to a query for `tokens`.

    An engine with a fingerprint is identified by content, not by the path or name of its model. Can other weights have
    the same fingerprint? It holds the log-probabilities of some six tokens, or twenty, after the canary to 1e-4 nat.

    - Nearly every weight has a part in each of these numbers, so fine-tuned, quantized or pruned weights and trained
      LoRA adapters beside one base model change some of them. A copy, or an adapter that was not trained, changes none,
      and no score either.
    - Neighbouring checkpoints agree on all of them only if they differ by less than rounding in the model's type. Their
      scores then differ by what an inexact server differs from itself (docs/determinism.md).
    - Weights that the canary does not use are not seen: experts that it is not routed to, embeddings of other tokens.
      Changing only those needs another MODEL_REVISION.
    - What shows only in longer prompts is in the configuration: windows, scaled positions, and the KV cache's type,
      which the engine states with `config`. A server without our extension does not: there a change of the model's
      configuration needs another MODEL_REVISION.

    So the fingerprint stands beside what the user or the engine states: revision, vLLM's version, kernels, type,
    configuration. The kind stays, too: an engine in this process fingerprints other tokens than a server's client does.
    Without a fingerprint (an external API) the key is that of earlier_keys.

    max_model_len is left out: it decides whether a prompt is answered, not what is answered.
    """
    if not identity.fingerprint:
        return earlier_keys(identity, tokens, prompt_digests)
    known_by = ("kind", "revision", "version", "determinism", "fingerprint", "dtype", "config")
    return _keys({name: getattr(identity, name) for name in known_by}, tokens, prompt_digests)


def earlier_keys(identity: EngineIdentity, tokens: NextTokens, prompt_digests: Sequence[str]) -> list[bytes]:
    """The keys up to format 2, by the model's path and name, so that answers stored then are still found."""
    named_by = ("kind", "model", "root", "revision", "version", "determinism", "fingerprint")
    engine = {name: getattr(identity, name) for name in named_by}
    if identity.unusual_dtype:
        engine["dtype"] = identity.unusual_dtype
    return _keys(engine, tokens, prompt_digests)


def _keys(engine: Mapping[str, str], tokens: NextTokens, prompt_digests: Sequence[str]) -> list[bytes]:
    content = {
        "engine": engine,
        "labels": [*tokens.texts, *(tokens.token_ids or [None] * len(tokens))],
        "prompt": "",
        "parser": PARSER_VERSION,
    }
    # The prompt comes last in sorted order, and a digest needs no escapes.
    shared = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS).removesuffix(b'"}'))
    keys = []
    for digest in prompt_digests:
        state = shared.copy()
        state.update(digest.encode() + b'"}')
        keys.append(state.digest())
    return keys


class CacheBusy(StorageFailed):
    """Another process has the file for itself. Nothing was read or written."""


class ResponseCache:
    """A SQLite file of answers, opened (and created) at once; use from one thread. Every call blocks up to BUSY_TIMEOUT
    while another process is writing; for an event loop there is AnswerStore.

    damaged: bad rows read so far. has_earlier: whether it may hold answers under earlier_keys.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.damaged = 0
        self.has_earlier = False
        self._is_open = False
        with self._named_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise
        self._is_open = True

    def __repr__(self) -> str:
        return f"ResponseCache({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_no_more(self) -> None:
        """From now on a call that would have to wait for another process raises CacheBusy."""
        with self._named_errors():
            self._db.execute("PRAGMA busy_timeout=0")

    def get_many(self, keys: Sequence[bytes]) -> dict[bytes, TokenLogprobs]:
        """The stored answers, by key; one query for every 500 keys. Raises StorageFailed where that fails."""
        found: dict[bytes, TokenLogprobs] = {}
        with self._named_errors():
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                some = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(some))
                query = f"SELECT {_COLUMNS} FROM answers WHERE key IN ({marks})"  # noqa: S608 - only question marks
                for key, *row in self._db.execute(query, some):
                    answer = _decode(key, *row)
                    if answer is None:
                        self._report_damage()
                    else:
                        found[key] = answer
        return found

    def put_many(self, answers: Mapping[bytes, TokenLogprobs]) -> None:
        """Store answers in one transaction, replacing earlier ones. Raises StorageFailed where that fails."""
        now = int(time.time())
        rows = [(key, *_encode(key, answer), now) for key, answer in answers.items()]
        if rows:
            with self._named_errors(), self._transaction():
                self._db.executemany(
                    f"INSERT OR REPLACE INTO answers ({_COLUMNS}, stored) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                    rows,
                )

    def __len__(self) -> int:
        """Number of rows, damaged ones included."""
        with self._named_errors():
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    def state(self) -> CacheState:
        """Look at every row and at the file itself."""
        rows = damaged = floored = 0
        with self._named_errors():
            faults = tuple(str(row[0]) for row in self._db.execute("PRAGMA integrity_check") if row[0] != "ok")
            for key, *row in self._db.execute(f"SELECT {_COLUMNS} FROM answers"):  # noqa: S608
                answer = _decode(key, *row)
                rows += 1
                damaged += answer is None
                floored += answer is not None and answer.floored
            [(oldest, newest)] = self._db.execute("SELECT min(stored), max(stored) FROM answers WHERE stored > 0")
        parts = (self.path, self.path.with_name(self.path.name + "-wal"))
        size = sum(part.stat().st_size for part in parts if part.exists())
        return CacheState(rows, damaged, floored, oldest, newest, size, faults)

    def prune(self, *, before: float | None = None, damaged: bool = False) -> int:
        """Remove answers stored before `before` (Unix seconds; those without a time are older than all), and those
        that fail their checksum; give the space back. Returns the number of rows removed."""
        with self._named_errors():
            with self._transaction():
                bad = [
                    (key,)
                    for key, *rest in self._db.execute(f"SELECT {_COLUMNS} FROM answers")  # noqa: S608
                    if damaged and _decode(key, *rest) is None
                ]
                start = self._db.total_changes
                self._db.executemany("DELETE FROM answers WHERE key = ?", bad)
                if before is not None:
                    self._db.execute("DELETE FROM answers WHERE stored < ?", (int(before),))
                removed = self._db.total_changes - start
            self._db.execute("VACUUM")
        return removed

    def close(self) -> None:
        """Close the file; idempotent."""
        self._db.close()

    def _prepare(self) -> None:
        _enter_wal(self._db)
        # A power cut may lose the last answers but not corrupt the file; they are asked for again.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        if self._version() != FORMAT_VERSION:
            self._migrate()
        self.has_earlier = bool(self._db.execute("SELECT answers FROM earlier").fetchone()[0])

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _migrate(self) -> None:
        with self._transaction():
            version = self._version()  # under the lock: once
            if version > FORMAT_VERSION:
                raise ConfigurationError(
                    f"{self.path} was written by a newer version (format {version}, this one reads {FORMAT_VERSION}).",
                    hint="Upgrade, or use another cache_path.",
                )
            if version == 0 and self._db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                raise ConfigurationError(
                    f"{self.path} is a SQLite database of something else.", hint="Use another cache_path."
                )
            if version < FORMAT_VERSION:
                for migration in MIGRATIONS[version:]:
                    self._db.execute(migration)
                self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        # IMMEDIATE takes the write lock first: a lock taken halfway fails at once instead of waiting.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it by itself
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        # A file that cannot be opened is a wrong setting; a later failure stops a run, which can go on once it is
        # fixed.
        kind: type[APIError] = StorageFailed if self._is_open else ConfigurationError
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, read-only, disk full, no such directory
            if self._is_open and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                kind = CacheBusy
            raise kind(
                f"cannot use the cache {self.path}: {error}.", hint="Free it, or use another cache_path."
            ) from error
        except sqlite3.DatabaseError as error:
            raise kind(
                f"the cache {self.path} is damaged or no database: {error}.", hint="Move it away; a new one is made."
            ) from error
        except OSError as error:
            raise kind(f"cannot use the cache {self.path}: {error.strerror}.") from error

    def _report_damage(self) -> None:
        self.damaged += 1
        if self.damaged == 1:
            log.warning("%s holds damaged rows; they are asked for again", self.path)


def _enter_wal(db: sqlite3.Connection) -> None:
    """Switch to write-ahead logging. SQLite does not wait here when two processes create the file at once."""
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


def _checksum(key: bytes, values: Sequence[float], floored: bool) -> int:
    # SQLite gives -0.0, the logprob of a certain token, back as 0.0; adding 0.0 makes both the same bits.
    if len(values) == 2:
        return zlib.crc32(key + _PAIR.pack(values[0] + 0.0, values[1] + 0.0, floored))
    return zlib.crc32(key + _packed([value + 0.0 for value in values]) + bytes([floored]))


def _packed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}d", *values)


def _encode(key: bytes, answer: TokenLogprobs) -> tuple[float, float, bytes | None, bool, int]:
    """A row, less its key and its time."""
    values, floored = answer.values, answer.floored
    packed = None if len(values) == 2 else _packed(values)
    return values[0], values[-1], packed, floored, _checksum(key, values, floored)


def _decode(key: Any, first: Any, last: Any, packed: Any, floored: Any, checksum: Any) -> TokenLogprobs | None:
    try:
        values = (first, last) if packed is None else struct.unpack(f">{len(packed) // 8}d", packed)
        if checksum != _checksum(key, values, bool(floored)):
            return None
        return TokenLogprobs(values, bool(floored))
    except (TypeError, ValueError, struct.error):
        return None
