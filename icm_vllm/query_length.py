"""From how many query tokens on FlashAttention uses one path for all; needs no vLLM."""

from __future__ import annotations

from typing import Final

SMALL_TILE: Final = 64
"""FlashAttention 3 (hopper/heuristics.h, use_one_mma_wg): up to this many query rows of a key head take half a tile."""


def least_query_length(heads: int, key_heads: int) -> int:
    """The length of a step's longest query, in tokens, from which on FlashAttention 2 and 3 use one path for all rows.

    2 for FlashAttention 2, which lays out steps of single tokens differently. For FlashAttention 3 the first number
    whose query rows (tokens times query heads a key head) no longer fit its small tile.
    """
    return max(2, SMALL_TILE // max(heads // key_heads, 1) + 1)
