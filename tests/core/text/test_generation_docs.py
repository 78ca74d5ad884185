"""The examples in docs/generation.md run as they are printed."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.text_server import FakeTextServer

REPOSITORY = Path(__file__).resolve().parents[3]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "generation.md").read_text(), re.DOTALL)


async def test_the_documented_calls_work_over_http(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(examples()[0])
    async with FakeTextServer() as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            server.model,
            env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "ready: one token" in out.decode()
    assert " Africa.0 Africa.1" in out.decode()
    assert "first token after 0." in out.decode()
    assert "failed" not in out.decode()


@pytest.mark.real_server
def test_the_documented_model_in_process_works(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(examples()[1])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "four, five" in done.stdout
