"""How a model's tokenizer spells a demonstration, and what sets engines of one name apart.

A prompt is put together from pieces that are tokenized once: what stands before every text (BOS), questions,
labels, separators. A tokenizer can make other tokens of a piece alone than of the same piece within a text: those in
SentencePiece's manner put a space before whatever they are given. So every piece is cut out of the tokens of a whole
demonstration. docs/algorithm.md says what is found, and how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import orjson

from core.errors import APIError, ConfigurationError
from core.llm_api.labels import OTHER_LABELS, TRUE_FALSE, LabelSpace, SpelledLabels

CANARY_TEXT: Final = "The capital of France is"
"""Asked of every engine at start. Shorter than a block of 16 tokens, so that no prefix cache can answer it."""

QUESTION: Final = "Question: Is fire hot?\nI think this claim is"
"""What labels are put after where nobody says which questions will be asked."""
OTHER_ENDING: Final = "End the template with another word or mark, or use another model."
PROBES: Final = ("x", "7")
LEADS: Final = ("\n", "A")
"""What a text is put after, so that no space is put before it; the second for texts that the first one joins."""
UNLIKE: Final = ("\ue0a1", "\ue0a2")
"""Two characters that no vocabulary holds: a tokenizer that can spell every text makes different tokens of them."""


class Tokenizer(Protocol):
    """Whatever turns texts into token ids; every Engine does."""

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """See Engine.tokenize."""
        ...


class Detokenizer(Protocol):
    """Whatever turns token ids into texts; every Engine does."""

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """See Engine.detokenize."""
        ...


@dataclass(frozen=True, slots=True)
class Spelling:
    """The tokens of everything in a demonstration but its question, for one model and one kind of question.

    prefix: what stands before every prompt. labels: where their texts lack the leading space that was asked for, it
    belongs to the question (`ending`). separator, separator_text: between demonstrations. leads: what texts are
    tokenized after, none where the tokenizer puts no space of its own before a text. unknown: the token that stands for
    whatever the tokenizer cannot spell, None where it spells every text. asked_in_text: there are no tokens at all.
    """

    labels: SpelledLabels
    prefix: tuple[int, ...] = ()
    separator: tuple[int, ...] = ()
    separator_text: str = ""
    ending: str = ""
    leads: tuple[str, ...] = ()
    unknown: int | None = None

    @property
    def asked_in_text(self) -> bool:
        return self.labels.tokens is None

    @classmethod
    async def of(
        cls, engine: Tokenizer, question: str = QUESTION, *, space: LabelSpace = TRUE_FALSE, separator: str = ""
    ) -> Self:
        """How `engine` spells question + label + separator. An engine that is asked in text gets the texts as given.

        Raises ConfigurationError where two labels cannot be told apart (SpelledLabels), where a label is joined with
        the question or the separator, and where the separator is lost.
        """
        plain = await engine.tokenize([*PROBES, LEADS[0], LEADS[0] + PROBES[0], *UNLIKE, " "])
        special = await engine.tokenize(PROBES, special=True)
        if plain is None or special is None:
            return cls(SpelledLabels(space), separator_text=separator)
        *probes, lead, after_lead, one, other, blank = plain
        leads = () if after_lead == lead + probes[0] else LEADS
        # A label after nothing begins an answer, before which a chat template's text was tokenized by itself.
        first = leads[0] if leads and question else ""
        parts = ["", " ", *space.texts, *(text + separator for text in space.texts)]
        asked, spaced, *labelled = await _ids(engine, [first + question + part for part in parts])
        with_label, wholes = labelled[: len(space)], labelled[len(space) :]
        ending, tokens = _labels_after(space, {"": asked, " ": spaced}, with_label) or (None, ())
        if ending is None:
            raise _no_labels(question, space, asked, with_label)
        rest = wholes[-1][len(with_label[-1]) :]
        if any(whole != before + rest for whole, before in zip(wholes, with_label, strict=True)):
            raise ConfigurationError(
                f"the tokenizer makes one token of a label's end and the separator {separator!r}.", hint=OTHER_ENDING
            )
        if separator and not rest:
            raise ConfigurationError(
                f"the tokenizer drops the separator {separator!r}: demonstrations would run into each other.",
                hint="Use another model.",
            )
        texts = tuple(text[len(ending) :] for text in space.texts)
        return cls(
            SpelledLabels(space, tokens, texts, end=rest[0] if rest else None),
            prefix=_before_texts(special, probes),
            separator=tuple(rest),
            separator_text=separator,
            ending=ending,
            leads=leads,
            unknown=one[-1] if one and one == other != blank else None,
        )

    async def questions(self, engine: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]] | None:
        """The tokens of each text and `ending` as they stand in a demonstration; None: asked in text.

        Raises ConfigurationError for a text that the tokenizer joins with its label.
        """
        if self.labels.tokens is None:
            return None
        closing = self.labels.space.texts[-1] + self.separator_text
        after = [*self.labels.tokens[-1], *self.separator]
        found: dict[int, tuple[int, ...]] = {}
        for lead in self.leads or ("",):
            missing = [position for position in range(len(texts)) if position not in found]
            if not missing:
                break
            demonstrations = [lead + texts[position] + closing for position in missing]
            before, *wholes = await _ids(engine, [lead, *demonstrations])
            for position, whole in zip(missing, wholes, strict=True):
                start, end = len(before), len(whole) - len(after)
                if start <= end and whole[:start] == before and whole[end:] == after:
                    found[position] = tuple(whole[start:end])
        for position, text in enumerate(texts):
            if position not in found:
                raise ConfigurationError(
                    f"the tokenizer does not keep the claim that begins {text[:40]!r} and ends {text[-40:]!r} apart "
                    f"from what stands around it: the label {self.labels.texts[-1]!r} would be another token there.",
                    hint=OTHER_ENDING,
                )
        return [found[position] for position in range(len(texts))]


async def spell_labels(engine: Tokenizer, space: LabelSpace = TRUE_FALSE, *, after: str = QUESTION) -> SpelledLabels:
    """The labels in tokens of the served model, as they follow the text `after`; nothing follows them.

    The texts in the result lack their leading space where the tokenizer makes a token of its own of it: of all of them
    or of none, for else unlike things would be compared. An engine that is asked in text gets the texts as given.
    Raises ConfigurationError as Spelling.of does.
    """
    return (await Spelling.of(engine, after, space=space)).labels


async def pieces(engine: Detokenizer, tokens: Sequence[int]) -> list[str] | None:
    """What each token adds to the text of those before it; None where the engine turns no tokens into text.

    "" for a token that only begins a character, whose end then has all of it.
    """
    texts = await engine.detokenize([tokens[: end + 1] for end in range(len(tokens))])
    if texts is None:
        return None
    shown, known = [], ""
    for text in texts:
        whole = text.rstrip("\ufffd")
        shown.append(whole[len(known) :] if whole.startswith(known) else whole)
        known = whole
    return shown


def fingerprint(tokens: Sequence[int], top: Mapping[str, float]) -> str:
    """SHA-256 of how an engine continued the canary: its token ids and the top log-probabilities to 1e-4 nat.

    Other weights, another precision or another kernel change it; a restart of the same server does not.
    """
    answer = sorted((token, f"{logprob:.4f}") for token, logprob in top.items())
    return hashlib.sha256(orjson.dumps([list(tokens), answer])).hexdigest()


async def prompt_ids(engine: Tokenizer, text: str) -> list[int]:
    """The tokens of `text` as a whole prompt: after BOS, with no EOS at its end. For engines that speak token ids."""
    probes, special = await _ids(engine, PROBES), await _ids(engine, PROBES, special=True)
    [tokens] = await _ids(engine, [text])
    return [*_before_texts(special, probes), *tokens]


async def _ids(engine: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Of no text there are no tokens, and a server may refuse the question."""
    tokens = await engine.tokenize([text for text in texts if text], special=special)
    assert tokens is not None, "an engine speaks token ids, or it does not"
    found = iter(tokens)
    return [next(found) if text else [] for text in texts]


