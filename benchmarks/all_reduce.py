"""The sum over GPUs of a tensor-parallel layer: by NCCL, by NCCL as vLLM's batch-invariant mode limits it, and by ours.

    python benchmarks/all_reduce.py --json all-reduce.json

Milliseconds (median) of one sum of (tokens, hidden) numbers in bfloat16 over all GPUs of the machine, and whether rows
keep their bits when they are summed among more rows. Each way runs in new processes: NCCL reads its environment once.
Two GPUs can add in one order only, so NCCL is exact there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import commit, hardware
from core.flags import FlagParser

LIMITED: Final = {
    "NCCL_MIN_NCHANNELS": "1",
    "NCCL_MAX_NCHANNELS": "1",
    "NCCL_PROTO": "Simple",
    "NCCL_ALGO": "allreduce:tree",
    "NCCL_NTHREADS": "1",
    "NCCL_COLLNET_ENABLE": "0",
}
"""The settings with which vLLM 0.26 makes NCCL add in one order (its override_envs_for_invariance)."""

OURS: Final = "copies, added in order"
TWO_STEPS: Final = "copies, added in order, in two steps"
WAYS: Final[dict[str, dict[str, str]]] = {"NCCL": {}, "NCCL, held to one channel": LIMITED, OURS: {}, TWO_STEPS: {}}


def adder(way: str) -> Callable[[Any], Any]:
    """A function that sums a tensor over all processes, into a new one."""
    import torch

    from icm_vllm.batch_invariant.collectives import all_reduce

    def by_nccl(x: Any) -> Any:
        y = x.clone()
        torch.distributed.all_reduce(y)
        return y

    if way == TWO_STEPS:
        return lambda x: all_reduce(x, gathered=0)
    return all_reduce if way == OURS else by_nccl


def measure(rank: int, count: int, folder: str, way: str, args: argparse.Namespace) -> None:
    """One GPU's part; the first GPU writes the result to folder/WAY.json."""
    import torch

    torch.cuda.set_device(rank)
    store = f"file://{folder}/{way}.store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=rank, world_size=count)
    add = adder(way)
    torch.manual_seed(rank)
    whole = torch.randn(max(args.tokens), args.hidden, device="cuda", dtype=torch.bfloat16)
    sums = add(whole)
    found: dict[str, Any] = {"milliseconds": {}, "rows_with_other_bits": {}}
    for tokens in args.tokens:
        x = whole[:tokens]
        found["rows_with_other_bits"][tokens] = int((add(x) != sums[:tokens]).any(1).sum())
        taken = []
        for _ in range(args.repeats + 3):
            torch.distributed.barrier()
            torch.cuda.synchronize()
            began = time.perf_counter()
            add(x)
            torch.cuda.synchronize()
            taken.append((time.perf_counter() - began) * 1e3)
        found["milliseconds"][tokens] = round(statistics.median(taken[3:]), 4)
    if rank == 0:
        Path(folder, f"{way}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def table(found: dict[str, dict[str, Any]], tokens: Sequence[int]) -> str:
    """One line a way: milliseconds by rows, and how many rows had other bits."""
    lines = ["| way | " + " | ".join(f"{rows} rows, ms" for rows in tokens) + " | rows with other bits |"]
    lines.append("| --- " * (len(tokens) + 2) + "|")
    for way, numbers in found.items():
        cells = [f"{numbers['milliseconds'][str(rows)]:.3f}" for rows in tokens]
        lines.append(f"| {way} | {' | '.join(cells)} | {sum(numbers['rows_with_other_bits'].values())} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 without two GPUs."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048, 8192], help="rows of a sum")
    parser.add_argument("--hidden", type=int, default=8192, help="numbers of a row (default: 8192, a 70B model's)")
    parser.add_argument("--repeats", type=int, default=20, help="of each (default: 20)")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(arguments)
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        print(f"benchmarks/all_reduce.py needs two NVIDIA GPUs, and there are {count} here", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, environment in WAYS.items():
            print(f"{way} ...", file=sys.stderr, flush=True)
            with patch.dict(os.environ, environment):
                torch.multiprocessing.spawn(measure, (count, folder, way, args), nprocs=count)
            found[way] = json.loads(Path(folder, f"{way}.json").read_text())
    print(table(found, args.tokens))
    if args.json is not None:
        result = {"gpus": count, "hidden": args.hidden, "machine": hardware(), "commit": commit(), "ways": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
