"""scripts/test_determinism.py against a fake server that is exact, or is not, and against the real one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.determinism.asking import HttpAsker
from core.determinism.bits import Compared
from core.determinism.matrix import Matrix, Row, Size
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.transport import HttpOptions, HttpTransport
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from scripts.test_determinism import LESS, QUICK, Report, build_parser, fitting, run
from src.icm.testbeds import BadInput
from src.pipeline.determinism_material import Amount, material_for
from tests.conftest import RunningServer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "test_determinism.py"


@pytest.fixture(autouse=True)
def without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_SECRETS", os.devnull)


async def check(server: FakeVLLM, folder: Path) -> tuple[bool, dict[str, Any]]:
    args = build_parser().parse_args(["--url", server.url, "--quick", "--runs_dir", str(folder)])
    report = Report(quiet=True)
    record = await run(args, report)
    return record.passed, {row.name: row for row in report.rows}


async def test_an_exact_server_passes_and_is_remembered(tmp_path: Path) -> None:
    async with FakeVLLM() as server:
        passed, first = await check(server, tmp_path)
        assert passed
        assert "in the check before this one" not in first
        assert first["alone, again"].cached == 0
        passed, second = await check(server, tmp_path)
    assert passed
    assert second["in the check before this one"].compared.prompts == 12


async def test_prompts_can_be_made_longer_than_a_window(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    async with FakeVLLM() as server:
        lengths = []
        for more in ([], ["--demonstrations", "60"]):
            given = ["--url", server.url, "--quick", "--prompts", "2", "--runs_dir", str(tmp_path), *more]
            assert (await run(build_parser().parse_args(given), Report(quiet=False))).passed
            told = re.search(r"^prompts of ([\d,]+) to [\d,]+ tokens$", capsys.readouterr().out, re.MULTILINE)
            assert told is not None
            lengths.append(int(told[1].replace(",", "")))
    assert lengths[1] > 5 * lengths[0]


async def test_prompts_that_fill_no_cache_block_are_refused_and_the_number_told_suffices(tmp_path: Path) -> None:
    async with FakeVLLM(block=544) as server:
        given = ["--url", server.url, "--quick", "--prompts", "2", "--runs_dir", str(tmp_path)]
        with pytest.raises(BadInput, match=r"too short for cache blocks of 544, .*--demonstrations (\d+)") as refused:
            await run(build_parser().parse_args(given), Report(quiet=True))
        told = re.search(r"--demonstrations \d+", str(refused.value))
        assert told is not None
        assert (await run(build_parser().parse_args([*given, *told[0].split()]), Report(quiet=True))).passed


async def test_a_server_that_answers_by_count_fails(tmp_path: Path) -> None:
    asked = 0

    def drifting(tokens: Sequence[int]) -> float:
        nonlocal asked
        asked += 1
        return hashed_log_odds(tokens) + 1e-6 * asked

    async with FakeVLLM(log_odds=drifting) as server:
        passed, rows = await check(server, tmp_path)
    assert not passed
    assert rows["alone, again"].compared.differing == 12


async def test_a_check_ends_in_time_and_names_what_it_did_not_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeVLLM() as server:
        args = build_parser().parse_args(
            ["--url", server.url, "--quick", "--runs_dir", str(tmp_path), "--seconds", "0.001", "--unless_passed"]
        )
        report = Report(quiet=False)
        record = await run(args, report)
        report.end(record)
        assert [row.name for row in report.rows] == ["one prompt 20 times, 10 at a time"]
        assert record.passed
        assert record.not_reached[0] == "alone, again"
        assert record.not_reached[-1] == "as a search asks"
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Determinism check: each row asks the same prompts in another way")
        assert f"not reached in the time given: {', '.join(record.not_reached)}" in lines
        args.seconds = None  # without a limit everything is asked again
        record = await run(args, Report(quiet=True))
    assert record.not_reached == []
    assert len(record.references) == 12


async def test_a_check_that_was_cut_short_is_not_repeated_nor_hides_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with FakeVLLM() as server:
        given = ["--url", server.url, "--quick", "--runs_dir", str(tmp_path)]
        short = build_parser().parse_args([*given, "--seconds", "0.001", "--unless_passed"])
        first = await run(short, Report(quiet=True))
        again = Report(quiet=False)
        assert await run(short, again) == first
        assert again.rows == []
        assert capsys.readouterr().out == ""
        again.end(first)
        assert f"repeated to the last bit when they were checked on {first.finished}" in capsys.readouterr().out
    async with FakeVLLM() as server:
        asked = 0

        def drifting(tokens: Sequence[int]) -> float:
            nonlocal asked
            asked += 1
            return hashed_log_odds(tokens) + 1e-6 * asked

        server.log_odds = drifting
        given[1] = server.url
        failed = await run(build_parser().parse_args(given), Report(quiet=True))
        assert not failed.passed
        server.log_odds = hashed_log_odds
        kept = await run(build_parser().parse_args([*given, "--seconds", "0.001"]), Report(quiet=False))
    assert kept == failed
    assert f"the check of {failed.finished} failed in rows that this one did not reach" in capsys.readouterr().out


def test_a_check_before_and_after_a_restart_counts_its_rows_anew(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(quiet=False)
    row = Row("alone, again", Compared(1, 0), 0.0)
    for names in (["alone, again"], ["alone, again", "in the check before this one"]):
        report.begin(names)
        for _ in names:
            report.add(row)
    report.close()
    assert len(report.rows) == 3
    assert capsys.readouterr().out.count("alone, again") == 3


def test_a_slow_engine_is_asked_less() -> None:
    counts = []
    for prompt_seconds in (0.01, 0.15, 0.2, 0.27, 0.4, 9.0):
        amount, size = fitting(*QUICK, prompt_seconds, 45.0)
        counts.append((amount.prompts, size.repeats, amount.long_tokens, amount.demonstrations))
    assert counts == [(12, 100, 3000, 10), *LESS]
    few = replace(QUICK[0], prompts=4)
    assert fitting(few, QUICK[1], 0.01, 45.0) == (few, QUICK[1])
    assert fitting(few, QUICK[1], 9.0, 45.0)[0].prompts == 2


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--url", "http://127.0.0.1:9", "--quick"], "no server answers"),
        (["--quick", "--seconds", "0"], "--seconds must be above 0"),
        (["--seconds", "9"], "--seconds is for --quick"),
        (["--prompts", "0"], "--prompts must be from 1 to 256"),
        (["--demonstrations", "1"], "--demonstrations must be from 2 to 250"),
        (["--quick", "--seconds", "9", "--demonstrations", "20"], "leave out --demonstrations"),
        (["--url", "http://127.0.0.1:9", "--option", "x"], "--option is for --start"),
        (["--url", "http://127.0.0.1:9", "--cpu"], "--cpu is for --direct"),
        (["--block_size", "32"], "--block_size is for --direct"),
        (["--start", "local", "--max_model_len", "512"], "--max_model_len is for --direct"),
        (["--start", "local", "--no-deterministic"], "for --start give --option=--no-deterministic"),
        (["--direct", "here", "--model", "m"], "--model is for a server"),
    ],
)
def test_what_cannot_be_checked_is_an_error_in_one_line(arguments: list[str], told: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.real_server
async def test_the_local_server_is_exact(vllm_server: RunningServer, tmp_path: Path) -> None:
    """What `make icm` and `launch_vllm_server.sh local` start: scores that depend on their prompt alone."""
    http = HttpTransport(vllm_server.url, key=None, key_name="", options=HttpOptions())
    client = VLLMClient(vllm_server.url, vllm_server.model)
    try:
        identity = await client.start()
        block = await client.kv_block_size()
        amount = Amount(prompts=3, demonstrations=6, long_tokens=1200, long=2, short=8)
        material = await material_for(client, amount, context=identity.max_model_len, block=block)
        size = Size(repeats=20, lists=(1, 2, 3), generated=12, texts=2, top=False)
        matrix = Matrix(HttpAsker(http, vllm_server.model), client, material, size, seed=os.getpid())
        found = {row.name: row.compared async for row in matrix.rows()}
    finally:
        await client.aclose()
        await http.aclose()
    assert {name: row.differing for name, row in found.items() if row.differing} == {}
    assert len(found) > 20
