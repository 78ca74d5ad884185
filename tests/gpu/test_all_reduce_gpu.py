"""Sums over real GPUs: every row has the bits that it has alone. Needs two GPUs.

python -m pytest -m gpu tests/gpu/test_all_reduce_gpu.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


def _one_gpu(rank: int, count: int, store: str) -> None:
    import torch

    from icm_vllm.batch_invariant.collectives import all_reduce

    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=count)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        every = []
        for other in range(count):
            generator = torch.Generator("cuda").manual_seed(other)
            numbers = torch.randn(2048, 8192, device="cuda", generator=generator) * 10.0 ** (other % 3)
            every.append(numbers.to(dtype))
        expected = every[0].float()
        for other in every[1:]:
            expected = expected + other.float()
        whole = all_reduce(every[rank])
        assert torch.equal(whole, expected.to(dtype))
        for rows in (1, 3, 64, 777, 2048):
            for limit in (0, 1 << 40):  # in two steps, in one
                assert torch.equal(all_reduce(every[rank][:rows], gathered=limit), whole[:rows]), (dtype, rows, limit)
    torch.distributed.destroy_process_group()


def test_sums_over_gpus(tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch")
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two NVIDIA GPUs")
    torch.multiprocessing.spawn(_one_gpu, (count, str(tmp_path / "store")), nprocs=count)
