"""The notebook in docs against a real model; UPDATE_DOCS=1 keeps what it shows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import RunningServer
from tests.library.notebook import NOTEBOOK, executed, shown


@pytest.mark.real_server
@pytest.mark.timeout(900)
async def test_the_notebook_labels_reviews(
    vllm_server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = await executed(tmp_path, vllm_server.url, vllm_server.model, monkeypatch)
    *_, agreement = shown(notebook, "text/plain")
    assert float(agreement) > 0.9
    if os.environ.get("UPDATE_DOCS"):
        import nbformat

        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which would differ each time
        nbformat.write(notebook, NOTEBOOK)
