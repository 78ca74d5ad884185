"""Queries for different tokens in as few requests as possible: a request has one list of tokens for all its prompts.

Asking every prompt for the tokens of several queries costs nothing: the model computes the whole distribution anyway.
So the prompts of a pool stay in the tree's order, and a prompt with a label's beginning comes right after the prompt,
while the prefix cache still holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.llm_api.types import NextTokens, Query
from icm_vllm.prompt_tree import MAX_LABELS


@dataclass(frozen=True, slots=True)
class Together:
    """Queries of one request, or of several with the same fields. token_ids: of all of them. positions: ascending."""

    token_ids: tuple[int, ...]
    positions: list[int]


def by_tokens(queries: Sequence[Query]) -> list[Together]:
    """Group the queries, with at most MAX_LABELS tokens a group, unless a single query asks for more.

    Raises ValueError for a query that was made for an engine asked in text.
    """
    positions: dict[NextTokens, list[int]] = {}
    tokens, some = None, [0]
    for position, query in enumerate(queries):
        if query.tokens is not tokens:  # mostly they are the same object
            tokens, some = query.tokens, positions.setdefault(query.tokens, [])
        some.append(position)
    found: list[tuple[dict[int, None], list[int]]] = []
    for each, places in positions.items():
        ids = dict.fromkeys(each.ids)
        for union, joined in found:
            if len(union | ids) <= MAX_LABELS:
                union |= ids
                joined += places
                break
        else:
            found.append((ids, places))
    return [Together(tuple(union), sorted(places)) for union, places in found]
