"""Products of 8-bit floats with scales, whose rows do not depend on each other: for fp8 models on Hopper.

vLLM 0.26 makes its Cutlass product batch-invariant by using one tile for any number of rows, which takes 2.5 times as
long as its best tile for many rows. Here tiles are chosen by the number of rows as for 16-bit types (tiles.py): the
additions of an element are the same in all. Scales are applied as in Cutlass, a column's first.

The matrix unit adds 8-bit products up in float32 registers, but keeps fewer bits than float32 has while it adds
(Cutlass's FP8FastAccum, which vLLM uses, is the same).
"""

from __future__ import annotations

import torch

from icm_vllm.batch_invariant import kernels
from icm_vllm.batch_invariant.matmul import by_descriptors, on_device, rows_of
from icm_vllm.batch_invariant.tiles import FP8, Tile, capability_of, choose, multiprocessors_of, tiles


def on_hopper(device: torch.device) -> bool:
    """Whether the kernels run there: compute capability 9, or Triton's interpreter."""
    return kernels.INTERPRETED or capability_of(device)[0] == 9


def scalable(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> bool:
    """Whether scaled_product computes this, whatever the number of rows; can be traced by torch.compile.

    True for e4m3 numbers, b lying in memory as (N, K), K and N multiples of 16, and one float32 scale for all or one
    for each row of a and each column of b.
    """
    return bool(
        a.dtype == b.dtype == FP8
        and scale_a.dtype == scale_b.dtype == torch.float32
        and (scale_a.numel() == 1 or scale_a.numel() == a.shape[0])
        and (scale_b.numel() == 1 or scale_b.numel() == b.shape[1])
        and b.shape[0] % 16 == b.shape[1] % 16 == 0
        and b.stride(0) == 1
    )


def scaled_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(a * scale_a) (M, K) @ (b * scale_b) (K, N) + bias (N,), of type out_dtype, rounded once: (M, N).

    scale_a: one number, or M of them in any shape; scale_b: one, or N. out_dtype: bfloat16 or float16, and the type of
    the bias. tile: instead of the one that would be chosen. Raises ValueError where `scalable` is False or shapes do
    not fit. Only where on_hopper().
    """
    if not scalable(a, b, scale_a, scale_b) or a.dim() != 2 or a.shape[1] != b.shape[0] or out_dtype.itemsize != 2:
        raise ValueError(
            f"{a.dtype} {tuple(a.shape)} by {b.dtype} {tuple(b.shape)}, strides {b.stride()}, with scales "
            f"{tuple(scale_a.shape)} and {tuple(scale_b.shape)} to {out_dtype} is not computed here"
        )
    m, n = a.shape[0], b.shape[1]
    if bias is not None and (bias.numel() != n or bias.dtype != out_dtype):
        raise ValueError(f"a bias of {bias.numel()} {bias.dtype} does not fit {n} columns of {out_dtype}")
    c = torch.empty(m, n, device=a.device, dtype=out_dtype)
    if not c.numel():
        return c
    multiprocessors = multiprocessors_of(a.device)
    tile = tile or choose(tiles(FP8, capability_of(a.device)), m, n, 1, multiprocessors)
    if rows_of(a) is None:  # unaligned, or with gaps
        a = a.clone(memory_format=torch.contiguous_format)
    if rows_of(b.t()) is None:
        b = b.t().clone(memory_format=torch.contiguous_format).t()
    with on_device(a.device):
        by_descriptors(a, b, bias, c, tile, multiprocessors, (scale_a.contiguous(), scale_b.contiguous()))
    return c


def tiles_agree(device: torch.device, *, n: int = 4096, k: int = 1040, seed: int = 0) -> list[tuple[str, int]]:
    """As `agreement` in matmul.py, for 8-bit floats: (what, differing elements) of every tile beside the smallest."""
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        # Device and type are given, because a model that is being loaded may have set other defaults.
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(device)

    # Large enough that each of the programs that share the tiles computes several.
    a, b, bias = random(1100, k).to(FP8), random(n, k).to(FP8).t(), random(n).to(torch.bfloat16)
    scale_a, scale_b = random(1100).abs(), random(n).abs()
    family = tiles(FP8, capability_of(device))
    found = []
    for with_bias in (None, bias):
        expected = scaled_product(a, b, scale_a, scale_b, with_bias, tile=family[-1])
        for tile in family:
            for rows in (1, 2, 15, 16, 17, 63, 64, 65, 129, 300, 1100):
                c = scaled_product(a[:rows], b, scale_a[:rows], scale_b, with_bias, tile=tile)
                what = f"fp8 {tile.name} {rows} rows{'' if with_bias is None else ' and a bias'}"
                found.append((what, int((c != expected[:rows]).sum())))
    return found
