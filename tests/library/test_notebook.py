"""The notebook in docs runs from top to bottom, shows its pictures, and is small."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path

import pytest

from fakes.vllm_server import FakeVLLM, Fault
from tests.library.notebook import NOTEBOOK, REPOSITORY, executed, outputs, shown


async def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeVLLM(model="gemma-3-270m") as server:
        notebook = await executed(tmp_path, server.url, "gemma-3-270m", monkeypatch)
    [picture] = shown(notebook, "image/png")
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert any("<table>" in page for page in shown(notebook, "text/html"))
    printed = "".join(output.text for output in outputs(notebook) if output.output_type == "stream")
    assert "labels" not in printed  # the command's summary is for the terminal
    assert printed.count("agreement with gold") == 2
    runs = [path.parent for path in (tmp_path / "runs" / "notebook").glob("*/labels.jsonl")]
    assert len(runs) == 3


CELL = """
import icm
icm.label([f"{n} is a prime number." for n in range(16)], model="fake-8b", run="cut", num_seed=4)
"""


async def test_interrupt_kernel_stops_resumably(tmp_path: Path) -> None:
    jupyter = pytest.importorskip("jupyter_client", reason="make setup-notebook")
    log = tmp_path / "runs" / "cut" / "log.jsonl"
    async with FakeVLLM() as server:
        environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}
        kernel, client = await jupyter.manager.start_new_async_kernel(
            cwd=str(tmp_path), env={**environment, "PYTHONPATH": str(REPOSITORY)}
        )
        try:
            server.faults.append(Fault(delay=0.05, times=None))
            cell = asyncio.ensure_future(client.execute_interactive(CELL, output_hook=lambda _: None))
            while not log.exists() or log.read_bytes().count(b"\n") < 4:
                assert not cell.done()
                await asyncio.sleep(0.02)
            await kernel.interrupt_kernel()
            content = (await cell)["content"]
            assert (content["status"], content["ename"]) == ("error", "KeyboardInterrupt")
            before = log.read_bytes()
            assert before.endswith(b"\n")
            await asyncio.sleep(0.2)
            assert log.read_bytes() == before  # nothing goes on behind the cell
            server.faults.clear()
            content = (await client.execute_interactive(CELL, output_hook=lambda _: None))["content"]
            assert content["status"] == "ok"
            assert log.read_bytes().startswith(before)
            assert (tmp_path / "runs" / "cut" / "labels.jsonl").exists()
        finally:
            client.stop_channels()
            await kernel.shutdown_kernel(now=True)


def test_what_is_committed_was_run_and_is_small() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    found = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in found if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in found) == 1
    text = json.dumps(cells)
    assert "/home/" not in text
    assert "/tmp/" not in text
