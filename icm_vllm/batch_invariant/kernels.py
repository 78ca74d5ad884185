"""The Triton kernels: each computes a row in the same steps whatever the other rows are.

A kernel depends on the batch if it splits a sum by the number of rows. None of these does: how a sum is split follows
from constants and its length, its parts are added in a fixed order, and no two programs add into the same place.
Everything is accumulated in float32.

do_not_specialize: Triton would compile another binary for one row, and another for multiples of 16 rows.

Set TRITON_INTERPRET=1 before importing to run them on the CPU, for tests.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's interpreter multiplies the bits of bfloat16 numbers as integers, so they are widened first there. That is
# exact: products of 16-bit numbers are exact in float32, and a matrix unit adds these, too.
WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP rows of tiles are walked column by column, so that both operands stay in L2."""
    in_group = GROUP * tiles_n
    first = (tile // in_group) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    inside = tile % in_group
    return first + inside % rows, inside // rows


@triton.jit
def _add_product(accumulator, a, b):
    """accumulator + a @ b. "ieee" only matters for float32: true float32 products, not TF32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def matmul_by_pointers(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_az,
    stride_am,
    stride_ak,
    stride_bz,
    stride_bk,
    stride_bn,
    stride_cz,
    stride_cm,
    stride_cn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PIECE: tl.constexpr,
):
    """C[z] = A[z] @ B[z] (+ bias): any strides, a BLOCK_M x BLOCK_N tile of a C[z] a program, all of C[0] first.

    Order of the sum over K: blocks of BLOCK_K one after the other into one float32 accumulator, each in the steps of
    the matrix unit (16 deep for 16-bit types). Past the end of K zeros are added, which changes nothing. With PIECE,
    every PIECE of K has its own accumulator, and these are added in order: rounding errors grow with the square root of
    the number of additions in a chain, so shorter chains keep more of the precision of float32 inputs.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    z = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = _place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + z * stride_az + rows[:, None].to(tl.int64) * stride_am + depth[None, :] * stride_ak
    b_ptrs = b_ptr + z * stride_bz + depth[:, None] * stride_bk + columns[None, :].to(tl.int64) * stride_bn
    a_rows = rows[:, None] < M
    b_columns = columns[None, :] < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if WHOLE_K:
            a = tl.load(a_ptrs, mask=a_rows, other=0.0)
            b = tl.load(b_ptrs, mask=b_columns, other=0.0)
        else:
            a = tl.load(a_ptrs, mask=a_rows & (depth[None, :] < K - k), other=0.0)
            b = tl.load(b_ptrs, mask=b_columns & (depth[:, None] < K - k), other=0.0)
        accumulator = _add_product(accumulator, a, b)
        if PIECE:  # noqa: SIM102  PIECE is known to the compiler, which would fail at a remainder by 0
            if (k + BLOCK_K) % PIECE == 0:
                total += accumulator
                accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if PIECE:
        accumulator = total + accumulator
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    c_ptrs = c_ptr + z * stride_cz + rows[:, None].to(tl.int64) * stride_cm + columns[None, :] * stride_cn
    tl.store(c_ptrs, accumulator.to(c_ptr.dtype.element_ty), mask=a_rows & b_columns)


@triton.jit(do_not_specialize=["M", "stride_sa", "stride_sb"])
def matmul_by_descriptors(
    a_desc,
    a_ptr,
    b_desc,
    bias_ptr,
    c_desc,
    scale_a_ptr,
    scale_b_ptr,
    M,
    N,
    K,
    stride_am,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    A_BY_POINTERS: tl.constexpr,
    B_IS_NK: tl.constexpr,
    HALVES: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """C = A @ B (+ bias) through tensor descriptors, which Hopper's copy engine reads and writes in whole tiles.

    SCALED: every element is multiplied by its column's scale and then by its row's, before the bias.

    B_IS_NK: B lies in memory as (N, K), as the weight of a linear layer does. HALVES = 2 writes a tile in two halves,
    which takes half the shared memory. PROGRAMS: that many programs share the tiles, so that each can write one while
    it reads the next; 0: a program for every tile. A_BY_POINTERS: for fewer rows than a tile has, with PROGRAMS = 0;
    the copy engine takes up to twice as long for a tile that reaches past the end of its matrix (H200, measured). The
    sum over K is that of matmul_by_pointers.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if PROGRAMS:
        # A second counter for writing: with a shared one the compiler would finish a tile before it reads the next.
        written = tl.program_id(0) - PROGRAMS
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
            accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(tl.cdiv(K, BLOCK_K)):
                a = a_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
                if B_IS_NK:
                    b = b_desc.load([tile_n * BLOCK_N, k * BLOCK_K]).T
                else:
                    b = b_desc.load([k * BLOCK_K, tile_n * BLOCK_N])
                accumulator = _add_product(accumulator, a, b)
            written += PROGRAMS
            tile_m, tile_n = _place(written, tiles_m, tiles_n, GROUP)
            if SCALED:
                accumulator = _scale(
                    accumulator, scale_a_ptr, scale_b_ptr, tile_m, tile_n, M, N, stride_sa, stride_sb, BLOCK_M, BLOCK_N
                )
            _write(accumulator, bias_ptr, c_desc, tile_m, tile_n, N, BLOCK_M, BLOCK_N, HAS_BIAS, HALVES)
    else:
        tile_m, tile_n = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        rows = tl.arange(0, BLOCK_M)
        depth = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :]
        for k in range(tl.cdiv(K, BLOCK_K)):
            if A_BY_POINTERS:
                inside = (rows[:, None] < M) & (depth[None, :] < K - k * BLOCK_K)
                a = tl.load(a_ptrs + k * BLOCK_K, mask=inside, other=0.0)
            else:
                a = a_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            if B_IS_NK:
                b = b_desc.load([tile_n * BLOCK_N, k * BLOCK_K]).T
            else:
                b = b_desc.load([k * BLOCK_K, tile_n * BLOCK_N])
            accumulator = _add_product(accumulator, a, b)
        if SCALED:
            accumulator = _scale(
                accumulator, scale_a_ptr, scale_b_ptr, tile_m, tile_n, M, N, stride_sa, stride_sb, BLOCK_M, BLOCK_N
            )
        _write(accumulator, bias_ptr, c_desc, tile_m, tile_n, N, BLOCK_M, BLOCK_N, HAS_BIAS, HALVES)


@triton.jit
def _scale(
    accumulator,
    scale_a_ptr,
    scale_b_ptr,
    tile_m,
    tile_n,
    M,
    N,
    stride_sa,
    stride_sb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile, its columns scaled and then its rows. A stride of 0: one scale for all."""
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    of_rows = tl.load(scale_a_ptr + rows * stride_sa, mask=rows < M, other=0.0)
    of_columns = tl.load(scale_b_ptr + columns * stride_sb, mask=columns < N, other=0.0)
    return (accumulator * of_columns[None, :]) * of_rows[:, None]


@triton.jit
def _write(
    accumulator,
    bias_ptr,
    c_desc,
    tile_m,
    tile_n,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Add the bias in float32, round once, and write a tile."""
    if HAS_BIAS:
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if HALVES == 2:
        pair = tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(pair)
        c_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], left.to(c_desc.dtype))
        c_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N + BLOCK_N // 2], right.to(c_desc.dtype))
    else:
        c_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], accumulator.to(c_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def softmax_rows(
    x_ptr,
    y_ptr,
    M,
    N,
    stride_x,
    stride_y,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """softmax, or with LOG log_softmax, over the N numbers of a row; ROWS rows a program.

    Lane j sums exp(x - max) of the numbers j, j + LANES, j + 2 LANES, ... in that order; then the lanes are added as
    one tree. Rows that share a program never meet in a sum.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    live = rows[:, None] < M
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * stride_x + lanes[None, :]
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * stride_y + lanes[None, :]
    highest = tl.full((ROWS, LANES), float("-inf"), dtype=tl.float32)
    for start in range(0, N, LANES):
        x = tl.load(x_ptrs + start, mask=live & (lanes[None, :] < N - start), other=float("-inf"))
        highest = tl.maximum(highest, x.to(tl.float32))
    top = tl.max(highest, axis=1)[:, None]
    total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for start in range(0, N, LANES):
        inside = live & (lanes[None, :] < N - start)
        x = tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, tl.exp(x - top), 0.0)
    # A row beyond the last has an empty sum; its logarithm must not be taken.
    total_of_row = tl.where(live, tl.sum(total, axis=1)[:, None], 1.0)
    log_total = tl.log(total_of_row)
    for start in range(0, N, LANES):
        inside = live & (lanes[None, :] < N - start)
        x = tl.load(x_ptrs + start, mask=inside, other=0.0).to(tl.float32)
        if LOG:
            y = (x - top) - log_total
        else:
            y = tl.exp(x - top) / total_of_row
        tl.store(y_ptrs + start, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def sum_rows(
    x_ptr,
    y_ptr,
    M,
    N,
    divisor,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Sum of PIECE numbers of a contiguous row, divided by `divisor`; (M, N) -> (M, cdiv(N, PIECE)).

    Lane j sums the numbers j, j + LANES, ... of the piece in that order; then the lanes are added as one tree.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    piece = tl.program_id(1)
    lanes = piece * PIECE + tl.arange(0, LANES)
    live = rows[:, None] < M
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * N + lanes[None, :]
    total = tl.zeros((ROWS, LANES), dtype=tl.float32)
    for start in range(0, PIECE, LANES):
        x = tl.load(x_ptrs + start, mask=live & (lanes[None, :] < N - start), other=0.0)
        total += x.to(tl.float32)
    y = tl.sum(total, axis=1) / divisor
    tl.store(y_ptr + rows.to(tl.int64) * tl.num_programs(1) + piece, y.to(y_ptr.dtype.element_ty), mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def rms_norm_rows(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    M,
    N,
    stride_x,
    stride_r,
    epsilon,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x / sqrt(mean(x^2) + epsilon) * weight of each row, after x += residual where there is one.

    LANES is at least N: a row is held whole, and its squares are added as one tree. x + residual is rounded to its own
    type before it is squared and stored, as the models' code does. y and the stored sum are contiguous.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    inside = (rows[:, None] < M) & (lanes[None, :] < N)
    places = rows[:, None].to(tl.int64) * N + lanes[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_x + lanes[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        r = tl.load(residual_ptr + rows[:, None].to(tl.int64) * stride_r + lanes[None, :], mask=inside, other=0.0)
        rounded = (x + r.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + places, rounded, mask=inside)
        x = rounded.to(tl.float32)
    squares = tl.sum(x * x, axis=1)[:, None]
    y = x * (1.0 / tl.sqrt(squares / N + epsilon))
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + lanes, mask=lanes < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def sum_in_order(x_ptr, y_ptr, M, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """(COUNT, M) -> (M,), contiguous: x[0] + x[1] + ... in that order in float32, rounded once."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < M
    total = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, COUNT):
        total += tl.load(x_ptr + part * M.to(tl.int64) + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, total.to(y_ptr.dtype.element_ty), mask=inside)
