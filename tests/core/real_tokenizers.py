"""Tokenizers as engines: small SentencePiece models that are trained here, real ones where a package brings them."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

MODELS: Final = Path(__file__).resolve().parents[2] / "models"
CLAIMS: Final = [
    f"Question: Is {thing} {what}?\nClaim: {answer}, {thing} is {what}.\nI think this claim is {label}"
    for thing in ("snow", "fire", "the sea", "a stone", "every film")
    for what in ("white", "hot", "wet", "good", "3 years old")
    for answer in ("Yes", "No")
    for label in ("True", "False")
]


@dataclass
class LocalTokenizer:
    """Texts to tokens and back, with `bos` before and `eos` after a text that is to have special tokens."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[list[int]], str]
    bos: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        return [[*self.bos, *self.encode(t), *self.eos] if special else list(self.encode(t)) for t in texts]

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        return [self.decode(list(ids)) for ids in tokens]

    def text_of(self, tokens: Sequence[int]) -> str:
        """Their text within a text: what a decoder takes off at a text's beginning stays."""
        return self.decode([*self.encode("\n"), *tokens]).removeprefix("\n")


def words_apart() -> LocalTokenizer:
    """A space is a token of its own, and so is every word and mark; no two texts share a token by chance."""
    known: list[str] = []

    def encode(text: str) -> list[int]:
        found = re.findall(r"\w+|\W", text)
        known.extend(dict.fromkeys(piece for piece in found if piece not in known))
        return [known.index(piece) for piece in found]

    return LocalTokenizer(encode, lambda ids: "".join(known[token] for token in ids), bos=(1000,))


@functools.cache
def trained(
    *, bytes_too: bool = True, dummy: bool = True, kind: str = "bpe", eos: bool = False, across_words: bool = False
) -> LocalTokenizer:
    """A SentencePiece model of a few words. bytes_too: with byte fallback; dummy: puts a space before every text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for claim in CLAIMS for line in claim.splitlines()]),
        model_writer=written,
        model_type=kind,
        vocab_size=420 if bytes_too else 160,
        byte_fallback=bytes_too,
        add_dummy_prefix=dummy,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[] if bytes_too else ["\n"],
        split_by_whitespace=not across_words,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return _sentencepiece(written.getvalue(), eos=eos)


def _sentencepiece(model: bytes, *, eos: bool = False) -> LocalTokenizer:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    return LocalTokenizer(
        processor.encode, processor.decode, (processor.bos_id(),), (processor.eos_id(),) if eos else ()
    )
