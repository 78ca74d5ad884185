"""Reads the Prometheus text that a vLLM server shows at /metrics.

Counters are summed over engines (data-parallel ranks). The prefix-cache counters are the only truthful ones for a
batch: `usage.prompt_tokens_details.cached_tokens` covers only its last prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from core.llm_api.types import PrefixCacheCounters

_SAMPLE: Final = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def prefix_cache_counters(text: str) -> PrefixCacheCounters | None:
    """Tokens looked up and found since the server started, or None where the server does not count them."""
    totals: dict[str, float] = {}
    for name, _, value in _samples(text):
        if name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"):
            totals[name] = totals.get(name, 0.0) + value
    if len(totals) != 2:
        return None
    return PrefixCacheCounters(
        int(totals["vllm:prefix_cache_queries_total"]), int(totals["vllm:prefix_cache_hits_total"])
    )


def kv_cache_capacity(text: str) -> int | None:
    """Tokens that one engine's KV cache holds, or None where the server does not say.

    Newer servers state kv_cache_size_tokens. Blocks times block size is right only where every layer keeps every token
    (sliding-window layers share the pool: Gemma 3 holds 0.39 of it). Of several engines the smallest counts, since a
    prefix lives in one of them.
    """
    capacities = []
    for name, labels, _ in _samples(text):
        if name == "vllm:cache_config_info":
            stated, blocks, size = (labels.get(k, "") for k in ("kv_cache_size_tokens", "num_gpu_blocks", "block_size"))
            if stated.isdigit():
                capacities.append(int(stated))
            elif blocks.isdigit() and size.isdigit():
                capacities.append(int(blocks) * int(size))
    return min(capacities, default=None)


def kv_block_size(text: str) -> int | None:
    """Tokens of one KV-cache block, or None where the server does not say. Cached prefixes end on block borders.

    Where attention works in larger blocks than were asked for (Gemma 3 makes 32 of 16), newer servers state both.
    """
    sizes = []
    for name, labels, _ in _samples(text):
        if name == "vllm:cache_config_info":
            stated = (labels.get(key, "") for key in ("block_size", "effective_attention_block_size"))
            sizes += [int(size) for size in stated if size.isdigit()]
    return max(sizes, default=None)


def requests_in_work(text: str) -> int:
    """Requests that the server's engines run or keep waiting."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return int(sum(value for name, _, value in _samples(text) if name in names))


def engine_seconds(text: str) -> tuple[float, int]:
    """(seconds from arrival to end of all finished requests, their number), as the server itself counts."""
    totals = {"sum": 0.0, "count": 0.0}
    for name, _, value in _samples(text):
        base, _, part = name.rpartition("_")
        if base == "vllm:e2e_request_latency_seconds" and part in totals:
            totals[part] += value
    return totals["sum"], int(totals["count"])


def _samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        name, labels, value = match.groups()
        try:
            yield name, dict(_LABEL.findall(labels or "")), float(value)
        except ValueError:
            continue
