"""vLLM with scores that depend only on the prompt: closes the gaps of its batch-invariant mode.

Switched on by ICM_BATCH_INVARIANT=1 beside vLLM's own VLLM_BATCH_INVARIANT=1, whose other settings (one attention
split, no cascade attention) are needed and stay. Five things are replaced, in every process of vLLM:

- Linear layers: vLLM's Triton product by ours, which chooses among tiles that give the same bits (faster).
- RMS norms. vLLM 0.26 adds the residual with a kernel that gives a row 1024 threads below 256 tokens in a step and 256
  from there on (csrc/layernorm_kernels.cu, max_block_size), in its batch-invariant mode too. That changes the
  order of the sum: a prompt whose uncached part is short gets other bits when it is asked by itself. Ours depends only
  on the row.
- FlashAttention gets a number of query tokens that is large enough for its usual path. Both versions choose by the
  longest query of a step: FlashAttention 2 lays out steps of one token each differently; FlashAttention 3 halves its
  tile when the query tokens that share a key head are 64 or fewer, which at head size 64 also changes the block of keys
  that it adds up at a time (192 instead of 128), and it drops the causal mask for single tokens. The number is an upper
  bound for both, so that a larger one costs nothing that was measured. ICM_BATCH_INVARIANT_ATTENTION=0 leaves it as it
  is.
- The sums over the GPUs of a tensor-parallel layer, by icm_vllm/batch_invariant/collectives.py: NCCL then only copies,
  and is freed of the limits that vLLM puts on it (one channel of one thread). ICM_BATCH_INVARIANT_ALL_REDUCE=0 leaves
  both as they are. Reduce-scatter, which some models with experts use, stays NCCL's. CUDA graphs are refused: it was
  not seen to work in one.
- On Hopper the products of fp8 models (Cutlass), which vLLM's mode computes with one tile for any number of rows, by
  icm_vllm/batch_invariant/scaled.py, which chooses among tiles (faster). ICM_BATCH_INVARIANT_FP8=0 leaves them as they
  are, and so do tiles that should differ.

What only some models compute with is in experts.py (mixtures of experts), quantized.py (weights other than those) and
adapters.py (LoRA), for the features that exactness.py finds.

Compiled code (for CUDA graphs) is cached on disk under a separate name.

Measured with vLLM 0.26.0 on H200s: docs/determinism.md. FlashAttention 3 has no exact way to compute sliding windows; a
server that computes them with it warns. vLLM's Triton attention has one (triton_attention.py), and compressed keys
(MLA) have one, too (latent_attention.py); ICM_BATCH_INVARIANT_ATTENTION=0 leaves these as they are as well. vLLM
0.32.0 has everything that is replaced here, too; a version that lacks any of it is refused.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Final

import torch

from icm_vllm import adapters, exactness, experts, latent_attention, quantized, triton_attention
from icm_vllm.batch_invariant import enable_batch_invariant_mode, product, settle_tiles
from icm_vllm.batch_invariant.collectives import all_reduce
from icm_vllm.batch_invariant.compiled import TAG
from icm_vllm.batch_invariant.scaled import on_hopper, scalable, tiles_agree
from icm_vllm.patches import BATCH_INVARIANT_MODES
from icm_vllm.plugin import ALL_REDUCE, ATTENTION, BATCH_INVARIANT, FP8
from icm_vllm.query_length import least_query_length

# A child of vLLM's logger, the only one that its workers show.
log = logging.getLogger(f"vllm.{__name__}")

VLLM: Final = "VLLM_BATCH_INVARIANT"
"""vLLM's own environment variable for its mode."""

LIMITS: Final = ("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_PROTO", "NCCL_ALGO", "NCCL_NTHREADS")
"""Environment variables by which vLLM's mode makes NCCL add in one order; they slow down copies, too."""

IMPORTERS: Final = (
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.layers.layernorm",
)
"""Modules that import functions replaced here by name."""


_fp8_is_ours = False
"""Whether our kernels compute the products of the fp8 model in this process."""


