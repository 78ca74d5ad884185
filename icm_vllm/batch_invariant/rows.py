"""Softmax, log-softmax, sums, means and RMS norms of rows, each computed as if it were the only row.

Order of the sums: `kernels.py`. LANES and the number of rows in a program depend only on the length of a row. Results
are rounded once, to the type asked for; everything before that is float32.

Error against float64, the largest over 64 rows of 4,096 standard normal float32 numbers, measured with Triton's
interpreter: log_softmax 1.0e-6 nat (1.6e-6 for 128,256 numbers), softmax 9e-10, mean 3.4e-9, sum 1.4e-5, RMS norm 5e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from icm_vllm.batch_invariant import kernels
from icm_vllm.batch_invariant.matmul import ALIGNMENT, SUPPORTED, on_device

PIECE: Final = 65536
"""Longer sums are split into pieces of this length; their sums are then added as a row."""

ELEMENTS: Final = 2048
"""Numbers that a program holds at a time: one row of them, or several shorter rows."""


def log_softmax(x: torch.Tensor, dim: int = -1, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """x - log(sum(exp(x))) along dim, in nats; of out_dtype, or x's type."""
    return _softmax(x, dim, out_dtype or x.dtype, log=True)


def softmax(x: torch.Tensor, dim: int = -1, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along dim; of out_dtype, or x's type."""
    return _softmax(x, dim, out_dtype or x.dtype, log=False)


def total(
    x: torch.Tensor,
    dims: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    out_dtype: torch.dtype | None = None,
    mean: bool = False,
) -> torch.Tensor:
    """Sum, or mean, over dims (all of them if None or empty); of out_dtype, or x's type.

    A mean divides the finished sum once. The mean of nothing is NaN, the sum of nothing 0.
    """
    _check(x)
    if x.dim() == 0:
        return total(x.reshape(1), None, out_dtype=out_dtype, mean=mean)
    dims = sorted({_wrapped(dim, x.dim()) for dim in dims}) if dims else list(range(x.dim()))
    kept = [dim for dim in range(x.dim()) if dim not in dims]
    shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
    final = shape if keepdim else [x.shape[dim] for dim in kept]
    wanted = out_dtype or x.dtype
    length = 1
    for dim in dims:
        length *= x.shape[dim]
    count = 1
    for dim in kept:
        count *= x.shape[dim]
    if not count or not length:
        return torch.full(final, float("nan") if mean else 0.0, device=x.device, dtype=wanted)
    rows = _two_dimensional(x.permute(*kept, *dims).reshape(count, length).contiguous())
    divisor = float(length) if mean else 1.0
    with on_device(x.device):
        while rows.shape[1] > PIECE:
            rows = _sums(rows, 1.0, torch.float32)
        return _sums(rows, divisor, wanted).reshape(final)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual) / rms * weight along the last dimension, and x + residual, both of x's type; without a residual,
    of x.

    Rows of up to 65,536 numbers. x + residual is rounded before it is squared. The second result is x itself where
    there is no residual.
    """
    _check(x)
    n = x.shape[-1]
    if not 0 < n <= PIECE:
        raise ValueError(f"RMS norm of rows of {n} numbers; 1 to {PIECE} are supported")
    rows = _two_dimensional(x)
    y = torch.empty(rows.shape, device=x.device, dtype=x.dtype)
    added = y
    r = rows
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"x is {tuple(x.shape)}, but the residual is {tuple(residual.shape)}")
        r = _two_dimensional(residual)
        added = torch.empty_like(y)
    lanes = _power_of_two(n)
    together = max(1, ELEMENTS // lanes)
    if rows.shape[0]:
        with on_device(x.device):
            kernels.rms_norm_rows[(-(-rows.shape[0] // together),)](
                rows,
                r,
                rows if weight is None else weight.contiguous(),
                y,
                added,
                rows.shape[0],
                n,
                rows.stride(0),
                r.stride(0),
                epsilon,
                HAS_WEIGHT=weight is not None,
                HAS_RESIDUAL=residual is not None,
                LANES=lanes,
                ROWS=together,
                num_warps=_warps(lanes * together),
            )
    return y.reshape(x.shape), (x if residual is None else added.reshape(x.shape))


def _softmax(x: torch.Tensor, dim: int, out_dtype: torch.dtype, *, log: bool) -> torch.Tensor:
    _check(x)
    if x.dim() == 0:
        return _softmax(x.reshape(1), 0, out_dtype, log=log).reshape(())
    dim = _wrapped(dim, x.dim())
    if not x.numel():
        return torch.empty(x.shape, device=x.device, dtype=out_dtype)
    if dim != x.dim() - 1:
        return _softmax(x.transpose(dim, -1), -1, out_dtype, log=log).transpose(dim, -1).contiguous()
    n = x.shape[-1]
    rows = _two_dimensional(x)
    y = torch.empty(rows.shape, device=x.device, dtype=out_dtype)
    lanes = min(_power_of_two(n), 2 * ELEMENTS)
    together = max(1, ELEMENTS // lanes)
    with on_device(x.device):
        kernels.softmax_rows[(-(-rows.shape[0] // together),)](
            rows,
            y,
            rows.shape[0],
            n,
            rows.stride(0),
            n,
            LOG=log,
            LANES=lanes,
            ROWS=together,
            num_warps=_warps(lanes * together),
        )
    return y.reshape(x.shape)


def _sums(rows: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    """(M, N) -> (M, cdiv(N, PIECE)); contiguous."""
    m, n = rows.shape
    pieces = -(-n // PIECE)
    y = torch.empty(m, pieces, device=rows.device, dtype=dtype)
    lanes = min(_power_of_two(n), ELEMENTS)
    together = max(1, ELEMENTS // lanes)
    kernels.sum_rows[(-(-m // together), pieces)](
        rows,
        y,
        m,
        n,
        divisor,
        LANES=lanes,
        ROWS=together,
        PIECE=PIECE if pieces > 1 else -(-n // lanes) * lanes,
        num_warps=_warps(lanes * together),
    )
    return y


def _check(x: torch.Tensor) -> None:
    if x.dtype not in SUPPORTED:
        raise TypeError(f"batch-invariant reductions take bfloat16, float16 and float32, not {x.dtype}")


def _wrapped(dim: int, dims: int) -> int:
    if not -max(dims, 1) <= dim < max(dims, 1):
        bounds = f"[{-max(dims, 1)}, {max(dims, 1) - 1}]"
        raise IndexError(f"Dimension out of range (expected to be in range of {bounds}, but got {dim})")
    return dim % max(dims, 1)


def _two_dimensional(x: torch.Tensor) -> torch.Tensor:
    """(rows, last dimension), contiguous in the last; a view if that is as well aligned as a copy would be.

    The alignment of addresses and strides decides how wide Triton's loads are, and with that how lanes are spread over
    threads and in which order they are added. So alignment must depend only on the length of a row.
    """
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    stride = n if rows.shape[0] == 1 else rows.stride(0)
    apart = stride == n or (n % ALIGNMENT == 0 and stride % ALIGNMENT == 0)
    if rows.data_ptr() % ALIGNMENT == 0 and apart and (n == 1 or rows.stride(1) == 1):
        return rows.as_strided(rows.shape, (stride, 1))
    return rows.clone(memory_format=torch.contiguous_format)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _warps(elements: int) -> int:
    """16 numbers a thread, in 4 to 16 warps."""
    return min(16, max(4, elements // 512))
