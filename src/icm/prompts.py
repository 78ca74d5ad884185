"""From claims to prompts: every claim is tokenized once, every prompt is a path of ready segments.

A question ends right before the label; a demonstration is question + label token + separator. Tokenizing segments
apart fixes the token sequence of every prompt, whatever stands around a claim; where a tokenizer would merge across
a segment's end, the sequence differs from tokenizing the whole text, and it is the sequence that the model is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from core.llm_api.types import LabelTokens, Prompt, Segment
from src.icm.consistency import Label

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class PromptBook:
    """All segments of a pool: the model's own prefix (BOS), N questions, 2 N demonstrations."""

    prefix: Segment
    questions: tuple[Segment, ...]
    demonstrations: tuple[tuple[Segment, Segment], ...]

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
        return cls(prefix, tuple(questions), tuple(demonstrations))

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

    def longest_prompt(self, size: int) -> int:
        """Tokens of the longest prompt once the first `size` claims are labelled, whichever claim of the book is
        asked; 0 for an engine asked in text. Labels are one token each, so their values do not matter."""
        sizes = [len(true) for _, true in self.demonstrations[:size]]
        total = len(self.prefix) + sum(sizes)
        own = [*sizes, *([0] * (len(self.questions) - size))]
        return max((total - left_out + len(q) for left_out, q in zip(own, self.questions, strict=True)), default=0)

    def claims_that_fit(self, max_tokens: int, size: int) -> int:
        """How many of the first `size` claims, taken in order, could label each other within `max_tokens`."""
        longest = max(map(len, self.questions), default=0)
        used = len(self.prefix) + longest
        for count, (_, true) in enumerate(self.demonstrations[:size], start=1):
            used += len(true)
            if used > max_tokens:
                return count
        return size


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
