"""Mixtures of experts on a GPU, whose rows depend on themselves alone; called by exact.py in each worker.

vLLM's batch-invariant mode already takes its Triton kernel for experts, with one configuration for any number of tokens
(tiles and the depth of a step of the sum; nothing is split), and sorts where it chooses the experts of a token. What is
left, and replaced here:

- That configuration, 64 x 64 tiles of depth 32, by one with larger tiles, which reads its operands less often.
  ICM_BATCH_INVARIANT_EXPERTS=0 leaves vLLM's; both are constants.
- Gates. vLLM 0.26 computes those that are a GateLinear (DeepSeek, Gemma 4, MiniMax M2, Nemotron H) with other kernels
  for up to 16 or 32 tokens, in its batch-invariant mode, too. Newer versions use the plain linear layer there, as here.
- The first projection of DeepSeek's attention in 16 bits, which has another kernel for up to 16 tokens.
- mxfp4 (gpt-oss). No kernel of vLLM for it is batch-invariant. Its experts become bfloat16 when they are loaded, which
  loses nothing (a number of mxfp4 is one of bfloat16) and takes four times the memory, and are computed as others are.

Read in vLLM 0.26.0 and 0.33.0; docs/determinism.md says what was measured.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from icm_vllm import exactness
from icm_vllm.batch_invariant import product
from icm_vllm.plugin import EXPERTS

_WIDE: Final = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "num_warps": 4, "num_stages": 3}
TILES: Final[Mapping[str | None, Mapping[str, int]]] = {None: _WIDE, "fp8_w8a8": {**_WIDE, "BLOCK_SIZE_K": 128}}
"""For 16 bits, which vLLM gives no name, and for fp8: 64 rows, the least for Hopper's larger matrix instruction, and as
deep as scales of blocks go."""

_WITH_EXPERTS: Final = (
    exactness.EXPERTS_16,
    exactness.EXPERTS_FP8,
    exactness.EXPERTS_MXFP4,
    exactness.EXPERTS_INTEGERS,
    exactness.EXPERTS_OTHER,
)


def install(features: Sequence[str]) -> list[str]:
    """Replace what a model with these features (exactness.py) needs; returns what was, in words.

    Raises ImportError or AttributeError where vLLM lacks it.
    """
    replaced = []
    if any(name in _WITH_EXPERTS for name in features):
        _one_gate()
        replaced.append("gates")
        if os.environ.get(EXPERTS) != "0":
            _one_configuration()
            replaced.append("tiles of experts")
    if exactness.MLA in features:
        _one_projection()
        replaced.append("projections")
    if exactness.EXPERTS_MXFP4 in features:
        _experts_in_16_bits()
        replaced.append("experts of mxfp4 in 16 bits")
    return replaced


def _one_configuration() -> None:
    kernels: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    own = kernels.get_default_config
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def configuration(*sizes_and_type: Any) -> Any:
        found = own(*sizes_and_type)  # in vLLM's mode one for any number of tokens
        return {**found, **TILES.get(sizes_and_type[5], {})}

    configuration.exact = True  # type: ignore[attr-defined]
    kernels.get_default_config = configuration


def _one_gate() -> None:
    gate: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.router.gate_linear").GateLinear
    own = gate.__init__
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        if named.get("force_fp32_compute"):  # vLLM keeps the weights in 16 bits where it has kernels for that
            named["params_dtype"] = torch.float32
        own(self, *arguments, **named)
        for name in [name for name in vars(self) if name.startswith("allow_")]:
            setattr(self, name, False)  # no kernel but the plain linear layer's

    init.exact = True  # type: ignore[attr-defined]
    gate.__init__ = init


def _one_projection() -> None:
    operators: Any = importlib.import_module("vllm._custom_ops")
    own = operators.dsv3_fused_a_gemm
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def project(output: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_: bool, **__: bool) -> None:
        product(a, b, out=output)  # newer versions also say when the kernel may begin

    project.exact = True  # type: ignore[attr-defined]
    operators.dsv3_fused_a_gemm = project


_E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of four bits, without the sign, which is the highest bit (OCP Microscaling Formats, version 1.0)."""


def from_mxfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """mxfp4 as bfloat16, exactly: (..., K). packed: (..., K / 2) bytes, the lower half of each first; scales:
    (..., K / 32) bytes, exponents of 2 plus 127."""
    table = torch.tensor([*_E2M1, *(-number for number in _E2M1)], dtype=torch.bfloat16, device=packed.device)
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    numbers = table[pairs.int()].view(*scales.shape, -1)
    return torch.ldexp(numbers, scales.int().unsqueeze(-1) - 127).to(torch.bfloat16).flatten(-2)


def _experts_in_16_bits() -> None:
    oracle: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.oracle.mxfp4")
    method: Any = importlib.import_module("vllm.model_executor.layers.quantization.mxfp4").GptOssMxfp4MoEMethod
    own, own_process = oracle.backend_to_kernel_cls, method.process_weights_after_loading
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def classes(backend: Any) -> Any:
        if backend.name == "HUMMING":
            return []  # said to be batch-invariant, but vLLM would choose it whether it is installed or not
        # Emulation keeps the weights as they are in the file.
        return [_experts_class()] if backend.name == "EMULATION" else own(backend)

    @functools.wraps(own_process)
    def process(self: Any, layer: Any) -> None:
        own_process(self, layer)
        if self.mxfp4_backend.name != "EMULATION":
            return
        for part in ("w13", "w2"):
            packed, scales = getattr(layer, f"{part}_weight").data, getattr(layer, f"{part}_weight_scale").data
            full = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=torch.bfloat16)
            for expert in range(len(packed)):
                full[expert] = from_mxfp4(packed[expert], scales[expert])
            setattr(layer, f"{part}_weight", torch.nn.Parameter(full, requires_grad=False))

    classes.exact = True  # type: ignore[attr-defined]
    oracle.backend_to_kernel_cls = classes
    method.process_weights_after_loading = process


@functools.cache
def _experts_class() -> Any:
    """vLLM's Triton experts of 16 bits, made from the settings of an mxfp4 layer."""
    base: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.triton_moe").TritonExperts
    config: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.config")

    def init(self: Any, moe_config: Any, quant_config: Any) -> None:
        plain = config.biased_moe_quant_config(
            quant_config.w1_bias,
            quant_config.w2_bias,
            gemm1_alpha=quant_config.gemm1_alpha,
            gemm1_beta=quant_config.gemm1_beta,
            gemm1_clamp_limit=quant_config.gemm1_clamp_limit,
        )
        base.__init__(self, moe_config, plain)

    def supports(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None  # 16-bit activations alone

    content = {"__init__": init, "__module__": __name__, "_supports_quant_scheme": staticmethod(supports)}
    return type("ExpertsOf16Bits", (base,), content)
