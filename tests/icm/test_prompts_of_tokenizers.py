"""Prompts as tokenizers make them: the ids spell the template's text, and the label is the token that comes next."""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.icm.prompts import SEPARATOR, PromptBook
from src.icm.testbeds import TESTBEDS
from tests.core.real_tokenizers import (
    CLAIMS,
    LocalTokenizer,
    deepseek,
    gemma,
    llama_3,
    mistral,
    qwen,
    tekken,
    trained,
    trained_bpe,
)

PUT_A_SPACE_BEFORE: dict[str, Callable[[], LocalTokenizer]] = {
    "SentencePiece BPE with bytes": trained,
    "SentencePiece BPE without bytes": lambda: trained(bytes_too=False),
    "SentencePiece unigram with bytes": lambda: trained(kind="unigram"),
    "SentencePiece unigram without bytes": lambda: trained(kind="unigram", bytes_too=False),
    "SentencePiece that ends with EOS": lambda: trained(eos=True),
    "BPE in Llama 2's manner": lambda: trained_bpe("Llama 2"),
    "Metaspace before the first word": lambda: trained_bpe("first"),
    "Metaspace before every text": lambda: trained_bpe("always"),
    "GPT-2's manner with a space": lambda: trained_bpe("GPT-2 with a space"),
    "Mistral v0.1": lambda: mistral("tokenizer.model.v1"),
    "Mistral v0.1 that ends with EOS": lambda: mistral("tokenizer.model.v1", eos=True),
    "Mistral v0.3": lambda: mistral("mistral_instruct_tokenizer_240323.model.v3"),
}
LEAVE_TEXTS_ALONE: dict[str, Callable[[], LocalTokenizer]] = {
    "SentencePiece without a space": lambda: trained(dummy=False),
    "GPT-2's manner": lambda: trained_bpe("GPT-2"),
    "Mistral Nemo": tekken,
    "Gemma 3": gemma,
    "Llama 3.2": llama_3,
    "Qwen 2.5": lambda: qwen("qwen2.5-72b-instruct"),
    "Qwen 3.5": lambda: qwen("qwen3.5-27b"),
    "DeepSeek V4": deepseek,
}
ALL = PUT_A_SPACE_BEFORE | LEAVE_TEXTS_ALONE

TEMPLATES = [testbed.template for testbed in TESTBEDS.values() if "{choice_2}" not in testbed.template]
BARE = "{choice}\nAnswer:"
TEXTS = [claim.partition(" True\n")[0] for claim in CLAIMS[::2]]
# U+2581 is how SentencePiece writes a space: in a text it cannot be told from one.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
SPACES = st.sampled_from(["", " ", "  ", "\n", "\n\n", "\t", " \n"])


def words_of(name: str) -> st.SearchStrategy[str]:
    """Texts that the tokenizer can spell, some with white space at either end."""
    known = "".join(sorted(set("".join(CLAIMS)))) if "without bytes" in name else None
    text = st.text(CHARACTERS if known is None else st.sampled_from(known), min_size=1, max_size=20)
    if known is not None:
        return text
    return st.builds("".join, st.tuples(SPACES, text, SPACES))


def opened(tokenizer: LocalTokenizer, texts: list[str]) -> PromptBook:
    return asyncio.run(PromptBook.open(tokenizer, texts))


def alike(text: str, other: str) -> bool:
    """The same but for composed characters, which Qwen's tokenizer composes."""
    return unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", other)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(data=st.data(), template=st.sampled_from([*TEMPLATES, BARE]))
def test_a_prompt_is_the_templates_text_and_the_label_comes_next(name: str, data: st.DataObject, template: str) -> None:
    tokenizer = ALL[name]()
    fields = st.lists(st.tuples(words_of(name), words_of(name)), min_size=3, max_size=3)
    texts = [template.format(question=a, choice=b) for a, b in data.draw(fields)]
    book = opened(tokenizer, texts)
    prompt = book.prompt(2, (0, 1), (True, False, None))
    text = f"{texts[0]} True\n\n{texts[1]} False\n\n{texts[2]}"
    assert prompt.text == text
    assert prompt.segments[0].tokens == tokenizer.bos
    ids = prompt.token_ids[len(tokenizer.bos) :]
    assert alike(tokenizer.text_of(ids), text)
    for label, tokens in zip(("False", "True"), book.labels.tokens or (), strict=True):
        whole = list(tokenizer.encode(f"{text} {label}{SEPARATOR}"))
        assert whole[-1 - len(book.separator) :] == [*tokens, *(book.separator.tokens or ())]
    assert book.labels.texts == (" False", " True")
    assert book.unspelled == ()


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("GPT-2")])
def test_a_prompt_has_the_tokens_of_its_whole_text(name: str) -> None:
    """GPT-2's manner makes two tokens of two newlines before a word, and one of them at the end of a demonstration."""
    tokenizer = ALL[name]()
    texts = TEXTS[::20]
    prompt = opened(tokenizer, texts).prompt(0, range(1, len(texts)), [True, False] * len(texts))
    assert [*tokenizer.bos, *tokenizer.encode(f"\n{prompt.text}")] == [
        *tokenizer.bos,
        *tokenizer.encode("\n"),
        *prompt.token_ids[len(tokenizer.bos) :],
    ]


@pytest.mark.parametrize("name", LEAVE_TEXTS_ALONE)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), template=st.sampled_from(TEMPLATES))
def test_where_pieces_alone_were_right_they_stay(name: str, data: st.DataObject, template: str) -> None:
    """Old runs go on, and cached scores stay valid."""
    tokenizer = LEAVE_TEXTS_ALONE[name]()
    fields = st.lists(st.tuples(words_of(name), words_of(name)), min_size=1, max_size=3)
    texts = [template.format(question=a, choice=b) for a, b in data.draw(fields)]
    book = opened(tokenizer, texts)
    [true], [false] = (tokenizer.encode(label) for label in (" True", " False"))
    separator = tokenizer.encode(SEPARATOR)
    for text, question, (after_false, after_true) in zip(texts, book.questions, book.demonstrations, strict=True):
        alone = tokenizer.encode(text)
        assert question.tokens == (*alone,)
        assert after_false.tokens == (*alone, false, *separator)
        assert after_true.tokens == (*alone, true, *separator)


@pytest.mark.parametrize("name", PUT_A_SPACE_BEFORE)
def test_pieces_alone_were_wrong(name: str) -> None:
    """What this is for: put together from pieces, the separator or the question would have a space of its own."""
    tokenizer = PUT_A_SPACE_BEFORE[name]()
    text = TEXTS[0]
    assert tokenizer.text_of(tokenizer.encode(text)) == f" {text}"
    assert opened(tokenizer, [text]).questions[0].tokens != (*tokenizer.encode(text),)


def test_what_a_tokenizer_cannot_spell_is_told() -> None:
    texts = TEXTS[:3]
    book = opened(trained(bytes_too=False), [*texts, TEXTS[4].replace("e", "雪")])
    assert book.unspelled == (3,)
