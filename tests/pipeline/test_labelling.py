"""What opening a labelling finds out about a model's tokens before anything is asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path

import orjson
import pytest

from core.llm_api.types import EngineIdentity
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, Pool, prepare_batches
from tests.core.real_tokenizers import LocalTokenizer, trained, with_special


@dataclass
class Untouched(LocalTokenizer):
    """A model that is only asked for tokens."""

    context: int | None = None

    @classmethod
    def of(cls, tokenizer: LocalTokenizer, context: int | None = None) -> Untouched:
        return cls(**{field.name: getattr(tokenizer, field.name) for field in fields(tokenizer)}, context=context)

    @property
    def identity(self) -> EngineIdentity:
        return EngineIdentity("test", "small", max_model_len=self.context)


def pool(size: int = 16, **settings: int) -> Pool:
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=size,
        consistency="gold-free",
        objective=Objective(1.0),
        settings=SearchSettings(**settings),
    )
    return pool


async def test_the_record_of_tokens_shows_the_label_as_the_model_sees_it() -> None:
    tokenizer = trained(eos=True)
    labelling = await Labelling.open(pool(), Untouched.of(tokenizer))
    record = orjson.loads(orjson.dumps(await labelling.token_record()))
    assert record["prefix"] == [[tokenizer.bos[0], ""]]  # SentencePiece's own has no text
    assert labelling.book.labels.tokens is not None
    (false,), (true,) = labelling.book.labels.tokens
    assert record["labels"] == {" True": true, " False": false}
    text = "".join(piece for _, piece in record["demonstration"])
    assert text.startswith("Review: ")
    assert text.endswith("\nPositive: True\n\n")
    assert record["demonstration"][-3] == [true, " True"]
    assert [piece for _, piece in record["separator"]] == ["\n", "\n"]


@pytest.mark.parametrize(
    ("tokenizer", "same"),
    [({"dummy": False}, True), ({}, False), ({"dummy": False, "eos": True}, False)],
    ids=["leaves texts alone", "puts a space before", "ends with EOS"],
)
async def test_old_runs_go_on_only_where_they_asked_the_same(tokenizer: dict[str, bool], same: bool) -> None:
    labelling = await Labelling.open(pool(), Untouched.of(trained(**tokenizer)))
    assert await labelling.asks_as_before() is same


async def test_claims_with_a_special_token_s_text_are_told_by_row(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Untouched.of(with_special("<s>", "</s>"))
    plain = pool()
    await Labelling.open(plain, tokenizer)
    assert caplog.text == ""
    marked = tuple(
        replace(claim, text=claim.text.replace("\n", "</s>\n", 1)) if at in (2, 5) else claim
        for at, claim in enumerate(plain.claims)
    )
    labelling = await Labelling.open(replace(plain, claims=marked), tokenizer)
    assert caplog.messages == [
        f"row {plain.claims[at].row} contains the text of a special token of this tokenizer: '</s>'; the model reads "
        "that token"
        for at in (2, 5)
    ]
    assert [at for at, claim in enumerate(labelling.pool.claims) if "</s>" in claim.text] == [2, 5]  # asked as they are


async def test_many_claims_with_special_tokens_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    plain = pool()
    marked = tuple(replace(claim, text="</s>" + claim.text) for claim in plain.claims)
    await Labelling.open(replace(plain, claims=marked), Untouched.of(with_special("<s>", "</s>")))
    assert len(caplog.messages) == 6
    assert caplog.messages[-1] == "11 more claims contain one"


async def test_claims_that_the_tokenizer_cannot_spell_are_told(caplog: pytest.LogCaptureFixture) -> None:
    without_z = trained(bytes_too=False)
    with caplog.at_level(logging.WARNING):
        await Labelling.open(pool(), Untouched.of(without_z))
        assert caplog.messages == []
        unable = LocalTokenizer(lambda text: without_z.encode(text.replace("z", "雪")), without_z.decode, without_z.bos)
        labelling = await Labelling.open(pool(64), Untouched.of(unable))
    [message] = caplog.messages
    first, *others = (claim for claim in (*labelling.pool.claims, *labelling.pool.rest) if "z" in claim.text)
    assert f"something in {1 + len(others)} of 256 claims, the first of them in row {first.row}" in message


async def test_a_cap_counts_in_what_must_fit() -> None:
    tokenizer = trained()
    whole = await Labelling.open(pool(), Untouched.of(tokenizer))
    all_but_one, few = whole.book.longest_prompt(16), whole.book.longest_prompt(16, 3)
    assert few < all_but_one / 2
    with pytest.raises(BadInput, match=rf"^16 claims need prompts of up to {all_but_one} tokens.*--batch_size"):
        await Labelling.open(pool(), Untouched.of(tokenizer, context=all_but_one))
    await Labelling.open(pool(context_cap=3), Untouched.of(tokenizer, context=few + 1))
    with pytest.raises(BadInput, match=rf"^3 demonstrations need prompts of up to {few} tokens.* 2 .*--context_cap"):
        await Labelling.open(pool(context_cap=3), Untouched.of(tokenizer, context=few))
