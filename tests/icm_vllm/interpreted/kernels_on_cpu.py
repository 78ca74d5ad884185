"""The kernels under Triton's interpreter, on the CPU; tests/icm_vllm/test_batch_invariant.py runs them in a
process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/icm_vllm/interpreted/kernels_on_cpu.py

Triton decides when a kernel is defined whether it is interpreted, so this process must define them no other way.

The interpreter multiplies with NumPy, whose BLAS may round a row otherwise at another place in its tile: OpenBLAS does
where AVX2 is all that a CPU has. A matrix unit does not, so `chained` stands in for it here, and a row's bits depend on
our kernels alone.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

import icm_vllm.batch_invariant as bi
from icm_vllm.batch_invariant import collectives, compiled, kernels, matmul, mode, scaled, tiles
from icm_vllm.batch_invariant.tiles import AMPERE, FP8, HOPPER, HOPPER_FP8, OTHER, Tile, choose

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest exact result. The interpreter cuts bfloat16 off instead of rounding it: twice the error of a GPU.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 9e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Small ones, whose products and sums are exact in any order."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float | None = None) -> bool:
    scale = max(1e-30, float(exact.abs().max())) if exact.numel() else 1.0
    return found.shape == exact.shape and bool(
        ((found.double() - exact).abs() <= (tolerance or TOLERANCE[found.dtype]) * scale).all()
    )


Matrix = npt.NDArray[np.float32]


def chained(a: Matrix, b: Matrix) -> Matrix:
    """a @ b: each element is one chain over the inner dimension, in order, each product and each sum rounded.

    By elementwise functions alone, which IEEE 754 leaves no choice: no other row, column or CPU can change a bit.
    """
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    step = np.empty_like(total)
    for column, row in zip(np.ascontiguousarray(a.T), np.ascontiguousarray(b), strict=True):
        np.multiply(column[:, None], row, out=step)
        np.add(total, step, out=total)
    return total


@pytest.fixture(autouse=True)
def _matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dot(_: object, a: Any, b: Any, d: Any, *__: object) -> Any:
        """As the interpreter's own, the block is added to d as a whole: another depth is another order of the sum."""
        assert a.data.dtype == b.data.dtype == d.data.dtype == np.float32  # the kernels widen, see WIDEN there
        return interpreter.TensorHandle(chained(a.data, b.data) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _mode_is_off() -> Iterator[None]:
    assert kernels.INTERPRETED
    yield
    left_on = bi.is_batch_invariant_mode_enabled()
    bi.disable_batch_invariant_mode()
    assert not left_on


# Products


def test_the_matrix_unit_gives_a_row_the_same_bits_at_every_place() -> None:
    a, b = (random(*shape, seed=seed).numpy() for seed, shape in enumerate([(64, 256), (256, 64)]))
    whole = chained(a, b)
    assert close(torch.from_numpy(whole), torch.from_numpy(a).double() @ torch.from_numpy(b).double(), 1e-6)
    for moved in (1, 6, 60):
        assert np.array_equal(chained(np.roll(a, moved, 0), np.roll(b, moved, 1)), np.roll(whole, moved, (0, 1)))
    for rows, columns in ((1, 64), (16, 32), (63, 1)):
        assert np.array_equal(chained(a[:rows], b[:, :columns]), whole[:rows, :columns])
    assert np.array_equal(chained(np.asfortranarray(a), b.T.copy().T), whole)
    # A product in two blocks, as tiles of another depth cut it.
    assert not np.array_equal(chained(a[:, :128], b[:128]) + chained(a[:, 128:], b[128:]), whole)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (3, 7, 5), (64, 64, 64), (65, 33, 130), (130, 100, 67), (40, 1, 40)]
)
def test_products_of_odd_shapes_against_float64(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    a, b, bias = random(m, k, dtype=dtype), random(k, n, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    exact = a.double() @ b.double()
    assert close(bi.product(a, b), exact)
    assert close(bi.product(a, b, bias), exact + bias.double())
    assert close(bi.product(a, b, out_dtype=torch.float32), exact, 1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 40), st.integers(0, 70), st.integers(0, 70))
def test_batches_of_any_size_against_float64(copies: int, m: int, k: int, n: int) -> None:
    a, b = random(copies, m, k), random(copies, k, n, seed=1)
    assert close(bi.product(a, b), a.double() @ b.double())


@pytest.mark.parametrize("dtype", TYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    a, b = random(20, 48, dtype=dtype), random(48, 24, dtype=dtype, seed=1)
    expected = bi.product(a, b)
    wide = random(20, 96, dtype=dtype, seed=2)
    wide[:, ::2] = a
    for other in (a.t().contiguous().t(), wide[:, ::2]):
        assert torch.equal(bi.product(other, b), expected)
    assert torch.equal(bi.product(a, b.t().contiguous().t()), expected)
    same = a[:1].expand(20, 48)
    assert torch.equal(bi.product(same, b), bi.product(same.contiguous(), b))
    batch = bi.product(a.expand(3, 20, 48), b.expand(3, 48, 24))
    assert all(torch.equal(part, expected) for part in batch)


def test_nothing_to_sum_is_zero_or_the_bias() -> None:
    bias = random(5)
    assert torch.equal(bi.product(random(3, 0), random(0, 5)), torch.zeros(3, 5))
    assert torch.equal(bi.product(random(3, 0), random(0, 5), bias), bias.expand(3, 5))
    assert bi.product(random(0, 4), random(4, 5)).shape == (0, 5)
    assert bi.product(random(2, 3, 4), random(2, 4, 0)).shape == (2, 3, 0)


def test_results_go_where_they_are_asked_to() -> None:
    a, b = random(6, 8), random(8, 10, seed=1)
    expected = bi.product(a, b)
    for out in (torch.empty(6, 10), torch.empty(10, 6).t(), torch.empty(6, 20)[:, ::2]):
        assert bi.product(a, b, out=out) is out
        assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        bi.product(random(2, 2).double(), random(2, 2).double())
    with pytest.raises(TypeError, match="same type"):
        bi.product(random(2, 2), random(2, 2).half())
    for a, b in ((random(2, 3), random(2, 3)), (random(2, 2, 2), random(2, 2)), (random(3), random(3, 1))):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            bi.product(a, b)
    with pytest.raises(ValueError, match="bias"):
        bi.product(random(2, 2), random(2, 2), random(3))
    with pytest.raises(ValueError, match="out is"):
        bi.product(random(2, 2), random(2, 2), out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="descriptors cannot read"):
        matmul.product(random(4, 8).half()[:, ::2], random(4, 8).half(), descriptors=True)


# Products of 8-bit floats


def eight_bit(m: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, b, and scales by powers of two: their products and sums are exact in any order."""
    a, b = integers(m, k).to(FP8), integers(n, k, seed=1).to(FP8).t()
    return a, b, 2.0 ** -integers(m, 1, seed=2).abs(), 2.0 ** -integers(n, 1, seed=3).abs()


@pytest.mark.parametrize("tile", HOPPER_FP8, ids=str)
def test_every_tile_multiplies_and_scales_8_bit_floats(tile: Tile) -> None:
    a, b, scale_a, scale_b = eight_bit(130, 272, 144)
    exact = (a.double() @ b.double()) * scale_a.double() * scale_b.double().t()
    bias = 2.0 ** integers(144, seed=4)
    for dtype in (torch.bfloat16, torch.float16):
        found = bi.scaled_product(a, b, scale_a, scale_b, None, dtype, tile=tile)
        assert found.dtype == dtype
        assert close(found, exact)
        assert close(bi.scaled_product(a, b, scale_a, scale_b, bias.to(dtype), dtype, tile=tile), exact + bias.double())


def test_8_bit_products_of_few_rows_and_of_one_scale() -> None:
    a, b, scale_a, scale_b = eight_bit(70, 48, 32)
    whole = bi.scaled_product(a, b, scale_a, scale_b)
    for rows in (1, 2, 64, 65):
        assert torch.equal(bi.scaled_product(a[:rows], b, scale_a[:rows], scale_b), whole[:rows])
    # As vLLM keeps them, as a row, and unaligned in memory.
    moved = torch.zeros(70 * 48 + 1, dtype=FP8)[1:].view(70, 48).copy_(a)
    assert torch.equal(bi.scaled_product(moved, b, scale_a.view(-1), scale_b.t()), whole)
    moved = torch.zeros(32 * 48 + 1, dtype=FP8)[1:].view(32, 48).copy_(b.t()).t()
    assert torch.equal(bi.scaled_product(a, moved, scale_a, scale_b), whole)
    one, half = torch.tensor([0.5]), torch.full((70,), 0.5)
    assert torch.equal(bi.scaled_product(a, b, one, scale_b), bi.scaled_product(a, b, half, scale_b))
    assert torch.equal(bi.scaled_product(a, b, scale_a, one), bi.scaled_product(a, b, scale_a, half[:32]))
    assert bi.scaled_product(a[:0], b, one, scale_b).shape == (0, 32)
    assert {count for _, count in scaled.tiles_agree(CPU, n=32, k=48)} == {0}


def test_8_bit_products_that_are_not_ours_are_refused() -> None:
    a, b, scale_a, scale_b = eight_bit(6, 48, 32)
    assert scaled.scalable(a, b, scale_a, scale_b)
    for other in (
        (a.float(), b, scale_a, scale_b),
        (a, b.float(), scale_a, scale_b),
        (a, b.t().contiguous().t()[:, :24], scale_a, scale_b[:24]),  # 24 columns
        (a, b.contiguous(), scale_a, scale_b),  # (K, N) in memory
        (a, b, scale_a[:5], scale_b),
        (a, b, scale_a, scale_b[:31]),
        (a, b, scale_a.double(), scale_b),
    ):
        assert not scaled.scalable(*other)
        with pytest.raises(ValueError, match="is not computed here"):
            bi.scaled_product(*other)
    with pytest.raises(ValueError, match="is not computed here"):
        bi.scaled_product(a[:, :32], b, scale_a, scale_b)
    with pytest.raises(ValueError, match="is not computed here"):
        bi.scaled_product(a, b, scale_a, scale_b, None, torch.float32)
    for bias in (torch.zeros(31, dtype=torch.bfloat16), torch.zeros(32)):
        with pytest.raises(ValueError, match="a bias of"):
            bi.scaled_product(a, b, scale_a, scale_b, bias)


@pytest.mark.parametrize("tile", [*HOPPER, Tile(64, 64, 64, 4, 3, persistent=True), *AMPERE, *OTHER], ids=str)
def test_every_tile_puts_everything_in_its_place(tile: Tile) -> None:
    """By descriptors and by pointers. Whether tiles round alike is seen on a GPU alone: `chained` multiplies here."""
    a, b, bias = (integers(*shape, dtype=torch.bfloat16) for shape in ((130, 72), (136, 72), (136,)))
    expected = (a.double() @ b.t().double() + bias.double()).bfloat16()
    exact = a.double() @ b.t().double() + bias.double()
    assert matmul.describable(a, b.t(), expected)
    for weight in (b.t(), b.t().contiguous()):
        for descriptors in (False, True):
            found = bi.product(a, weight, bias, tile=tile, descriptors=descriptors)
            assert close(found, exact)
            assert torch.equal(found.float().round(), found.float())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_keeps_its_bits_whatever_it_is_multiplied_with(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tiles.TILE_VARIABLE, "64x64x32")
    a, b = random(150, 100, dtype=dtype), random(100, 70, dtype=dtype, seed=1)
    whole = bi.product(a, b)
    for m in (1, 2, 15, 16, 17, 63, 64, 65, 149):
        for start in (0, 1, 150 - m):
            assert torch.equal(bi.product(a[start : start + m], b), whole[start : start + m])
    batch = bi.product(torch.stack([a, a.flip(0)]), b.expand(2, 100, 70))
    assert torch.equal(batch[0], whole)
    assert torch.equal(batch[1].flip(0), whole)


def test_agreement_compares_all_tiles_and_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Tile(64, 64, 32, 4, 3)
    monkeypatch.setattr(tiles, "AMPERE", (dataclasses.replace(same, group=1), same))
    results = bi.agreement(CPU, torch.float16, n=64, k=40)
    assert len(results) == 2 * 10
    assert not any(count for _, count in results)
    # Another depth is another order of the sum.
    monkeypatch.setattr(tiles, "AMPERE", (dataclasses.replace(same, depth=16), same))
    assert any(count for _, count in bi.agreement(CPU, torch.float32, n=64, k=40)) is False
    assert any(count for _, count in bi.agreement(CPU, torch.float16, n=64, k=400))


def test_tiles_that_differ_are_not_chosen_among(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiles.TILE_VARIABLE, "")
    same = Tile(64, 64, 32, 4, 3)
    monkeypatch.setattr(matmul, "agreement", partial(matmul.agreement, n=64, k=400))
    monkeypatch.setattr(tiles, "AMPERE", (dataclasses.replace(same, group=1), same))
    assert matmul.settle_tiles(CPU, [torch.float16]) == []
    assert len(tiles.tiles(torch.float16, (8, 0))) == 2
    monkeypatch.setattr(
        tiles, "AMPERE", (dataclasses.replace(same, depth=16), dataclasses.replace(same, rows=32), same)
    )
    assert "64x64x16 pointers" in matmul.settle_tiles(CPU, [torch.float16])[0]
    assert [tile.name for tile in tiles.tiles(torch.float16, (8, 0))] == ["32x64x32"]
    assert matmul.settle_tiles(CPU, [torch.float16]) == []


# Tiles


def test_the_tile_with_the_fewest_rounds_for_its_size_is_chosen() -> None:
    big, wide, middle, small, smallest = HOPPER
    for m, n, expected in (
        (8192, 4096, big),
        (2048, 4096, big),
        (2048, 28672, big),
        (1024, 6144, wide),  # two rounds of the big tile, the second half empty
        (512, 4096, wide),
        (256, 4096, middle),
        (64, 28672, wide),
        (64, 6144, small),
        (1, 4096, smallest),
    ):
        assert choose(HOPPER, m, n, 1, 132) == expected, (m, n)
    assert choose(HOPPER, 1, 64, 1000, 132) == small
    assert {choose(HOPPER, m, 128256, 1, 132).rows for m in (1, 16, 64)} == {64}
    assert choose(AMPERE, 1, 4096, 1, 108).rows == 16
    assert all(choose(tiles.FULL_PRECISION, m, 4096, 1, 132) == tiles.FULL_PRECISION[0] for m in (1, 100, 10000))


def test_families_follow_the_gpu_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tiles.TILE_VARIABLE, raising=False)
    assert tiles.tiles(torch.bfloat16, (9, 0)) == HOPPER
    assert tiles.tiles(torch.float16, (8, 6)) == AMPERE
    assert len(tiles.tiles(torch.bfloat16, (10, 0))) == 1
    assert {tile.rows >= 64 for tile in HOPPER} == {True}
    monkeypatch.setenv(tiles.TILE_VARIABLE, "64x128x128")
    assert [tile.name for tile in tiles.tiles(torch.bfloat16, (9, 0))] == ["64x128x128"]
    assert tiles.tiles(torch.float32, (9, 0)) == tiles.FULL_PRECISION
    monkeypatch.setenv(tiles.TILE_VARIABLE, "7x7x7")
    with pytest.raises(ValueError, match="this GPU has 128x256x64, 64x256x64"):
        tiles.tiles(torch.bfloat16, (9, 0))


# Rows


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (4, 1000), (3, 5000), (2, 3, 129)])
def test_softmax_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype) * 5
    for dim in range(-len(shape), len(shape)):
        assert close(bi.softmax(x, dim), x.double().softmax(dim))
        assert close(bi.log_softmax(x, dim), x.double().log_softmax(dim))
        assert close(bi.log_softmax(x, dim, out_dtype=torch.float32), x.double().log_softmax(dim), 1e-6)


def test_softmax_of_the_infinite_and_of_nothing() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -inf, 1.0], [nan, 0.0, 1.0], [1e38, -1e38, 0.0], [88.0, 89.0, 90.0]])
    torch.testing.assert_close(bi.softmax(x), x.softmax(-1), equal_nan=True)
    torch.testing.assert_close(bi.log_softmax(x), x.log_softmax(-1), equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of inf - inf
        assert bi.log_softmax(torch.tensor([[-inf, -inf], [inf, 0.0]])).isnan().any(dim=1).all()
    assert bi.softmax(torch.empty(0, 3)).shape == (0, 3)
    assert float(bi.softmax(torch.tensor(3.0))) == 1.0
    with pytest.raises(IndexError):
        bi.softmax(x, 2)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dims", [None, [], [0], [-1], [1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_and_means_against_float64(dims: list[int] | None, keepdim: bool, dtype: torch.dtype) -> None:
    x = random(3, 5, 130, dtype=dtype)
    every = dims or [0, 1, 2]
    assert close(bi.total(x, dims, keepdim, mean=True), x.double().mean(every, keepdim))
    assert close(bi.total(x, dims, keepdim), x.double().sum(every, keepdim), 10 * TOLERANCE[dtype])


def test_long_sums_are_cut_into_pieces_and_empty_ones_are_zero() -> None:
    x = random(2, 150_001)
    assert close(bi.total(x, [1]), x.double().sum(1), 1e-5)
    assert torch.equal(bi.total(x[1:], [1]), bi.total(x, [1])[1:])
    assert torch.equal(bi.total(torch.empty(2, 0), [1]), torch.zeros(2))
    assert bi.total(torch.empty(2, 0), [1], mean=True).isnan().all()
    assert bi.total(torch.empty(0, 2), [1]).shape == (0,)
    assert float(bi.total(torch.tensor(2.5))) == 2.5
    with pytest.raises(TypeError, match="int64"):
        bi.total(torch.arange(3))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 64, 100, 4096])
def test_rms_norm_against_float64(n: int, dtype: torch.dtype) -> None:
    x, r, weight = random(2, 5, n, dtype=dtype), random(2, 5, n, dtype=dtype, seed=1), random(n, seed=2)
    y, same = bi.rms_norm(x, weight, 1e-6)
    assert same is x

    def norm(z: torch.Tensor) -> torch.Tensor:
        return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    assert close(y, norm(x.double()) * weight.double())
    y, added = bi.rms_norm(x, None, 1e-6, r)
    assert close(added, x.double() + r.double())
    assert close(y, norm(added.double()))
    with pytest.raises(ValueError, match="residual is"):
        bi.rms_norm(x, None, 1e-6, r[0])


ROW_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": bi.softmax,
    "log_softmax": bi.log_softmax,
    "mean": lambda x: bi.total(x, [-1], mean=True),
    "rms_norm": lambda x: bi.rms_norm(x, None, 1e-6)[0],
    "add_rms_norm": lambda x: bi.rms_norm(x, None, 1e-6, x.flip(-1))[0],
}


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize(("n", "dtype"), [*((n, dtype) for n in (100, 128) for dtype in TYPES), (5000, torch.float32)])
def test_rows_keep_their_bits_and_alignment_does_not_matter(function: str, n: int, dtype: torch.dtype) -> None:
    compute, x = ROW_FUNCTIONS[function], random(40, n, dtype=dtype)
    whole = compute(x)
    for m, start in ((1, 0), (1, 39), (2, 3), (17, 5), (33, 1)):
        assert torch.equal(compute(x[start : start + m]), whole[start : start + m])
    padded = torch.zeros(40, n + 8, dtype=dtype)
    for offset in (0, 1, 8):  # elements: 1 is no 16-byte boundary
        padded[:, offset : offset + n] = x
        assert torch.equal(compute(padded[:, offset : offset + n]), whole)


# The mode


def everything(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> list[torch.Tensor]:
    """All that is overridden, by the names that models use."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
    torch.mm(a, b, out=out)
    batch = torch.empty(1, a.shape[0], b.shape[1], dtype=a.dtype)
    torch.bmm(a[None], b[None], out=batch)
    sums = torch.empty_like(out)
    torch.addmm(c, a, b, out=sums)
    return [
        a @ b,
        out,
        batch,
        sums,
        torch.addmm(c, a, b, beta=0.5, alpha=2.0),
        torch.addmm(torch.full_like(c, float("nan")), a, b, beta=0.0),
        torch.nn.functional.linear(a[None], b.t(), c),
        torch.nn.functional.linear(a[0], b.t()),
        torch.bmm(a[None], b[None]),
        torch.baddbmm(c, a[None], b[None]),
        torch.einsum("ij,jk->ki", a, b),
        a @ b[:, 0],
        torch.addmv(c[0].expand(a.shape[0]), a, b[:, 0]),
        torch.dot(a[0], b[:, 0]),
        a.softmax(0),
        a.log_softmax(-1),
        a.log_softmax(-1, dtype=torch.float32),
        a.mean(),
        a.mean(-1, keepdim=True),
        a.sum(0),
        a.sum(),
    ]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each operator came to us."""
    calls = dict.fromkeys(mode.OVERRIDDEN, 0)

    def counting(name: str, ours: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return ours(*arguments, **named)

        return call

    for name, ours in list(mode.OVERRIDDEN.items()):
        monkeypatch.setitem(mode.OVERRIDDEN, name, counting(name, ours))
    return calls


def test_the_mode_takes_over_every_operator_and_gives_it_back(counted: dict[str, int]) -> None:
    a, b, c = random(5, 7), random(7, 3, seed=1), random(3, seed=2)
    before = everything(a, b, c)
    with bi.set_batch_invariant_mode():
        found = everything(a, b, c)
        assert {name for name, calls in counted.items() if not calls} == {"baddbmm.out"}
    for ours, theirs in zip(found, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    calls = dict(counted)
    after = everything(a, b, c)
    assert counted == calls
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))


def test_the_mode_nests_and_survives_errors(counted: dict[str, int]) -> None:
    a = random(3, 3)

    def ours() -> bool:
        calls = counted["mm"]
        torch.mm(a, a)
        return counted["mm"] > calls

    with bi.set_batch_invariant_mode():
        with bi.set_batch_invariant_mode():
            assert ours()
        assert ours()
        with bi.set_batch_invariant_mode(False):
            assert not ours()
            assert not bi.is_batch_invariant_mode_enabled()
        assert ours()
        with pytest.raises(RuntimeError, match="shape"), bi.set_batch_invariant_mode(False):
            torch.mm(a, random(2, 2))
        assert ours()
    assert not ours()
    bi.enable_batch_invariant_mode()
    bi.enable_batch_invariant_mode()
    assert ours()
    with bi.set_batch_invariant_mode():
        pass
    assert ours()
    bi.disable_batch_invariant_mode()
    bi.disable_batch_invariant_mode()
    assert not ours()


def test_other_threads_see_the_mode(counted: dict[str, int]) -> None:
    with bi.set_batch_invariant_mode():
        thread = threading.Thread(target=lambda: torch.mm(random(2, 2), random(2, 2)))
        thread.start()
        thread.join()
    assert counted["mm"] == 1


def test_other_types_go_to_pytorch() -> None:
    a = random(4, 4).double()
    with bi.set_batch_invariant_mode():
        assert torch.equal(a @ a, torch.mm(a, a))
        assert (a @ a).dtype == torch.float64
        assert int((torch.arange(6).view(2, 3) @ torch.arange(3))[1]) == 14
        assert torch.arange(6).sum().dtype == torch.int64
        assert a.to(torch.complex64).mm(a.to(torch.complex64)).is_complex()
        assert a.softmax(0).dtype == torch.float64
        assert torch.addmm(a[0], a, a, beta=2).dtype == torch.float64


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: torch.mm(a, a),
        lambda a: torch.bmm(a[None], a[None]),
        lambda a: torch.addmm(a[0], a, a),
        lambda a: torch.addmm(a[0].expand(5, 3), a, a.t()),
        lambda a: torch.mv(a, a[:, 0]),
        lambda a: torch.addmv(a[:, 0], a, a[:, 0]),
        lambda a: torch.dot(a[0], a[:, 0]),
        lambda a: torch.mm(a, a.t().double()),
        lambda a: a.softmax(5),
        lambda a: a.mean(5),
        lambda a: torch.mm(a, a.t(), out=torch.empty(2, 2).double()),
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_words(wrong: Callable[[torch.Tensor], Any]) -> None:
    def refusal() -> str:
        with pytest.raises((RuntimeError, IndexError)) as caught:
            wrong(random(2, 3))
        return str(caught.value)

    expected = refusal()
    with bi.set_batch_invariant_mode():
        assert refusal() == expected


def test_pytorchs_settings_are_restored() -> None:
    before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    with bi.set_batch_invariant_mode():
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == before


def test_without_cuda_the_mode_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="built for CUDA"), bi.set_batch_invariant_mode():
        pass
    assert not bi.is_batch_invariant_mode_enabled()


def test_derivatives_are_pytorchs_own() -> None:
    def gradient() -> torch.Tensor:
        x = random(4, 6).requires_grad_()
        ((x @ random(6, 5, seed=1)).softmax(-1) * random(4, 5, seed=2)).sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    with bi.set_batch_invariant_mode():
        torch.testing.assert_close(gradient(), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_compiled_code_calls_the_kernels_while_the_mode_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import run_and_get_code

    # PyTorch (2.13) takes what it wrote for other vectors out of its cache, and then computes wrong numbers.
    vectors = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{cache_dir()}-{vectors}")
    w, c = random(7, 3, seed=1), random(3, seed=2)

    def model(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.linear(x, w.t(), c)
        return (hidden.softmax(-1) + (x @ w)).log_softmax(-1) - hidden.mean(-1, keepdim=True)

    x = random(9, 7)
    torch.compiler.reset()
    with bi.set_batch_invariant_mode():
        expected = model(x)
        found, code = run_and_get_code(torch.compile(model), x)
        for name in ("product", "softmax", "log_softmax", "total"):
            assert f"torch.ops.icm.{name}.default(" in code[0]
        # The rest is elementwise; a compiler may contract a - b * c, but not depending on how many rows there are.
        torch.testing.assert_close(found, expected)
        assert torch.equal(torch.compile(model, dynamic=True)(x[2:4]), found[2:4])
    torch.compiler.reset()
    found, code = run_and_get_code(torch.compile(model), x)
    assert "torch.ops.icm" not in code[0]
    assert not compiled._before
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_a_transformer_gives_a_prompt_the_same_logits_alone_and_among_others() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        # In whole vectors: PyTorch's silu on a CPU rounds the numbers that are left over behind them otherwise.
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(96, (5, 11))
    with torch.inference_mode(), bi.set_batch_invariant_mode():
        together = model(tokens).logits
        for number in range(5):
            assert torch.equal(model(tokens[number : number + 1]).logits[0], together[number])
        assert torch.equal(model(tokens[[3, 1]]).logits, together[[3, 1]])


def test_the_operators_have_the_shapes_that_they_promise() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def results() -> list[torch.Tensor]:
        x, w, c = torch.ones(2, 3, 8), torch.ones(5, 8), torch.ones(5)
        icm = torch.ops.icm
        return [
            icm.linear(x, w, c),
            icm.linear(x, w),
            icm.product(x[0], w.t()),
            icm.product(x, x.transpose(1, 2)),
            icm.softmax(x, -1),
            icm.log_softmax(x.half(), 0, torch.float32),
            icm.total(x, [0, -1], False, None, True),
            icm.total(x, [1], True, torch.float16, False),
            icm.total(x, [], False, None, False),
            icm.rms_norm(x, None, 1e-6),
            *icm.add_rms_norm(x, x, x[0, 0], 1e-6),
        ]

    with FakeTensorMode():
        promised = [(tuple(y.shape), y.dtype) for y in results()]
    assert promised == [(tuple(y.shape), y.dtype) for y in results()]


# Sums over processes


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 4095, 9001])
def test_sums_in_order(count: int, length: int, dtype: torch.dtype) -> None:
    parts = integers(count, length, dtype=dtype)
    assert torch.equal(collectives.sum_in_order(parts), parts.sum(0).to(dtype))
    parts = random(count, length)
    expected = torch.zeros(length)
    for part in parts:
        expected = expected + part
    assert torch.equal(collectives.sum_in_order(parts), expected)


def _in_one_of_several(rank: int, count: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    every = [random(24, 5, seed=other) * 10.0 ** (other % 3) for other in range(count)]
    own, whole = every[rank], collectives.all_reduce(every[rank])
    expected = every[0]
    for other in every[1:]:
        expected = expected + other
    assert torch.equal(whole, expected)  # in the order of the ranks
    for rows in (1, 7, 24):
        for limit in (0, 1 << 30):  # in two steps, in one
            assert torch.equal(collectives.all_reduce(own[:rows], gathered=limit), whole[:rows])
    assert torch.equal(collectives.all_reduce(own[:, 1:2].t(), gathered=0), whole[:, 1:2].t())  # not contiguous
    assert collectives.all_reduce(own[:0]).shape == (0, 5)
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        collectives.all_reduce(torch.ones(3, dtype=torch.int64))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_a_row_has_the_same_sum_over_processes_whatever_is_beside_it(tmp_path: Any, count: int) -> None:
    torch.multiprocessing.spawn(_in_one_of_several, (count, str(tmp_path / "store")), nprocs=count)
