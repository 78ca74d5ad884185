"""Sums over processes that do not depend on how much is summed at a time.

NCCL adds along rings and trees, and the place of a number in the message decides the order in which its parts are
added: a row of a tensor-parallel layer gets other bits among more rows. vLLM's batch-invariant mode therefore limits
NCCL to one tree with one channel, which is slow (docs/determinism.md). Copies have no such problem. So the processes
exchange copies at full speed and add them up themselves: in the order of the ranks, in float32, rounded once.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.distributed as dist

from icm_vllm.batch_invariant import kernels
from icm_vllm.batch_invariant.matmul import SUPPORTED, on_device

GATHERED: Final = 32 << 20
"""Most bytes that a process gets from the others in one step; for more it gets its share of the numbers, and then the
sums. This only affects speed: the bits are the same."""

BLOCK: Final = 4096


def all_reduce(x: torch.Tensor, group: dist.ProcessGroup | None = None, *, gathered: int | None = None) -> torch.Tensor:
    """The sum of x over the processes of `group` (None: all), in a new tensor of x's shape and type.

    gathered: bytes, in place of GATHERED. Every process must call it, with the same shape. With n processes each gets
    n - 1 times x in one step; in two steps, as in a ring, 2 (n - 1) / n times x. Raises TypeError for types
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
    if missing := -flat.numel() % count:  # all shares must have the same length
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
