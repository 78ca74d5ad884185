"""docs/library.ipynb, run from top to bottom by Jupyter's own kernel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOTEBOOK = REPOSITORY / "docs" / "library.ipynb"


async def executed(folder: Path, url: str, model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook with its outputs, run in `folder` against the server at `url`. An error in a cell is raised."""
    nbclient = pytest.importorskip("nbclient", reason="make setup-notebook")
    nbformat = pytest.importorskip("nbformat", reason="make setup-notebook")
    monkeypatch.setenv("VLLM_BASE_URL", url)
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.reads(NOTEBOOK.read_text().replace("gemma-3-270m", model), as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return await client.async_execute()


def outputs(notebook: Any) -> list[Any]:
    """The outputs of all cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook: Any, kind: str) -> list[str]:
    """What cells show as `kind` (text/plain, image/png, ...)."""
    return [output.data[kind] for output in outputs(notebook) if kind in output.get("data", {})]
