"""Kernels whose result for one row does not depend on the other rows, and a mode that makes PyTorch use them.

    from icm_vllm.batch_invariant import set_batch_invariant_mode

    with set_batch_invariant_mode():
        logits = model(tokens)           # each row has the same bits whatever the other rows are

Works with plain PyTorch models in bfloat16, float16 and float32, eagerly, under torch.compile and in CUDA graphs. In a
vLLM server: ICM_BATCH_INVARIANT=1 (icm_vllm/exact.py). What it guarantees and costs: docs/determinism.md.
Needs PyTorch 2.9 or newer and the Triton that comes with it.
"""

from icm_vllm.batch_invariant.matmul import agreement, product, settle_tiles
from icm_vllm.batch_invariant.mode import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from icm_vllm.batch_invariant.rows import log_softmax, rms_norm, softmax, total
from icm_vllm.batch_invariant.scaled import scaled_product

__all__ = [
    "agreement",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "is_batch_invariant_mode_enabled",
    "log_softmax",
    "product",
    "rms_norm",
    "scaled_product",
    "set_batch_invariant_mode",
    "settle_tiles",
    "softmax",
    "total",
]
