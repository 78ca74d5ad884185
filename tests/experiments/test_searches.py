"""icm label --search bootstrapping, and every command that reads the run it leaves."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.experiments import ICM, compare, diagnose, export, report, watch
from src.results.curves import curves_of
from src.results.run_reader import read_run
from src.results.run_record import final_labels


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=hashed_log_odds) as fake:
        yield fake


class Done(NamedTuple):
    code: int
    out: str
    err: str


async def label(runs: Path, server: FakeVLLM, *more: str) -> Done:
    """ICM.py in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(ICM.__file__)), "--testbed", "builtin", "--batch_size", "16", "--seed", "3"),
        *("--calibrate", "mean", "--model", server.model, "--runs_dir", str(runs), "--search", "bootstrapping", *more),
        env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), err.decode())


async def test_a_table_that_searches_nothing_takes_no_search(server: FakeVLLM, tmp_path: Path) -> None:
    async def table(*more: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "src.experiments.commands", "baselines", "--testbed", "builtin", "--quiet"),
            *("--batch_size", "8", "--test_size", "8", "--seeds", "1", "--model", server.model),
            *("--runs_dir", str(tmp_path), "--run", "t", *more),
            env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": os.getcwd()},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, err.decode()

    code, err = await table("--search", "ascent", "--rows", "zero-shot", "many-shot-gold")
    assert code == 2
    [line] = err.strip().splitlines()
    assert (
        "--search ascent and --rows zero-shot many-shot-gold contradict each other: only the row icm searches" in line
    )
    assert not (tmp_path / "t" / "baselines.json").exists()
    assert (await table("--search", "gibbs", "--gibbs_sweeps", "1", "--rows", "icm"))[0] == 0
    # Another row of a table with a search is added by the same flags.
    code, err = await table("--search", "gibbs", "--gibbs_sweeps", "1", "--rows", "zero-shot")
    assert code == 0, err


async def test_a_run_by_bootstrapping_is_labelled_shown_and_read(
    server: FakeVLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    said = await label(runs, server, "--run", "a", "--bootstrap_start", "zero-shot")
    assert said.code == 0, said.err
    assert "search: bootstrapping" in said.out
    assert "iteration=" in said.err
    document = json.loads((runs / "a" / "run.json").read_text())
    assert document["settings"]["search"] == "bootstrapping"
    assert document["settings"]["bootstrap_start"] == "zero-shot"
    assert "bootstrap_rounds" not in document["settings"]  # as it is by default
    assert document["result"]["labelled"] == 16
    assert document["result"]["warning"] is None or "random" not in document["result"]["warning"]
    rows = [json.loads(line) for line in (runs / "a" / "labels.jsonl").read_text().splitlines()]
    assert [row["by"] for row in rows] == ["icm"] * 16
    run = read_run(runs / "a")
    assert (run.search, run.skipped) == ("bootstrapping", 0)
    assert final_labels(run.journal) == {at: row["label"] for at, row in enumerate(rows)}
    curves = curves_of(run.journal, run.gold)
    assert curves.utility[-1] == pytest.approx(document["result"]["U"])
    assert curves.utility[1:] == sorted(curves.utility[1:])
    assert curves.labelled[-1] == 16
    agreeing, compared = document["result"]["icm"]
    assert curves.accuracy[-1] == agreeing / compared
    assert (runs / "a" / "curves.png").exists()
    assert (await label(runs, server, "--run", "b")).code == 0
    commands: list[tuple[Any, list[str]]] = [
        (report, [str(runs / "a")]),
        (diagnose, [str(runs / "a")]),
        (compare, [str(runs / "a"), str(runs / "b")]),
        (export, [str(runs / "a"), "--format", "csv"]),
        (watch, [str(runs / "a"), "--once"]),
    ]
    for command, arguments in commands:
        assert command.main(arguments) == 0, command
    assert "Bootstrapping labels all claims at once" in capsys.readouterr().out


async def test_a_run_begun_by_one_search_is_not_gone_on_with_by_another(server: FakeVLLM, tmp_path: Path) -> None:
    assert (await label(tmp_path, server, "--run", "a", "--quiet")).code == 0
    said = await label(tmp_path, server, "--run", "a", "--quiet", "--search", "annealing")
    assert said.code == 2
    assert "--search bootstrapping, now annealing" in said.err


async def test_a_setting_that_bootstrapping_does_not_use_is_refused(server: FakeVLLM, tmp_path: Path) -> None:
    said = await label(tmp_path, server, "--run", "a", "--K", "50")
    assert said.code == 2
    assert "--K 50 and --search bootstrapping contradict each other" in said.err
    assert server.requests == []


async def test_batches_and_passes_are_searched_so_too(server: FakeVLLM, tmp_path: Path) -> None:
    said = await label(tmp_path, server, "--run", "a", "--num_batches", "2", "--passes", "3")
    assert said.code == 0, said.err
    document = json.loads((tmp_path / "a" / "run.json").read_text())
    assert document["result"]["labelled"] == 32
    part = json.loads((tmp_path / "a" / "batch-000-pass-0" / "run.json").read_text())
    assert part["settings"]["search"] == "bootstrapping"
