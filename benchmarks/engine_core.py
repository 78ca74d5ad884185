"""What vLLM's engine core spends on the blocks of a cached pool: without our extension, with it for single prompts, and
with it for the pool as a tree (docs/serving.md), side by side.

    python benchmarks/engine_core.py --size 256 --block_size 16

No model and no GPU: vLLM's requests, hashes, block lookup, allocation and release, for the prompts of a cached tree.
This is work for every token of every prompt, so it grows with N * N where the model's grows with N. Needs vLLM.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import hardware
from core.flags import FlagParser
from core.llm_api.http.pool_tree import tree_of
from core.llm_api.types import Prompt, Segment
from icm_vllm.block_hashes import PathHasher, RememberingHasher
from icm_vllm.block_lookup import RememberingLookup
from icm_vllm.prompt_tree import PromptTree
from src.icm.prefix_tree import TreeLayout

STEPS = ("request and hashes", "lookup", "allocation", "release")


def tree_of_claims(size: int, claim_tokens: int) -> PromptTree:
    """The prompts of a tree over `size` random claims, depth first."""
    rng = np.random.default_rng(0)
    claims = [Segment("", rng.integers(0, 100_000, claim_tokens + 2).tolist()) for _ in range(size)]
    questions = [Segment("", (claim.tokens or ())[:-2]) for claim in claims]
    layout = TreeLayout.build(range(size), [str(i) for i in range(size)], rng)
    first = Segment("", [0])
    return tree_of(
        [
            Prompt((first, *(claims[other] for other in layout.context(claim)), questions[claim]))
            for claim in layout.questions
        ]
    )


class EngineCore:
    """vLLM's block management for one group of full attention, called as by its scheduler."""

    def __init__(self, block_size: int, tokens: int) -> None:
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
        blocks = tokens // block_size
        config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
        self._manager: Any = KVCacheManager(
            config,
            max_model_len=131072,
            scheduler_block_size=block_size,
            hash_block_size=block_size,
            enable_caching=True,
            max_in_flight_tokens=131072,
        )
        self.hasher: Any = get_request_block_hasher(block_size, sha256)
        self._requests = 0

    def pool(self, prompts: Iterable[tuple[list[int], int]], hasher: Callable[..., Any]) -> dict[str, float]:
        """Seconds of each of STEPS, summed over a pool. prompts: token ids, and how many are shared with the last."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        seconds: dict[str, float] = defaultdict(float)
        manager, clock = self._manager, time.perf_counter
        for prompt, shared in prompts:
            self._requests += 1
            if isinstance(hasher, PathHasher):
                hasher.shared = shared
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            t0 = clock()
            request = Request(
                request_id=str(self._requests),
                prompt_token_ids=prompt,
                sampling_params=sampling,
                pooling_params=None,
                block_hasher=hasher,
            )
            t1 = clock()
            blocks, hit = manager.get_computed_blocks(request)[:2]
            t2 = clock()
            if manager.allocate_slots(request, len(prompt) - hit, hit, blocks) is None:
                raise RuntimeError("the simulated KV cache is too small")
            request.num_computed_tokens = len(prompt)
            t3 = clock()
            manager.free(request)
            for step, taken in zip(STEPS, (t1 - t0, t2 - t1, t3 - t2, clock() - t3), strict=True):
                seconds[step] += taken
        return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; with --json also write it."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="claims (default 256)")
    parser.add_argument("--claim_tokens", type=int, default=40)
    parser.add_argument("--block_size", type=int, default=16, help="tokens (default 16)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if min(args.size - 1, args.claim_tokens, args.block_size, args.repeats) < 1:
        parser.error("--size must be at least 2, the other numbers at least 1")
    try:
        import vllm
        from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager as Manager
    except ImportError as error:
        print(f"engine_core: needs vLLM ({error}): run `make setup-local`", file=sys.stderr)
        return 2
    tree = tree_of_claims(args.size, args.claim_tokens)
    # Through JSON and back, as single prompts come: no two prompts share an object.
    single = [(json.loads(json.dumps(ids)), 0) for ids, _ in tree.prompts()]
    tokens = sum(tree.lengths())
    core = EngineCore(args.block_size, max(100_000, 3 * tokens // max(1, args.size // 16)))
    own = Manager.find_longest_cache_hit
    remembering = functools.partial(RememberingLookup(), own)
    ways = {
        "vLLM": (core.hasher, own),
        "one by one": (RememberingHasher(core.hasher, args.block_size), remembering),
        "as a tree": (PathHasher(core.hasher, args.block_size), remembering),
    }
    for hasher, _ in ways.values():
        core.pool(tree.prompts(), hasher)  # fills the cache and the hasher's memory
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, (hasher, lookup) in ways.items():
            Manager.find_longest_cache_hit = staticmethod(lookup)
            measured[name].append(core.pool(tree.prompts() if name == "as a tree" else single, hasher))
    print(f"vLLM {vllm.__version__}: {args.size} prompts, {tokens:,} tokens, all cached, blocks of {args.block_size}")
    print(f"{'seconds a pool (median)':<26}{''.join(f'{name:>22}' for name in ways)}{'last / first':>14}")
    for step in (*STEPS, "together"):
        found = [
            statistics.median(sum(run.values()) if step == "together" else run[step] for run in runs)
            for runs in measured.values()
        ]
        print(f"{step:<26}{''.join(f'{value:>22.3f}' for value in found)}{found[-1] / found[0]:>14.2f}")
    if args.json:
        result = {"vllm": vllm.__version__, "hardware": hardware(), "size": args.size, "tokens": tokens}
        result |= {"block_size": args.block_size, "seconds": measured}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
