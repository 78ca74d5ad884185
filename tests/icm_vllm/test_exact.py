"""What is replaced in vLLM for exact scores: it is there, it is replaced once, and it computes the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icm_vllm.query_length import SMALL_TILE, least_query_length

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("heads", "key_heads", "length"), [(32, 8, 17), (64, 8, 9), (8, 8, 65), (128, 1, 2), (4, 1, 17), (32, 32, 65)]
)
def test_the_least_query_length_leaves_the_small_tile(heads: int, key_heads: int, length: int) -> None:
    assert least_query_length(heads, key_heads) == length
    assert length * (heads // key_heads) > SMALL_TILE


# A worker switches vLLM's mode on, whichever order things were imported in.
START = """
import sys
from types import SimpleNamespace
import torch
from vllm.v1.attention.backends import flash_attn
seen = []
flash_attn.FlashAttentionMetadataBuilder.build = lambda self, prefix, batch, fast_build=False: seen.append(batch)
if sys.argv[1] == "late":
    import vllm.model_executor.layers.linear, vllm.model_executor.layers.vocab_parallel_embedding
from vllm.distributed.device_communicators.cuda_communicator import CudaCommunicator
CudaCommunicator.all_reduce = lambda self, x: ("own", x.dtype)
import vllm._custom_ops
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
vllm._custom_ops.cutlass_scaled_mm = lambda a, b, scale_a, scale_b, out_dtype, bias=None: "own"
CutlassFP8ScaledMMLinearKernel.__init__ = lambda self, config, names: None
from icm_vllm.batch_invariant import is_batch_invariant_mode_enabled
from functools import partial
from icm_vllm import exact
exact.tiles_agree = partial(exact.tiles_agree, n=32, k=48)  # numbers enough for an interpreter
exact.log.info = lambda text, *values: print(text % values)
source, bmm = exact._source(), torch.bmm
source.current_platform = SimpleNamespace(dispatch_key="CPU", is_cuda=lambda: False, is_cuda_alike=lambda: False,
                                          is_xpu=lambda: False, is_rocm=lambda: False)
if sys.argv[1] == "enabled":
    source.enable_batch_invariant_mode()
    torch.bmm = bmm
exact.install(); exact.install()
assert is_batch_invariant_mode_enabled() == (sys.argv[1] == "enabled")
source.override_envs_for_invariance()
source.enable_batch_invariant_mode(); source.enable_batch_invariant_mode()
assert source._batch_invariant_MODE and is_batch_invariant_mode_enabled() and torch.bmm is bmm
"""

PROGRAM = """
from vllm.model_executor.layers import layernorm, linear, vocab_parallel_embedding
ours = "icm_vllm.exact"
for module, name in ((linear, "linear_batch_invariant"), (vocab_parallel_embedding, "linear_batch_invariant"),
                     (layernorm, "rms_norm_batch_invariant"), (source, "matmul_persistent")):
    assert getattr(module, name).__module__ == ours, (module, name)

x, w, bias, r = torch.randn(3, 2, 32), torch.randn(5, 32), torch.randn(5), torch.randn(3, 2, 32)
torch.testing.assert_close(linear.linear_batch_invariant(x, w, bias), torch.nn.functional.linear(x, w, bias))
torch.testing.assert_close(source.matmul_persistent(x[0], w.t(), bias), torch.nn.functional.linear(x[0], w, bias))

from vllm.config import VllmConfig, set_current_vllm_config
with set_current_vllm_config(VllmConfig()):
    for cls in (layernorm.RMSNorm, layernorm.GemmaRMSNorm):
        norm = cls(32, eps=1e-5)
        norm.weight.data = torch.rand(32)
        weight = norm.weight.data + (1 if cls is layernorm.GemmaRMSNorm else 0)
        def expected(z):
            return z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
        for forward in (norm.forward_cuda, norm.forward_native):
            torch.testing.assert_close(forward(x), expected(x))
            y, added = forward(x, r)
            torch.testing.assert_close(added, x + r)
            torch.testing.assert_close(y, expected(x + r))

def lengths(longest, furthest, window):
    builder = SimpleNamespace(num_heads_q=32, num_heads_kv=8, model_config=SimpleNamespace(max_model_len=4096),
                              kv_cache_spec=SimpleNamespace(sliding_window=window))
    batch = SimpleNamespace(max_query_len=longest, max_seq_len=furthest)
    flash_attn.FlashAttentionMetadataBuilder.build(builder, 0, batch, fast_build=True)
    assert (batch.max_query_len, batch.max_seq_len) == (longest, furthest), "vLLM's own batch was changed"
    return seen[-1].max_query_len, seen[-1].max_seq_len
print("lengths", lengths(1, 5, None), lengths(40, 5, None), lengths(1, 5, 512), lengths(1, 5, 9999))

# Sums over GPUs: of one process here.
import os, tempfile
torch.distributed.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
communicator = SimpleNamespace(device_group=torch.distributed.group.WORLD)
y = CudaCommunicator.all_reduce(communicator, x)
assert y is not x and torch.equal(y, x)
assert CudaCommunicator.all_reduce(communicator, torch.arange(3)) == ("own", torch.int64)
torch.cuda.is_current_stream_capturing = lambda: True
try:
    CudaCommunicator.all_reduce(communicator, SimpleNamespace(is_cuda=True, is_floating_point=lambda: True))
