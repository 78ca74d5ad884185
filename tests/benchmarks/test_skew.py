"""benchmarks/skew.py: its pools, its figures, the offsets it compares; a small part of it against a fake server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.skew import OFFSETS, Right, mean_probability, right, shifted_mean, skewed
from fakes.vllm_server import FakeVLLM
from src.pipeline.datafiles import load_testbed

REPO_ROOT = Path(__file__).resolve().parents[2]


def test_figures_by_hand() -> None:
    gold = [True] * 6 + [False] * 2
    assert right(gold, gold) == Right(1.0, 1.0, 1.0, 0.75)
    assert right([True] * 8, gold) == Right(0.75, 0.5, 0.0, 1.0)
    labels = [True] * 5 + [False] * 2 + [True]
    assert right(labels, gold) == Right(0.75, (5 / 6 + 1 / 2) / 2, 0.5, 0.75)


def test_every_claim_of_a_pool_is_of_another_pair() -> None:
    _, claims, _ = load_testbed("builtin", Path())
    for trues in (1, 62, 63):
        pool = skewed(claims, 64, trues, 0)
        assert sum(claim.gold is True for claim in pool) == trues
        assert len({claims[claim.row].group for claim in pool}) == len({claim.group for claim in pool}) == 64
    assert skewed(claims, 64, 62, 0) == skewed(claims, 64, 62, 0) != skewed(claims, 64, 62, 1)


def test_each_offset_is_what_it_is_called() -> None:
    scores = np.random.default_rng(1).normal(2.0, 3.0, 64).tolist()
    for prior in (0.5, 0.8, 62 / 64):
        offset = mean_probability(scores, prior)
        assert np.mean(1 / (1 + np.exp(offset - np.array(scores)))) == pytest.approx(prior)
        assert np.mean(np.array(scores) > OFFSETS["quantile 1 - p"](scores, prior)) == pytest.approx(prior, abs=1 / 64)
        assert shifted_mean(scores, prior) == pytest.approx(np.mean(scores) - np.log(prior / (1 - prior)))
    assert shifted_mean(scores, 0.5) == OFFSETS["mean"](scores, 0.5)


@pytest.mark.parametrize("search", [False, True])
async def test_a_table_is_made(tmp_path: Path, search: bool) -> None:
    file = tmp_path / "skew.json"
    flags = ["--size", "16", "--true", "14", "--draws", "1", "--model", "fake-8b", "--json", str(file)]
    async with FakeVLLM() as server:
        environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}
        command = [sys.executable, "benchmarks/skew.py", *flags, *(["--search"] if search else [])]
        process = await asyncio.create_subprocess_exec(*command, cwd=REPO_ROOT, env=environment, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
    assert process.returncode == 0
    rows = json.loads(file.read_text())["rows"]
    assert len(out.splitlines()) == len(rows) == (3 if search else 2 * len(OFFSETS))
    known = [row for row in rows if row["offset"] == "quantile 1 - p"]
    assert all(row["true_share"] == pytest.approx(14 / 16) for row in known)
