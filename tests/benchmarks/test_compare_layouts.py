"""benchmarks/compare_layouts.py on a testbed file of three labels, against a fake server whose scores are known."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM, encode
from tests.pipeline.test_many_labels import MOODS, Model

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "compare_layouts.py"
SENTIMENT = REPOSITORY / "docs" / "examples" / "sentiment.yaml"


async def compare(server: FakeVLLM, out: Path, *more: str) -> tuple[int | None, str, dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), "--model", server.model, "--size", "12", "--draws", "1", "--json", str(out)),
        *more,
        env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    return process.returncode, err.decode(), json.loads(out.read_text()) if out.exists() else {}


async def test_three_labels_of_a_testbed_file_are_compared(tmp_path: Path) -> None:
    async with FakeVLLM(distribution=Model(MOODS)) as server:
        code, err, result = await compare(server, tmp_path / "a.json", "--testbed", str(SENTIMENT))
        assert code == 0, err
        asked = {tuple(body["logprob_token_ids"]) for body in server.pools}
    assert asked == {tuple(encode(text)[0] for text in reversed(MOODS.texts))}
    assert result["claims"] == 12
    rows = {row["layout"]: row for row in result["rows"]}
    assert set(rows) == {
        *("upstream's order", "tree", "tree, 4 anchors", "tree, a quarter appended", "random order per question"),
    }
    assert rows["upstream's order"]["correlation"] == [1.0]
    assert rows["upstream's order"]["sign_differs"] == [0.0]
    assert rows["tree"]["correlation"][0] < 1


async def test_the_figures_of_three_labels_by_hand(tmp_path: Path) -> None:
    """A model that says neutral of everything: a third of the claims, whose margins are log odds of .8 to .1."""
    negative, neutral, positive = (encode(text)[0] for text in MOODS.texts)
    always = {negative: -2.302585, neutral: -0.223144, positive: -2.302585}
    testbed = tmp_path / "all.yaml"
    testbed.write_text(SENTIMENT.read_text().replace("sentiment.csv", "all.csv"))
    texts = [f"text {at},{at % 3 + 1}\n" for at in range(12)]
    (tmp_path / "all.csv").write_text("text,stars\n" + "".join(texts))
    async with FakeVLLM(distribution=lambda tokens: always) as server:
        code, err, result = await compare(server, tmp_path / "a.json", "--testbed", str(testbed), "--distances", "0")
    assert code == 0, err
    for row in result["rows"]:
        assert row["accuracy"] == [0.333]
        # log .8/.2 for a third, log .1/.9 for the others.
        assert row["mean_signed"] == [pytest.approx((1.386 - 2 * 2.197) / 3, abs=2e-3)]
        assert row["sign_differs"] == [0.0]


async def test_what_is_no_testbed_is_refused(tmp_path: Path) -> None:
    async with FakeVLLM() as server:
        code, err, _ = await compare(server, tmp_path / "a.json", "--testbed", "nothing")
        assert (code, "or a file: mine.yaml" in err) == (2, True)
        code, err, _ = await compare(server, tmp_path / "a.json", "--testbed", str(tmp_path / "mine.yaml"))
        assert (code, "mine.yaml: not found" in err) == (2, True)
