"""Matrix products whose rows do not depend on each other.

Tile and order of the sums: `tiles.py` and `kernels.matmul_by_pointers`. Inputs may have any strides; what Hopper's copy
engine can read (16-byte aligned, one dimension contiguous) goes through descriptors, everything else through pointers,
in the same order of sums.

Largest error against float64 of (256 x 4096) @ (4096 x 512) of standard normal numbers on an H200, relative to the
largest exact result: float32 5.4e-7 (cuBLAS 5.0e-7), float16 4.4e-4 and bfloat16 3.0e-3 (both as cuBLAS: the error of
rounding the result). benchmarks/batch_invariant.py measures it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Final

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from icm_vllm.batch_invariant import kernels
from icm_vllm.batch_invariant.tiles import TILE_VARIABLE, Tile, capability_of, choose, multiprocessors_of, tiles

log = logging.getLogger(__name__)

SUPPORTED: Final = (torch.bfloat16, torch.float16, torch.float32)
"""Types that the kernels compute; they accumulate in float32. float32 products are true ones, never TF32."""

PIECE: Final = 512
"""float32 products are added in pieces of this many, each piece in a chain."""

ALIGNMENT: Final = 16
"""Bytes to which addresses and rows must be aligned for descriptors; wide loads in Triton need the same."""


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> torch.Tensor:
    """a (..., M, K) @ b (..., K, N) + bias (N,), both with two dimensions or both with three of the same first size.

    The sum is rounded once, to out_dtype (a's type unless given), bias included. tile and descriptors override what
    would be chosen, for comparisons. Raises TypeError for other types than SUPPORTED, ValueError for shapes that do
    not fit.
    """
    _check(a, b, bias)
    (m, k), n = a.shape[-2:], b.shape[-1]
    copies = a.shape[0] if a.dim() == 3 else 1
    shape = (*a.shape[:-1], n)
    wanted = out_dtype or a.dtype
    if out is not None and (out.shape != torch.Size(shape) or out.dtype != wanted):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, but the result is {shape} {wanted}")
    direct = out is not None and out.is_contiguous()
    c = out if out is not None and direct else torch.empty(shape, device=a.device, dtype=wanted)
    if c.numel() and not k:
        c.copy_(bias) if bias is not None else c.zero_()
    elif c.numel():
        multiprocessors = multiprocessors_of(a.device)
        tile = tile or choose(tiles(a.dtype, capability_of(a.device)), m, n, copies, multiprocessors)
        if descriptors is None:
            descriptors = capability_of(a.device)[0] == 9 and describable(a, b, c)
        with on_device(a.device):
            if descriptors:
                by_descriptors(a, b, bias, c, tile, multiprocessors)
            else:
                _by_pointers(a, b, bias, c, tile)
    if out is not None and not direct:
        out.copy_(c)
        return out
    return c


def describable(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> bool:
    """Whether descriptors can read a and b and write c: 16-bit types, aligned, one dimension contiguous."""
    if a.dim() != 2 or a.element_size() != 2 or c.element_size() != 2 or (c.shape[1] * 2) % ALIGNMENT:
        return False
    return rows_of(a) is not None and (rows_of(b.t()) is not None or rows_of(b) is not None)


def rows_of(x: torch.Tensor) -> list[int] | None:
    """Strides of a matrix whose rows a descriptor can read, or None."""
    inner = 1 if x.shape[1] == 1 else x.stride(1)
    # The stride of a single row means nothing, and need not be aligned.
    outer = -(-x.shape[1] // ALIGNMENT) * ALIGNMENT if x.shape[0] == 1 else x.stride(0)
    if inner != 1 or outer <= 0 or (outer * x.element_size()) % ALIGNMENT or x.data_ptr() % ALIGNMENT:
        return None
    return [outer, 1]


def _check(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> None:
    if a.dtype not in SUPPORTED:
        raise TypeError(f"batch-invariant products take bfloat16, float16 and float32, not {a.dtype}")
    if a.dtype != b.dtype:
        raise TypeError(f"expected both matrices to have the same type, got {a.dtype} and {b.dtype}")
    if a.dim() != b.dim() or a.dim() not in (2, 3) or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    if bias is not None and bias.shape != (b.shape[-1],):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit {b.shape[-1]} columns")


class _Here:
    """A context for the current device, which changes nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_HERE: Final = _Here()


def on_device(device: torch.device) -> Any:
    """A context in which this is the current device, on which Triton launches."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def _by_pointers(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, c: torch.Tensor, tile: Tile) -> None:
    if a.dim() == 2:
        a, b, c = a.unsqueeze(0), b.unsqueeze(0), c.unsqueeze(0)
    copies, m, k = a.shape
    n = b.shape[2]
    count = -(-m // tile.rows) * -(-n // tile.columns) * copies
    kernels.matmul_by_pointers[(count,)](
        a,
        b,
        c if bias is None else bias.contiguous(),
        c,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        *c.stride(),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GROUP=tile.group,
        HAS_BIAS=bias is not None,
        WHOLE_K=k % tile.depth == 0,
        PIECE=PIECE if a.dtype == torch.float32 else 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def by_descriptors(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor,
    tile: Tile,
    multiprocessors: int,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """c (M, N) = a (M, K) @ b (K, N) + bias (N,), with `scales` of a's rows (M,) and b's columns (N,), or of all (1,).

    Raises ValueError for matrices that descriptors cannot read.
    """
    (m, k), n = a.shape, b.shape[1]
    a_strides, b_strides = rows_of(a), rows_of(b.t())
    b_is_nk = b_strides is not None
    b_strides = b_strides or rows_of(b)
    if a_strides is None or b_strides is None:
        raise ValueError("descriptors cannot read these strides or addresses")
    b_block = [tile.columns, tile.depth] if b_is_nk else [tile.depth, tile.columns]
    count = -(-m // tile.rows) * -(-n // tile.columns)
    kernels.matmul_by_descriptors[(min(count, multiprocessors) if tile.persistent else count,)](
        TensorDescriptor(a, [m, k], a_strides, [tile.rows, tile.depth]),
        a,
        TensorDescriptor(b, [n, k] if b_is_nk else [k, n], b_strides, b_block),
        c if bias is None else bias.contiguous(),
        TensorDescriptor(c, [m, n], [n, 1], [tile.rows, tile.columns // tile.halves]),
        *((c, c) if scales is None else scales),
        m,
        n,
        k,
        a_strides[0],
        *((0, 0) if scales is None else (int(scale.numel() > 1) for scale in scales)),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        GROUP=tile.group,
        HAS_BIAS=bias is not None,
        SCALED=scales is not None,
        A_BY_POINTERS=m < tile.rows and not tile.persistent,
        B_IS_NK=b_is_nk,
        HALVES=tile.halves,
        PROGRAMS=multiprocessors if tile.persistent else 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def agreement(
    device: torch.device, dtype: torch.dtype, *, n: int = 512, k: int = 1040, seed: int = 0
) -> list[tuple[str, int]]:
    """Compare every tile of this GPU, by descriptors and by pointers, with the smallest by pointers, bit by bit.

    Products of 1 to 300 rows of random numbers; returns (what, number of differing elements) of each. All must be 0
    for tiles to be chosen by the number of rows; see settle_tiles.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    a = torch.randn(300, k, generator=generator).to(device, dtype)
    b = torch.randn(n, k, generator=generator).to(device, dtype).t()
    family = tiles(dtype, capability_of(device))
    expected = product(a, b, tile=family[-1], descriptors=False)
    found = []
    for tile in family:
        for descriptors in (False, True):
            if descriptors and not (capability_of(device)[0] == 9 and describable(a, b, expected)):
                continue
            for rows in (1, 2, 15, 16, 17, 63, 64, 65, 129, 300):
                c = product(a[:rows], b, tile=tile, descriptors=descriptors)
                differing = int((c != expected[:rows]).sum())
                found.append((f"{tile.name} {'descriptors' if descriptors else 'pointers'} {rows} rows", differing))
    return found


def settle_tiles(device: torch.device, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)) -> list[str]:
    """Compare the tiles of this GPU, and use a single one for everything from now on if any two differ.

    Takes some seconds where they are not compiled yet. Returns what differed; empty where all agree.
    """
    differing: list[str] = []
    for dtype in dtypes:
        family = tiles(dtype, capability_of(device))
        if len(family) == 1:
            continue
        found = [f"{what} ({count} elements of {dtype})" for what, count in agreement(device, dtype) if count]
        if found:
            os.environ[TILE_VARIABLE] = family[1].name
            log.warning(
                "tiles differ on this GPU, %s computes everything now: %s", family[1].name, "; ".join(found[:4])
            )
        differing += found
    return differing
