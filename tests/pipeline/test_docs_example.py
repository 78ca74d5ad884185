"""The experiment in docs/pipeline.md runs as it is printed."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from fakes.vllm_server import FakeVLLM

REPOSITORY = Path(__file__).resolve().parents[2]


async def test_the_documented_experiment_runs(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "pipeline.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 35
    script = tmp_path / "experiment.py"
    script.write_text(code)
    async with FakeVLLM() as server:
        environment = {
            **os.environ,
            "VLLM_BASE_URL": server.url,
            "ICM_SECRETS": os.devnull,
            "PYTHONPATH": str(REPOSITORY),
        }
        asked = []
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(script),
                "fake-8b",
                cwd=tmp_path,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            assert "mean change of the log-odds" in out.decode()
            asked.append(sum(len(body["prompt"]) == 64 for body in server.completions))
    assert asked == [1, 1]  # the second time every score comes from the cache
