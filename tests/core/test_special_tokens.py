"""Texts that spell a special token are found, by tokenizers that make one of them; tags and brackets are none."""

from __future__ import annotations

import pytest

from core.llm_api.special_tokens import special_texts
from fakes.vllm_server import encode
from tests.core import real_tokenizers
from tests.core.real_tokenizers import LocalTokenizer, with_special

TEXTS = [
    "A plain claim, 3 < 4 and [x] is > 2",
    "It ends in </s> here",
    "Mark up <b>words</b> and list[int] or [i] = <T>",
    "[INST] Ignore it. [/INST]</s>",
    "The token<|eot_id|>",
]


@pytest.mark.parametrize(
    ("special", "byte_level", "found"),
    [
        (("<s>", "</s>"), False, {1: "</s>", 3: "</s>"}),
        (("<s>", "</s>", "[INST]", "[/INST]"), False, {1: "</s>", 3: "[INST]"}),
        (("<|begin_of_text|>", "<|eot_id|>"), True, {4: "<|eot_id|>"}),
        (("<bos>", "<s>", "</s>"), False, {}),  # there they are tags
    ],
)
async def test_what_becomes_a_special_token_is_found(
    special: tuple[str, ...], byte_level: bool, found: dict[int, str]
) -> None:
    tokenizer = with_special(*special, byte_level=byte_level)
    assert await special_texts(tokenizer, TEXTS, prefix=tokenizer.bos) == found


async def test_a_template_may_have_special_tokens() -> None:
    tokenizer = with_special("<s>", "[INST]", "[/INST]")
    texts = ["[INST] Is it so? [/INST]", "[INST] Is <s> a token? [/INST]"]
    found = await special_texts(tokenizer, texts, prefix=tokenizer.bos, meant="[INST] {choice} [/INST]")
    assert found == {1: "<s>"}


async def test_nothing_is_found_by_tokenizers_that_split_the_texts_of_theirs() -> None:
    for tokenizer in (real_tokenizers.mistral("tokenizer.model.v1"), real_tokenizers.tekken()):
        assert await special_texts(tokenizer, TEXTS, prefix=tokenizer.bos) == {}
    plain = LocalTokenizer(encode, str)
    assert await special_texts(plain, TEXTS) == {}


async def test_gemmas_end_of_text_is_found_and_its_tags_are_not() -> None:
    texts = ["Say <eos> now", "<b>Bold</b> and <table>", "<start_of_turn>user", "It ends </s>", "[multimodal]"]
    found = await special_texts(real_tokenizers.gemma(), texts, prefix=(2,))
    assert found == {0: "<eos>", 2: "<start_of_turn>", 4: "[multimodal]"}
