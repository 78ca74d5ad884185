"""From claims to prompts: every claim is tokenized once, every prompt is a path of ready segments.

A question ends right before the label; a demonstration is question + label token + separator. A question's tokens are
cut out of those of its whole demonstration (core/llm_api/tokens.py), and stay the same whatever stands before it; where
a tokenizer would join a separator with the question after it, the prompt has the two apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from core.llm_api.tokens import QUESTION, Spelling, Tokenizer
from core.llm_api.types import LabelTokens, Prompt, Segment
from src.icm.consistency import Label

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptBook:
    """All segments of a pool: the model's own prefix (BOS), N questions, 2 N demonstrations.

    labels: as the model spells them. unspelled: texts with something that the tokenizer has no token for.
    """

    prefix: Segment
    questions: tuple[Segment, ...]
    demonstrations: tuple[tuple[Segment, Segment], ...]
    labels: LabelTokens
    separator: Segment
    unspelled: tuple[int, ...] = ()

    @classmethod
    async def spelling(cls, api: Tokenizer, question: str = QUESTION) -> Spelling:
        """How the model behind `api` spells demonstrations of questions like this one. Raises ConfigurationError."""
        return await Spelling.of(api, question, separator=SEPARATOR)

    @classmethod
    async def open(cls, api: Tokenizer, texts: Sequence[str], spelling: Spelling | None = None) -> PromptBook:
        """The book of N question texts for the model behind `api`, with as many requests for tokens and a few more.

        spelling: where it is known already. Raises ConfigurationError where the tokenizer cannot spell a demonstration.
        """
        spelling = spelling or await cls.spelling(api, *texts[:1])
        tokens = await spelling.questions(api, texts)
        book = cls.build(
            [text + spelling.ending for text in texts],
            spelling.labels,
            tokens=tokens,
            prefix_tokens=spelling.prefix,
            separator_tokens=spelling.separator,
        )
        return replace(book, unspelled=tuple(at for at, ids in enumerate(tokens or ()) if spelling.unknown in ids))

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        labels: LabelTokens,
        *,
        tokens: Sequence[Sequence[int]] | None = None,
        prefix_tokens: Sequence[int] = (),
        separator_tokens: Sequence[int] = (),
    ) -> PromptBook:
        """Segments of N question texts. `tokens`: token ids of each text, None for an engine asked in text."""
        questions = []
        demonstrations = []
        for position, text in enumerate(texts):
            ids = None if tokens is None else tokens[position]
            questions.append(Segment(text, ids))
            demonstrations.append(
                (
                    _demonstration(text, labels.false, ids, labels.false_id, separator_tokens),
                    _demonstration(text, labels.true, ids, labels.true_id, separator_tokens),
                )
            )
        prefix = Segment("", None if tokens is None else prefix_tokens)
        separator = Segment(SEPARATOR, None if tokens is None else separator_tokens)
        return cls(prefix, tuple(questions), tuple(demonstrations), labels, separator)

    def prompt(self, claim: int, context: Sequence[int], labels: Sequence[Label], place: float = 0.0) -> Prompt:
        """The question about `claim` after the demonstrations `context`, each with its label in `labels`.

        place: see Prompt.place.
        """
        demonstrations = self.demonstrations
        shown = [demonstrations[other][label] for other in context if (label := labels[other]) is not None]
        if len(shown) < len(context):
            unlabelled = next(other for other in context if labels[other] is None)
            raise ValueError(f"claim {unlabelled} has no label to demonstrate")
        return Prompt((self.prefix, *shown, self.questions[claim]), name=f"claim {claim}", place=place)

    def longest_prompt(self, size: int, cap: int | None = None) -> int:
        """Tokens of the longest prompt once the first `size` claims are labelled, whichever claim of the book is
        asked; 0 for an engine asked in text. Labels are one token each, so their values do not matter.

        cap: demonstrations at most in a prompt, whichever they are; None: all.
        """
        sizes = [len(true) for _, true in self.demonstrations[:size]]
        shown = size if cap is None else min(cap, size)
        longest = sorted(range(size), key=lambda claim: -sizes[claim])
        total = sum(sizes[claim] for claim in longest[:shown])
        # Without its own demonstration a claim sees the next one in its place, where there is one more.
        after = sizes[longest[shown]] if shown < size else 0
        missing = dict.fromkeys(longest[:shown])
        lengths = (
            total - (sizes[claim] - after if claim in missing else 0) + len(question)
            for claim, question in enumerate(self.questions)
        )
        return len(self.prefix) + max(lengths, default=0)

    def claims_that_fit(self, max_tokens: int, size: int) -> int:
        """How many of the first `size` claims, taken in order, could label each other within `max_tokens`."""
        return self._that_fit(max_tokens, [len(true) for _, true in self.demonstrations[:size]])

    def cap_that_fits(self, max_tokens: int, size: int) -> int:
        """How many demonstrations fit into `max_tokens` before any question, whichever of the first `size` they are."""
        sizes = sorted((len(true) for _, true in self.demonstrations[:size]), reverse=True)
        return self._that_fit(max_tokens, sizes) - 1

    def _that_fit(self, max_tokens: int, sizes: Sequence[int]) -> int:
        """1 more than the demonstrations of these sizes that fit before the longest question, or all."""
        used = len(self.prefix) + max(map(len, self.questions), default=0)
        for count, size in enumerate(sizes, start=1):
            used += size
            if used > max_tokens:
                return count
        return len(sizes)


def in_shared_order(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts in the order of what is sent, so that those with a common prefix stand together, however they came about.

    That is a depth-first walk of their trie: an engine that takes prompts in order computes every shared prefix once
    while it is at hand, also where its KV cache holds little more than one prompt, and labelings that differ in their
    last demonstration are asked question by question.
    """
    return sorted(prompts, key=lambda prompt: prompt.content)


def _demonstration(
    text: str, label: str, ids: Sequence[int] | None, label_id: int | None, separator: Sequence[int]
) -> Segment:
    if ids is None:
        return Segment(text + label + SEPARATOR)
    if label_id is None:
        raise ValueError("token ids need label token ids")
    return Segment(text + label + SEPARATOR, (*ids, label_id, *separator))
