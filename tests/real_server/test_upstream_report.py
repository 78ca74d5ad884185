"""benchmarks/upstream_report.py with a real vLLM on the CPU, without the batch-invariant mode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.llm_api.in_process.options import OPENMP

REPO_ROOT = Path(__file__).resolve().parents[2]
MODEL = REPO_ROOT / "models" / "gemma-3-270m"

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(600)]


def test_scores_of_a_real_engine_are_compared(tmp_path: Path) -> None:
    if not MODEL.is_dir():
        pytest.skip("needs the model of make icm")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    if OPENMP.is_file():
        environment |= {"LD_PRELOAD": str(OPENMP), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [sys.executable, "benchmarks/upstream_report.py", "--cpu", "--model", str(MODEL)]
    command += ["--prompts", "2", "--tokens", "200", "--part_seconds", "500", "--json", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO_ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    [record] = json.loads((tmp_path / "r.json").read_text())["records"]
    assert record["failures"] == []
    assert record["environment"]["mode"] == "off"
    assert [note.partition(",")[0] for note in record["notes"]] == ["CPUAttentionBackendImpl"] * 2
    rows = {row["what"]: row for row in record["rows"]}
    assert len(rows) == 7
    assert {row["compared"] for row in rows.values()} == {2}
    # The same question at the same state is answered alike even without the mode; and what was cached is said.
    assert rows["not cached, each alone, once more"]["differ"] == 0
    assert rows["not cached, each alone, once more"]["detail"] == "0 tokens a prompt cached"
    assert rows["wholly cached, each alone"]["detail"] == "128 tokens a prompt cached"
