"""icm baselines against a real vLLM server: a base model's missing chat template is found out, rows agree with gold."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).resolve().parents[2]


async def test_gold_demonstrations_beat_zero_shot_and_a_base_model_has_no_template(
    vllm_server: RunningServer, tmp_path: Path
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "src.experiments.commands", "baselines", "--testbed", "builtin", "--seeds", "1"),
        *("--model", vllm_server.model, "--chat_model", vllm_server.model, "--batch_size", "16", "--test_size", "16"),
        *("--rows", "zero-shot", "zero-shot-chat", "many-shot-gold", "bootstrap-consistent", "--rounds", "2"),
        *("--alpha", "50", "--calibrate", "mean", "--runs_dir", str(tmp_path), "--run", "t", "--quiet"),
        env={**os.environ, "VLLM_BASE_URL": vllm_server.url, "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    table = json.loads((tmp_path / "t" / "baselines.json").read_text())
    rows = {row["row"]: row for row in table["rows"]}
    if vllm_server.model.startswith("gemma"):
        assert table["chat"]["template"] is False
        assert "no chat template" in err.decode()
        assert rows["many-shot-gold"]["test"]["mean"] > rows["zero-shot"]["test"]["mean"]
    assert rows["bootstrap-consistent"]["pool"]["claims"] == 16