def install() -> None:
    """Replace the above when a worker of this process switches vLLM's mode on; does nothing the second time.

    Not earlier: vLLM's attention module reads the configuration when it is imported, and only a worker has one. Raises
    RuntimeError without VLLM_BATCH_INVARIANT=1, and later in the worker if vLLM lacks what should be replaced: a server
    that was asked for exact scores must not start without them.
    """
    if os.environ.get(VLLM) != "1":
        raise RuntimeError(f"ICM_BATCH_INVARIANT=1 also needs {VLLM}=1: the kernels are only a part of an exact server")
    source = _source()
    own = source.enable_batch_invariant_mode
    if getattr(own, "exact", False):
        return

    asked = {name: os.environ.get(name) for name in LIMITS}

    @functools.wraps(own)
    def enable() -> None:
        bmm = torch.bmm
        own()
        # vLLM replaces torch.bmm itself, which an override of the operator would not reach.
        torch.bmm = bmm
        enable_batch_invariant_mode()
        if torch.cuda.is_available():
            settle_tiles(_device())
        try:
            _replace_linear(source)
            _replace_norms(source)
            replaced = ["kernels", "RMS norms"]
            if os.environ.get(ATTENTION) != "0":
                _replace_attention()
                triton_attention.replace()
                latent_attention.replace()
                replaced.append("attention")
            if os.environ.get(ALL_REDUCE) != "0":
                _replace_all_reduce()
                replaced.append("sums over GPUs")
                _put_back(asked)  # in time: workers switch the mode on before they make communicators
            if os.environ.get(FP8) != "0":
                _replace_scaled_products()
                replaced.append("fp8 products")
            replaced += _for_this_model()
            _name_what_is_compiled()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"this vLLM cannot be made exact, it lacks what is replaced: {error}") from error
        log.info("exact scores: in place are batch-invariant %s", ", ".join(replaced))

    enable.exact = True  # type: ignore[attr-defined]
    source.enable_batch_invariant_mode = enable  # type: ignore[attr-defined]
    if source._batch_invariant_MODE:
        enable()


def _for_this_model() -> list[str]:
    """Replace what only some models compute with; what that is, in words."""
    config = importlib.import_module("vllm.config").get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        log.warning("which model this worker computes is not known: its experts and quantized weights stay vLLM's")
        return []
    features = exactness.features(config.model_config.hf_config.to_dict(), exactness.server_of(config, "gpu"))
    return [name for part in (experts, quantized, adapters) for name in part.install(features)]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _source() -> ModuleType:
    for name in BATCH_INVARIANT_MODES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    raise RuntimeError("this vLLM has no batch-invariant mode")


def _replace_name(source: ModuleType, name: str, ours: Callable[..., Any]) -> None:
    own = getattr(source, name)
    if own.__module__ == __name__:
        return
    setattr(source, name, ours)
    for module in [sys.modules.get(importer) for importer in IMPORTERS]:
        if module is not None and getattr(module, name, None) is own:
            setattr(module, name, ours)


def _replace_linear(source: ModuleType) -> None:
    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return torch.ops.icm.linear(x, weight, None if bias is None else bias.expand(weight.shape[0]))

    def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return product(a, b, bias)

    _replace_name(source, "linear_batch_invariant", linear)
    _replace_name(source, "matmul_persistent", matmul)


