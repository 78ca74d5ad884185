"""Linear layers with quantized weights on a GPU, whose rows depend on themselves alone; called by exact.py in workers.

- fp8 with a scale for each block of 128 x 128 (DeepSeek's format): vLLM's batch-invariant mode leaves the choice among
  DeepGEMM, Cutlass and Triton as it is. Here it is Triton's kernel, with one configuration for any number of rows.
  ICM_BATCH_INVARIANT_FP8=0 leaves vLLM's choice.
- GPTQ and other weights in integers: Marlin and Machete share out the inner dimension by the number of rows. Their
  products of the unit vectors are the weights as they compute with them, whatever the order of the sum, because all
  other terms are zero. So that is what a layer is turned into when it is loaded: 16 bits, computed by our product, in
  the memory of a model that is not quantized.
- AWQ: vLLM's mode makes 16 bits of a layer's weights at every step and multiplies with our product. The first is done
  by vLLM's Triton kernel here, because that of its extension knows float16 alone.

Read in vLLM 0.26.0 and 0.33.0; docs/determinism.md says what was measured.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from typing import Any, Final

import torch

from icm_vllm import exactness
from icm_vllm.plugin import FP8

UNIT_VECTORS: Final = 1024
"""How many are multiplied at once."""


def install(features: Sequence[str]) -> list[str]:
    """Replace what a model with these features (exactness.py) needs; returns what was, in words.

    Raises ImportError or AttributeError where vLLM lacks it.
    """
    replaced = []
    if exactness.FP8_BLOCKS in features and os.environ.get(FP8) != "0":
        _triton_for_blocks()
        replaced.append("products of fp8 blocks")
    if exactness.GPTQ in features:
        _integers_in_16_bits()
        replaced.append("weights in 16 bits")
    if exactness.AWQ in features:
        _awq_in_triton()
        replaced.append("weights of AWQ")
    return replaced


def _triton_for_blocks() -> None:
    linear: Any = importlib.import_module("vllm.model_executor.kernels.linear")
    tuned: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    linear._POSSIBLE_FP8_BLOCK_KERNELS[platform._enum] = [linear.TritonFp8BlockScaledMMKernel]
    if not hasattr(tuned, "get_w8a8_block_fp8_configs"):
        raise AttributeError("get_w8a8_block_fp8_configs")
    # No configurations by the number of rows, which newer modes skip themselves.
    tuned.get_w8a8_block_fp8_configs = lambda *sizes: None


def _awq_in_triton() -> None:
    operators: Any = importlib.import_module("vllm._custom_ops")
    own = operators.awq_dequantize
    if getattr(own, "exact", False):
        return
    unpack = importlib.import_module("vllm.model_executor.layers.quantization.awq_triton").awq_dequantize_triton

    @functools.wraps(own)
    def dequantize(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, *unused: int) -> Any:
        return unpack(weight, scales, zeros)

    dequantize.exact = True  # type: ignore[attr-defined]
    operators.awq_dequantize = dequantize


def _integers_in_16_bits() -> None:
    kernels: Any = importlib.import_module("vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel")
    kernel = kernels.MPLinearKernel
    own = kernel.__init__
    if getattr(own, "exact", False):
        return

    @functools.wraps(own)
    def init(self: Any, config: Any, *names: Any, **named: Any) -> None:
        own(self, config, *names, **named)
        if config.act_type.itemsize == 2:  # not where activations are quantized, too
            _take_over(self)

    init.exact = True  # type: ignore[attr-defined]
    kernel.__init__ = init


def _take_over(kernel: Any) -> None:
    """Let a kernel of vLLM's make the weights once, and ours compute with them."""
    prepare, apply = kernel.process_weights_after_loading, kernel.apply_weights
    weights: list[torch.Tensor] = []

    def process(layer: Any) -> None:
        prepare(layer)
        inputs, outputs = kernel.config.partition_weight_shape
        device = next(layer.parameters(recurse=False)).device
        found = torch.empty(outputs, inputs, dtype=kernel.config.act_type, device=device)
        for start in range(0, inputs, UNIT_VECTORS):
            count = min(UNIT_VECTORS, inputs - start)
            unit = found.new_zeros(count, inputs)
            unit[:, start : start + count].fill_diagonal_(1)
            found[:, start : start + count] = apply(layer, unit).t()
        weights[:] = [found]
        bias = getattr(layer, "bias", None)
        if bias is not None:  # some kernels have brought it into an order of their own
            bias.data = apply(layer, found.new_zeros(1, inputs), bias)[0]
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "bias":
                parameter.data = parameter.data.new_empty(0)

    def applied(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return torch.ops.icm.linear(x, weights[0], bias)

    kernel.process_weights_after_loading, kernel.apply_weights = process, applied