def _before_texts(special: Sequence[list[int]], plain: Sequence[list[int]]) -> tuple[int, ...]:
    """What the tokenizer puts before every text, without what it puts after them (EOS).

    special, plain: the same different texts, with the tokenizer's own tokens and without them.
    """
    for start in range(len(special[0]) - len(plain[0]) + 1):
        before, after = special[0][:start], special[0][start + len(plain[0]) :]
        if all(with_own == before + text + after for with_own, text in zip(special, plain, strict=True)):
            return tuple(before)
    raise ConfigurationError(
        f"the tokenizer's own tokens (BOS, EOS) cannot be told apart from a text's: {PROBES[0]!r} is {plain[0]} "
        f"without them and {special[0]} with them.",
        hint="Use another model.",
    )


def _labels_after(
    space: LabelSpace, befores: Mapping[str, list[int]], with_label: Sequence[list[int]]
) -> tuple[str, tuple[tuple[int, ...], ...]] | None:
    """Where a label begins that is as few tokens as can be: what ends the question, and each label's tokens after it.

    befores: tokens of the question, by its ending. None where no ending keeps all labels apart from the question.
    """
    found = []
    for ending, before in befores.items():
        begun = len(before)
        apart = all(ids[:begun] == before and len(ids) > begun for ids in with_label)
        if apart and all(text.startswith(ending) for text in space.texts):
            found.append((ending, tuple(tuple(ids[begun:]) for ids in with_label)))
    return min(found, key=lambda each: sum(map(len, each[1])), default=None)


def _no_labels(question: str, space: LabelSpace, asked: list[int], with_label: Sequence[list[int]]) -> APIError:
    joined = [
        text for text, ids in zip(space.texts, with_label, strict=True) if ids[: len(asked)] != asked or ids == asked
    ]
    return ConfigurationError(
        f"the labels must be tokens of their own: the tokenizer joins {' and '.join(map(repr, joined))} with the "
        f"question's end {question[-20:]!r}.",
        hint=OTHER_LABELS,
    )
