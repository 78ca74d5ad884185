"""The way of one claim, as docs/architecture.md lists it: its functions exist, and a run calls them in that order."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
from pathlib import Path

from fakes.vllm_server import FakeVLLM

ROOT = Path(__file__).resolve().parents[2]
SECTION = (
    (ROOT / "docs" / "architecture.md").read_text().partition("## From a command to a label")[2].partition("\n## ")[0]
)
HOPS = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", SECTION, re.MULTILINE)
DATA = "question,choice\n" + "".join(f"What is {n} + 1?,{n + n % 2}\n" for n in range(1, 7))
TRACED = """
import sys
from pathlib import Path
from src.experiments.ICM import main

calls, root = [], Path.cwd()

def note(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(str(root)):
        call = f"{Path(frame.f_code.co_filename).relative_to(root)} {frame.f_code.co_name}"
        if not calls or calls[-1] != call:
            calls.append(call)

sys.setprofile(note)
code = main(sys.argv[2:])
sys.setprofile(None)
Path(sys.argv[1]).write_text("\\n".join(calls))
sys.exit(code)
"""


def functions(file: str) -> set[str]:
    """Of a module and of its classes, by qualified name."""
    module = ast.parse((ROOT / file).read_text())
    found = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{each.name}" for each in inner}
    return found


def test_the_way_is_short_and_its_functions_exist() -> None:
    assert 15 <= len(HOPS) <= 20
    assert len({file for file, _ in HOPS}) <= 15
    assert [(file, name) for file, name in HOPS if name not in functions(file)] == []


async def test_a_run_goes_that_way(tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text(DATA)
    async with FakeVLLM() as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TRACED, str(tmp_path / "calls"), "--data", str(tmp_path / "claims.csv")),
            *(
                "--model",
                server.model,
                "--num_seed",
                "2",
                "--K",
                "2",
                "--stop",
                "K",
                "--runs_dir",
                str(tmp_path),
                "--quiet",
            ),
            cwd=ROOT,
            env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    calls = iter((tmp_path / "calls").read_text().splitlines())
    missing = [hop for hop in HOPS if f"{hop[0]} {hop[1].rpartition('.')[2]}" not in calls]
    assert missing == [], "these are not called after those that stand above them"
