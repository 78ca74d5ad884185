"""A pool of prompts as the tree of segments that is sent to a server or an engine (icm_vllm/prompt_tree.py)."""

from __future__ import annotations

from collections.abc import Sequence

from core.llm_api.types import Prompt, Segment, common
from icm_vllm.prompt_tree import PromptTree


def tree_of(prompts: Sequence[Prompt]) -> PromptTree:
    """The tree of `prompts`, in their order. Raises ValueError for one without token ids."""
    numbers: dict[int, int] = {}  # of segments, by identity: the prompts of a pool share their segments
    segments: list[list[int]] = []
    children: dict[tuple[int, int], int] = {}
    parents: list[int] = []
    pieces: list[int] = []
    ends: list[int] = []
    before: Sequence[Segment] = ()
    path: list[int] = []  # the node that stands for each segment of the prompt before, and what came before it
    for prompt in prompts:
        depth = common(before, prompt.segments)  # pools come depth first: most of a path is the last one's
        before = prompt.segments
        del path[depth:]
        node = path[-1] if path else -1
        for segment in before[depth:]:
            if segment.tokens:
                piece = numbers.get(id(segment))
                if piece is None:
                    piece = numbers[id(segment)] = len(segments)
                    segments.append(list(segment.tokens))
                edge = (node, piece)
                child = children.get(edge)
                if child is None:
                    child = children[edge] = len(parents)
                    parents.append(node)
                    pieces.append(piece)
                node = child
            path.append(node)
        if node == -1:
            raise ValueError(f"prompt {prompt.name!r} has no token ids")
        ends.append(node)
    return PromptTree(segments, parents, pieces, ends)
