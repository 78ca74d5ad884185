"""LoRA adapters on a CPU that leave other requests alone.

Up to 0.32 vLLM's products for adapters on a CPU take a row that belongs to no adapter (number -1) for one of the last
adapter: a request for the base model that shares a step with one for an adapter is computed with its weights, and what
is then cached of it stays wrong. Here such rows go in as zeros, to which any adapter adds nothing. 0.33 leaves them out
itself; on GPUs every version does.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger(__name__)

PRODUCTS: Final = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
"""The products with one number of an adapter for each row; those with one for each request call them."""


def for_rows_of_adapters(product: Callable[..., None]) -> Callable[..., None]:
    """`product(inputs, weights, output, adapters, ...)` with zeros for the rows whose adapter is negative.

    inputs: [rows, features]. adapters: [rows].
    """

    @functools.wraps(product)
    def masked(inputs: Any, weights: Any, output: Any, adapters: Any, *rest: Any, **named: Any) -> None:
        product(inputs.masked_fill((adapters < 0).unsqueeze(-1), 0), weights, output, adapters, *rest, **named)

    masked.of_adapters = True  # type: ignore[attr-defined]
    return masked


def install() -> None:
    """Replace the products in this process; does nothing the second time, or to another vLLM."""
    try:
        ops: Any = importlib.import_module("vllm.lora.ops.torch_ops.lora_ops")
        package: Any = importlib.import_module(ops.__name__.rpartition(".")[0])  # from which others take the names
        own = {name: getattr(ops, name) for name in PRODUCTS}
    except (ImportError, AttributeError) as error:
        log.warning("this vLLM keeps its own products for adapters on a CPU: %s", error)
        return
    for name, product in own.items():
        if not getattr(product, "of_adapters", False):
            masked = for_rows_of_adapters(product)
            setattr(ops, name, masked)
            setattr(package, name, masked)
