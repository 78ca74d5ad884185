"""How a model's tokenizer spells a demonstration, and the fingerprint that tells engines of one name apart.

A prompt is put together from pieces that are tokenized once: what comes before every text (BOS), questions, labels,
separators. A tokenizer can make other tokens of a piece by itself than within a text: SentencePiece puts a space before
whatever it is given. So every piece is cut out of the tokens of a whole demonstration (docs/algorithm.md).
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
"""The question before the labels where the caller names none."""
OTHER_ENDING: Final = "End the template with another word or mark, or use another model."
PROBES: Final = ("x", "7")
LEADS: Final = ("\n", "A")
"""Put before a text so that the tokenizer adds no space; the second for texts that the first one is joined with."""
UNLIKE: Final = ("\ue0a1", "\ue0a2")
"""Two characters in no vocabulary: a tokenizer that can spell every text makes different tokens of them."""


class Tokenizer(Protocol):
    """Turns texts into token ids; every Engine is one."""

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """See Engine.tokenize."""
        ...


class Detokenizer(Protocol):
    """Turns token ids into texts; every Engine is one."""

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """See Engine.detokenize."""
        ...


@dataclass(frozen=True, slots=True)
class Spelling:
    """The tokens of everything in a demonstration but its question, for one model and one kind of question.

    prefix: tokens before every prompt. labels: where their texts lack the leading space that was asked for, it belongs
    to the question (`ending`). separator, separator_text: between demonstrations. leads: texts that others are
    tokenized after, none where the tokenizer adds no space before a text. unknown: the token for whatever the tokenizer
    cannot spell, None where it spells every text. asked_in_text: there are no tokens.
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
        # Without a question the label begins an answer, and the chat template before it was tokenized by itself.
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

    The texts in the result lack their leading space where the tokenizer makes a separate token of it: all of them or
    none, or unlike tokens would be compared. An engine that is asked in text gets the texts as given.
    Raises ConfigurationError as Spelling.of does.
    """
    return (await Spelling.of(engine, after, space=space)).labels


async def pieces(engine: Detokenizer, tokens: Sequence[int]) -> list[str] | None:
    """The text that each token adds to those before it; None where the engine turns no tokens into text.

    "" for a token that only begins a character; the token that completes it gets the whole character.
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
    """The tokens of `text` as a whole prompt: after BOS, with no EOS at its end. For engines that take token ids."""
    probes, special = await _ids(engine, PROBES), await _ids(engine, PROBES, special=True)
    [tokens] = await _ids(engine, [text])
    return [*_before_texts(special, probes), *tokens]


async def _ids(engine: Tokenizer, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """Token ids of each text. An empty text has none and is not sent: a server may refuse it."""
    tokens = await engine.tokenize([text for text in texts if text], special=special)
    assert tokens is not None, "this engine took token ids before"
    found = iter(tokens)
    return [next(found) if text else [] for text in texts]


def _before_texts(special: Sequence[list[int]], plain: Sequence[list[int]]) -> tuple[int, ...]:
    """The tokens that the tokenizer puts before every text (BOS), without those after it (EOS).

    special, plain: the tokens of the same texts, with and without what the tokenizer adds.
    """
    for start in range(len(special[0]) - len(plain[0]) + 1):
        before, after = special[0][:start], special[0][start + len(plain[0]) :]
        if all(whole == before + text + after for whole, text in zip(special, plain, strict=True)):
            return tuple(before)
    raise ConfigurationError(
        f"the tokenizer's own tokens (BOS, EOS) cannot be told apart from a text's: {PROBES[0]!r} is {plain[0]} "
        f"without them and {special[0]} with them.",
        hint="Use another model.",
    )


def _labels_after(
    space: LabelSpace, befores: Mapping[str, list[int]], with_label: Sequence[list[int]]
) -> tuple[str, tuple[tuple[int, ...], ...]] | None:
    """The ending of the question after which the labels have the fewest tokens, and each label's tokens after it.

    befores: tokens of the question, by its ending. None where every ending is joined with some label.
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
