"""Experts, quantized weights and adapters, replaced for exact scores: with stand-ins of vLLM's modules, and in vLLM."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs PyTorch and Triton (make setup-local)",
)
@pytest.mark.timeout(300)
def test_rows_of_models_depend_on_themselves_alone() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/icm_vllm/interpreted/models_on_cpu.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