except RuntimeError as error:
    assert "--enforce-eager" in str(error)
else:
    raise AssertionError("it was recorded")
print("nccl", os.environ.get("NCCL_MAX_NCHANNELS"), os.environ.get("NCCL_ALGO"), os.environ["NCCL_NVLS_ENABLE"])

# fp8 models: vLLM's product stays until a layer of such a model is made.
from vllm import _custom_ops as operators
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel as Layer
a, b = torch.randn(2, 3, 32).to(torch.float8_e4m3fn), torch.randn(16, 32).to(torch.float8_e4m3fn).t()
numbers = a, b, torch.rand(6, 1), torch.rand(16, 1), torch.bfloat16
assert operators.cutlass_scaled_mm(*numbers) == "own"
import vllm.envs
from icm_vllm.batch_invariant.compiled import TAG
assert f"{TAG},fp8=False" in vllm.envs.compile_factors().values()
Layer("layer", [])
y = operators.cutlass_scaled_mm(*numbers)
expected = (a.double() @ b.double()) * numbers[2].view(2, 3, 1) * numbers[3].t()
torch.testing.assert_close(y.double(), expected, rtol=0.01, atol=0.01)
assert operators.cutlass_scaled_mm(a, b, torch.rand(6, 2), *numbers[3:]) == "own"
compiled = torch.compile(lambda a, s: operators.cutlass_scaled_mm(a, b, s, numbers[3], torch.bfloat16) * 2,
                         fullgraph=True, dynamic=True, backend="aot_eager")
torch.testing.assert_close(compiled(a[0], numbers[2][:3]), y[0] * 2, rtol=0, atol=0)
assert f"{TAG},fp8=True" in vllm.envs.compile_factors().values() and TAG in torch.compiler.config.cache_key_tag

# Ours lie on top of vLLM's.
torch.testing.assert_close(x.softmax(-1), torch.ops.icm.softmax(x, -1), rtol=0, atol=0)
torch.testing.assert_close(torch.bmm(x, x.mT), torch.ops.icm.product(x, x.mT), rtol=0, atol=0)
print("done")
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.real_server
@pytest.mark.parametrize("order", ["early", "late", "enabled"])
def test_the_plugin_replaces_what_vllm_computes_with(order: str) -> None:
    done = run(START + PROGRAM, order, ICM_BATCH_INVARIANT="1", VLLM_BATCH_INVARIANT="1", NCCL_MAX_NCHANNELS="7")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nccl 7 None 0" in done.stdout  # as it was asked for, not as vLLM limits it
    assert "lengths (17, 5) (40, 5) (17, 513) (17, 4096)" in done.stdout
    assert "which model this worker computes is not known" in done.stdout + done.stderr
    # Two models with windows were seen, one warning is enough.
    assert (done.stdout + done.stderr).count("for which FlashAttention 3 is not exact") == 1
    assert done.stdout.endswith("done\n")


@pytest.mark.real_server
def test_attention_can_be_left_alone() -> None:
    program = START + "print(hasattr(flash_attn.FlashAttentionMetadataBuilder.build, '__wrapped__'))"
    for attention, wrapped in (("1", "True"), ("0", "False")):
        variables = {
            "ICM_BATCH_INVARIANT": "1",
            "VLLM_BATCH_INVARIANT": "1",
            "ICM_BATCH_INVARIANT_ATTENTION": attention,
        }
        assert run(program, "early", **variables).stdout.split()[-1] == wrapped


@pytest.mark.real_server
def test_sums_over_gpus_and_fp8_products_can_be_left_to_vllm() -> None:
    variables = {
        "ICM_BATCH_INVARIANT": "1",
        "VLLM_BATCH_INVARIANT": "1",
        "ICM_BATCH_INVARIANT_ALL_REDUCE": "0",
        "ICM_BATCH_INVARIANT_FP8": "0",
    }
    shown = (
        "import os; from icm_vllm.plugin import kernels;"
        "print(hasattr(CudaCommunicator.all_reduce, '__wrapped__'), os.environ['NCCL_MAX_NCHANNELS'],"
        "hasattr(vllm._custom_ops.cutlass_scaled_mm, '__wrapped__'), kernels())"
    )
    done = run(START + shown, "early", **variables)
    named = [f"{name}={value}" for name, value in variables.items()]
    assert sorted(done.stdout.split()[-1].split(",")) == sorted(named)
    assert done.stdout.split()[-4:-1] == ["False", "1", "False"]
    assert "batch-invariant kernels, RMS norms, attention\n" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs PyTorch and Triton (make setup-local)")
def test_without_vllms_own_mode_it_is_refused() -> None:
    done = run("from icm_vllm import exact; exact.install()", VLLM_BATCH_INVARIANT="0")
    assert done.returncode == 1
    assert "ICM_BATCH_INVARIANT=1 also needs VLLM_BATCH_INVARIANT=1" in done.stderr
    done = run("from icm_vllm.plugin import register; register()", ICM_BATCH_INVARIANT="0")
    assert done.returncode == 0
