"""How far two lists agree, which is what the other modules save work by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

STRIDE: Final = 256


def common_prefix(a: Sequence[T], b: Sequence[T]) -> int:
    """How many items two lists share from their start on. Compares slices, which runs in C, and one slice by item."""
    end = min(len(a), len(b))
    for start in range(0, end, STRIDE):
        left, right = a[start : min(start + STRIDE, end)], b[start : min(start + STRIDE, end)]
        if left != right:
            return start + next(i for i, (x, y) in enumerate(zip(left, right, strict=True)) if x != y)
    return end
