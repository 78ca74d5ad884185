"""Do rows of vLLM's CPU kernels depend on what is computed beside them? As in vLLM, and in the shapes of cpu_exact.

    python benchmarks/cpu_rows.py                     # some minutes; `make setup-local` first
    OMP_NUM_THREADS=7 python benchmarks/cpu_rows.py   # as many threads as you like

Matrix products: rows of a large product against the same rows in products of other sizes and orders, and the cost of
blocks of rows. Attention: the last tokens of a sequence, computed again with the others in a paged cache, alone and in
batches, against the whole sequence in one call; as whole requests, and in the pieces of icm_vllm/cpu_exact.py.
Mixtures of experts: rows of a large batch against the same rows in smaller ones, as vLLM computes them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from icm_vllm.cpu_exact import ROWS, in_blocks, piece_size, pieces

LAYERS: Final = ((640, 1536), (1024, 640), (640, 4096), (2048, 640))
"""(K, N) of Gemma 3 270M's linear layers."""
HEADS: Final = ((4, 1, 256), (9, 3, 64), (8, 2, 128), (32, 4, 64), (16, 16, 64))
"""(query heads, key heads, head size)."""
EXPERTS: Final = ((128, 8, 1024, 384), (32, 4, 1024, 1024), (8, 2, 2048, 768))
"""(experts, those of each token, hidden size, inner size)."""
LENGTHS: Final = (100, 1000, 2000)
BLOCK: Final = 32

Sequence_ = tuple[Any, Any, Any, int]
"""queries, keys, values of a whole sequence, and the first token whose query is computed."""


def products(torch: Any, ops: Any) -> None:
    """Differing rows of products, and milliseconds of 704 rows and of one."""
    print(f"{'K x N':>12} {'as it is: rows differing':>25} {'blocks of 64':>13} {'ms, 704 rows':>22} {'ms, 1 row':>20}")
    for k, n in LAYERS:
        handler = ops.create_onednn_mm((torch.randn(n, k) * 0.02).bfloat16().t(), 32)

        def plain(x: Any, weight: Any = None, bias: Any = None, handler: Any = handler) -> Any:
            return ops.onednn_mm(handler, x, bias)

        exact = in_blocks(plain, torch)
        x = torch.randn(11 * ROWS, k).bfloat16()
        found = [_differing_rows(torch, way, x) for way in (plain, exact)]
        times = [_milliseconds(way, part) for part in (x, x[:1]) for way in (plain, exact)]
        print(
            f"{f'{k} x {n}':>12} {found[0]:>25} {found[1]:>13} {f'{times[0]:.2f} -> {times[1]:.2f}':>22} "
            f"{f'{times[2]:.2f} -> {times[3]:.2f}':>20}"
        )


def _differing_rows(torch: Any, way: Callable[..., Any], x: Any) -> int:
    whole = way(x, None)
    order = torch.randperm(len(x))
    others = [(way(x[:count], None), whole[:count]) for count in (1, 2, 15, 16, 17, 63, 64, 65, 300)]
    others += [(way(x[skipped:], None), whole[skipped:]) for skipped in (1, 7, 33)]
    others.append((way(x[order], None), whole[order]))
    return sum(int((a != b).any(1).sum()) for a, b in others)


