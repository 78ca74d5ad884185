"""benchmarks/ascent_starts.py: a small part of it against a fake server, counts and never times."""

from __future__ import annotations

import argparse
from pathlib import Path

import orjson
import pytest

from benchmarks import ascent_starts
from fakes.vllm_server import FakeVLLM, hashed_log_odds


async def test_both_ways_find_the_same_and_one_takes_fewer_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        given = {"model": server.model, "testbed": "builtin", "data_dir": Path(), "batch_size": 16, "alpha": 30.0}
        args = argparse.Namespace(**given, calibrate="mean", starts=4, seeds=[1, 2], out=out)
        assert await ascent_starts.main(args) == 0
    told = orjson.loads(out.read_bytes())
    assert told["same"] is True
    by_way = {way: [row for row in told["rows"] if row["way"] == way] for way in ascent_starts.WAYS}
    alone, together = by_way.values()
    for one, other in zip(alone, sorted(together, key=lambda row: row["seed"]), strict=True):
        assert (one["seed"], one["questions"], one["U"]) == (other["seed"], other["questions"], other["U"])
        assert other["batches"] < one["batches"]
        assert one["flushed"] is other["flushed"] is False  # this server has no such route
    told = capsys.readouterr().out
    assert "the same labels and questions" in told
    assert "seconds are not comparable" in told
