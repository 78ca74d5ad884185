"""vLLM's copy of token ids to the GPU, by way of NumPy.

The GPU worker turns the token ids of every new request, a list of Python numbers, into a tensor; torch.tensor takes
three times as long for that as NumPy (6.6 against 2.0 ms for 100,000 numbers). At 2.7 million tokens a pool this was
more than a third of the engine's time with everything cached (docs/lab-log.md).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

log = logging.getLogger(__name__)


def through_numpy(copy: Any, int32: Any) -> Any:
    """`vllm.utils.torch_utils.async_tensor_h2d`, for which a list that becomes a tensor of `int32` is made an array."""
    import numpy as np

    @functools.wraps(copy)
    def copied(data: Any, *places: Any, **options: Any) -> Any:
        if options.get("dtype") is int32 and isinstance(data, list):
            data = np.array(data, dtype=np.int32)
        return copy(data, *places, **options)

    copied.through_numpy = True  # type: ignore[attr-defined]
    return copied


def install() -> None:
    """Make the GPU worker of this process copy so; does nothing the second time, or where the worker is another."""
    try:
        torch: Any = importlib.import_module("torch")
        buffers: Any = importlib.import_module("vllm.v1.worker.gpu.buffer_utils")
        copy = buffers.async_tensor_h2d
    except (ImportError, AttributeError) as error:
        log.debug("this vLLM copies token ids in its own way: %s", error)
        return
    if not getattr(copy, "through_numpy", False):
        buffers.async_tensor_h2d = through_numpy(copy, torch.int32)
