from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import os
import sqlite3
from pathlib import Path

import orjson
import pytest

from core.errors import ConfigurationError, StorageFailed
from core.llm_api import response_cache
from core.llm_api.response_cache import ResponseCache, cache_keys, earlier_keys
from core.llm_api.types import EngineIdentity, NextTokens, TokenLogprobs
from tests.core.old_cache import checksum, old_cache
from tests.core.two_labels import pair, two

IDENTITY = EngineIdentity("vllm", "m", "/r", "rev", "1", "det", "print", 100)
LABELS = two(1, 2).asked


def cache_key(identity: EngineIdentity, tokens: NextTokens, digest: str) -> bytes:
    return cache_keys(identity, tokens, [digest])[0]


def key(i: int) -> bytes:
    return cache_key(IDENTITY, LABELS, f"{i:064x}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache.sqlite"


def test_answers_come_back_exactly_and_survive_closing(path: Path) -> None:
    answers = {key(i): pair(-0.1 - i / 3, -(2.0**-40) * i, floored=i % 2 == 1) for i in range(1200)}
    with ResponseCache(path) as cache:
        cache.put_many(answers)
    with ResponseCache(path) as cache:
        assert cache.get_many([*answers, key(9999)]) == answers
        assert len(cache) == 1200
        assert cache.get_many([]) == {}
        cache.put_many({})


def test_a_second_answer_replaces_the_first(path: Path) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(0): pair(-1, -2, floored=True)})
        cache.put_many({key(0): pair(-3, -4)})
        assert cache.get_many([key(0)]) == {key(0): pair(-3, -4)}


def test_one_query_for_hundreds_of_keys(path: Path) -> None:
    with ResponseCache(path) as cache:
        statements: list[str] = []
        cache._db.set_trace_callback(statements.append)
        cache.get_many([key(i) for i in range(400)])
        assert len(statements) == 1
        statements.clear()
        cache.get_many([key(i) for i in range(1001)])
        assert [statement.count("X'") + statement.count("x'") for statement in statements] == [500, 500, 1]
        statements.clear()
        cache.put_many({key(i): pair(-1, -2) for i in range(400)})
        assert [s for s in statements if not s.startswith("INSERT")] == ["BEGIN IMMEDIATE", "COMMIT"]


@pytest.mark.parametrize("name", ["kind", "revision", "version", "determinism", "fingerprint", "dtype", "config"])
def test_all_that_is_known_of_an_engines_content_is_in_the_key(name: str) -> None:
    assert cache_key(dataclasses.replace(IDENTITY, **{name: "other"}), LABELS, "d") != cache_key(IDENTITY, LABELS, "d")


@pytest.mark.parametrize("name", ["model", "root", "max_model_len"])
def test_a_model_that_was_moved_or_is_served_under_another_name_is_the_same(name: str) -> None:
    moved = dataclasses.replace(IDENTITY, **{name: 7 if name == "max_model_len" else "other"})
    assert cache_keys(moved, LABELS, ["d", "e"]) == cache_keys(IDENTITY, LABELS, ["d", "e"])


@pytest.mark.parametrize("name", ["kind", "model", "root", "revision", "version", "determinism", "fingerprint"])
def test_every_field_of_the_identity_is_in_the_keys_of_earlier_versions(name: str) -> None:
    other = dataclasses.replace(IDENTITY, **{name: "other"})
    assert earlier_keys(other, LABELS, ["d"]) != earlier_keys(IDENTITY, LABELS, ["d"])


def test_an_engine_without_a_fingerprint_is_known_by_its_name_and_address() -> None:
    api = EngineIdentity("openai-compatible", "m", "http://x")
    assert cache_keys(api, LABELS, ["d"]) == earlier_keys(api, LABELS, ["d"])
    assert cache_key(dataclasses.replace(api, root="http://y"), LABELS, "d") != cache_key(api, LABELS, "d")


