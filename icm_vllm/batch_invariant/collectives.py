"""Sums over processes that do not depend on how much is summed at a time.

NCCL adds along rings and trees, and where in the message a number lies decides in which order its parts are added: a
row of a tensor-parallel layer has other bits among more rows. vLLM's batch-invariant mode therefore holds NCCL to one
tree with one channel, which is slow (docs/determinism.md). Copies are free of all this. So the processes exchange
copies, as fast as NCCL can, and add them up themselves: in the order of the ranks, in float32, rounded once.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist

from icm_vllm.batch_invariant import kernels
from icm_vllm.batch_invariant.matmul import SUPPORTED, on_device

GATHERED: Final = 32 << 20
"""Bytes that a process may get from the others in one step; where it would be more, it gets its share of the numbers,
and then the sums. A matter of speed: the bits are the same."""

BLOCK: Final = 4096


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None = None, *, gathered: int | None = None) -> torch.Tensor:
    """The sum of x over the processes of `group` (None: all), in a new tensor of x's shape and type.

    gathered: bytes, in the place of GATHERED. Every process must call it, with the same shape. With n processes each
    gets n - 1 times x in one step, in two what it would in a ring, 2 (n - 1) / n times x. Raises TypeError for types
    other than bfloat16, float16 and float32.
    """
    if x.dtype not in SUPPORTED:
        raise TypeError(f"batch-invariant sums take bfloat16, float16 and float32, not {x.dtype}")
    count = dist.get_world_size(group)
    flat = x.contiguous().view(-1)
    if (count - 1) * flat.nbytes <= (GATHERED if gathered is None else gathered):
        parts = flat.new_empty(count * flat.numel())
        dist.all_gather_into_tensor(parts, flat, group=group)
        return sum_in_order(parts.view(count, -1)).view(x.shape)
    if missing := -flat.numel() % count:  # to shares of one length
        flat = torch.nn.functional.pad(flat, (0, missing))
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat, group=group)
    whole = torch.empty_like(flat)
    dist.all_gather_into_tensor(whole, sum_in_order(parts.view(count, -1)), group=group)
    return whole[: x.numel()].view(x.shape)


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """(n, m), contiguous -> (m,): the first row plus the second, and so on, in float32, rounded once to parts' type."""
    count, length = parts.shape
    y = parts.new_empty(length)
    if length:
        with on_device(parts.device):
            kernels.sum_in_order[(-(-length // BLOCK),)](parts, y, length, COUNT=count, BLOCK=BLOCK, num_warps=8)
    return y
