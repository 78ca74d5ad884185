"""Labels as tokens of a model: what to ask to learn their probabilities, and how to compute these from the answers.

A label is a text of one token or several. The tokens of all labels form a trie. At each inner node the model is asked,
after the prompt and the tokens that the labels below have in common, for the tokens that may follow; log P(label) is
the sum along its path. Labels of one token each are one node, which is one query a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt

from core.errors import ConfigurationError
from core.llm_api.types import NextTokens, Prompt, Query, Segment, TokenLogprobs
from icm_vllm.prompt_tree import MAX_LABELS

OTHER_LABELS: Final = "Use other words as labels, or another model."


@dataclass(frozen=True, slots=True)
class LabelSpace:
    """K labels, 2 <= K <= MAX_LABELS; a label is an index from 0 to K - 1.

    names: as files and reports have them. texts: as they follow a question, leading space included. Raises
    ConfigurationError for labels that cannot be told apart.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.texts) or not 2 <= len(self.names) <= MAX_LABELS:
            raise ConfigurationError(
                f"{len(self.names)} names and {len(self.texts)} texts of labels.",
                hint=f"Give 2 to {MAX_LABELS} labels, each with one text.",
            )
        for kind, given in (("name", self.names), ("text", self.texts)):
            bad = next((each for each in given if not each.strip() or given.count(each) > 1), None)
            if bad is not None:
                raise ConfigurationError(
                    f"the label {kind} {bad!r} is {'there twice' if bad.strip() else 'blank'}.",
                    hint=f"Give each label a different {kind}.",
                )

    def __len__(self) -> int:
        return len(self.names)


TRUE_FALSE: Final = LabelSpace(("False", "True"), (" False", " True"))
"""A bool is its label's index."""


@dataclass(frozen=True, slots=True)
class Node:
    """One query about each prompt: `tokens`, after the prompt and `beginning` (None at the root)."""

    beginning: Segment | None
    tokens: NextTokens

    def query(self, prompt: Prompt) -> Query:
        """The question at this node after `prompt`."""
        if self.beginning is None:
            return Query(prompt, self.tokens)
        return Query(replace(prompt, segments=(*prompt.segments, self.beginning)), self.tokens)


@dataclass(frozen=True, slots=True)
class SpelledLabels:
    """A label space as a model's tokenizer spells it.

    tokens: of each label, one or several; None for an engine that is asked in text, where each label must be one token.
    texts: as `space` has them; without the leading space where that belongs to the question. end: the token after every
    label, the separator's first; it is added to a label whose tokens another label begins with.
    nodes: the trie's inner nodes, depth first, the root first. paths: of each label, the nodes from the root on and the
    position of its token among those asked there.

    At a node the last label's token is asked for first, so that True comes before False, as in existing cache keys.
    Raises ConfigurationError where two labels are the same tokens, or cannot be told apart by their end.
    """

    space: LabelSpace
    tokens: tuple[tuple[int, ...], ...] | None = None
    texts: tuple[str, ...] = ()
    end: int | None = None
    nodes: tuple[Node, ...] = field(init=False, repr=False, compare=False)
    paths: tuple[tuple[tuple[int, int], ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        texts = self.texts or self.space.texts
        object.__setattr__(self, "texts", texts)
        size = len(self.space)
        if self.tokens is None:
            nodes = [Node(None, NextTokens(texts[::-1]))]
            paths = [[(0, size - 1 - label)] for label in range(size)]
        else:
            nodes, paths = _trie(_ended(self.tokens, texts, self.end), texts)
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "paths", tuple(map(tuple, paths)))

    def __len__(self) -> int:
        """How many labels there are."""
        return len(self.space)

    @property
    def asked(self) -> NextTokens:
        """What is asked right after a prompt."""
        return self.nodes[0].tokens

    @property
    def longest_beginning(self) -> int:
        """The most tokens that are put after a prompt."""
        return max(0 if node.beginning is None else len(node.beginning) for node in self.nodes)

    def record(self) -> dict[str, int | list[int] | None]:
        """Tokens by text, for files: a number for one token, a list for several, None for an engine asked in text."""
        if self.tokens is None:
            return dict.fromkeys(self.texts[::-1])
        return {
            text: ids[0] if len(ids) == 1 else list(ids)
            for text, ids in zip(self.texts[::-1], self.tokens[::-1], strict=True)
        }

    def queries(self, prompts: Sequence[Prompt]) -> list[Query]:
        """What to ask about `prompts`: all nodes of the first, then of the second, ...; len(nodes) a prompt."""
        tokens = self.asked
        if len(self.nodes) == 1:
            return [Query(prompt, tokens) for prompt in prompts]
        return [node.query(prompt) for prompt in prompts for node in self.nodes]

    def logprobs(self, answers: Sequence[TokenLogprobs]) -> npt.NDArray[np.float64]:
        """log P(label k) after each prompt, nats, shape [num_prompts, K], from the answers to `queries`, in order."""
        count = len(self.nodes)
        found = [
            np.fromiter(chain.from_iterable([answer.values for answer in answers[at::count]]), np.float64).reshape(
                -1, len(node.tokens)
            )
            for at, node in enumerate(self.nodes)
        ]
        columns = [reduce(np.add, (found[node][:, position] for node, position in path)) for path in self.paths]
        return np.stack(columns, axis=1)


def _ended(tokens: Sequence[tuple[int, ...]], texts: Sequence[str], end: int | None) -> list[tuple[int, ...]]:
    """The labels' tokens, with `end` after those that another label begins with."""
    ended = []
    for label, ids in enumerate(tokens):
        longer = [other for other, more in enumerate(tokens) if other != label and more[: len(ids)] == ids]
        for other in longer:
            if tokens[other] == ids:
                raise ConfigurationError(
                    f"the labels {texts[label]!r} and {texts[other]!r} are the same tokens.", hint=OTHER_LABELS
                )
            if end is None or tokens[other][len(ids)] == end:
                why = "nothing follows a label" if end is None else "goes on as a demonstration does after its label"
                raise ConfigurationError(
                    f"the label {texts[other]!r} begins with the tokens of {texts[label]!r}, and {why}: where the "
                    "shorter one ends cannot be seen.",
                    hint=OTHER_LABELS,
                )
        ended.append((*ids, end) if longer and end is not None else ids)
    return ended


def _trie(ended: Sequence[tuple[int, ...]], texts: Sequence[str]) -> tuple[list[Node], list[list[tuple[int, int]]]]:
    """The nodes and paths of SpelledLabels."""
    nodes: list[Node] = []
    paths: list[list[tuple[int, int]]] = [[] for _ in ended]

    def grow(labels: Sequence[int], depth: int) -> None:
        children: dict[int, list[int]] = {}
        for label in labels:
            children.setdefault(ended[label][depth], []).append(label)
        # A token that is not a whole label has no text: engines that are asked in text are never asked for it.
        whole = ["" if depth or len(ended[below[0]]) > 1 else texts[below[0]] for below in children.values()]
        beginning = Segment("", ended[labels[0]][:depth]) if depth else None
        nodes.append(Node(beginning, NextTokens(tuple(whole), tuple(children))))
        here = len(nodes) - 1
        for position, below in enumerate(children.values()):
            for label in below:
                paths[label].append((here, position))
            if going_on := [label for label in below if len(ended[label]) > depth + 1]:
                grow(going_on, depth + 1)

    grow(range(len(ended))[::-1], 0)
    return nodes, paths
