"""The kernels as PyTorch operators, torch.ops.icm.*, which torch.compile cannot take apart.

    icm::linear(x, weight, bias) -> y                (..., K), (N, K), (N,) -> (..., N)
    icm::product(a, b, bias) -> c                    (M, K), (K, N), (N,) -> (M, N), or with a batch in front of both
    icm::scaled_product(a, b, scale_a, scale_b, bias, dtype) -> c      the same of 8-bit floats and their scales
    icm::log_softmax, icm::softmax(x, dim, dtype)    as in PyTorch, dtype being that of the result
    icm::total(x, dims, keepdim, dtype, mean)        sum or mean
    icm::rms_norm(x, weight, epsilon)                y
    icm::add_rms_norm(x, residual, weight, epsilon)  (y, x + residual)

Each has a fake implementation (only shapes and types). They are recorded by CUDA graphs like any other: nothing waits
for the GPU, and memory comes from PyTorch's allocator. They have no derivatives; the overrides in `mode.py` keep
PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from icm_vllm.batch_invariant import rows
from icm_vllm.batch_invariant.matmul import product
from icm_vllm.batch_invariant.scaled import scaled_product

NAMESPACE: Final = "icm"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,): a linear layer."""
    y = product(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _linear_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return product(a, b, bias)


def _product_shape(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _scaled_product_shape(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _log_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return rows.log_softmax(x, dim, out_dtype=dtype)


def _softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return rows.softmax(x, dim, out_dtype=dtype)


def _softmax_shape(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _total(x: torch.Tensor, dims: list[int], keepdim: bool, dtype: torch.dtype | None, mean: bool) -> torch.Tensor:
    return rows.total(x, dims, keepdim, out_dtype=dtype, mean=mean)


def _total_shape(
    x: torch.Tensor, dims: list[int], keepdim: bool, dtype: torch.dtype | None, mean: bool
) -> torch.Tensor:
    summed = {dim % max(x.dim(), 1) for dim in dims} if dims else set(range(x.dim()))
    shape = [1 if dim in summed else size for dim, size in enumerate(x.shape) if keepdim or dim not in summed]
    return x.new_empty(shape, dtype=dtype or x.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return rows.rms_norm(x, weight, epsilon)[0]


def _rms_norm_shape(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.rms_norm(x, weight, epsilon, residual)


def _add_rms_norm_shape(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_OPERATORS: Final[tuple[tuple[str, Callable[..., object], Callable[..., object]], ...]] = (
    ("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear, _linear_shape),
    ("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor", _product, _product_shape),
    (
        "scaled_product(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias, ScalarType dtype) -> Tensor",
        scaled_product,
        _scaled_product_shape,
    ),
    ("log_softmax(Tensor x, int dim, ScalarType? dtype=None) -> Tensor", _log_softmax, _softmax_shape),
    ("softmax(Tensor x, int dim, ScalarType? dtype=None) -> Tensor", _softmax, _softmax_shape),
    ("total(Tensor x, int[] dims, bool keepdim, ScalarType? dtype, bool mean) -> Tensor", _total, _total_shape),
    ("rms_norm(Tensor x, Tensor? weight, float epsilon) -> Tensor", _rms_norm, _rms_norm_shape),
    (
        "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float epsilon) -> (Tensor, Tensor)",
        _add_rms_norm,
        _add_rms_norm_shape,
    ),
)


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema, kernel, shape in _OPERATORS:
        name = library.define(schema)
        # The CPU has them for Triton's interpreter.
        for key in ("CUDA", "CPU"):
            library.impl(name, kernel, key)
        torch.library.register_fake(f"{NAMESPACE}::{name}", shape, lib=library)
    return library


_LIBRARY: Final = _register()