def test_the_key_knows_labels_prompt_and_parser_but_not_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = cache_key(IDENTITY, LABELS, "d")
    assert len(base) == 32
    assert cache_key(dataclasses.replace(IDENTITY, max_model_len=5), LABELS, "d") == base
    # Every answer was one in bfloat16 before types were noted.
    [earlier] = earlier_keys(IDENTITY, LABELS, ["d"])
    assert earlier_keys(dataclasses.replace(IDENTITY, dtype="bfloat16"), LABELS, ["d"]) == [earlier]
    assert earlier_keys(dataclasses.replace(IDENTITY, dtype="float32"), LABELS, ["d"]) != [earlier]
    swapped = two(2, 1).asked
    others = {cache_key(IDENTITY, swapped, "d"), cache_key(IDENTITY, LABELS, "e")}
    others.add(cache_key(IDENTITY, NextTokens(("Yes", "No"), (1, 2)), "d"))
    monkeypatch.setattr(response_cache, "PARSER_VERSION", 99)
    others.add(cache_key(IDENTITY, LABELS, "d"))
    assert len(others | {base}) == 5


def test_keys_and_checksums_are_those_of_caches_that_exist() -> None:
    """Another spelling of what is hashed would ask every answer again."""
    assert response_cache.PARSER_VERSION == 1, "then the keys below are others, too"
    [earlier] = earlier_keys(IDENTITY, LABELS, ["d"])
    assert earlier.hex() == "21cf7046c504e160ac94b704daec532fb5af609fa44c035dcebbd81e8561b0de"
    assert cache_key(IDENTITY, LABELS, "d").hex() == "a9934cfeb9b56428f780e1400b5dd9107b407e01636237b156844b8588298cc8"
    assert response_cache._encode(b"key", pair(-0.5, -1.25, True)) == (-0.5, -1.25, None, 1, 3447029096)
    assert checksum(b"key", -0.5, -1.25, True) == 3447029096
    certain, rounded = (response_cache._encode(b"key", pair(value, value)) for value in (-0.0, 0.0))
    assert certain == rounded


@pytest.mark.parametrize(
    "damage", ["first_logprob = -0.5", "floored = 1", "checksum = checksum + 1", "last_logprob = 'x'"]
)
def test_a_damaged_row_is_a_miss_counted_and_reported_once(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(i): pair(-1, -2) for i in range(3)})
        cache._db.execute(f"UPDATE answers SET {damage} WHERE key IN (?, ?)", (key(0), key(1)))
        with caplog.at_level(logging.WARNING):
            assert set(cache.get_many([key(0), key(1), key(2)])) == {key(2)}
        assert cache.damaged == 2
        assert len(caplog.records) == 1
        cache.put_many({key(0): pair(-7, -8)})
        assert cache.get_many([key(0)]) == {key(0): pair(-7, -8)}


def test_damage_is_reported_when_it_is_first_met(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(i): pair(-1, -2) for i in range(3)})
        cache._db.execute("UPDATE answers SET first_logprob = -0.5")
        with caplog.at_level(logging.WARNING):
            for met in range(3):
                cache.get_many([key(met)])
                assert (cache.damaged, len(caplog.records)) == (met + 1, 1)


def test_a_row_under_anothers_key_is_damaged(path: Path) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(0): pair(-1, -2)})
        cache._db.execute("UPDATE answers SET key = ?", (key(1),))
        assert cache.get_many([key(1)]) == {}


def test_wal_and_version(path: Path) -> None:
    ResponseCache(path).close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA user_version").fetchone() == (6,)
    db.execute("PRAGMA user_version=7")
    db.close()
    with pytest.raises(ConfigurationError, match="newer version"):
        ResponseCache(path)


def test_how_the_file_is_opened(path: Path) -> None:
    with ResponseCache(path.parent / "deeper" / "cache.sqlite") as cache:
        assert cache._db.execute("PRAGMA busy_timeout").fetchone() == (30_000,)
        assert cache._db.execute("PRAGMA synchronous").fetchone() == (1,), "NORMAL"
        assert repr(cache) == f"ResponseCache({str(cache.path)!r})"


