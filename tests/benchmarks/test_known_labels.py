"""benchmarks/known_labels.py: which tables it makes, what it counts, and one whole run of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.known_labels import Cell, cells_of, counts_of, main, table_of
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.pipeline.baselines.row_result import Answer, Cost, RowResult

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_runs_that_claims_are_chosen_by_come_first() -> None:
    cells = list(cells_of([1, 2], [0, 4], ["random", "chosen"]))
    assert cells == [
        *(Cell(seed, "none", 0) for seed in (1, 2)),
        *(Cell(seed, how, 4) for how in ("random", "chosen") for seed in (1, 2)),
    ]
    assert cells[3].run("known") == "known-seed2-random4"


def answer(claim: int, group: str, label: bool, gold: bool | None) -> Answer:
    return Answer(claim, group, gold, label, 0.0, 0.0)


def test_claims_beside_a_known_one_are_counted_apart() -> None:
    pool = (answer(0, "a", True, True), answer(1, "b", True, False), answer(2, "b", True, True))
    test = (answer(9, "t", True, True), answer(8, "t", True, None))
    found = counts_of(RowResult("icm", pool, test, 1.5, Cost(1.0, 12, 0, 0, 1)), {"a"})
    assert found == {"others": (2, 3), "apart": (1, 2), "held_out": (1, 1), "U": 1.5, "questions": 12}


def test_the_table_has_a_line_for_each_method_and_way() -> None:
    def row(seed: int, how: str, labels: int, right: int) -> dict[str, object]:
        counts = dict.fromkeys(("others", "apart", "held_out"), (right, 10))
        return {"seed": seed, "how": how, "labels": labels, "row": "icm", **counts}

    rows = [row(1, "none", 0, 5), row(2, "none", 0, 7), row(1, "random", 4, 8), row(1, "chosen", 4, 9)]
    lines = table_of(rows).splitlines()[1:4]
    assert [line.split() for line in lines] == [
        ["known", "labels", "0", "4"],
        ["ICM,", "random", "0.600", "±", "0.141", "0.800"],
        ["ICM,", "chosen", "0.600", "±", "0.141", "0.900"],
    ]


@pytest.mark.parametrize("wrong", [["--labels", "4", "-1"], ["--at_once", "0"]])
def test_numbers_that_mean_nothing_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(wrong)
    assert f"error: {wrong[0]} must be at least" in capsys.readouterr().err


def test_a_table_that_fails_is_named_with_its_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    flags = ["--testbed", "builtin", "--model", "m", "--batch_size", "8", "--runs_dir", str(tmp_path)]
    assert main([*flags, "--seeds", "3", "--labels", "0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: seed 3, 0 labels known (none): no server answers at http://127.0.0.1:9")
    assert said.count("\n") == 1


async def test_it_is_made_stopped_and_gone_on_with(tmp_path: Path) -> None:
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        flags = [
            *("--testbed", "builtin", "--model", server.model, "--batch_size", "8", "--test_size", "8"),
            *("--search", "bootstrapping", "--seeds", "1", "--labels", "0", "2", "--at_once", "2"),
            *("--rows", "few-shot-known", "icm", "--runs_dir", str(tmp_path), "--out", str(tmp_path / "known.json")),
        ]
        environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}

        async def run(*more: str) -> tuple[int | None, str, str]:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "benchmarks/known_labels.py", *flags, *more),
                env=environment,
                cwd=REPOSITORY,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            return process.returncode, out.decode(), err.decode()

        code, out, err = await run()
        assert code == 0, err
        document = json.loads((tmp_path / "known.json").read_text())
        assert [(row["how"], row["labels"], row["row"]) for row in document["rows"]] == [
            ("none", 0, "icm"),
            ("random", 2, "few-shot-known"),
            ("random", 2, "icm"),
            ("chosen", 2, "few-shot-known"),
            ("chosen", 2, "icm"),
        ]
        assert [row["others"][1] for row in document["rows"]] == [8, 6, 6, 6, 6]
        assert all(row["held_out"][1] == 8 for row in document["rows"])
        asked = len(server.requests)
        again = await run()
        assert (again[0], again[1]) == (0, out)
        assert len([one for one in server.requests[asked:] if "prompt" in one]) == 0
        code, _, err = await run("--name", "other", "--at_once", "1", "--consistency", "nothing")
        assert code == 1
        assert err.strip().splitlines()[-1].startswith("error: seed 1, 0 labels known (none): argument")
