"""What a prefix cache has to compute."""

from __future__ import annotations

from collections.abc import Iterable

from src.icm.prefix_tree import Context


def distinct_demonstrations(contexts: Iterable[Context]) -> int:
    """Demonstrations an unlimited prefix cache computes for these contexts: the edges of their trie."""
    return len({context[: end + 1] for context in contexts for end in range(len(context))})
