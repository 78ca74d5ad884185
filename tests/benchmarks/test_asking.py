"""benchmarks/asking.py: its figures by hand, and a small part of it against a fake server."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.asking import Round, answer, answers_of, round_of, share, summary
from fakes.vllm_server import FakeVLLM
from src.results.run_reader import read_run
from tests.experiments.test_landscape import learns_from_context, write_claims
from tests.run_examples import write_run

REPO_ROOT = Path(__file__).resolve().parents[2]
HALF = [at % 2 == 0 for at in range(8)]


def test_gold_answers_what_was_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", labels=[True] * 8, gold=HALF, log_odds=[1.0 + at for at in range(8)])
    answer(run, 4, "margin", 1, tmp_path / "answers.csv")
    with (tmp_path / "answers.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["label"]) for row in rows] == [(str(at), str(HALF[at])) for at in (0, 2, 4, 6)]


def test_gold_that_contradicts_a_constraint_is_unsure(tmp_path: Path) -> None:
    one_true = {0: [(1, "exactly one is true")], 2: [(3, "agree")]}
    gold = [True, True, True, False, None, False, True, False]
    run = read_run(write_run(tmp_path / "a", labels=HALF, gold=gold, constraints=one_true))
    answers = ["True", "unsure", "True", "unsure", "unsure", "False", "True", "False"]
    assert answers_of(run, range(8)) == dict(enumerate(answers))
    known = replace(run, claims=(replace(run.claims[0], label=False, by="known"), *run.claims[1:]))
    assert answers_of(known, [1, 2]) == {1: "True", 2: "True"}


def test_a_round_by_hand(tmp_path: Path) -> None:
    """The first labels are wrong of 2 claims; one of them is answered, and the search then mends the other."""
    wrong = [not HALF[0], not HALF[1], *HALF[2:]]
    base = read_run(write_run(tmp_path / "a", labels=wrong, gold=HALF))
    now = read_run(write_run(tmp_path / "b", labels=HALF, gold=HALF))
    now = replace(now, claims=(replace(now.claims[0], by="known"), *now.claims[1:]))
    one = round_of(now, base, 1, "margin", 0, 1)
    assert (one.agreeing, one.compared) == (8, 8)
    assert (one.rest_agreeing, one.rest_compared) == (7, 7)
    assert one.alone == 7
    assert (one.asked, one.from_cache) == (1000, 10)


def made(seed: int, by: str, answers: int, agreeing: int, draw: int = 0) -> Round:
    return Round(seed, by, draw, answers, "r", agreeing, 10, agreeing - answers, 10 - answers, agreeing, 9, 3, 100, 1.0)


def test_the_table_by_hand() -> None:
    rounds = [made(1, "margin", 2, 9), made(2, "margin", 2, 7)]
    rounds += [made(1, "random", 2, 8), made(1, "random", 2, 9, 1), made(2, "random", 2, 7), made(2, "random", 2, 7, 1)]
    assert share(rounds[2:], "all") == pytest.approx({1: 0.85, 2: 0.7})
    [margin, random] = summary(rounds)
    assert (margin["all"], margin["above_random"], margin["seeds"]) == (0.8, 1, 2)
    assert (random["all"], random["above_random"], random["new"]) == (0.775, 0, 6)


@pytest.mark.timeout(400)  # seven processes, on a machine that may be busy
async def test_a_table_is_made_and_made_again(tmp_path: Path) -> None:
    file = tmp_path / "asking.json"
    claims = write_claims(tmp_path / "claims.jsonl")
    flags = ["--data", str(claims), "--model", "fake-8b", "--batch_size", "16", "--alpha", "50", "--calibrate", "mean"]
    mine = ["--seeds", "1", "--counts", "2", "--by", "margin", "random", "--draws", "1", "--json", str(file)]
    asked = []
    async with FakeVLLM(log_odds=learns_from_context) as server:
        environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "benchmarks/asking.py", *flags, "--search", "ascent", *mine),
                *("--runs_dir", str(tmp_path / "runs")),
                cwd=REPO_ROOT,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            asked.append(len(server.completions))
    assert asked[0] == asked[1]
    found = json.loads(file.read_text())
    assert [(row["by"], row["answers"]) for row in found["summary"]] == [
        (by, count) for by in ("margin", "random") for count in (0, 2)
    ]
    for row in found["rounds"]:
        assert row["compared"] == 16
        assert row["rest_compared"] == 16 - row["answers"]
        assert row["agreeing"] - row["rest_agreeing"] == row["answers"]
    assert out.decode().splitlines()[-5].split()[:3] == ["by", "answers", "all"]
