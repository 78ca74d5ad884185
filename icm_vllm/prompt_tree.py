"""A pool of prompts as a tree of shared segments: O(N) bytes instead of the O(N^2) of N whole prompts.

N leave-one-out prompts repeat the same N demonstrations; as lists of token ids they are 18 MB of JSON at N = 256, and a
server spends longer on reading them than on computing new tokens. Here every segment is sent once, and a prompt is a
path: node i continues node parents[i] (-1: the start) with segments[pieces[i]]; each prompt ends at a node. The client
makes the tree (core/llm_api/http/pool_tree.py), the server reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeGuard

PATH: Final = "/v1/label_logprobs"
"""Where a server with our extension takes a PromptTree. Under /v1, so that vLLM's --api-key guards it."""

ADAPTER_PATH: Final = f"{PATH}/adapter"
"""Where it takes one for a LoRA adapter, which the request names: a path of its own, because a server of an earlier
version does not read that name, and would answer for its base model."""

FORMAT: Final = 1
"""Raise when the request or the answer changes; a client only uses an extension of the same format.

The first servers took exactly two labels; newer ones state their maximum (`max_labels`). So all clients and servers of
this format can exchange two labels.
"""

MAX_LABELS: Final = 20
"""The most different tokens that a request may ask for: vLLM's default --max-logprobs."""

MAX_PROMPTS_PER_REQUEST: Final = 1024
"""vLLM's limit for the prompts of one /v1/completions request; it also applies to a tree."""


@dataclass(frozen=True, slots=True)
class PromptTree:
    """segments: token ids, each once. parents, pieces: one a node, see the module. ends: each prompt's last node."""

    segments: list[list[int]]
    parents: list[int]
    pieces: list[int]
    ends: list[int]

    @classmethod
    def read(cls, fields: object) -> PromptTree:
        """Check a tree from decoded JSON. Raises ValueError that says what is wrong with it."""
        if not isinstance(fields, dict):
            raise ValueError("tree must be an object")
        segments, parents, pieces, ends = (fields.get(name) for name in ("segments", "parents", "pieces", "ends"))
        if not isinstance(segments, list) or not all(map(_is_ids, segments)):
            raise ValueError("segments must be lists of token ids")
        if not (_is_ints(parents) and _is_ints(pieces) and _is_ints(ends)):
            raise ValueError("parents, pieces and ends must be lists of integers")
        if len(parents) != len(pieces) or not all(-1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError("every node needs a piece and a parent before it")
        if not all(0 <= piece < len(segments) for piece in pieces):
            raise ValueError("a piece names no segment")
        if not ends or not all(0 <= end < len(parents) for end in ends):
            raise ValueError("an end names no node")
        if len(ends) > MAX_PROMPTS_PER_REQUEST:
            raise ValueError(f"{len(ends)} prompts, and a request may hold {MAX_PROMPTS_PER_REQUEST}")
        return cls(segments, parents, pieces, ends)

    def lengths(self) -> list[int]:
        """Tokens of each prompt, without making it."""
        until = self._until()
        return [until[end] for end in self.ends]

    def prompts(self) -> Iterator[tuple[list[int], int]]:
        """Token ids of each prompt, and how many of them, from the first on, it shares with the prompt before it.

        Prompts hold the same int objects as their segments, so what they share is in memory once.
        """
        until, depth = self._until(), [0] * len(self.parents)
        for node, parent in enumerate(self.parents):
            depth[node] = depth[parent] + 1 if parent >= 0 else 0
        path: list[int] = []  # nodes of the prompt before
        ids: list[int] = []
        for end in self.ends:
            new, node = [], end
            while node >= 0 and not (depth[node] < len(path) and path[depth[node]] == node):
                new.append(node)
                node = self.parents[node]
            shared = until[node] if node >= 0 else 0
            path = path[: depth[node] + 1 if node >= 0 else 0] + new[::-1]
            ids = ids[:shared]
            for node in reversed(new):
                ids += self.segments[self.pieces[node]]
            yield ids, shared

    def _until(self) -> list[int]:
        """Tokens from the start to the end of each node."""
        until: list[int] = []
        for parent, piece in zip(self.parents, self.pieces, strict=True):
            until.append((until[parent] if parent >= 0 else 0) + len(self.segments[piece]))
        return until


def read_request(body: bytes) -> tuple[PromptTree, list[int], str | None]:
    """The tree of a request, the ids of the tokens that it asks for after every prompt (`labels`), and the name of the
    LoRA adapter that it is for (`adapter`; None: the base model).

    Raises ValueError that says what is wrong with it.
    """
    try:
        fields = json.loads(body)
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    labels = fields.get("labels") if isinstance(fields, dict) else None
    if not _is_ids(labels) or len(labels) > MAX_LABELS or len({*labels}) < len(labels):
        raise ValueError(f"labels must be 1 to {MAX_LABELS} different token ids")
    adapter = fields.get("adapter")
    if adapter is not None and not (isinstance(adapter, str) and adapter):
        raise ValueError("adapter must be the name of a LoRA adapter")
    return PromptTree.read(fields.get("tree")), labels, adapter


def _is_ints(value: object) -> TypeGuard[list[int]]:
    # type(), because True is an int to isinstance.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_ids(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(item) is int and item >= 0 for item in value)
