"""How a tokenizer spells a demonstration: labels, BOS, separator, and every question as it stands in the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from core.errors import ConfigurationError
from core.llm_api.labels import LabelSpace
from core.llm_api.tokens import Spelling, fingerprint, pieces, prompt_ids, spell_labels
from core.llm_api.types import Prompt, Segment
from tests.core.real_tokenizers import LocalTokenizer, trained, words_apart
from tests.core.two_labels import IN_TEXT, two

QUESTION = "Question: Is snow white?\nClaim: Yes, snow is white.\nI think this claim is"
SEPARATOR = "\n\n"
ANSWERS = LabelSpace(("False", "True"), ("False", "True"))
"""As an answer begins with them."""


class Textual:
    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        return None

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        return None


def by_character(joined: dict[str, int], eos: tuple[int, ...] = ()) -> LocalTokenizer:
    """Every character is a token, but for the texts that are joined to one wherever they stand."""

    def encode(text: str) -> list[int]:
        ids = []
        while text:
            piece = next((piece for piece in joined if text.startswith(piece)), text[0])
            ids.append(joined.get(piece, ord(piece[0])))
            text = text[len(piece) :]
        return ids

    texts = {token: piece for piece, token in joined.items()}
    return LocalTokenizer(encode, lambda ids: "".join(texts.get(i, chr(i % 0x110000)) for i in ids), (900_001,), eos)


async def test_sentencepiece_labels_are_those_of_the_whole() -> None:
    engine = trained()
    label, other, *_ = engine.encode(" True")
    assert (engine.decode([label, label]), engine.encode("True")) == (" ", [other])  # what a label alone looks like
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    assert spelling.labels.tokens == ((engine.encode("False")[0],), (other,))
    assert spelling.labels.texts == (" False", " True")
    assert spelling.ending == ""
    assert engine.encode(QUESTION + " True" + SEPARATOR)[-3:] == [other, *spelling.separator]
    assert engine.text_of(spelling.separator) == SEPARATOR  # alone it is a space and two newlines
    assert len(engine.encode(SEPARATOR)) == 3


async def test_sentencepiece_questions_get_no_space_of_their_own() -> None:
    engine = trained()
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    [question, strange] = await spelling.questions(engine, [QUESTION, f"\n {QUESTION}"]) or []
    assert engine.text_of(question) == QUESTION
    assert engine.text_of(strange) == f"\n {QUESTION}"
    assert engine.text_of(engine.encode(QUESTION)) == f" {QUESTION}"


async def test_a_tokenizer_that_ends_texts_with_eos_leaves_none_in_the_prefix() -> None:
    engine = trained(eos=True)
    assert (await engine.tokenize(["x"], special=True))[0][-1:] == [*engine.eos]
    assert (await Spelling.of(engine, QUESTION)).prefix == engine.bos


@pytest.mark.parametrize(("bos", "eos"), [((), ()), ((), (2,)), ((1,), ()), ((1, 5), (2, 2)), ((120,), (120,))])
async def test_what_stands_before_texts(bos: tuple[int, ...], eos: tuple[int, ...]) -> None:
    engine = by_character({" True": 900_002, " False": 900_003})
    engine.bos, engine.eos = bos, eos  # 120 is "x", which is asked for
    assert (await Spelling.of(engine)).prefix == bos


async def test_a_prompt_has_bos_and_no_eos() -> None:
    engine = trained(eos=True)
    assert await prompt_ids(engine, QUESTION) == [*engine.bos, *engine.encode(QUESTION)]


async def test_no_empty_text_is_asked_about() -> None:
    """A server that tokenizes by completing refuses an empty prompt."""
    asked: list[str] = []

    class Listening(LocalTokenizer):
        async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
            asked.extend(texts)
            return await super().tokenize(texts, special=special)

    engine = Listening(
        by_character({"True": 900_004, "False": 900_005, " True": 900_002, " False": 900_003}).encode, str
    )
    await spell_labels(engine, ANSWERS, after="")
    await (await Spelling.of(engine, QUESTION)).questions(engine, [QUESTION])
    assert asked
    assert "" not in asked


async def test_special_tokens_that_change_the_text_are_refused() -> None:
    class Changing(LocalTokenizer):
        async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
            return await super().tokenize([text.upper() if special else text for text in texts])

    engine = Changing(by_character({" True": 900_002, " False": 900_003}).encode, lambda ids: "")
    with pytest.raises(ConfigurationError, match="cannot be told apart from a text's"):
        await Spelling.of(engine)


async def test_a_space_that_is_a_token_of_its_own_belongs_to_the_question() -> None:
    engine = words_apart()
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    assert spelling.labels.texts == ("False", "True")
    assert spelling.labels.tokens == tuple(tuple(engine.encode(label)) for label in ("False", "True"))
    assert spelling.ending == " "
    [question] = await spelling.questions(engine, [QUESTION]) or []
    assert engine.text_of(question) == f"{QUESTION} "


async def test_labels_as_an_answer_begins() -> None:
    engine = by_character({" True": 900_002, " False": 900_003, "True": 900_004, "False": 900_005})
    assert await spell_labels(engine) == two(900_002, 900_003)
    begun = await spell_labels(engine, ANSWERS, after="")
    assert (begun.texts, begun.tokens) == (("False", "True"), ((900_005,), (900_004,)))


async def test_sentencepiece_labels_as_an_answer_begins() -> None:
    """As Llama 2 and Mistral were trained: the answer is tokenized by itself."""
    engine = trained()
    [true], [false] = engine.encode("True"), engine.encode("False")
    labels = await spell_labels(engine, ANSWERS, after="")
    assert (labels.texts, labels.tokens) == (("False", "True"), ((false,), (true,)))


@pytest.mark.parametrize(
    ("joined", "told"),
    [
        ({" True": 900_002, " False": 900_002}, r"' True' are the same tokens"),
        (
            {" True": 900_002, " False": 900_003, "is True": 900_004},
            r"the tokenizer joins ' True' with the question's end '.* is'",
        ),
        ({" True": 900_002, " False": 900_003, " True\n": 900_004}, r"a label's end and the separator '\\n\\n'"),
    ],
)
async def test_labels_that_cannot_be_spelled(joined: dict[str, int], told: str) -> None:
    longest_first = dict(sorted(joined.items(), key=lambda item: -len(item[0])))
    with pytest.raises(ConfigurationError, match=told) as refused:
        await Spelling.of(by_character(longest_first), QUESTION, separator=SEPARATOR)
    assert refused.value.hint


SENTIMENT = LabelSpace(("bad", "good", "very good"), (" bad", " good", " very good"))


async def test_labels_of_several_tokens() -> None:
    engine = by_character({" good": 900_002, " bad": 900_003, " very": 900_004})
    spelling = await Spelling.of(engine, QUESTION, space=SENTIMENT, separator=SEPARATOR)
    assert spelling.labels.tokens == ((900_003,), (900_002,), (900_004, 900_002))
    assert (spelling.ending, spelling.separator) == ("", (10, 10))
    [question] = await spelling.questions(engine, [QUESTION]) or []
    assert engine.decode(list(question)) == QUESTION


async def test_a_label_that_another_begins_with_ends_at_the_separator() -> None:
    engine = by_character({" good": 900_002, " enough": 900_003})
    space = LabelSpace(("good", "good enough"), (" good", " good enough"))
    spelling = await Spelling.of(engine, QUESTION, space=space, separator=SEPARATOR)
    asked = [query.tokens.ids for query in spelling.labels.queries([Prompt((Segment("", [1]),))])]
    assert asked == [(900_002,), (900_003, 10)]
    with pytest.raises(
        ConfigurationError, match="' good enough' begins with the tokens of ' good', and nothing follow"
    ):
        await Spelling.of(engine, QUESTION, space=space)


async def test_one_label_in_one_token_and_one_in_several_keep_their_space() -> None:
    """Never one with its space and one without: another question would be asked about each."""
    engine = by_character({" True": 900_002})
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    assert spelling.labels.texts == (" False", " True")
    assert spelling.labels.tokens == (tuple(map(ord, " False")), (900_002,))


async def test_a_space_apart_goes_to_the_question_where_labels_have_more_words_too() -> None:
    engine = words_apart()
    space = LabelSpace(("False", "not at all"), (" False", " not at all"))
    spelling = await Spelling.of(engine, QUESTION, space=space, separator=SEPARATOR)
    assert (spelling.ending, spelling.labels.texts) == (" ", ("False", "not at all"))
    assert [engine.text_of(ids) for ids in spelling.labels.tokens or ()] == ["False", "not at all"]
    [question] = await spelling.questions(engine, [QUESTION]) or []
    assert engine.text_of(question) == f"{QUESTION} "


async def test_a_separator_that_the_tokenizer_drops() -> None:
    whole = by_character({" True": 900_002, " False": 900_003})
    engine = LocalTokenizer(lambda text: whole.encode(text.rstrip("\n")), whole.decode)
    with pytest.raises(ConfigurationError, match=r"drops the separator '\\n\\n'"):
        await Spelling.of(engine, QUESTION, separator=SEPARATOR)


async def test_a_claim_that_is_joined_with_its_label_is_refused_by_name() -> None:
    engine = by_character({"! True": 900_004, " True": 900_002, " False": 900_003})
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    with pytest.raises(ConfigurationError, match=r"begins 'Fire!' and ends 'Fire!'.*' True' would be another token"):
        await spelling.questions(engine, [QUESTION, "Fire!"])


async def test_a_tokenizer_that_cannot_spell_every_text_says_so() -> None:
    engine = trained(bytes_too=False)
    spelling = await Spelling.of(engine, QUESTION, separator=SEPARATOR)
    assert spelling.unknown == engine.encode("東")[-1] == 0
    assert (await Spelling.of(trained(), QUESTION, separator=SEPARATOR)).unknown is None
    silent = LocalTokenizer(lambda text: engine.encode(re.sub("[\ue0a1\ue0a2]", "", text) or " "), engine.decode)
    assert (await Spelling.of(silent, QUESTION, separator=SEPARATOR)).unknown is None


async def test_an_engine_asked_in_text_gets_the_texts() -> None:
    labels = await spell_labels(Textual())
    assert labels == IN_TEXT
    with pytest.raises(ValueError, match="no token ids"):
        _ = labels.asked.ids
    assert await (await Spelling.of(Textual())).questions(Textual(), ["x"]) is None
    assert await pieces(Textual(), [1, 2]) is None


async def test_pieces_are_what_each_token_adds() -> None:
    engine = trained()
    ids = engine.encode("Is 東 True\n")
    told = await pieces(engine, ids) or []
    assert "".join(told) == "Is 東 True\n"
    assert told[-6:] == [" ", "", "", "東", " True", "\n"]


def test_fingerprint_ignores_order_and_noise_below_1e_4() -> None:
    base = fingerprint([1, 2], {"a": -1.0, "b": -2.0})
    assert base == fingerprint([1, 2], {"b": -2.00001, "a": -1.0})
    assert base != fingerprint([1, 2], {"a": -1.001, "b": -2.0})
    assert base != fingerprint([1, 3], {"a": -1.0, "b": -2.0})
