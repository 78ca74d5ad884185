"""icm cache: stats, verify, prune."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from core.llm_api.response_cache import ResponseCache
from src.experiments.cache_command import main
from tests.core.two_labels import pair


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "responses.sqlite"
    with ResponseCache(path) as cache:
        cache.put_many({bytes([i]) * 32: pair(-1, -2) for i in range(10)})
    return path


def damage(path: Path, rows: int) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE answers SET last_logprob = -9 WHERE key IN (SELECT key FROM answers LIMIT ?)", (rows,))
    db.commit()
    db.close()


def test_stats_tells_what_is_there(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--cache", str(path)]) == 0
    told = capsys.readouterr().out
    assert "answers  10" in told
    assert "UTC" in told


def test_verify_finds_damaged_answers_and_prune_removes_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--cache", str(path)]) == 0
    damage(path, 3)
    assert main(["verify", "--cache", str(path)]) == 1
    assert "damaged  3" in capsys.readouterr().out
    assert main(["prune", "--cache", str(path)]) == 0
    assert "3 answers removed" in capsys.readouterr().out
    assert main(["verify", "--cache", str(path)]) == 0


def test_prune_by_age(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--cache", str(path), "--older_than", "1"]) == 0
    assert "0 answers removed" in capsys.readouterr().out
    db = sqlite3.connect(path)
    db.execute("UPDATE answers SET stored = 0 WHERE key < ?", (bytes([4]) * 32,))
    db.commit()
    db.close()
    assert main(["prune", "--cache", str(path), "--older_than", "1"]) == 0
    assert "4 answers removed" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["stats", "verify", "prune"])
def test_what_is_no_cache_is_refused_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--cache", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()  # looking makes no file
    (tmp_path / "text").write_text("no database at all " * 100)
    assert main([command, "--cache", str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