class Colliding:
    """A connection whose first switches to write-ahead logging meet another process."""

    def __init__(self, times: int, message: str = "database is locked") -> None:
        self.times, self.message, self.asked = times, message, 0

    def execute(self, statement: str) -> None:
        assert statement == "PRAGMA journal_mode=WAL"
        self.asked += 1
        if self.asked <= self.times:
            raise sqlite3.OperationalError(self.message)


def test_two_that_create_a_cache_at_once_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = iter(range(1000))
    monkeypatch.setattr(response_cache.time, "sleep", slept.append)
    monkeypatch.setattr(response_cache.time, "monotonic", lambda: float(next(clock)))
    short = Colliding(3)
    response_cache._enter_wal(short)  # type: ignore[arg-type]
    assert (short.asked, slept) == (4, [0.01] * 3)
    forever = Colliding(1000)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        response_cache._enter_wal(forever)  # type: ignore[arg-type]
    assert forever.asked == 31, "the clock moves a second each time that it is read"
    broken = Colliding(1000, "disk I/O error")
    with pytest.raises(sqlite3.OperationalError, match="I/O"):
        response_cache._enter_wal(broken)  # type: ignore[arg-type]
    assert broken.asked == 1


def test_a_file_that_is_refused_is_closed(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is text, not SQLite " * 100)
    with pytest.raises(ConfigurationError) as refused:
        ResponseCache(path)
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert refused.traceback, "which still knows the connection"
    assert str(path) not in held


def test_a_file_that_is_no_database(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is text, not SQLite " * 100)
    with pytest.raises(ConfigurationError, match=r"cache.sqlite.*[Mm]ove it away"):
        ResponseCache(path)


def test_a_corrupt_database(path: Path) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(i): pair(-1, -2) for i in range(2000)})
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    path.write_bytes(content)
    damage = (ConfigurationError, StorageFailed)  # met at once, or when a row is read
    with pytest.raises(damage, match=r"[Mm]ove it away"), ResponseCache(path) as cache:
        cache.get_many([key(i) for i in range(2000)])


def test_somebody_elses_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.commit()
    db.close()
    with pytest.raises(ConfigurationError, match="something else"):
        ResponseCache(path)


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot use the cache"):
        ResponseCache(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot use the cache"):
        ResponseCache(tmp_path / "file" / "cache.sqlite")


def test_a_lock_held_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_cache, "BUSY_TIMEOUT", 0.05)
    with ResponseCache(path) as cache:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StorageFailed, match="locked"):
            cache.put_many({key(0): pair(-1, -2)})
        other.execute("ROLLBACK")
        other.close()
        cache.put_many({key(0): pair(-1, -2)})  # the failed transaction is not left open


def test_a_transaction_that_fails_halfway_leaves_nothing(path: Path) -> None:
    with ResponseCache(path) as cache:
        abort = "BEGIN SELECT RAISE(ABORT, 'no'); END"
        cache._db.execute(f"CREATE TRIGGER t BEFORE INSERT ON answers WHEN new.first_logprob < -8 {abort}")
        with pytest.raises(StorageFailed):
            cache.put_many({key(0): pair(-1, -2), key(1): pair(-9, -2)})
        assert len(cache) == 0
        cache.put_many({key(0): pair(-1, -2)})
        assert len(cache) == 1


def _write(path: str, worker: int) -> None:
    with ResponseCache(path) as cache:
        for i in range(40):
            cache.put_many({key(1000 * worker + i): pair(-worker - 1, -i), key(5): pair(-1, -2)})
            assert key(5) in cache.get_many([key(5)])


def test_several_processes_at_once(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(path), n)) for n in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with ResponseCache(path) as cache:
        assert len(cache) == 3 * 40 + 1
        assert cache.get_many([key(2039)]) == {key(2039): pair(-3, -39)}


