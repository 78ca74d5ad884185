"""vLLM's Triton attention with rows that depend only on the prompt: for models with windows and sinks.

In vLLM's batch-invariant mode this kernel goes through the keys of a row in tiles of 32 that lie at multiples of 32 in
the sequence, in one pass, whatever else is in the batch. With a window it leaves out the tiles that no query of a tile
can see. Which queries share a tile is chance, so a row may go through tiles at both ends of which it sees nothing, and
these must not change its bits. Three things are replaced:

- How a tile enters the softmax. Before vLLM 0.33 a first tile of which a row sees nothing set the row's maximum to 0,
  from which then all its exponentials were taken if its scores were lower. Ours leaves the maximum as it was.
- The longest query of a step, which is raised to 2: on Blackwell larger tiles are taken from there on at head size 256.
- With ICM_BATCH_INVARIANT_WINDOW_TILE the tile, for all rows alike: QUERIESxKEYS, as in 64x32, or
  QUERIESxKEYSxWARPSxSTAGES. A row of a tile is a query token and one of the query heads of a key head. The tile of
  keys is another order of the sum, so servers with two values have two scores for a prompt.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from icm_vllm.environment import window_tile
from icm_vllm.plugin import WINDOW_TILE


@triton.jit
def softmax_step(scores, largest, total):  # type: ignore[no-untyped-def]
    """One tile of keys into the softmax of each row.

    scores: (rows, keys), -inf where a row does not see a key. largest, total: (rows,), maximum and sum so far; -inf
    where a row has seen no key. Returns both after this tile, exp(scores - maximum), and what the sums so far are to be
    multiplied by: 1 for a row that sees nothing here.
    """
    now = tl.maximum(largest, tl.max(scores, axis=1))
    shift = tl.where(now > float("-inf"), now, 0.0)
    weights = tl.exp(scores - shift[:, None])
    factor = tl.exp(largest - shift)
    return now, total * factor + tl.sum(weights, axis=1), weights, factor


def tile_of(text: str) -> tuple[int, ...]:
    """(queries, keys) or (queries, keys, warps, stages) of `64x32`, `64x32x4x2`; () of "". Raises ValueError."""
    return window_tile(WINDOW_TILE, text)


class OneTile:
    """vLLM's attention kernel, launched with one tile whatever it is asked for."""

    def __init__(self, own: Any, tile: tuple[int, ...]) -> None:
        self._own = own
        self._queries, self._keys, *rest = tile
        self._how = dict(zip(("num_warps", "num_stages"), rest, strict=False))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., Any]:
        def launch(**named: Any) -> Any:
            # One key head's query heads must fit, as in vLLM's own choice.
            rows = max(self._queries, triton.next_power_of_2(named["num_queries_per_kv"]))
            tokens = rows // named["num_queries_per_kv"]
            blocks = named["query_ptr"].shape[0] // tokens + named["num_seqs"]
            tile = {"BLOCK_M": rows, "BLOCK_Q": tokens, "TILE_SIZE": self._keys, **self._how}
            return self._own[(blocks, *grid[1:])](**{**named, **tile})

        return launch


def replace() -> None:
    """Replace the above in this process; does nothing the second time. Raises ImportError or AttributeError where
    vLLM lacks a name, ValueError for a tile that is none."""
    kernels: Any = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    backend: Any = importlib.import_module("vllm.v1.attention.backends.triton_attn")
    builder = backend.TritonAttentionMetadataBuilder
    own = builder.build
    if getattr(own, "exact", False):
        return
    kernel, _ = kernels.kernel_unified_attention, kernels.softmax_step
    tile = tile_of(os.environ.get(WINDOW_TILE, ""))

    @functools.wraps(own)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *rest: Any, **named: Any) -> Any:
        batch = copy.copy(common_attn_metadata)
        batch.max_query_len = max(batch.max_query_len, 2)
        return own(self, common_prefix_len, batch, *rest, **named)

    build.exact = True  # type: ignore[attr-defined]
    builder.build = build
    kernels.softmax_step = softmax_step
    if tile:
        kernels.kernel_unified_attention = OneTile(kernel, tile)
