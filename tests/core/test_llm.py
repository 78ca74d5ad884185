from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import APIError, ConfigurationError, RequestRejected, ServerUnreachable
from core.llm_api.engines.direct import DirectEngine
from core.llm_api.engines.external import ExternalAPI
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import VLLMGroup
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.response_cache import ResponseCache, earlier_keys
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PoolScores,
    PrefixCacheCounters,
    Prompt,
    Query,
    Segment,
)
from core.settings import Settings
from fakes.vllm_server import FALSE, TRUE, FakeVLLM, Fault, hashed_log_odds
from tests.core.old_cache import old_cache
from tests.core.two_labels import pair, two

LABELS = two(TRUE, FALSE)


class ScriptedEngine:
    """Answers token t with log-odds t, one prompt at a time; waits for `gate` and fails on tokens in `broken`."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: set[int] = set()
        self.closed = 0
        self.counters: PrefixCacheCounters | None = None
        self.floored = False
        self.identity = EngineIdentity("scripted", "m", fingerprint="f", max_model_len=100)

    async def start(self) -> EngineIdentity:
        return self.identity

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        return [[len(text)] for text in texts]

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        prompts = [query.prompt for query in queries]
        self.asked.append([p.token_ids[0] for p in prompts])
        await self.gate.wait()
        answers = []
        for position, prompt in enumerate(prompts):
            token = prompt.token_ids[0]
            if token in self.broken:
                raise RequestRejected(f"token {token}", status=400)
            answers.append(pair(-1.0, -1.0 - token, self.floored))
            if on_answer is not None:
                on_answer([position], EngineAnswer(answers[-1:], prompt_tokens=1, requests=1, retries=0))
            await asyncio.sleep(0)
        return EngineAnswer(answers, prompt_tokens=len(answers), requests=len(answers))

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        return self.counters

    async def kv_cache_tokens(self) -> int | None:
        return 7

    async def aclose(self) -> None:
        self.closed += 1


def pool(*tokens: int) -> list[Prompt]:
    return [Prompt((Segment("q", [t]),), name=f"claim {t}") for t in tokens]


def odds(scores: PoolScores) -> list[float]:
    return scores.log_odds


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


async def test_scores_in_order_each_prompt_sent_once(engine: ScriptedEngine) -> None:
    async with ModelAPI(engine) as api:
        scores = await api.score(pool(3, 1, 3, 2, 1), LABELS)
        assert odds(scores) == [3, 1, 3, 2, 1]
        assert engine.asked == [[3, 1, 2]]
        assert scores.prompt_tokens == 3
        stats = api.stats
        assert (stats.asked, stats.in_flight_hits, stats.engine_prompts, stats.requests) == (5, 2, 3, 3)
        assert await api.tokenize(["abc"]) == [[3]]
        assert await api.kv_cache_tokens() == 7
        assert await api.prefix_cache() is None
        assert api.identity is engine.identity
    assert engine.closed == 1


async def test_an_empty_batch_asks_nothing(engine: ScriptedEngine) -> None:
    async with ModelAPI(engine) as api:
        scores = await api.score([], LABELS)
        assert (scores.logprobs.shape, scores.log_odds, scores.prompt_tokens) == ((0, 2), [], 0)
    assert engine.asked == []


async def test_the_cache_answers_and_outlives_the_api(engine: ScriptedEngine, tmp_path: Path) -> None:
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1, 2), LABELS)
        assert odds(await api.score(pool(2, 5, 1), LABELS)) == [2, 5, 1]
        assert (api.stats.cache_hits, api.stats.engine_prompts) == (2, 3)
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        scores = await api.score(pool(1, 2, 5), LABELS)
        assert (odds(scores), scores.prompt_tokens) == ([1, 2, 5], 0)
        assert await api.are_cached(pool(5, 1), LABELS)
        assert not await api.are_cached(pool(5, 6), LABELS)
    assert engine.asked == [[1, 2], [5]]
    async with ModelAPI(engine) as api:
        assert not await api.are_cached(pool(5), LABELS)
    engine.identity = EngineIdentity("scripted", "m", fingerprint="another")
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1), LABELS)
    assert engine.asked[-1] == [1]


async def test_other_labels_are_other_questions(engine: ScriptedEngine, tmp_path: Path) -> None:
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1), LABELS)
        await api.score(pool(1), two(FALSE, TRUE))
    assert engine.asked == [[1], [1]]


async def test_floored_answers_count_only_where_flooring_is_asked_for(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.floored = True
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c"), accept_floored=True) as api:
        await api.score(pool(1), LABELS)
        await api.score(pool(1), LABELS)
        assert api.stats.floored == 2  # every use counts, or a run on cached answers would seem clean
    assert engine.asked == [[1]]
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1), LABELS)
    assert engine.asked == [[1], [1]]


async def test_damaged_rows_are_asked_again_and_counted(engine: ScriptedEngine, tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "c")
    async with ModelAPI(engine, cache=cache) as api:
        await api.score(pool(1, 2), LABELS)
        cache._db.execute("UPDATE answers SET last_logprob = -9")
        assert odds(await api.score(pool(1, 2), LABELS)) == [1, 2]
        assert api.stats.damaged_rows == 2


async def test_what_was_answered_before_a_failure_is_kept(engine: ScriptedEngine, tmp_path: Path) -> None:
    engine.broken = {3}
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        with pytest.raises(RequestRejected, match="token 3"):
            await api.score(pool(1, 2, 3, 4), LABELS)
        assert api._in_flight == {}
        engine.broken = set()
        assert odds(await api.score(pool(1, 2, 3, 4), LABELS)) == [1, 2, 3, 4]
        assert api.stats.engine_prompts == 4
    assert engine.asked[-1] == [3, 4]


async def test_concurrent_twins_share_one_request(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    async with ModelAPI(engine) as api:
        first = asyncio.create_task(api.score(pool(1, 2), LABELS))
        await asyncio.sleep(0)
        second = asyncio.create_task(api.score(pool(2, 3, 1), LABELS))
        await asyncio.sleep(0)
        engine.gate.set()
        assert odds(await first) == [1, 2]
        assert odds(await second) == [2, 3, 1]
        assert engine.asked == [[1, 2], [3]]
        assert api.stats.in_flight_hits == 2
        assert api._in_flight == {}


async def test_a_share_asks_the_same_engine_and_counts_its_own(engine: ScriptedEngine, tmp_path: Path) -> None:
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c.sqlite")) as api:
        one, other = api.share(), api.share(exclusive=False)
        await asyncio.gather(one.score(pool(1, 2), LABELS), other.score(pool(2, 3), LABELS))
        assert sorted(token for batch in engine.asked for token in batch) == [1, 2, 3]
        assert (one.stats.asked, other.stats.asked, api.stats.asked) == (2, 2, 0)
        engine.counters = PrefixCacheCounters(10, 4)
        assert await one.prefix_cache() == engine.counters
        assert await other.prefix_cache() is None  # others' questions are in it
    assert engine.closed == 1


async def test_a_failed_owner_does_not_poison_its_twins(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    engine.broken = {1}
    async with ModelAPI(engine) as api:
        owner = asyncio.create_task(api.score(pool(1, 2), LABELS))
        await asyncio.sleep(0)
        twins = [asyncio.create_task(api.score(pool(2), LABELS)) for _ in range(3)]
        await asyncio.sleep(0)
        engine.gate.set()
        with pytest.raises(RequestRejected):
            await owner
        assert [odds(await twin) for twin in twins] == [[2]] * 3
        assert engine.asked == [[1, 2], [2]]


async def test_a_cancelled_owner_leaves_nobody_hanging(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    async with ModelAPI(engine) as api:
        owner = asyncio.create_task(api.score(pool(1), LABELS))
        await asyncio.sleep(0)
        twin = asyncio.create_task(api.score(pool(1), LABELS))
        await asyncio.sleep(0)
        owner.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        assert odds(await asyncio.wait_for(twin, 1)) == [1]
        assert owner.cancelled()
        assert api._in_flight == {}


async def test_a_cancelled_twin_does_not_cancel_the_owner(engine: ScriptedEngine) -> None:
    engine.gate.clear()
    async with ModelAPI(engine) as api:
        owner = asyncio.create_task(api.score(pool(1), LABELS))
        await asyncio.sleep(0)
        twin = asyncio.create_task(api.score(pool(1), LABELS))
        await asyncio.sleep(0)
        twin.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        assert odds(await asyncio.wait_for(owner, 1)) == [1]


async def test_two_pools_that_own_half_of_each_other_do_not_deadlock(engine: ScriptedEngine) -> None:
    async with ModelAPI(engine) as api:
        scores = await asyncio.wait_for(
            asyncio.gather(*(api.score(pool(*range(n, n + 20)), LABELS) for n in range(0, 40, 5))), 5
        )
        assert [odds(s) for s in scores] == [list(range(n, n + 20)) for n in range(0, 40, 5)]
        assert sorted(token for asked in engine.asked for token in asked) == list(range(55))


async def test_a_prompt_that_is_too_long_is_named_before_anything_is_sent(engine: ScriptedEngine) -> None:
    async with ModelAPI(engine) as api:
        with pytest.raises(ConfigurationError, match="'long' has 100 tokens; m takes 99"):
            await api.score([*pool(1), Prompt((Segment("x", [1] * 100),), name="long")], LABELS)
        await api.score([Prompt((Segment("x", [1] * 99),))], LABELS)
    assert engine.asked == [[1]]


async def test_not_started(engine: ScriptedEngine) -> None:
    with pytest.raises(RuntimeError, match="not started"):
        _ = ModelAPI(engine).identity


async def test_a_failed_start_closes_everything(engine: ScriptedEngine, tmp_path: Path) -> None:
    async def refuse() -> EngineIdentity:
        raise ServerUnreachable("no")

    engine.start = refuse
    cache = ResponseCache(tmp_path / "c")
    with pytest.raises(ServerUnreachable):
        async with ModelAPI(engine, cache=cache):
            pass
    assert engine.closed == 1
    with pytest.raises(APIError):
        cache.get_many([b"x"])


def named_by_path(path: Path, engine: ScriptedEngine, tokens: Sequence[int]) -> None:
    """A cache as format 2 was, which knew a model by its path."""
    keys = earlier_keys(engine.identity, LABELS.asked, [prompt.digest for prompt in pool(*tokens)])
    old_cache(path, {key: pair(-1.0, -1.0 - token) for key, token in zip(keys, tokens, strict=True)}, version=2)


async def test_a_moved_model_is_not_asked_again(engine: ScriptedEngine, tmp_path: Path) -> None:
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1, 2), LABELS)
    engine.identity = replace(engine.identity, root="/elsewhere", model="my-name-for-it")
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        assert odds(await api.score(pool(2, 1), LABELS)) == [2, 1]
    engine.identity = replace(engine.identity, config="a longer window")
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1), LABELS)
    assert engine.asked == [[1, 2], [1]]


async def test_answers_of_an_earlier_version_are_found_where_they_were_given_and_kept_by_content(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    named_by_path(tmp_path / "c", engine, range(20))
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        assert await api.are_cached(pool(3), LABELS)
        assert odds(await api.score(pool(*range(10), 77), LABELS)) == [*range(10), 77]
        assert api.stats.cache_hits == 10
    engine.identity = replace(engine.identity, root="/elsewhere")
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(*range(11), 77), LABELS)
    assert engine.asked == [[77], [10]]  # where the model lay when it answered 10 is not known any more


async def test_a_second_look_is_taken_only_for_what_is_missing_in_a_cache_of_an_earlier_version(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    named_by_path(tmp_path / "earlier", engine, [1])
    for name, looks in (("earlier", 2), ("new", 1)):
        cache = ResponseCache(tmp_path / name)
        statements: list[str] = []
        async with ModelAPI(engine, cache=cache) as api:
            await api.score(pool(1), LABELS)
            cache._db.set_trace_callback(statements.append)
            await api.score(pool(1), LABELS)
            await api.are_cached(pool(1, 5), LABELS)
            cache._db.set_trace_callback(None)
        assert len(statements) == 1 + looks


async def test_other_questions_are_answered_while_another_process_has_the_cache(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        await api.score(pool(1), LABELS)
        other = sqlite3.connect(tmp_path / "c", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(api.score(pool(2), LABELS))
        while len(engine.asked) < 2:
            await asyncio.sleep(0)
        for _ in range(20):
            assert odds(await api.score(pool(1), LABELS)) == [1]
            await asyncio.sleep(0.002)
        assert not waiting.done()  # an iteration is journaled only when its answers are safe
        other.execute("ROLLBACK")
        assert odds(await waiting) == [2]
        other.close()
    assert engine.asked == [[1], [2]]


async def test_an_answer_that_a_cancelled_task_paid_for_is_kept(engine: ScriptedEngine, tmp_path: Path) -> None:
    ResponseCache(tmp_path / "c").close()
    other = sqlite3.connect(tmp_path / "c", isolation_level=None)
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        other.execute("BEGIN IMMEDIATE")
        asking = asyncio.create_task(api.score(pool(1), LABELS))
        while not engine.asked:
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert odds(await api.score(pool(1), LABELS)) == [1]
        other.execute("ROLLBACK")
        other.close()
    async with ModelAPI(engine, cache=ResponseCache(tmp_path / "c")) as api:
        assert await api.are_cached(pool(1), LABELS)
    assert engine.asked == [[1]]


# With the real client and the fake server.


def settings(server: FakeVLLM, **more: object) -> Settings:
    return Settings(vllm_base_url=(server.url,), max_attempts=2, **more)


async def test_a_pool_over_http(server: FakeVLLM, tmp_path: Path) -> None:
    server.log_odds = lambda tokens: float(tokens[-1] % 7) - 3
    async with open_model_api(settings(server, cache_path=tmp_path / "c"), model=server.model) as api:
        labels = await api.spell_labels()
        assert labels == LABELS
        scores = await api.score(pool(*range(20)), labels)
        assert odds(scores) == pytest.approx([t % 7 - 3 for t in range(20)])
        assert scores.prompt_tokens == 20
        again = await api.score(pool(*range(20)), labels)
        assert (again.logprobs.tolist(), again.prompt_tokens) == (scores.logprobs.tolist(), 0)
        assert api.stats.as_dict() == {
            "asked": 40, "cache_hits": 20, "in_flight_hits": 0, "engine_prompts": 20, "prompt_tokens": 20,
            "requests": 1, "retries": 0, "floored": 0, "damaged_rows": 0, "cached_tokens": 0, "untold_tokens": 20,
            "label_misses": 0,
        }  # fmt: skip


async def test_partial_progress_over_http(server: FakeVLLM, tmp_path: Path) -> None:
    told = settings(server, cache_path=tmp_path / "c", prompts_per_request=2, max_concurrent_requests=1)
    server.faults = [Fault(status=400, only=lambda b: [4] in b["prompt"], times=None)]
    async with open_model_api(told, model=server.model) as api:
        with pytest.raises(RequestRejected):
            await api.score(pool(*range(8)), LABELS)
    server.faults = []
    async with open_model_api(told, model=server.model) as api:
        scores = await api.score(pool(*range(8)), LABELS)
        assert odds(scores) == pytest.approx([hashed_log_odds([t]) for t in range(8)])
        assert api.stats.cache_hits == 7, "all but the one"


@pytest.mark.parametrize(
    ("configured", "flag", "direct", "expected"),
    [
        ({"vllm_base_url": "http://v"}, None, False, VLLMClient),
        ({"vllm_base_url": "http://v,http://w"}, None, False, VLLMGroup),
        ({"llama_api_base": "http://x"}, None, False, ExternalAPI),
        ({"vllm_base_url": "http://v", "llama_api_base": "http://x"}, None, False, VLLMClient),
        ({"vllm_base_url": "http://v", "llama_api_base": "http://x", "use_vllm": False}, None, False, ExternalAPI),
        ({"llama_api_base": "http://x", "use_vllm": True}, None, False, VLLMClient),
        ({"llama_api_base": "http://x", "use_vllm": True}, False, False, ExternalAPI),
        ({"llama_api_base": "http://x", "use_vllm": False}, True, False, VLLMClient),
        ({}, True, False, VLLMClient),
        ({"llama_api_base": "http://x"}, None, True, DirectEngine),
    ],
)
async def test_which_engine(configured: dict[str, object], flag: bool | None, direct: bool, expected: type) -> None:
    api = open_model_api(Settings(**configured), model="m", use_vllm=flag, direct=direct)
    assert type(api._engine) is expected
    await api.aclose()


@pytest.mark.parametrize(
    ("configured", "flag", "direct", "message"),
    [
        ({}, None, False, "VLLM_BASE_URL.*LLAMA_API_BASE"),
        ({"vllm_base_url": "http://v"}, False, False, "LLAMA_API_BASE is not set"),
        ({}, False, True, "ruled out"),
    ],
)
def test_no_engine(configured: dict[str, object], flag: bool | None, direct: bool, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_model_api(Settings(**configured), model="m", use_vllm=flag, direct=direct)
