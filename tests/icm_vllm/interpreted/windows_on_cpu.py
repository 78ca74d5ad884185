"""vLLM's Triton attention by Triton's interpreter: rows with windows and sinks, computed in every company.

Run by tests/icm_vllm/test_triton_attention.py in a process of its own: Triton decides when a kernel is defined whether
it is interpreted, and vLLM, whether there is a Triton at all. By hand, for minutes, of Gemma 3 4B's own sizes:

    python tests/icm_vllm/interpreted/windows_on_cpu.py --gemma3 [--old_step]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_BATCH_INVARIANT": "1", "CUDA_VISIBLE_DEVICES": ""}

import pytest
import torch
import triton
import triton.language as tl
from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=None, compiler=None)  # else vLLM for CPUs defines no kernels

from vllm.v1.attention.ops import triton_unified_attention as kernels  # noqa: E402

from icm_vllm import triton_attention  # noqa: E402

# Rows of a tile that hold no query have no sum, either.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide")


@dataclass(frozen=True)
class Sizes:
    """Heads, their size, tokens of a cache block, tokens of each sequence, and the type of all numbers."""

    heads: int = 4
    key_heads: int = 2
    size: int = 32
    block: int = 16
    lengths: tuple[int, ...] = (75, 40, 21)
    dtype: torch.dtype = torch.float32


SMALL = Sizes()
GEMMA3 = Sizes(heads=2, key_heads=1, size=256, lengths=(1300, 1100, 64))
"""Of Gemma 3 4B (benchmarks/shapes/published.py), one of its four key heads, which are programs of their own with two
query heads each. float32: the interpreter's bfloat16 is not right."""
GEMMA3_WINDOW = 1024
COMPANY = ([(1, 1), (2, 3)], [(1, 40), (2, 21)])


@triton.jit
def forgetful_step(scores, largest, total):  # type: ignore[no-untyped-def]
    """As vLLM had it before 0.33: a first tile that a row does not see leaves 0 as its maximum."""
    now = tl.maximum(largest, tl.max(scores, axis=1))
    now = tl.where(now > float("-inf"), now, 0.0)
    weights = tl.exp(scores - now[:, None])
    factor = tl.exp(largest - now)
    return now, total * factor + tl.sum(weights, axis=1), weights, factor