# Any number of tokens


VALUES = ((-0.5,), (-0.1, -2.5, -0.0), tuple(-1.0 - n / 7 for n in range(20)))


def test_answers_of_any_number_of_tokens(path: Path) -> None:
    answers = {key(at): TokenLogprobs(values, floored=at == 1) for at, values in enumerate(VALUES)}
    answers[key(9)] = pair(-1, -2)
    with ResponseCache(path) as cache:
        cache.put_many(answers)
    with ResponseCache(path) as cache:
        assert cache.get_many(list(answers)) == answers
        state = cache.state()
        assert (state.rows, state.damaged, state.floored) == (4, 0, 1)
        assert cache._db.execute("SELECT count(*) FROM answers WHERE logprobs IS NULL").fetchone() == (1,)


@pytest.mark.parametrize(
    "damage",
    ["logprobs = NULL", "logprobs = x'0102'", "logprobs = substr(logprobs, 9)", "logprobs = 7", "floored = 1"],
)
def test_a_damaged_row_of_many_is_a_miss(path: Path, damage: str) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(0): TokenLogprobs(VALUES[1])})
        cache._db.execute(f"UPDATE answers SET {damage}")
        assert cache.get_many([key(0)]) == {}
        assert cache.damaged == 1


def test_keys_tell_tokens_of_any_number_apart() -> None:
    tokens = [
        NextTokens(("A", "B", "C"), (1, 2, 3)),
        NextTokens(("A", "B", "C"), (1, 3, 2)),
        NextTokens(("A", "C", "B"), (1, 2, 3)),
        NextTokens(("A", "B", "C")),
        NextTokens(("A", "B"), (1, 2)),
        NextTokens(("A",), (1,)),
    ]
    assert len({cache_key(IDENTITY, each, "d") for each in tokens}) == len(tokens)


# Formats, looking after it


@pytest.mark.parametrize("version", [2, 3])
def test_answers_of_two_labels_are_read_from_caches_of_before(path: Path, version: int) -> None:
    answers = {key(i): pair(-0.25 * i, -1 - 2.0**-40, floored=i == 3) for i in range(50)}
    old_cache(path, answers, version)
    with ResponseCache(path) as cache:
        assert cache.get_many(list(answers)) == answers
        assert cache.state().damaged == 0
        cache.put_many({key(99): TokenLogprobs((-1, -2, -3))})
        assert len(cache) == 51


def test_an_older_format_is_migrated_with_all_its_answers(path: Path) -> None:
    answers = {key(i): pair(-0.25 * i, -1) for i in range(50)}
    old_cache(path, answers)
    with ResponseCache(path) as cache:
        assert cache.get_many(list(answers)) == answers
        state = cache.state()
        assert (state.rows, state.damaged, state.oldest) == (50, 0, None)
        cache.put_many({key(99): pair(-1, -2)})
        assert cache.state().oldest is not None
        assert cache.has_earlier
    with ResponseCache(path) as cache:
        assert len(cache) == 51
        assert cache.has_earlier


def test_a_cache_that_began_with_keys_by_content_holds_no_earlier_ones(path: Path) -> None:
    for _ in range(2):
        with ResponseCache(path) as cache:
            assert not cache.has_earlier
            cache.put_many({key(0): pair(-1, -2)})


