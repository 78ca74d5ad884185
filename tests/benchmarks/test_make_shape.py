"""Folders of shapes: their tokenizer takes one token a made-up word and knows the built-in claims."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.make_shape import LABELS, SHAPES, make_shape, word
from src.pipeline.datafiles import load_testbed

tokenizers = pytest.importorskip("tokenizers")


def test_the_tokenizer_reads_made_up_words_labels_and_the_built_in_claims(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(make_shape("tiny", tmp_path) / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= SHAPES["tiny"]["vocab_size"]
    assert len(tokenizer.encode("".join(map(word, range(40))), add_special_tokens=False).ids) == 40
    assert all(len(tokenizer.encode(label, add_special_tokens=False).ids) == 1 for label in LABELS)
    _, claims, _ = load_testbed("builtin", tmp_path)
    unknown = tokenizer.token_to_id("<unk>")
    ids = [tokenizer.encode(claim.text).ids for claim in claims]
    assert not [claim.text for claim, tokens in zip(claims, ids, strict=True) if unknown in tokens]
    assert len({tuple(tokens) for tokens in ids}) == len(claims)


def test_a_shape_may_have_fewer_layers(tmp_path: Path) -> None:
    whole = json.loads((make_shape("405B-fp8", tmp_path / "whole") / "config.json").read_text())
    half = json.loads((make_shape("405B-fp8", tmp_path / "half", layers=63) / "config.json").read_text())
    assert {name for name in whole if whole[name] != half[name]} == {"num_hidden_layers"}
    assert half["num_hidden_layers"] == 63