class Sequences:
    """Queries, and keys and values in shuffled blocks. All scores are negative, so that a maximum of 0 would show."""

    def __init__(self, sizes: Sizes = SMALL) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        counts = [-(-length // sizes.block) for length in sizes.lengths]
        stored = torch.randn(sum(counts) + 1, sizes.block, sizes.key_heads, 2 * sizes.size)
        self.keys = (-stored[..., : sizes.size].abs() / 4).to(sizes.dtype)
        self.values = stored[..., sizes.size :].to(sizes.dtype)
        self.queries = [torch.randn(length, sizes.heads, sizes.size).abs().to(sizes.dtype) for length in sizes.lengths]
        self.sinks = torch.randn(sizes.heads) - 9
        blocks = torch.randperm(sum(counts)).tolist()
        self.tables = torch.full((len(counts), max(counts) + 1), sum(counts), dtype=torch.int32)
        for table, count in zip(self.tables, counts, strict=True):
            table[:count] = torch.tensor([blocks.pop() for _ in range(count)])

    def attend(self, parts: list[tuple[int, int]], window: int, sinks: bool, cached: int = 0) -> list[torch.Tensor]:
        """Outputs of the last tokens of sequences: parts is [(which, how many), ...]; but for the `cached` last ones,
        which are left out, of the first sequence."""
        lengths = [self.sizes.lengths[which] - (cached if which == 0 else 0) for which, _ in parts]
        queries = torch.cat([self.queries[w][n - c : n] for (w, c), n in zip(parts, lengths, strict=True)])
        out = torch.empty_like(queries)
        kernels.unified_attention(
            q=queries,
            k=self.keys,
            v=self.values,
            out=out,
            cu_seqlens_q=torch.tensor([0, *(count for _, count in parts)]).cumsum(0).int(),
            max_seqlen_q=max(2, *(count for _, count in parts)),
            seqused_k=torch.tensor(lengths).int(),
            max_seqlen_k=max(lengths),
            softmax_scale=self.sizes.size**-0.5,
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
            block_table=self.tables[[which for which, _ in parts]].contiguous(),
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            sinks=self.sinks if sinks else None,
        )
        return list(out.split([count for _, count in parts]))


def differing(sequences: Sequences, window: int, sinks: bool) -> int:
    """Numbers of the first sequence that have other bits when its tokens are not computed all at once."""
    length = SMALL.lengths[0]
    whole = sequences.attend([(0, length)], window, sinks)[0]
    found = 0
    for count in (1, 2, 17, 38):
        for before in ([], *COMPANY):
            part = sequences.attend([*before, (0, count)], window, sinks)[-1]
            found += int((part != whole[-count:]).sum())
    for start, end in pairwise((0, 16, 21, 53, 75)):  # a prefill in chunks
        part = sequences.attend([(0, end - start)], window, sinks, cached=length - end)[0]
        found += int((part != whole[start:end]).sum())
    return found


def reference(sequences: Sequences, window: int, sinks: bool) -> torch.Tensor:
    """The first sequence's attention in float64."""
    sizes = sequences.sizes
    count, block, share = sizes.lengths[0], sizes.block, sizes.heads // sizes.key_heads
    places = torch.arange(count)
    rows = [
        store[sequences.tables[0, places // block], places % block].double().repeat_interleave(share, 1)
        for store in (sequences.keys, sequences.values)
    ]
    scores = torch.einsum("qhd,khd->hqk", sequences.queries[0].double(), rows[0]) * sizes.size**-0.5
    back = places[:, None] - places
    scores = scores.masked_fill((back < 0) | (back >= (window or count)), float("-inf"))
    if sinks:
        scores = torch.cat([scores, sequences.sinks.double()[:, None, None].expand(-1, count, 1)], -1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :count], rows[1])


@pytest.fixture
def sequences(monkeypatch: pytest.MonkeyPatch) -> Sequences:
    monkeypatch.setattr(kernels, "softmax_step", triton_attention.softmax_step)
    return Sequences()


@pytest.mark.parametrize(("window", "sinks"), [(0, False), (20, False), (33, False), (20, True)])
def test_rows_have_one_result(sequences: Sequences, window: int, sinks: bool) -> None:
    assert differing(sequences, window, sinks) == 0
    whole = sequences.attend([(0, SMALL.lengths[0])], window, sinks)[0]
    torch.testing.assert_close(whole.double(), reference(sequences, window, sinks), rtol=1e-5, atol=1e-5)


def test_a_tile_of_keys_that_a_row_does_not_see_must_not_be_remembered(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "softmax_step", forgetful_step)
    assert differing(sequences, 20, sinks=False) > 0


@pytest.mark.parametrize("tile", ["32x16", "64x64x4x2"])
def test_another_tile_is_one_tile_for_all_rows(
    sequences: Sequences, monkeypatch: pytest.MonkeyPatch, tile: str
) -> None:
    usual = sequences.attend([(0, SMALL.lengths[0])], 20, sinks=False)[0]
    asked: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            asked.append(grid)
            return lambda **named: own[grid](
                **{name: value for name, value in named.items() if not name.startswith("num_s") or name == "num_seqs"}
            )

    own = kernels.kernel_unified_attention
    monkeypatch.setattr(
        kernels, "kernel_unified_attention", triton_attention.OneTile(Kernel(), triton_attention.tile_of(tile))
    )
    assert differing(sequences, 20, sinks=False) == 0
    whole = sequences.attend([(0, SMALL.lengths[0])], 20, sinks=False)[0]
    assert asked[-1] == (SMALL.lengths[0] // (int(tile[:2]) // 2) + 1, SMALL.key_heads)
    torch.testing.assert_close(whole, usual, rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole, usual), "it went through the keys in the same tiles"


def rows_of_gemma3(sequences: Sequences) -> Iterator[tuple[str, int, int, float]]:
    """How rows of the first sequence, longer than the window, were computed again; how many of them have other bits
    than when all are computed at once, of how many, and the largest difference. A row is a token's query head."""
    lengths = sequences.sizes.lengths
    length = lengths[0]
    whole = sequences.attend([(0, length)], GEMMA3_WINDOW, sinks=False)[0]
    torch.testing.assert_close(whole.double(), reference(sequences, GEMMA3_WINDOW, sinks=False), rtol=1e-5, atol=1e-5)

    def compared(part: torch.Tensor, rows: torch.Tensor) -> tuple[int, int, float]:
        other = (part != rows).any(-1)
        return int(other.sum()), other.numel(), float((part.float() - rows.float()).abs().max())

    # The last token sees from token 276 on.
    for cached in (1299, 1284, 1000, 517, 256):
        part = sequences.attend([(0, length - cached)], GEMMA3_WINDOW, sinks=False)[0]
        where = "inside" if cached > length - GEMMA3_WINDOW else "before"
        yield f"behind {cached:,} cached, {where} the last window", *compared(part, whole[cached:])
    bounds = (0, 512, 1030, 1101, length)
    parts = [
        sequences.attend([(0, end - start)], GEMMA3_WINDOW, sinks=False, cached=length - end)[0]
        for start, end in pairwise(bounds)
    ]
    yield f"in chunks to {', '.join(f'{end:,}' for end in bounds[1:])}", *compared(torch.cat(parts), whole)
    for company, cached in (([(1, 1), (2, 3)], 0), ([(1, 1), (2, 3)], 1100), ([(1, lengths[1]), (2, 5)], 1000)):
        part = sequences.attend([*company, (0, length - cached)], GEMMA3_WINDOW, sinks=False)[-1]
        beside = " and ".join(f"{count:,}" for _, count in company)
        yield f"behind {cached:,} cached, beside {beside} of others", *compared(part, whole[cached:])


def main() -> int:
    """Print one line for each way of computing; 1 where rows differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gemma3", action="store_true", required=True, help="a key head and the window of Gemma 3 4B, 1,300 tokens"
    )
    parser.add_argument(
        "--old_step", action="store_true", help="with the softmax of vLLM before 0.33: rows must differ"
    )
    args = parser.parse_args()
    kernels.softmax_step = forgetful_step if args.old_step else triton_attention.softmax_step
    begun, found, total = time.monotonic(), 0, 0
    for how, differ, rows, largest in rows_of_gemma3(Sequences(GEMMA3)):
        found, total = found + differ, total + rows
        print(f"{how:<56} {differ:>6,} of {rows:>6,} rows differ, by {largest:.3g}", flush=True)
    print(f"{found:,} of {total:,} rows differ; {time.monotonic() - begun:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
