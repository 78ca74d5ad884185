"""LoRA adapters on a GPU, whose rows depend on themselves alone; called by exact.py in each worker.

vLLM's kernels for adapters take their tiles, and how deep one step of the sum is, by the number of tokens. Its
batch-invariant mode does not split the sum any more (0.26), or splits it in one way (0.33), but 0.26 still goes deeper
below 128 tokens. Here any number of tokens is computed as a large one.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, Final

from icm_vllm import exactness

TOKENS: Final = 8192
"""As how many tokens a step of any length is computed."""


def install(features: Sequence[str]) -> list[str]:
    """Replace what a server with these features (exactness.py) needs; returns what was, in words.

    Raises ImportError or AttributeError where vLLM lacks it.
    """
    if exactness.LORA not in features:
        return []
    utilities: Any = importlib.import_module("vllm.lora.ops.triton_ops.utils")
    own = utilities.get_lora_op_configs
    if getattr(own, "exact", False):
        return ["tiles of adapters"]

    @functools.wraps(own)
    def configuration(op_type: str, max_loras: int, batch: int, *rest: Any, **named: Any) -> Any:
        return own(op_type, max_loras, TOKENS, *rest, **named)

    configuration.exact = True  # type: ignore[attr-defined]
    utilities.get_lora_op_configs = configuration
    for name in ("vllm.lora.ops.triton_ops.lora_shrink_op", "vllm.lora.ops.triton_ops.lora_expand_op"):
        importer: Any = importlib.import_module(name)
        importer.get_lora_op_configs = configuration
    return ["tiles of adapters"]
