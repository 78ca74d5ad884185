"""The batch-invariant kernels on the CPU, by Triton's interpreter, in a process that defines them so."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs PyTorch and Triton (make setup-local)",
)


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )


@pytest.mark.timeout(600)
def test_the_kernels_under_the_interpreter() -> None:
    done = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/icm_vllm/interpreted/kernels_on_cpu.py"),
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


CHECK = """
import torch
from icm_vllm.batch_invariant import is_batch_invariant_mode_enabled as on
import threading
threading.Thread(target=lambda: print(on(), torch.compiler.config.cache_key_tag)).start()
"""


def test_sitecustomize_switches_the_mode_on_where_it_is_asked_to(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the next one')")
    site = REPOSITORY / "icm_vllm" / "batch_invariant" / "site"
    path = os.pathsep.join([str(site), str(tmp_path), str(REPOSITORY)])
    asked = run("-c", CHECK, TRITON_INTERPRET="1", ICM_BATCH_INVARIANT="1", PYTHONPATH=path)
    assert asked.stdout.split("\n") == ["the next one", "True icm-batch-invariant", ""], asked.stderr
    plain = run("-c", CHECK, TRITON_INTERPRET="1", ICM_BATCH_INVARIANT="0", PYTHONPATH=path)
    assert plain.stdout.split("\n") == ["the next one", "False ", ""], plain.stderr


TAG = "from icm_vllm.batch_invariant.compiled import TAG; print(TAG)"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86")
def test_code_compiled_for_one_cpu_is_kept_apart_from_that_for_another() -> None:
    tags = {}
    for capability in ("default", "avx2"):
        done = run("-c", TAG, ATEN_CPU_CAPABILITY=capability)
        assert done.returncode == 0, done.stderr
        tags[capability] = done.stdout.strip()
    assert tags["default"].endswith("-default")
    assert tags["avx2"].endswith("-avx2")
    assert tags["default"].removesuffix("-default") == tags["avx2"].removesuffix("-avx2")


@pytest.mark.parametrize("script", ["batch_invariant", "attention_rows", "gpu_time", "scaled_products"])
def test_benchmarks_without_a_gpu_end_with_one_line(script: str) -> None:
    arguments = ["--model", "FOLDER"] if script == "gpu_time" else []
    done = run(f"benchmarks/{script}.py", *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr == f"benchmarks/{script}.py needs an NVIDIA GPU, and there is none here\n"
