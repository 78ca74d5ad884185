"""Fixed shapes for vLLM on a CPU: the cutting is right, and products have one shape only. Needs torch, not vLLM."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_vllm.cpu_exact import ROWS, in_blocks, piece_size, pieces

torch: Any = pytest.importorskip("torch")

requests = st.lists(
    st.integers(1, 200).flatmap(lambda length: st.tuples(st.just(length), st.integers(1, length))),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)  # the first call imports half of torch
@given(requests, st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_pieces_are_aligned_and_hold_every_query_once(batch: list[tuple[int, int]], piece: int) -> None:
    start = torch.tensor([0, *(asked for _, asked in batch)]).cumsum(0)
    lengths = torch.tensor([length for length, _ in batch])
    owner, ends, rows = (part.tolist() for part in pieces(start, lengths, piece, torch))

    assert all(end % piece == 0 for end in ends)
    assert len(set(rows)) == len(rows) == sum(asked for _, asked in batch)
    found = [(owner[row // piece], ends[row // piece] - piece + row % piece) for row in rows]
    wanted = [
        (number, position) for number, (length, asked) in enumerate(batch) for position in range(length - asked, length)
    ]
    assert found == wanted  # each query's row stands for its own request and its own place in the sequence
    touched = {(number, position // piece) for number, position in wanted}
    assert sorted(touched) == [(number, end // piece - 1) for number, end in zip(owner, ends, strict=True)]


def test_a_request_without_queries_has_no_piece() -> None:
    start = torch.tensor([0, 3, 3, 5])
    owner, _, rows = pieces(start, torch.tensor([10, 4, 2]), 4, torch)
    assert set(owner.tolist()) == {0, 2}
    assert len(rows) == 5


def test_pieces_fill_a_tile_and_divide_a_block() -> None:
    assert piece_size("amx", 4) == 32
    assert piece_size("amx", 8) == 16
    assert piece_size("vec", 4) == 8
    assert piece_size("vec", 3) == 8
    assert piece_size("vec16", 64) == 1
    assert all(32 % piece_size(isa, heads) == 0 for isa in ("amx", "vec", "vec16") for heads in range(1, 65))


@settings(deadline=None)  # the first call imports half of torch
@given(st.integers(1, 200))
def test_a_product_has_one_shape_whatever_the_batch(count: int) -> None:
    shapes = set()

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        shapes.add(tuple(x.shape))
        return torch.nn.functional.linear(x, weight, bias)

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator)
    x = torch.randn(2, count, 3, generator=generator)
    answer = in_blocks(linear, torch)(x, weight, torch.ones(5))
    assert shapes == {(ROWS, 3)}
    torch.testing.assert_close(answer, torch.nn.functional.linear(x, weight, torch.ones(5)))
