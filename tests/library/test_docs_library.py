"""The programs in docs/library.md run as they are printed."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

from fakes.vllm_server import FakeVLLM

REPOSITORY = Path(__file__).resolve().parents[2]
FRAME = """import icm
frame = [{"review": f"The {n}th film is good.", "label": "fair"} for n in range(8)]
result = """


async def printed(code: str, folder: Path, url: str) -> list[str]:
    (folder / "program.py").write_text(code.replace("http://localhost:8000", url))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "program.py"),
        cwd=folder,
        env={**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().splitlines()


async def test_the_programs_run(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "library.md").read_text()
    ten_lines, own_words, landscape = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in ten_lines.splitlines() if line.strip()]) <= 10
    async with FakeVLLM(model="MODEL") as server:
        lines = await printed(ten_lines, tmp_path, server.url)
        assert [bool(re.match(r"(True|False) [01]\.\d\d (Which|Does) ", line)) for line in lines] == [True] * 4
        assert {line.split()[0] for line in lines} == {"True", "False"}
        lines = await printed(f"{FRAME}{own_words}print(result.labels)", tmp_path, server.url)
        assert len(re.findall("bad|fair|good", lines[0])) == 8
        claims = ten_lines[: ten_lines.index("result = ")]
        await printed(f"{claims}{landscape}", tmp_path, server.url)
    [picture] = (tmp_path / "runs").glob("*/landscape.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
