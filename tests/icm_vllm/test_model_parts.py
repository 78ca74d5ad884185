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


IN_VLLM = """
from icm_vllm import adapters, exactness as x, experts, quantized
found = [experts.install([x.EXPERTS_MXFP4, x.MLA]), quantized.install([x.FP8_BLOCKS, x.GPTQ, x.AWQ]),
         adapters.install([x.LORA])]
print(sum(found, []))
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.oracle import mxfp4
shapes = (128, 1536, 2048), (128, 2048, 768), 8
for dtype, depth in ((None, 64), ("fp8_w8a8", 128)):
    chosen = [fused_moe.try_get_optimal_moe_config(*shapes, dtype, tokens, [128, 128]) for tokens in (1, 17, 8192)]
    assert all(each == chosen[0] for each in chosen) and chosen[0]["BLOCK_SIZE_K"] == depth, chosen
from vllm.model_executor.layers.fused_moe.config import ocp_mx_moe_quant_config
import torch
from types import SimpleNamespace
scales = dict(w1_scale=torch.zeros(2), w2_scale=torch.zeros(2), w1_bias=torch.ones(2, 4), w2_bias=torch.ones(2, 4))
(ours,) = mxfp4.backend_to_kernel_cls(mxfp4.Mxfp4MoeBackend.EMULATION)
gate = dict.fromkeys(("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
moe = SimpleNamespace(**gate, activation_situ_beta=None, activation_situ_linear_beta=None)
made = ours(moe, ocp_mx_moe_quant_config(quant_dtype="mxfp4", **scales))
assert made.quant_dtype is None and made.w1_scale is None and made.w1_bias is scales["w1_bias"]
print("done")
"""


@pytest.mark.real_server
def test_it_fits_the_vllm_of_this_environment() -> None:
    done = run("-c", IN_VLLM, VLLM_BATCH_INVARIANT="1")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "done"
    assert "experts of mxfp4 in 16 bits" in lines[-2]
    assert "tiles of adapters" in lines[-2]
