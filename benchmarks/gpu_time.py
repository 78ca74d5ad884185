"""Where a GPU's time goes while vLLM answers a pool: PyTorch's profiler around an engine in this process.

    python benchmarks/make_shape.py 405B-fp8 FOLDER --layers 6
    python benchmarks/gpu_time.py --model FOLDER                          # exact, as servers are launched
    python benchmarks/gpu_time.py --model FOLDER --no_deterministic

Needs one NVIDIA GPU and vLLM. Weights are random (--load-format dummy), so a shape is enough. Each prompt begins with
more of one text than the one before, as in a tree. Prints the seconds of three pools, then the kernels by their time in
a fourth.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser

BLOCK = 16
"""Tokens of a block of the prefix cache."""


def pool(seed: int, prompts: int, shared: int, own: int) -> list[dict[str, list[int]]]:
    """Token ids of the prompts: the i-th has i/prompts of `shared` tokens in common with all later ones."""
    rng = random.Random(seed)
    text = [rng.randrange(10, 4000) for _ in range(shared)]
    cuts = [shared * number // prompts // BLOCK * BLOCK for number in range(prompts)]
    return [{"prompt_token_ids": text[:cut] + [rng.randrange(10, 4000) for _ in range(own)]} for cut in cuts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 without a GPU."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, such as benchmarks/make_shape.py makes")
    parser.add_argument("--no_deterministic", action="store_true", help="vLLM's own kernels")
    parser.add_argument("--prompts", type=int, default=40, help="of a pool (default: 40)")
    parser.add_argument("--shared", type=int, default=8000, help="tokens that they share, in parts (default: 8000)")
    parser.add_argument("--own", type=int, default=200, help="tokens of each that it does not share (default: 200)")
    parser.add_argument("--rows", type=int, default=45, help="of the table (default: 45)")
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_time.py needs an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not args.no_deterministic:
        os.environ |= {"VLLM_BATCH_INVARIANT": "1", "ICM_BATCH_INVARIANT": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model,
        load_format="dummy",
        enforce_eager=True,
        max_num_batched_tokens=8192,
        max_num_seqs=512,
        max_model_len=32768,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.9,
        block_size=BLOCK,
    )
    one_token = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)

    def ask(seed: int) -> float:
        prompts: Any = pool(seed, args.prompts, args.shared, args.own)
        began = time.perf_counter()
        llm.generate(prompts, one_token, use_tqdm=False)
        return time.perf_counter() - began

    ask(0)  # compiles what is compiled on first use
    print("seconds", *(f"{ask(seed):.3f}" for seed in (1, 2, 3)), flush=True)
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        ask(4)
    averages = profile.key_averages()
    print(averages.table(sort_by="cuda_time_total", row_limit=args.rows, max_name_column_width=110))
    return 0


if __name__ == "__main__":
    sys.exit(main())