def test_a_cache_that_is_there_opens_while_another_process_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(0): pair(-1, -2)})
    monkeypatch.setattr(response_cache, "BUSY_TIMEOUT", 0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ResponseCache(path) as cache:
        assert cache.get_many([key(0)]) == {key(0): pair(-1, -2)}
    other.close()


def migrate(path: Path) -> int:
    with ResponseCache(path) as cache:
        return len(cache)


def test_many_processes_that_open_an_older_cache_at_once_migrate_it_once(path: Path) -> None:
    old_cache(path, {key(i): pair(-0.25 * i, -1) for i in range(50)})
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(migrate, [path] * 8) == [50] * 8


def test_a_migration_that_is_killed_leaves_the_older_format(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_cache(path, {key(0): pair(-1, -2)})
    with monkeypatch.context() as patch:
        patch.setattr(response_cache, "MIGRATIONS", (*response_cache.MIGRATIONS, "SELECT * FROM nowhere"))
        with pytest.raises(ConfigurationError):
            ResponseCache(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()
    with ResponseCache(path) as cache:
        assert len(cache) == 1


def test_its_state_and_pruning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ResponseCache(path) as cache:
        for day in (1, 2, 3):
            monkeypatch.setattr(response_cache.time, "time", lambda day=day: 86_400.0 * day)
            cache.put_many({key(10 * day + i): pair(-1, -2, floored=i == 0) for i in range(4)})
        cache._db.execute("UPDATE answers SET first_logprob = -7 WHERE key = ?", (key(31),))
        state = cache.state()
        assert (state.rows, state.damaged, state.floored) == (12, 1, 3)
        assert (state.oldest, state.newest, state.faults) == (86_400, 3 * 86_400, ())
        wal = path.with_name(path.name + "-wal")
        assert state.bytes == path.stat().st_size + wal.stat().st_size > path.stat().st_size
        assert cache.prune() == 0
        assert cache.prune(damaged=True) == 1
        assert cache.prune(before=3 * 86_400) == 8
        assert cache.get_many([key(10 * day + i) for day in (1, 2, 3) for i in range(4)]).keys() == {
            key(30), key(32), key(33)
        }  # fmt: skip


def test_a_key_is_the_hash_of_the_canonical_json_of_all_that_matters() -> None:
    """Written out: caches that earlier versions filled must go on answering."""
    named = dataclasses.replace(IDENTITY, model='m"\u00fc')
    fields = ("kind", "model", "root", "revision", "version", "determinism", "fingerprint")
    content = {
        "engine": {name: getattr(named, name) for name in fields},
        "labels": [" True", " False", 1, 2],
        "parser": 1,
    }
    digests = [f"{i:064x}" for i in range(3)]
    whole = [orjson.dumps(content | {"prompt": each}, option=orjson.OPT_SORT_KEYS) for each in digests]
    expected = [hashlib.sha256(each).digest() for each in whole]
    assert earlier_keys(named, LABELS, digests) == expected
    content["engine"] = {name: getattr(named, name) for name in (*fields[:1], *fields[3:], "dtype", "config")}
    whole = [orjson.dumps(content | {"prompt": each}, option=orjson.OPT_SORT_KEYS) for each in digests]
    expected = [hashlib.sha256(each).digest() for each in whole]
    assert cache_keys(named, LABELS, digests) == expected
    assert [cache_key(named, LABELS, each) for each in digests] == expected


def test_what_sqlite_finds_wrong_is_told(path: Path) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(0): pair(-1, -2)})
        schema = cache._db.execute("SELECT sql FROM sqlite_master").fetchone()[0]
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA writable_schema=1")
    change = "UPDATE sqlite_master SET sql = ? WHERE name = 'answers'"
    db.execute(change, (schema.replace("first_logprob REAL NOT NULL", "first_logprob REAL"),))
    db.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("UPDATE answers SET first_logprob = NULL")
    db.execute("PRAGMA writable_schema=1")
    db.execute(change, (schema,))
    db.close()
    with ResponseCache(path) as cache:
        state = cache.state()
        assert (state.rows, state.damaged) == (1, 1)
        assert state.faults == ("NULL value in answers.first_logprob",)


def test_pruning_gives_the_space_back(path: Path) -> None:
    with ResponseCache(path) as cache:
        cache.put_many({key(i): pair(-1, -2) for i in range(3000)})
        pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
        assert cache.prune(before=2.0**40) == 3000
        assert cache._db.execute("PRAGMA page_count").fetchone()[0] < pages / 10