def _milliseconds(way: Callable[..., Any], x: Any, repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        way(x, None)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1000


def attention(torch: Any, ops: Any, instruction_sets: Sequence[str]) -> None:
    """Differing rows of attention, among all that were compared."""
    print(
        f"\n{'heads':>14} {'window':>7} {'instructions':>13} {'rows':>8} {'whole: differ':>14} {'pieces: differ':>15}"
    )
    for heads in HEADS:
        for window in (-1, 511):
            for isa in instruction_sets:
                compared, whole, cut = 0, 0, 0
                for length in LENGTHS:
                    for asked in (length - 1, length // 2, 64, 33, 17, 16, 2, 1):
                        for others in (0, 3, 20):
                            torch.manual_seed(length)
                            batch = [_sequence(torch, heads, 200, 0) for _ in range(others // 2)]
                            batch += [_sequence(torch, heads, 60, 59) for _ in range(others - others // 2)]
                            own = _sequence(torch, heads, length, 0)
                            again = (*own[:3], length - asked)
                            compared += asked
                            for exact in (False, True):
                                (reference,) = attend(torch, ops, [own], heads, isa, window, exact)
                                answers = attend(torch, ops, [*batch, again], heads, isa, window, exact)
                                found = int((answers[-1] != reference[-asked:]).flatten(1).any(1).sum())
                                whole, cut = (whole, cut + found) if exact else (whole + found, cut)
                print(f"{'/'.join(map(str, heads)):>14} {window:>7} {isa:>13} {compared:>8} {whole:>14} {cut:>15}")


def _sequence(torch: Any, heads: tuple[int, int, int], length: int, first: int) -> Sequence_:
    query_heads, key_heads, size = heads
    queries, keys, values = (
        torch.randn(length, count, size).bfloat16() for count in (query_heads, key_heads, key_heads)
    )
    return queries, keys, values, first


def attend(
    torch: Any,
    ops: Any,
    batch: Sequence[Sequence_],
    heads: tuple[int, int, int],
    isa: str,
    window: int,
    exact: bool,
) -> list[Any]:
    """The asked rows of every sequence of the batch, in one call. exact: in pieces; else as vLLM does."""
    query_heads, key_heads, size = heads
    counts = [-(-len(keys) // BLOCK) for _, keys, _, _ in batch]
    cache = torch.randn(sum(counts) + 1, key_heads, BLOCK, 2 * size).bfloat16().view(-1, key_heads, 2 * BLOCK, size)
    key_cache, value_cache = cache.chunk(2, dim=2)
    tables = torch.zeros(len(batch), max(counts), dtype=torch.int32)
    used = 1
    for row, (count, (_, keys, values, _)) in enumerate(zip(counts, batch, strict=True)):
        tables[row, :count] = torch.arange(used, used + count)
        slots = torch.arange(len(keys)) + used * BLOCK
        ops.cpu_attn_reshape_and_cache(keys.contiguous(), values.contiguous(), key_cache, value_cache, slots, isa)
        used += count
    asked = torch.cat([queries[first:] for queries, _, _, first in batch])
    starts = torch.tensor([0, *(len(queries) - first for queries, _, _, first in batch)]).cumsum(0).int()
    lengths = torch.tensor([len(keys) for _, keys, _, _ in batch], dtype=torch.int32)
    query, query_starts, ends, rows = asked, starts, lengths, torch.arange(len(asked))
    if exact:
        piece = piece_size(isa, query_heads // key_heads)
        owner, ends, rows = pieces(starts, lengths, piece, torch)
        query = asked.new_zeros(len(owner) * piece, query_heads, size)
        query[rows] = asked
        query_starts = torch.arange(0, len(query) + 1, piece, dtype=torch.int32)
        ends, tables = ends.int(), tables[owner]
    plan = ops.cpu_attn_get_scheduler_metadata(
        len(ends), query_heads, key_heads, size, ends, torch.bfloat16, query_starts, True, window, isa, not exact
    )
    out = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query, key_cache, value_cache, out, query_starts, ends, size**-0.5, True, None, window, tables, 0.0, plan, None
    )
    return list(out[rows].split([len(queries) - first for queries, _, _, first in batch]))


def experts(torch: Any, ops: Any, instruction_sets: Sequence[str]) -> None:
    """Differing rows of mixtures of experts, among all that were compared."""
    print(f"\n{'experts, of each token, sizes':>30} {'instructions':>13} {'type':>9} {'rows':>7} {'differ':>7}")
    for count, chosen, hidden, inner in EXPERTS:
        for isa in instruction_sets:
            for dtype in (torch.bfloat16, torch.float32) if isa == "vec" else (torch.bfloat16,):
                gate_up = torch.randn(count, 2 * inner, hidden).mul(hidden**-0.5).to(dtype)
                down = torch.randn(count, hidden, inner).mul(inner**-0.5).to(dtype)
                packed = [ops.cpu_prepack_moe_weight(weights, isa) for weights in (gate_up, down)]
                x = torch.randn(300, hidden).to(dtype)
                shares, numbers = torch.randn(len(x), count).softmax(-1).topk(chosen, -1)

                def way(
                    rows: Any, packed: Any = packed, x: Any = x, of: Any = (shares, numbers), isa: str = isa
                ) -> Any:
                    y = torch.empty_like(x[rows])
                    parts = [part[rows].contiguous() for part in (x, of[0], of[1].int())]
                    ops.cpu_fused_moe(y, parts[0], *packed, None, None, *parts[1:], "silu", isa)
                    return y

                compared = differing = 0
                whole = way(torch.arange(len(x)))
                for size in (1, 2, 3, 5, 8, 17, 64, 100):
                    for start in range(0, len(x) - size, 37):
                        rows = torch.arange(start, start + size)
                        differing += int((way(rows) != whole[rows]).any(1).sum())
                        compared += size
                sizes, name = f"{count}, {chosen}, {hidden} x {inner}", str(dtype).removeprefix("torch.")
                print(f"{sizes:>30} {isa:>13} {name:>9} {compared:>7} {differing:>7}")


def main() -> int:
    """Print the tables."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("products", "attention", "experts", "all"), default="all")
    args = parser.parse_args()
    try:
        import torch
        import vllm._custom_ops as ops
        from vllm.platforms import current_platform
    except ImportError as error:
        print(f"error: vLLM for the CPU is not installed ({error}); make setup-local does it", file=sys.stderr)
        return 2
    if not current_platform.is_cpu():
        print("error: this vLLM is not one for a CPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    print(f"threads {torch.get_num_threads()}, AMX {'yes' if amx else 'no'}")
    if args.part in ("products", "all"):
        products(torch, ops)
    if args.part in ("attention", "all"):
        attention(torch, ops, ["amx", "vec", "vec16"] if amx else ["vec", "vec16"])
    if args.part in ("experts", "all"):
        experts(torch, ops, ["amx", "vec"] if amx else ["vec"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
