"""vLLM's attention over compressed keys (MLA: DeepSeek) with rows that depend only on the prompt.

vLLM has two ways for such a layer. A step of up to 512 tokens of a request is computed over the compressed keys of the
cache, the others with keys and values that are made of them: the new tokens by themselves, what is cached in pieces,
both added up by their log-sum-exp. So which tokens are cached, and how long a step is, decides how a row is added up.

Here all go the first way (FlashAttention 3 over the paged cache, one split, as vLLM's batch-invariant mode has it),
which adds up a row's keys in one order wherever they come from; and FlashAttention gets a longest query as other
models do (exact.py). It costs arithmetic: of DeepSeek V3 1,088 numbers a query head and key instead of 320, and
memory that vLLM does not foresee, 3,200 bytes a token of a step and query head of a GPU.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from icm_vllm.query_length import least_query_length

ALL: Final = 1 << 30
"""Tokens of a request up to which a step is computed over the compressed keys."""


def replace() -> None:
    """Replace the above in this process; does nothing the second time, nor where there is no such attention to import.

    Raises AttributeError where vLLM lacks a name.
    """
    try:
        backend: Any = importlib.import_module("vllm.v1.attention.backends.mla.flashattn_mla")
    except ImportError:
        return
    builder = backend.FlashAttnMLAMetadataBuilder
    own_build, own_schedule = builder._build_decode, builder._schedule_decode
    if getattr(own_build, "exact", False):
        return

    @functools.wraps(own_build)
    def build(self: Any, *arguments: Any, **named: Any) -> Any:
        metadata = own_build(self, *arguments, **named)
        metadata.max_query_len = max(metadata.max_query_len, least_query_length(self.num_heads, 1))
        return metadata

    @functools.wraps(own_schedule)
    def schedule(self: Any, *arguments: Any, **named: Any) -> Any:
        if "max_query_len" in named:
            named["max_query_len"] = max(named["max_query_len"], least_query_length(self.num_heads, 1))
        return own_schedule(self, *arguments, **named)

    build.exact = True  # type: ignore[attr-defined]
    builder.reorder_batch_threshold  # noqa: B018 - AttributeError where a version has no such threshold
    builder._build_decode, builder._schedule_decode = build, schedule
    builder.reorder_batch_threshold = ALL
