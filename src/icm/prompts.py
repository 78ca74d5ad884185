"""From claims to prompts: every claim is tokenized once, every prompt is a path of ready segments.

A question ends right before the label; a demonstration is question + label + separator. A question's tokens are
cut out of those of its whole demonstration (core/llm_api/tokens.py) and do not depend on what comes before: where a
tokenizer would join a separator with the next question, the prompt keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from core.llm_api.labels import TRUE_FALSE, LabelSpace, SpelledLabels
from core.llm_api.tokens import Spelling, Tokenizer
from core.llm_api.types import Prompt, Segment
from src.icm.consistency import Label

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptBook:
    """All segments of a pool: the model's prefix (BOS), N questions, K demonstrations of each.

    demonstrations: shape [N, K], by claim and label. labels: as the model spells them. unspelled: positions of texts
    with something in them that the tokenizer has no token for.
    """

    prefix: Segment
    questions: tuple[Segment, ...]
    demonstrations: tuple[tuple[Segment, ...], ...]
    labels: SpelledLabels
    separator: Segment
    unspelled: tuple[int, ...] = ()

    @classmethod
    async def open(
        cls,
        api: Tokenizer,
        texts: Sequence[str],
        spelling: Spelling | None = None,
        *,
        space: LabelSpace = TRUE_FALSE,
        separator: str = SEPARATOR,
    ) -> PromptBook:
        """The book of N question texts, tokenized for the model behind `api`.

        spelling: how that model spells demonstrations, where it is known already; `space` and `separator` are then not
        used. Raises ConfigurationError where the tokenizer cannot spell a demonstration.
        """
        spelling = spelling or await Spelling.of(api, *texts[:1], space=space, separator=separator)
        tokens = await spelling.questions(api, texts)
        book = cls.build(
            [text + spelling.ending for text in texts],
            spelling.labels,
            tokens=tokens,
            prefix_tokens=spelling.prefix,
            separator_tokens=spelling.separator,
            separator=spelling.separator_text,
        )
        return replace(book, unspelled=tuple(at for at, ids in enumerate(tokens or ()) if spelling.unknown in ids))

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        labels: SpelledLabels,
        *,
        tokens: Sequence[Sequence[int]] | None = None,
        prefix_tokens: Sequence[int] = (),
        separator_tokens: Sequence[int] = (),
        separator: str = SEPARATOR,
    ) -> PromptBook:
        """Segments of N question texts. `tokens`: token ids of each text, None for an engine asked in text."""
        prefix = Segment("", None if tokens is None else prefix_tokens)
        after = Segment(separator, None if tokens is None else separator_tokens)
        ids: Sequence[Sequence[int] | None] = [None] * len(texts) if tokens is None else tokens
        questions = tuple(map(Segment, texts, ids))
        demonstrations = tuple(_demonstrations(*each, labels, after) for each in zip(texts, ids, strict=True))
        return cls(prefix, questions, demonstrations, labels, after)

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
        """Tokens of the longest query about any claim of the book, after the first `size` claims with any labels; 0 for
        an engine asked in text.

        cap: the most demonstrations in a prompt, None for all.
        """
        sizes = self._sizes(size)
        shown = size if cap is None else min(cap, size)
        longest = sorted(range(size), key=lambda claim: -sizes[claim])
        total = sum(sizes[claim] for claim in longest[:shown])
        # A claim does not see its own demonstration but, where there is one more, the next one.
        after = sizes[longest[shown]] if shown < size else 0
        missing = dict.fromkeys(longest[:shown])
        lengths = (
            total - (sizes[claim] - after if claim in missing else 0) + len(question)
            for claim, question in enumerate(self.questions)
        )
        return len(self.prefix) + max(lengths, default=0) + self.labels.longest_beginning

    def claims_that_fit(self, max_tokens: int, size: int) -> int:
        """How many of the first `size` claims, taken in order, could label each other within `max_tokens`."""
        return self._that_fit(max_tokens, self._sizes(size))

    def cap_that_fits(self, max_tokens: int, size: int) -> int:
        """How many demonstrations of the first `size` claims, even the longest, fit before a question."""
        sizes = sorted(self._sizes(size), reverse=True)
        return self._that_fit(max_tokens, sizes) - 1

    def _sizes(self, size: int) -> list[int]:
        """Tokens of a demonstration of each of the first `size` claims, with its longest label."""
        return [max(map(len, by_label)) for by_label in self.demonstrations[:size]]

    def _that_fit(self, max_tokens: int, sizes: Sequence[int]) -> int:
        """1 more than the demonstrations of these sizes that fit before the longest question, or all."""
        used = len(self.prefix) + max(map(len, self.questions), default=0) + self.labels.longest_beginning
        for count, size in enumerate(sizes, start=1):
            used += size
            if used > max_tokens:
                return count
        return len(sizes)


def in_shared_order(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts sorted by their content, so that those with a common prefix are neighbours.

    That is a depth-first walk of their trie: an engine that takes prompts in order computes every shared prefix once,
    even where its KV cache holds little more than one prompt.
    """
    return sorted(prompts, key=lambda prompt: prompt.content)


def _demonstrations(
    text: str, ids: Sequence[int] | None, labels: SpelledLabels, separator: Segment
) -> tuple[Segment, ...]:
    """The question with each label, shape [K]."""
    if ids is None:
        return tuple(Segment(text + label + separator.text) for label in labels.texts)
    if labels.tokens is None:
        raise ValueError("token ids need label token ids")
    return tuple(
        Segment(text + label + separator.text, (*ids, *tokens, *(separator.tokens or ())))
        for label, tokens in zip(labels.texts, labels.tokens, strict=True)
    )
