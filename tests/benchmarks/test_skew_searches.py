"""benchmarks/skew_searches.py: its pools, its figures, and a small table against a fake server, gone on with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.skew_searches import figures, losses, skewed, trues_of
from fakes.vllm_server import FakeVLLM
from src.icm.testbeds import BadInput, Claim
from src.pipeline.datafiles import load_testbed

REPO_ROOT = Path(__file__).resolve().parents[2]


def test_shares_are_counts_with_both_labels() -> None:
    assert [trues_of(percent, 64) for percent in (1, 5, 50, 95, 99)] == [1, 3, 32, 61, 63]
    assert [trues_of(percent, 16) for percent in (1, 99)] == [1, 15]


@pytest.mark.parametrize("trues", [1, 32, 61, 63])
def test_a_pool_has_the_share_and_no_group_twice(trues: int) -> None:
    _, claims, _ = load_testbed("builtin", Path())
    pool = skewed(claims, 64, trues, 0)
    assert sum(claim.gold is True for claim in pool) == trues
    assert len({claims[claim.row].group for claim in pool}) == len({claim.group for claim in pool}) == 64
    assert skewed(claims, 64, trues, 0) == pool != skewed(claims, 64, trues, 1)


def test_groups_of_one_label_are_used_before_those_of_both() -> None:
    def claim(row: int, group: str, gold: bool) -> Claim:
        return Claim(text=f"claim {row}", group=group, gold=gold, row=row, of_row=row, question="", choice="")

    both = [claim(at, f"both {at // 2}", at % 2 == 0) for at in range(8)]
    one = [claim(8 + at, f"true {at}", True) for at in range(4)]
    assert sum(bool(each.gold) for each in skewed([*both, *one], 8, 4, 0)) == 4
    with pytest.raises(BadInput, match="not enough groups for 3 of 8 True"):
        skewed([*both, *one], 8, 3, 0)


def test_figures_by_hand() -> None:
    gold = [True] * 6 + [False] * 2
    found = figures([True] * 5 + [False] * 2 + [True], gold)
    assert found["agreement"] == 0.75
    assert found["balanced"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert (found["f1_true"], found["f1_rarer"]) == (pytest.approx(5 / 6), pytest.approx(0.5))
    assert figures([True] * 8, gold)["f1_rarer"] == 0
    assert figures([not label for label in gold], [not label for label in gold])["f1_rarer"] == 1


def test_losses_are_of_the_mean_at_a_half() -> None:
    kinds = {("mean", 50): (0.9, 1.0), ("mean", 95): (0.7, 0.7), ("prior", 95): (0.9, 0.9)}
    rows = [
        {"how": "ascent", "calibration": calibration, "percent": percent, "balanced": value}
        for (calibration, percent), values in kinds.items()
        for value in values
    ]
    assert losses("mine", rows, [50, 95])[-1] == "| ascent | – / 0.25 / 0.05 / – |"
    assert losses("mine", [row for row in rows if row["percent"] == 95], [95]) == []


async def test_a_table_is_made_and_what_is_known_is_not_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "skew.json"
    flags = [
        *("--size", "16", "--draws", "1", "--model", "fake-8b", "--json", str(file)),
        "--searches",
        "bootstrapping",
    ]
    async with FakeVLLM() as server:

        async def run(*more: str) -> tuple[int | None, str, str]:
            environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "benchmarks/skew_searches.py", *flags, *more),
                cwd=REPO_ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = await process.communicate()
            return process.returncode, out.decode(), err.decode()

        code, out, err = await run("--percent", "80")
        assert code == 0, err
        rows = json.loads(file.read_text())["rows"]
        assert len(rows) == 1 + 3 * 4
        known = [row for row in rows if (row["how"], row["calibration"]) == ("zero-shot", "prior")]
        assert [row["true_share"] for row in known] == [13 / 16]
        assert all("estimate" in row for row in rows if row["calibration"] == "auto")
        assert "| bootstrapping | auto |" in out
        code, again, err = await run("--percent", "80")
        assert code == 0, err
        assert again == out
        assert "13 cells, 13 of them known" in err
        assert "balanced accuracy lost" not in out
        code, out, err = await run("--percent", "80", "95")
        assert "26 cells, 13 of them known" in err
        assert len(json.loads(file.read_text())["rows"]) == 26
        code, _, err = await run("--size", "20")
        assert (code, err) == (2, f"error: {file}: is of another model or --size\n")
