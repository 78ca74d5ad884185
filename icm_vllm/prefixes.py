"""The length of the common prefix of two lists, by which the other modules avoid work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

STRIDE: Final = 256


def common_prefix(a: Sequence[T], b: Sequence[T]) -> int:
    """How many items two lists have in common at their start. Compares slices, which is done in C."""
    end = min(len(a), len(b))
    for start in range(0, end, STRIDE):
        stop = min(start + STRIDE, end)
        if a[start:stop] != b[start:stop]:
            while stop - start > 1:  # the first difference lies in between
                middle = (start + stop) // 2
                if a[start:middle] == b[start:middle]:
                    start = middle
                else:
                    stop = middle
            return start
    return end
