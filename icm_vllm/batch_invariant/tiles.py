"""Which tile computes a matrix product, and the setting that forces a single one.

An element of A @ B is a chain of additions: blocks of the inner dimension in order, within a block the steps of the
matrix unit in order. It does not depend on the height and width of a tile, so a small tile for few rows and a large one
for many give the same bits, as long as both use the same matrix instruction. On Hopper this means a height of 64 or
more: below it Triton takes the older warp-level instruction, which may round differently. This is also checked:
`icm_vllm.batch_invariant.settle_tiles` compares the tiles bit by bit on the GPU (a vLLM worker does so when it starts),
and uses a single one if they differ; ICM_BATCH_INVARIANT_TILE forces one.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Final

import torch

TILE_VARIABLE: Final = "ICM_BATCH_INVARIANT_TILE"
"""Environment variable: the tile that computes every product of 16-bit types, as ROWSxCOLUMNSxDEPTH: 64x128x128."""

FP8: Final = torch.float8_e4m3fn
"""The 8-bit floats of fp8 models."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A block of the result that one program computes, and how.

    rows, columns: its size. depth: how much of the inner dimension is read at a time. warps, stages: threads / 32, and
    blocks in flight. group: rows of tiles walked together. halves: parts in which a tile is written. persistent: as
    many programs as multiprocessors (descriptors only). slowness: time for an element of the result, relative to the
    largest tile; only used to choose a tile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8
    halves: int = 1
    persistent: bool = False
    slowness: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}"


HOPPER: Final = (
    Tile(128, 256, 64, warps=8, stages=4, halves=2, persistent=True),
    Tile(64, 256, 64, warps=4, stages=5, slowness=1.05),
    Tile(64, 128, 128, warps=4, stages=4, slowness=1.4),
    Tile(64, 64, 128, warps=4, stages=5, slowness=1.5),
    Tile(64, 32, 256, warps=4, stages=4, slowness=2.0),
)
"""16-bit types on compute capability 9, largest first. 64 rows at least: one instruction for all (see above). Chosen
among 29 by their times on an H200 for the linear layers of an 8B model and 1 to 1,024 rows: what `choose` takes is
within 3% of the fastest of these five in every case (docs/lab-log.md)."""

HOPPER_FP8: Final = (
    Tile(128, 256, 128, warps=8, stages=3, halves=2, persistent=True),
    Tile(64, 256, 128, warps=4, stages=4, slowness=1.05),
    Tile(64, 128, 128, warps=4, stages=6, slowness=1.4),
    Tile(64, 64, 256, warps=4, stages=5, slowness=1.5),
    Tile(64, 32, 256, warps=4, stages=6, slowness=2.0),
)
"""8-bit floats on compute capability 9, whose matrix instruction is 32 deep in all of them."""

OTHER: Final = (Tile(128, 128, 32, warps=8, stages=3),)
"""16-bit types on other GPUs: one tile, because several were never compared there."""

AMPERE: Final = (
    Tile(128, 128, 32, warps=4, stages=4),
    Tile(64, 128, 32, warps=4, stages=4, slowness=1.15),
    Tile(64, 64, 32, warps=4, stages=5, slowness=1.4),
    Tile(16, 64, 32, warps=4, stages=6, slowness=2.5),
)
"""16-bit types on compute capability 8, within the 99 KiB of shared memory of the smaller ones."""

FULL_PRECISION: Final = (Tile(64, 64, 32, warps=4, stages=2),)
"""float32: one tile, no matrix unit, fused multiply-adds in the order of K."""


def tiles(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The tiles that may compute products of this type on such a GPU, largest first."""
    if dtype == torch.float32:
        return FULL_PRECISION
    if dtype == FP8:
        return HOPPER_FP8
    family = {0: AMPERE, 8: AMPERE, 9: HOPPER}.get(capability[0], OTHER)
    wanted = os.environ.get(TILE_VARIABLE)
    if not wanted:
        return family
    found = tuple(tile for tile in family if tile.name == wanted)
    if not found:
        raise ValueError(f"{TILE_VARIABLE}={wanted}: this GPU has {', '.join(tile.name for tile in family)}")
    return found


def choose(family: tuple[Tile, ...], m: int, n: int, copies: int, multiprocessors: int) -> Tile:
    """The tile that should compute `copies` results of (m, n) in the least time.

    Every multiprocessor computes one tile at a time, so time is rounds * size * slowness. Tiles with more rows than the
    padded result are left out.
    """
    lowest = min(tile.rows for tile in family)
    padded = -(-m // lowest) * lowest

    def time(tile: Tile) -> float:
        count = -(-m // tile.rows) * -(-n // tile.columns) * copies
        return -(-count // multiprocessors) * tile.rows * tile.columns * tile.slowness

    return min((tile for tile in family if tile.rows <= padded), key=time)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 0, 0
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; few for the CPU, so that in the interpreter a program computes several tiles."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
