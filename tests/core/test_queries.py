"""Labels of any number and of several tokens, from ModelAPI down to what a server is sent and answers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import orjson
import pytest
from aiohttp import web

from core.errors import ConfigurationError, MissingLabel
from core.llm_api.engines.external import ExternalAPI
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import VLLMGroup
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.labels import LabelSpace, SpelledLabels
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import ResponseCache
from core.llm_api.tokens import Spelling
from core.llm_api.types import NextTokens, Prompt, Query, Segment
from fakes.vllm_server import FALSE, TRUE, FakeVLLM, encode, hashed_log_odds
from icm_vllm.prompt_tree import PATH
from src.icm.prompts import PromptBook
from tests.core.two_labels import two

OPTIONS = HttpOptions(retry=RetryPolicy(max_attempts=2, deadline=10, base=0.01, cap=0.02), read_timeout=5)
WORDS = (" bad", " good", " very", " enough", "\n")
IDS = [encode(word)[0] for word in WORDS]
BAD, GOOD, VERY, ENOUGH, NEWLINE = IDS
SENTIMENT = LabelSpace(("bad", "good", "very good"), (" bad", " good", " very good"))
CHOICE = LabelSpace(("A", "B", "C", "D"), (" A", " B", " C", " D"))


def of_words(tokens: Sequence[int]) -> dict[int, float]:
    """Log-probabilities of the words that share 0.9, by all that stands before."""
    weights = {token: math.exp(hashed_log_odds([*tokens, token])) for token in IDS}
    return {token: math.log(0.9 * weight / sum(weights.values())) for token, weight in weights.items()}


def of_letters(tokens: Sequence[int]) -> dict[int, float]:
    letters = [encode(text)[0] for text in CHOICE.texts]
    weights = {token: math.exp(hashed_log_odds([*tokens, token]) / 4) for token in letters}
    return {token: math.log(0.9 * weight / sum(weights.values())) for token, weight in weights.items()}


def prompts(count: int, length: int = 3) -> list[Prompt]:
    shown = Segment("d", [7] * length)
    return [Prompt((shown, Segment("q", [at])), name=f"claim {at}", place=at / count) for at in range(count)]


def client(server: FakeVLLM, **more: object) -> VLLMClient:
    return VLLMClient(server.url, server.model, options=OPTIONS, **more)


def single(space: LabelSpace) -> SpelledLabels:
    return SpelledLabels(space, tuple((encode(text)[0],) for text in space.texts))


def sentiment(end: int | None = None) -> SpelledLabels:
    return SpelledLabels(SENTIMENT, ((BAD,), (GOOD,), (VERY, GOOD)), end=end)


def expected(tokens: Sequence[int]) -> list[float]:
    """log P of bad, good and very good."""
    first = of_words(tokens)
    return [first[BAD], first[GOOD], first[VERY] + of_words([*tokens, VERY])[GOOD]]


@pytest.fixture(params=[True, False], ids=["trees", "whole prompts"])
async def words(request: pytest.FixtureRequest) -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(trees=request.param, distribution=of_words) as server:
        yield server


# What is sent


class Listening(FakeVLLM):
    """Keeps the bodies as they came."""

    def __init__(self, **knobs: object) -> None:
        super().__init__(**knobs)
        self.bodies: list[bytes] = []

    async def _serve(self, request: web.Request, body: dict) -> web.StreamResponse:
        self.bodies.append(await request.read())
        return await super()._serve(request, body)


@pytest.mark.parametrize(
    ("trees", "sent"),
    [
        (
            False,
            b'{"model":"fake-8b","max_tokens":1,"temperature":0,"logprobs":1,"return_tokens_as_token_ids":true,'
            b'"logprob_token_ids":[5852,7983],"prompt":[[7,7,7,0],[7,7,7,1]]}',
        ),
        (
            True,
            b'{"labels":[5852,7983],"tree":{"segments":[[7,7,7],[0],[1]],"parents":[-1,0,0],"pieces":[0,1,2],'
            b'"ends":[1,2]}}',
        ),
    ],
)
async def test_two_labels_of_one_token_are_asked_for_as_ever(trees: bool, sent: bytes) -> None:
    """To the byte: servers of all versions are asked so."""
    async with Listening(trees=trees) as server, ModelAPI(client(server)) as api:
        await api.score(prompts(2), two(TRUE, FALSE))
        assert server.bodies[-1] == sent


async def test_four_labels_of_one_token_are_one_request_of_one_query_a_prompt() -> None:
    for trees in (True, False):
        async with FakeVLLM(trees=trees, distribution=of_letters) as server, ModelAPI(client(server)) as api:
            labels = await api.spell_labels(CHOICE)
            assert labels == single(CHOICE)
            scores = await api.score(prompts(5), labels)
            [body] = server.pools
            assert body["logprob_token_ids"] == [encode(text)[0] for text in (" D", " C", " B", " A")]
            assert ("tree" in body) == trees
            assert body["prompt"] == [prompt.token_ids for prompt in prompts(5)]
            assert (api.stats.asked, api.stats.requests, scores.prompt_tokens) == (5, 1, 20)
            for prompt, found in zip(prompts(5), scores.logprobs.tolist(), strict=True):
                assert found == pytest.approx(list(of_letters(prompt.token_ids).values()))


async def test_labels_of_several_tokens_are_asked_beside_their_prompt(words: FakeVLLM) -> None:
    async with ModelAPI(client(words)) as api:
        pool = prompts(3)
        scores = await api.score(pool, sentiment())
        [body] = words.pools
        assert body["prompt"] == [ids for prompt in pool for ids in (prompt.token_ids, [*prompt.token_ids, VERY])]
        assert body["logprob_token_ids"] == [VERY, GOOD, BAD], "those of all nodes, each once"
        assert (api.stats.asked, api.stats.engine_prompts, scores.prompt_tokens) == (6, 6, 3 * 4 + 3 * 5)
        for prompt, found in zip(pool, scores.logprobs.tolist(), strict=True):
            assert found == pytest.approx(expected(prompt.token_ids))


async def test_a_beginning_costs_a_few_tokens_where_its_prompt_is_cached() -> None:
    async with FakeVLLM(trees=True, distribution=of_words) as server, ModelAPI(client(server)) as api:
        before = await api.prefix_cache()
        await api.score(prompts(4, length=64), sentiment())
        after = await api.prefix_cache()
        assert before is not None
        assert after is not None
        asked = after - before
        assert asked.queries == 4 * 65 + 4 * 66
        assert asked.computed == 65 + 3 * 1 + 4 * 2, "blocks of 16: each but the first finds 64 tokens"


async def test_a_label_that_another_begins_with_is_told_from_it_by_the_separator(words: FakeVLLM) -> None:
    space = LabelSpace(("good", "good enough"), (" good", " good enough"))
    async with ModelAPI(client(words)) as api:
        book = await PromptBook.open(api, ["A film:", "Another film:"], space=space, separator="\n")
        prompt = book.prompt(1, [0], [1, None])
        assert prompt.text == "A film: good enough\nAnother film:"
        [found] = (await api.score([prompt], book.labels)).logprobs.tolist()
        first, then = of_words(prompt.token_ids), of_words([*prompt.token_ids, GOOD])
        assert found == pytest.approx([first[GOOD] + then[NEWLINE], first[GOOD] + then[ENOUGH]])
        with pytest.raises(ConfigurationError, match="' good enough' begins with the tokens of ' good'"):
            await api.spell_labels(space)


async def test_a_book_of_three_labels(words: FakeVLLM) -> None:
    async with ModelAPI(client(words)) as api:
        book = await PromptBook.open(api, ["One:", "Two:", "Three:"], space=SENTIMENT)
        prompt = book.prompt(0, [1, 2], [None, 2, 0])
        assert prompt.text == "Two: very good\n\nThree: bad\n\nOne:"
        assert prompt.token_ids[1:] == encode(prompt.text)
        assert [len(by_label) for by_label in book.demonstrations] == [3, 3, 3]
        longest = max(book.prompt(0, [1, 2], [None, 2, 2]).num_tokens, book.prompt(1, [0, 2], [2, None, 2]).num_tokens)
        assert book.longest_prompt(3) == longest + 1, "and what the longest label begins with"
        assert book.claims_that_fit(longest + 1, 3) == 3
        assert book.claims_that_fit(1, 3) == 1


async def test_more_tokens_than_a_request_may_ask_for_are_two_requests(words: FakeVLLM) -> None:
    names = [f"{letter} {number}" for letter in "abcd" for number in range(5)]
    tokens = tuple((1000 + at // 5, 2000 + at) for at in range(20))
    labels = SpelledLabels(LabelSpace(tuple(names), tuple(names)), tokens)
    async with ModelAPI(client(words)) as api:
        scores = await api.score(prompts(2), labels)
        assert scores.logprobs.shape == (2, 20)
        assert [len(body["logprob_token_ids"]) for body in words.pools] == [19, 5]
        assert [len(body["prompt"]) for body in words.pools] == [2 * 4, 2 * 1]


# Servers and clients of other versions


async def test_a_server_that_takes_trees_of_two_labels_gets_whole_prompts_for_more() -> None:
    async with FakeVLLM(trees=True, tree_labels=None, distribution=of_words) as server, AsyncExitStack() as closing:
        api = await closing.enter_async_context(ModelAPI(client(server)))
        scores = await api.score(prompts(3), sentiment())
        assert ["tree" in body for body in server.pools] == [False]
        assert scores.logprobs[0].tolist() == pytest.approx(expected(prompts(1)[0].token_ids))
        await api.score(prompts(3), two(GOOD, BAD))
        assert ["tree" in body for body in server.pools] == [False, True]


async def test_a_tree_holds_what_its_server_says_at_most() -> None:
    async with FakeVLLM(trees=True, tree_labels=3, distribution=of_letters) as server, ModelAPI(client(server)) as api:
        await api.score(prompts(3), single(CHOICE))
        await api.score(prompts(3), single(LabelSpace(CHOICE.names[:3], CHOICE.texts[:3])))
        assert ["tree" in body for body in server.pools] == [False, True]


async def test_a_client_of_before_is_answered(words: FakeVLLM) -> None:
    """It reads a pair for each prompt."""
    if words.trees:
        tree = b'{"segments":[[7,7,7],[0],[1]],"parents":[-1,0,0],"pieces":[0,1,2],"ends":[1,2]}'
        body = b'{"labels":[5852,7983],"tree":' + tree + b"}"
        engine = client(words)
        await engine.start()
        answer = orjson.loads(await engine._http.send("POST", PATH, body))
        assert [len(row) for row in answer["logprobs"]] == [2, 2]
        assert orjson.loads(await engine._http.send("GET", PATH))["format"] == 1
        await engine.aclose()


# The cache, and what is missing


async def test_every_node_is_cached_by_itself(words: FakeVLLM, tmp_path: Path) -> None:
    async with ModelAPI(client(words), cache=ResponseCache(tmp_path / "c")) as api:
        first = await api.score(prompts(3), sentiment())
        assert await api.are_cached(prompts(3), sentiment())
        again = await api.score(prompts(3)[::-1], sentiment())
        assert again.logprobs.tolist() == first.logprobs[::-1].tolist()
        assert (again.prompt_tokens, api.stats.cache_hits) == (0, 6)
        assert not await api.are_cached(prompts(3), two(GOOD, BAD)), "another set of tokens"
        assert not await api.are_cached(prompts(4), sentiment())
        await api.score(prompts(4), sentiment())
        assert len(words.pools[-1]["prompt"]) == 2


async def test_a_missing_part_of_a_label_is_an_error_that_names_the_prompt() -> None:
    async with FakeVLLM(exact_labels="ignored", distribution=of_words) as server, ModelAPI(client(server)) as api:
        server.drop = {VERY}
        with pytest.raises(MissingLabel, match=f"'claim 0'.*token_id:{VERY}"):
            await api.score(prompts(1), sentiment())


async def test_a_missing_one_of_three_is_floored_by_request(tmp_path: Path) -> None:
    async with FakeVLLM(exact_labels="ignored", distribution=of_letters) as server:
        server.drop = {encode(" B")[0], encode(" C")[0]}
        async with ModelAPI(client(server, missing_label="floor")) as api:
            [found] = (await api.score(prompts(1), single(CHOICE))).logprobs.tolist()
            assert api.stats.floored == 1
            assert found[1] == found[2] < min(found[0], found[3])


# Several servers, and one that is asked in text


async def test_a_prompt_and_its_beginnings_go_to_one_server() -> None:
    async with FakeVLLM(distribution=of_words) as one, FakeVLLM(distribution=of_words) as other:
        group = VLLMGroup([client(one), client(other)])
        async with ModelAPI(group) as api:
            scores = await api.score(prompts(8), sentiment())
            for prompt, found in zip(prompts(8), scores.logprobs.tolist(), strict=True):
                assert found == pytest.approx(expected(prompt.token_ids))
            for server in (one, other):
                [body] = server.pools
                asked = body["prompt"]
                assert [ids[:4] for ids in asked[::2]] == [ids[:4] for ids in asked[1::2]]
                assert len(asked) == 8


@pytest.mark.parametrize("space", [LabelSpace(CHOICE.names[:3], CHOICE.texts[:3]), CHOICE], ids=["3", "4"])
async def test_labels_in_text(space: LabelSpace) -> None:
    async with FakeVLLM(distribution=of_letters) as server:
        engine = ExternalAPI(server.url + "/v1", server.model, options=OPTIONS)
        async with ModelAPI(engine) as api:
            labels = await api.spell_labels(space)
            assert labels.tokens is None
            book = await PromptBook.open(api, ["First:", "Second:"], space=space)
            encoded = server._encoded("".join(space.texts), {})  # it knows how its tokens read
            assert len(encoded) == len(space) + 1
            prompt = book.prompt(1, [0], [2, None])
            assert prompt.text == "First: C\n\nSecond:"
            [found] = (await api.score([prompt], book.labels)).logprobs.tolist()
            assert found == pytest.approx(list(of_letters(encode(prompt.text)).values())[: len(space)])
            missing = LabelSpace(("A", "E"), (" A", " E"))
            with pytest.raises(MissingLabel, match="' E'"):
                await api.score([prompt], await api.spell_labels(missing))


async def test_queries_of_one_batch_may_ask_for_different_tokens(words: FakeVLLM) -> None:
    """In any order; each is answered for its own."""
    engine = client(words)
    await engine.start()
    pool = prompts(4)
    some, others = NextTokens(("", ""), (GOOD, BAD)), NextTokens(("",), (VERY,))
    queries = [Query(prompt, tokens) for prompt, tokens in zip(pool, (some, others, others, some), strict=True)]
    heard: dict[int, tuple[float, ...]] = {}
    answer = await engine.score(
        queries, on_answer=lambda at, part: heard.update(zip(at, (a.values for a in part.logprobs), strict=True))
    )
    for position, query in enumerate(queries):
        logprobs = of_words(query.prompt.token_ids)
        assert heard[position] == answer.logprobs[position].values
        assert list(heard[position]) == pytest.approx([logprobs[token] for token in query.tokens.ids])
    await engine.aclose()


async def test_spelling_is_of_the_labels_that_are_asked_for(words: FakeVLLM) -> None:
    engine = client(words)
    spelling = await Spelling.of(engine, "Good?", space=SENTIMENT, separator="\n")
    assert spelling.labels == sentiment(end=NEWLINE)
    await engine.aclose()
