"""vLLM on a CPU, made batch-invariant: a row is computed in the same way whatever is computed beside it.

vLLM's own VLLM_BATCH_INVARIANT works on GPUs only. On a CPU two places choose how to add up by the size of the batch:

- oneDNN's matrix product blocks its reduction by the number of rows. Here every linear layer computes blocks of
  ROWS rows, the last one filled up with zeros, so that each product has the same shape.
- the attention kernel sizes its tiles by how many queries a request has, and may share one request's keys among
  threads. Here a request becomes pieces of its sequence that begin at fixed positions (0, C, 2 C, ...), each with
  exactly C queries, zeros where a query is not asked for, and keys are never shared among threads.

Everything else (norms, rotary embedding, activations, softmax over the vocabulary) treats each row separately. Checked
on vLLM 0.32 with AMX and AVX-512: docs/determinism.md has the measurements and the cost.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

ROWS: Final = 64
"""Rows of one matrix product. 64 costs a large batch next to nothing, and a batch of one some tens of percent."""
TILE_ROWS: Final = {"amx": 128}
"""Query rows (queries x query heads a key head) that one tile of the attention kernel takes without being split."""
OTHER_TILE_ROWS: Final = 32
MAX_PIECE: Final = 32
"""Queries of one piece at most. Must divide the KV cache's block size, of which vLLM wants multiples of 32 here."""


def in_blocks(linear: Any, torch: Any, rows: int = ROWS) -> Any:
    """`linear(x, weight, bias)` in blocks of `rows` rows. x: [..., features in]; returns [..., features out]."""

    def blocked(x: Any, weight: Any, bias: Any = None) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        count = flat.shape[0]
        missing = -count % rows
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing, flat.shape[1])])
        parts = [linear(part, weight, bias) for part in flat.split(rows)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined[:count].reshape(*x.shape[:-1], joined.shape[-1])

    return blocked


def piece_size(isa: str, queries_per_key: int) -> int:
    """Queries of one piece, a power of two: as many as one tile takes. queries_per_key: query heads a key head."""
    most = max(1, TILE_ROWS.get(isa, OTHER_TILE_ROWS) // queries_per_key)
    return int(min(MAX_PIECE, 1 << (most.bit_length() - 1)))


def pieces(query_start: Any, lengths: Any, piece: int, torch: Any) -> tuple[Any, Any, Any]:
    """Cut the asked queries of each request into pieces that begin at multiples of `piece` in its sequence.

    query_start: [requests + 1], where each request's queries begin in the batch. lengths: [requests], tokens of each
    sequence; its queries are its last tokens. Returns, with P pieces: the request of each piece, [P]; the length of the
    sequence up to the piece's end, [P]; and where the batch's queries stand among the P * piece rows, [queries].
    """
    start, lengths = query_start.long(), lengths.long()
    asked = start[1:] - start[:-1]
    before = lengths - asked
    first, end = before // piece, (lengths + piece - 1) // piece
    counts = torch.where(asked > 0, end - first, 0)
    piece_start = torch.cumsum(counts, 0) - counts  # of each request among all pieces
    owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    number = torch.arange(len(owner)) - piece_start[owner] + first[owner]
    row_of_request = piece_start * piece + before - first * piece
    query_owner = torch.repeat_interleave(torch.arange(len(lengths)), asked)
    rows = torch.arange(len(query_owner)) - start[:-1][query_owner] + row_of_request[query_owner]
    return owner, (number + 1) * piece, rows


def install() -> None:
    """Make the CPU engine of this process exact; does nothing the second time.

    Raises RuntimeError where this vLLM lacks what should be replaced: a server that was asked for exact scores must not
    start without them.
    """
    try:
        torch: Any = importlib.import_module("torch")
        layers: Any = importlib.import_module("vllm.model_executor.layers.utils")
        attention: Any = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
        ops: Any = importlib.import_module("vllm._custom_ops")
        _install_linear(layers, torch)
        _install_attention(attention, ops, torch)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"this vLLM cannot be made exact on a CPU ({error}); unset ICM_BATCH_INVARIANT") from error


def _install_linear(layers: Any, torch: Any) -> None:
    dispatch = layers.dispatch_cpu_unquantized_gemm
    if getattr(dispatch, "in_blocks", False):
        return

    @functools.wraps(dispatch)
    def dispatched(layer: Any, remove_weight: bool) -> None:
        dispatch(layer, remove_weight)
        if hasattr(layer, "cpu_linear"):
            layer.cpu_linear = in_blocks(layer.cpu_linear, torch)

    dispatched.in_blocks = True  # type: ignore[attr-defined]
    layers.dispatch_cpu_unquantized_gemm = dispatched


def _install_attention(attention: Any, ops: Any, torch: Any) -> None:
    builder, impl = attention.CPUAttentionMetadataBuilder, attention.CPUAttentionBackendImpl
    build, forward = builder.build, impl.forward
    if getattr(build, "in_pieces", False):
        return

    @functools.wraps(build)
    def built(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, fast_build)
        if self.is_cross_attention or self.is_encoder_only_attention or metadata.dynamic_causal is not None:
            return metadata
        piece = piece_size(self.isa, self.num_heads // self.num_kv_heads)
        owner, ends, rows = pieces(metadata.query_start_loc, metadata.seq_lens, piece, torch)
        metadata.num_actual_tokens = len(owner) * piece
        metadata.max_query_len = piece
        metadata.query_start_loc = torch.arange(0, (len(owner) + 1) * piece, piece, dtype=torch.int32)
        metadata.seq_lens = ends.to(torch.int32)
        metadata.block_table = metadata.block_table[owner]
        metadata.scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(owner),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=metadata.seq_lens,
            dtype=self.dtype,
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=False,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        metadata.rows = rows
        return metadata

    @functools.wraps(forward)
    def forwarded(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        kv_cache: Any,
        attn_metadata: Any,
        output: Any,
        *scales: Any,
        **named_scales: Any,
    ) -> Any:
        rows = getattr(attn_metadata, "rows", None)
        if rows is None:
            return forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales, **named_scales)
        spread = query.new_zeros(attn_metadata.num_actual_tokens, *query.shape[1:])
        spread[rows] = query[: len(rows)]
        answer = output.new_empty(attn_metadata.num_actual_tokens, *output.shape[1:])
        forward(self, layer, spread, key, value, kv_cache, attn_metadata, answer, *scales, **named_scales)
        output[: len(rows)] = answer[rows]
        return output

    built.in_pieces = True  # type: ignore[attr-defined]
    builder.build = built
    impl.forward = forwarded
