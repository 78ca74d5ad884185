"""Exact attention for models with windows, and for those with compressed keys."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from icm_vllm import latent_attention

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **variables}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        timeout=500,
    )


@pytest.mark.real_server
@pytest.mark.timeout(600)
def test_windows_and_sinks_under_the_interpreter() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/icm_vllm/interpreted/windows_on_cpu.py")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


TILES = """
from icm_vllm.triton_attention import tile_of
assert tile_of("") == () and tile_of("64x32") == (64, 32) and tile_of("128x64x8x2") == (128, 64, 8, 2)
for text in ("64", "64x", "64x48", "8x32", "64x32x4", "axb", "-64x32", "64x32x0x2"):
    try:
        tile_of(text)
    except ValueError as error:
        assert str(error).startswith(f"ICM_BATCH_INVARIANT_WINDOW_TILE={text}: "), error
    else:
        raise AssertionError(text)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs PyTorch and Triton (make setup-local)")
def test_a_tile_that_is_none_is_refused() -> None:
    done = run("-c", TILES)
    assert done.returncode == 0, done.stderr


REPLACED = """
import sys
from types import ModuleType, SimpleNamespace

seen = []
kernels = ModuleType("kernels")
kernels.softmax_step, kernels.kernel_unified_attention = "own", "own kernel"
backend = ModuleType("backend")
class Builder:
    def build(self, prefix, batch, fast_build=False):
        seen.append((batch.max_query_len, fast_build))
backend.TritonAttentionMetadataBuilder = Builder
sys.modules["vllm.v1.attention.ops.triton_unified_attention"] = kernels
sys.modules["vllm.v1.attention.backends.triton_attn"] = backend

from icm_vllm import triton_attention
triton_attention.replace(); once = Builder.build
triton_attention.replace(); assert Builder.build is once
batch = SimpleNamespace(max_query_len=1)
Builder().build(0, batch, fast_build=True)
Builder().build(0, SimpleNamespace(max_query_len=7))
assert batch.max_query_len == 1, "vLLM's own batch was changed"
assert kernels.softmax_step is triton_attention.softmax_step
print(seen, kernels.kernel_unified_attention if kernels.kernel_unified_attention == "own kernel" else "ours")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs PyTorch and Triton (make setup-local)")
@pytest.mark.parametrize(("tile", "kernel"), [("", "own kernel"), ("64x32", "ours")])
def test_what_is_replaced_for_windows(tile: str, kernel: str) -> None:
    done = run("-c", REPLACED, ICM_BATCH_INVARIANT_WINDOW_TILE=tile)
    assert done.stdout == f"[(2, True), (7, False)] {kernel}\n", done.stderr


class Compressed:
    """The parts of vLLM's builder for compressed keys that are replaced, and what they were given."""

    reorder_batch_threshold = 512
    num_heads = 128

    def __init__(self) -> None:
        self.scheduled: list[int] = []

    def _build_decode(self, longest: int) -> SimpleNamespace:
        self._schedule_decode(num_reqs=1, max_query_len=longest)
        return SimpleNamespace(max_query_len=longest)

    def _schedule_decode(self, num_reqs: int, max_query_len: int) -> None:
        self.scheduled.append(max_query_len)


def test_all_rows_of_compressed_keys_go_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vllm.v1.attention.backends.mla.flashattn_mla"
    monkeypatch.setitem(sys.modules, name, None)  # as where vLLM has no such attention
    latent_attention.replace()
    module = ModuleType(name)
    module.FlashAttnMLAMetadataBuilder = Compressed  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    for attribute in ("_build_decode", "_schedule_decode", "reorder_batch_threshold"):
        monkeypatch.setattr(Compressed, attribute, getattr(Compressed, attribute))
    latent_attention.replace()
    once = Compressed._build_decode
    latent_attention.replace()
    assert Compressed._build_decode is once
    assert Compressed.reorder_batch_threshold > 1_000_000
    builder = Compressed()
    assert [builder._build_decode(longest).max_query_len for longest in (1, 5)] == [2, 5]
    builder.num_heads = 16
    assert builder._build_decode(1).max_query_len == 5
    assert builder.scheduled == [2, 5, 5]


def test_a_vllm_without_a_part_of_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashattn_mla")
    module.FlashAttnMLAMetadataBuilder = SimpleNamespace(_build_decode=len, _schedule_decode=len)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.mla.flashattn_mla", module)
    with pytest.raises(AttributeError, match="reorder_batch_threshold"):
        latent_attention.replace()