def _replace_norms(source: ModuleType) -> None:
    layernorm: Any = importlib.import_module("vllm.model_executor.layers.layernorm")

    def norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, residual: Any = None) -> Any:
        if residual is None:
            return torch.ops.icm.rms_norm(x, weight, eps)
        return torch.ops.icm.add_rms_norm(x, residual, weight, eps)

    _replace_name(source, "rms_norm_batch_invariant", norm)
    # The classes as well: compiled models run forward_native, and Gemma's norm does not call the function.
    plain, gemma = layernorm.RMSNorm, layernorm.GemmaRMSNorm
    own_forward = plain.forward_native
    if own_forward.__module__ == __name__:
        return

    def forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if self.variance_size_override is not None:
            return own_forward(self, x, residual)
        weight = self.weight.data if getattr(self, "has_weight", True) else None
        return norm(x, weight, self.variance_epsilon, residual)

    def gemma_forward(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        return norm(x, self.weight.data.float() + 1.0, self.variance_epsilon, residual)

    for owner, ours in ((plain, forward), (gemma, gemma_forward)):
        owner.forward_native = ours
        owner.forward_cuda = ours


def _replace_all_reduce() -> None:
    owner: Any = importlib.import_module("vllm.distributed.device_communicators.cuda_communicator").CudaCommunicator
    own = owner.all_reduce
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def reduce(self: Any, input_: torch.Tensor) -> Any:
        if not input_.is_floating_point():
            return own(self, input_)  # whole numbers have one sum in any order
        if input_.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"exact sums over GPUs are not made for CUDA graphs: --enforce-eager, or {ALL_REDUCE}=0")
        return all_reduce(input_, self.device_group)

    reduce.exact = True  # type: ignore[attr-defined]
    owner.all_reduce = reduce


def _replace_scaled_products() -> None:
    operators: Any = importlib.import_module("vllm._custom_ops")
    layers: Any = importlib.import_module("vllm.model_executor.kernels.linear.scaled_mm.cutlass")
    own, own_init = operators.cutlass_scaled_mm, layers.CutlassFP8ScaledMMLinearKernel.__init__
    if getattr(own, "exact", False):
        return

    @functools.cache
    def ours() -> bool:
        """Whether our tiles agree here. Only called for an fp8 model: compiling the tiles takes seconds."""
        differing = [what for what, count in tiles_agree(_device()) if count]
        if differing:
            log.warning("tiles differ on this GPU, vLLM's own compute fp8: %s", "; ".join(differing[:4]))
        return not differing

    @functools.wraps(own_init)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        global _fp8_is_ours
        own_init(self, *arguments, **named)
        _fp8_is_ours = on_hopper(_device()) and ours()

    @functools.wraps(own)
    def scaled_mm(
        a: torch.Tensor,
        b: torch.Tensor,
        scale_a: torch.Tensor,
        scale_b: torch.Tensor,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> Any:
        rows = a.view(-1, a.shape[-1])
        if not (_fp8_is_ours and scalable(rows, b, scale_a, scale_b)):
            return own(a, b, scale_a, scale_b, out_dtype, bias)
        y = torch.ops.icm.scaled_product(rows, b, scale_a, scale_b, bias, out_dtype)
        return y.view(*a.shape[:-1], b.shape[1])

    scaled_mm.exact = True  # type: ignore[attr-defined]
    operators.cutlass_scaled_mm = scaled_mm
    layers.CutlassFP8ScaledMMLinearKernel.__init__ = init


def _name_what_is_compiled() -> None:
    """vLLM keys its cache of compiled models with its environment variables, among others: add ours to them."""
    envs: Any = importlib.import_module("vllm.envs")
    # _fp8_is_ours is set when the layers are made, before anything is compiled.
    envs.environment_variables[BATCH_INVARIANT] = lambda: f"{TAG},fp8={_fp8_is_ours}"


def _put_back(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@functools.cache
def _warn_of_windows() -> None:
    log.warning(
        "this model's attention looks back over a window, for which FlashAttention 3 is not exact: "
        "scores depend on what is cached; start it with --attention-config.backend TRITON_ATTN (docs/determinism.md)"
    )


def _replace_attention() -> None:
    backend: Any = importlib.import_module("vllm.v1.attention.backends.flash_attn")
    builder = backend.FlashAttentionMetadataBuilder
    own = builder.build
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *rest: Any, **named: Any) -> Any:
        batch = copy.copy(common_attn_metadata)
        batch.max_query_len = max(batch.max_query_len, least_query_length(self.num_heads_q, self.num_heads_kv))
        window = getattr(self.kv_cache_spec, "sliding_window", None)
        if window:
            _warn_of_windows()
            # A window that spans all keys of a step counts as none, which is another tile.
            batch.max_seq_len = max(batch.max_seq_len, min(window + 1, self.model_config.max_model_len))
        return own(self, common_prefix_len, batch, *rest, **named)

    build.exact = True  # type: ignore[attr-defined]
    builder.build = build
