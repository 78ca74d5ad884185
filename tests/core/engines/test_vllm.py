from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from pydantic import SecretStr

from core.errors import (
    ConfigurationError,
    MissingLabel,
    RateLimited,
    RequestRejected,
    RetriesExhausted,
    ServerChanged,
    ServerUnreachable,
    TransientError,
)
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http import gather
from core.llm_api.http.completions import token_body, vllm_fields
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.tokens import CANARY_TEXT, spell_labels
from core.llm_api.types import Engine, EngineAnswer, Prompt, Segment
from fakes.vllm_server import BOS, FALSE, TRUE, FakeVLLM, Fault, hashed_log_odds
from icm_vllm.prompt_tree import ADAPTER_PATH, PATH
from tests.core.two_labels import log_odds, two

KEY = "sk-planted-0123456789"
LABELS = two(TRUE, FALSE)
QUICK = RetryPolicy(max_attempts=3, deadline=10, base=0.01, cap=0.02)


def client(server: FakeVLLM, *, options: HttpOptions | None = None, **kwargs: object) -> VLLMClient:
    options = options or HttpOptions(retry=QUICK, read_timeout=5)
    return VLLMClient(server.url, kwargs.pop("model", server.model), options=options, **kwargs)


def prompts(n: int, length: int = 3) -> list[Prompt]:
    return [Prompt((Segment("d", [7] * length), Segment("q", [i])), name=f"claim {i}") for i in range(n)]


async def started(server: FakeVLLM, **kwargs: object) -> VLLMClient:
    engine = client(server, **kwargs)
    await engine.start()
    return engine


async def test_identity(server: FakeVLLM) -> None:
    engine = client(server, revision="main")
    assert isinstance(engine, Engine)
    with pytest.raises(RuntimeError):
        _ = engine.exact_labels
    identity = await engine.start()
    assert engine.exact_labels
    assert (identity.kind, identity.model, identity.root) == ("vllm", "fake-8b", "/models/fake")
    assert (identity.version, identity.revision, identity.max_model_len) == ("0.26.0+fake", "main", 8192)
    canary = server.completions[1]
    assert len(canary["prompt"][0]) < 16
    assert len(canary["logprob_token_ids"]) == 5
    assert await engine.start() == identity
    await engine.aclose()
    await engine.aclose()


async def test_the_fingerprint_tells_models_of_one_name_apart() -> None:
    prints = set()
    for salt in ("", "", "other"):
        async with FakeVLLM(salt=salt) as server:
            engine = client(server)
            prints.add((await engine.start()).fingerprint)
            await engine.aclose()
    assert len(prints) == 2


async def test_a_pool_is_one_request_in_order(server: FakeVLLM) -> None:
    engine = await started(server)
    server.shuffle = True
    pool = prompts(300)
    answer = await engine.score(LABELS.queries(pool))
    assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in pool])
    assert (answer.requests, answer.retries, answer.prompt_tokens) == (1, 0, 300 * 4)
    assert [body["prompt"] for body in server.pools] == [[p.token_ids for p in pool]]
    assert server.pools[0]["logprob_token_ids"] == [TRUE, FALSE]
    assert server.pools[0]["max_tokens"] == 1
    assert not server.pools[0].get("echo")
    await engine.aclose()


async def test_a_server_with_our_extension_gets_pools_as_trees() -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        assert engine.takes_trees
        pool = prompts(300)
        answer = await engine.score(LABELS.queries(pool))
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in pool])
        assert (answer.requests, answer.retries, answer.prompt_tokens) == (1, 0, 300 * 4)
        assert answer.cached_tokens == 0
        assert [body["prompt"] for body in server.pools] == [[p.token_ids for p in pool]]
        assert server.requests.count(PATH) == 2  # the question whether it does, and the pool


async def test_a_tree_is_told_how_much_of_it_was_cached() -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        pool = prompts(4, length=39)
        before = await engine.prefix_cache()
        answers = [await engine.score(LABELS.queries(pool)) for _ in range(2)]
        after = await engine.prefix_cache()
        assert before is not None
        assert after is not None
        assert [answer.cached_tokens for answer in answers] == [3 * 32, 4 * 32]
        assert (after - before).hits == 7 * 32
        plain = await started(server, use_extension=False)
        closing.push_async_callback(plain.aclose)
        assert (await plain.score(LABELS.queries(pool))).cached_tokens is None


async def test_kernels_and_their_type_are_part_of_who_answers() -> None:
    knobs = {"kernels": "ICM_BATCH_INVARIANT=1", "dtype": "float32"}
    async with FakeVLLM(trees=True, **knobs) as server, AsyncExitStack() as closing:
        for use_extension in (True, False):
            engine = VLLMClient(server.url, server.model, use_extension=use_extension)
            closing.push_async_callback(engine.aclose)
            identity = await engine.start()
            assert (identity.determinism, identity.dtype) == ("ICM_BATCH_INVARIANT=1", "float32")
            assert "(float32, fingerprint " in identity.describe()


async def test_an_extension_of_another_format_or_model_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        monkeypatch.setattr("core.llm_api.http.vllm_extension.FORMAT", 2)
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        assert not engine.takes_trees
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server, use_extension=False)
        closing.push_async_callback(engine.aclose)
        assert not engine.takes_trees
        await engine.score(LABELS.queries(prompts(2)))
        assert server.requests.count(PATH) == 1  # asked what it is, and no pool was sent there
    async with FakeVLLM(trees=True, exact_labels="rejected") as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        assert not engine.takes_trees


async def test_a_server_that_loses_its_extension_gets_whole_prompts(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        server.trees = False
        pool = prompts(3)
        for _ in range(2):
            answer = await engine.score(LABELS.queries(pool))
            assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in pool])
        assert not engine.takes_trees
        assert caplog.text.count("no longer takes pools as trees") == 1


def tuned_log_odds(tokens: Sequence[int]) -> float:
    return -hashed_log_odds(tokens)


async def scored(engine: VLLMClient, pool: Sequence[Prompt]) -> list[float]:
    return [log_odds(answer) for answer in (await engine.score(LABELS.queries(pool))).logprobs]


async def test_an_adapters_pools_are_trees_that_name_it() -> None:
    async with FakeVLLM(trees=True, adapters={"tuned": tuned_log_odds}) as server, AsyncExitStack() as closing:
        base, tuned = await started(server), await started(server, model="tuned")
        closing.push_async_callback(base.aclose)
        closing.push_async_callback(tuned.aclose)
        assert base.takes_trees
        assert tuned.takes_trees
        pool = prompts(3)
        odds = [hashed_log_odds(prompt.token_ids) for prompt in pool]
        for _ in range(2):
            assert await scored(base, pool) == pytest.approx(odds)
            assert await scored(tuned, pool) == pytest.approx([-value for value in odds])
        assert [(body["model"], "tree" in body) for body in server.pools] == [("fake-8b", True), ("tuned", True)] * 2
        assert (server.requests.count(PATH), server.requests.count(ADAPTER_PATH)) == (2 + 2, 2)


async def test_an_extension_that_takes_no_adapters_gets_whole_prompts_for_them() -> None:
    adapters = {"tuned": tuned_log_odds}
    async with FakeVLLM(trees=True, adapters=adapters, adapter_trees=False) as server, AsyncExitStack() as closing:
        tuned = await started(server, model="tuned")
        closing.push_async_callback(tuned.aclose)
        assert not tuned.takes_trees
        pool = prompts(3)
        assert await scored(tuned, pool) == pytest.approx([-hashed_log_odds(prompt.token_ids) for prompt in pool])
        assert [(body["model"], "tree" in body) for body in server.pools] == [("tuned", False)]


async def test_an_adapter_is_never_answered_for_by_its_base_model(caplog: pytest.LogCaptureFixture) -> None:
    """Where an extension that knew adapters is followed by one that does not read their names."""
    async with FakeVLLM(trees=True, adapters={"tuned": tuned_log_odds}) as server, AsyncExitStack() as closing:
        tuned = await started(server, model="tuned")
        closing.push_async_callback(tuned.aclose)
        server.adapter_trees = False
        pool = prompts(3)
        for _ in range(2):
            assert await scored(tuned, pool) == pytest.approx([-hashed_log_odds(prompt.token_ids) for prompt in pool])
        assert not any("tree" in body for body in server.pools)
        assert caplog.text.count("no longer takes pools as trees") == 1


async def test_an_adapter_that_was_unloaded_is_missed_in_vllms_words_and_used_when_it_is_back() -> None:
    async with FakeVLLM(trees=True, adapters={"tuned": tuned_log_odds}) as server, AsyncExitStack() as closing:
        tuned = await started(server, model="tuned")
        closing.push_async_callback(tuned.aclose)
        pool = prompts(3)
        unloaded = server.adapters.pop("tuned")
        with pytest.raises(RequestRejected, match="The model `tuned` does not exist"):
            await scored(tuned, pool)
        server.adapters["tuned"] = unloaded
        odds = [-hashed_log_odds(prompt.token_ids) for prompt in pool]
        assert await scored(tuned, pool) == pytest.approx(odds)
        assert not tuned.takes_trees
        tuned._extension.again = 0.0
        assert await scored(tuned, pool) == pytest.approx(odds)
        assert tuned.takes_trees


async def test_a_label_without_a_logprob_is_missing_in_a_tree_too() -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        server.drop = {TRUE}
        with pytest.raises(MissingLabel, match="claim 0"):
            await engine.score(LABELS.queries(prompts(2)))


@pytest.mark.parametrize(
    "patch",
    [
        lambda a: a.update(logprobs=a["logprobs"][:-1]),
        lambda a: a["logprobs"][0].pop(),
        lambda a: a.pop("prompt_tokens"),
        lambda a: a.update(logprobs=[["x", 1.0]] * 3),
        lambda a: [],
    ],
)
async def test_a_malformed_answer_to_a_tree_is_asked_again(patch: Callable[[dict[str, Any]], object]) -> None:
    async with FakeVLLM(trees=True) as server, AsyncExitStack() as closing:
        engine = await started(server)
        closing.push_async_callback(engine.aclose)
        server.faults = [Fault(patch=patch)]
        pool = prompts(3)
        answer = await engine.score(LABELS.queries(pool))
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in pool])


async def test_no_request_is_larger_than_vllm_allows(server: FakeVLLM) -> None:
    engine = await started(server)
    assert (await engine.score(LABELS.queries(prompts(1025, 1)))).requests == 2
    assert sorted(len(body["prompt"]) for body in server.pools) == [1, 1024]
    assert await engine.score(LABELS.queries([])) == EngineAnswer([], 0, requests=0, cached_tokens=0)
    await engine.aclose()


async def test_splitting_keeps_order_and_bounds_concurrency(server: FakeVLLM) -> None:
    options = HttpOptions(retry=QUICK, max_concurrent_requests=3)
    engine = await started(server, options=options, prompts_per_request=2)
    server.latency = 0.02
    heard: list[list[int]] = []
    pool = prompts(15)
    answer = await engine.score(LABELS.queries(pool), on_answer=lambda positions, _: heard.append(list(positions)))
    assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in pool])
    assert [body["prompt"][0][-1] for body in server.pools] == list(range(0, 15, 2))
    assert server.max_in_flight == 3
    assert sorted(heard) == [[start, start + 1] for start in range(0, 14, 2)] + [[14]]
    assert answer.requests == 8
    await engine.aclose()


async def test_the_first_failure_soon_ends_the_others(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "SETTLE", 0.2)
    engine = await started(server, prompts_per_request=1)
    server.latency = 5
    server.faults = [
        Fault(status=400, body={"error": {"message": "bad prompt"}}, only=lambda b: b["prompt"][0][-1] == 2)
    ]
    server.latency = 0
    server.faults.append(Fault(delay=30, times=None))
    began = time.monotonic()
    with pytest.raises(RequestRejected, match="bad prompt"):
        await engine.score(LABELS.queries(prompts(5)))
    assert time.monotonic() - began < 5
    await asyncio.sleep(0.1)
    assert server.in_flight == 0
    assert server.aborted == 4  # closing the connections makes vLLM drop the prompts
    await engine.aclose()


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500, body={"error": {"message": "boom"}}),
        Fault(status=503, body="busy", headers={"Retry-After": "0"}),
        Fault(status=429, body={}, headers={"Retry-After": "0"}),
        Fault(status=408),
        Fault(disconnect=True),
        Fault(truncate=True),
        Fault(patch=lambda answer: answer["choices"].pop()),
        Fault(patch=lambda answer: answer.pop("choices")),
        Fault(patch=lambda answer: answer["choices"][0].update(index=1)),
    ],
)
async def test_what_may_pass_is_asked_again(server: FakeVLLM, fault: Fault) -> None:
    engine = await started(server)
    server.faults = [Fault(**{**vars(fault), "patch": _in_place(fault.patch), "times": 1})]
    answer = await engine.score(LABELS.queries(prompts(3)))
    assert answer.retries == 1
    assert [log_odds(a) for a in answer.logprobs] == pytest.approx([hashed_log_odds(p.token_ids) for p in prompts(3)])
    await engine.aclose()


def _in_place(patch):
    def run(answer):
        patch(answer)
        return answer

    return run if patch else None


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(status=500, body={"error": {"message": "x" * 5000}}, times=None), TransientError),
        (Fault(status=429, headers={"Retry-After": "0"}, times=None), RateLimited),
        (Fault(truncate=True, times=None), TransientError),
        (Fault(disconnect=True, times=None), TransientError),
    ],
)
async def test_retries_end(server: FakeVLLM, fault: Fault, cause: type[Exception]) -> None:
    engine = await started(server)
    server.faults = [fault]
    with pytest.raises(RetriesExhausted, match="after 3 attempts") as caught:
        await engine.score(LABELS.queries(prompts(1)))
    assert isinstance(caught.value.__cause__, cause)
    assert len(server.pools) == 3
    assert len(str(caught.value)) < 500
    await engine.aclose()


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "length"),
        (401, "VLLM_API_KEY"),
        (403, "VLLM_API_KEY"),
        (404, "URL"),
        (413, "client_max_body_size"),
        (422, ""),
    ],
)
async def test_final_statuses_are_asked_once_and_say_what_to_do(server: FakeVLLM, status: int, hint: str) -> None:
    engine = await started(server)
    server.faults = [Fault(status=status, body={"error": {"message": "the server's words"}}, times=None)]
    with pytest.raises(RequestRejected, match="the server's words") as caught:
        await engine.score(LABELS.queries(prompts(1)))
    assert caught.value.status == status
    assert hint in caught.value.hint
    assert len(server.pools) == 1
    await engine.aclose()


async def test_retry_after_is_waited_for(server: FakeVLLM) -> None:
    engine = await started(server)
    server.faults = [Fault(status=429, headers={"Retry-After": "0.3"})]
    began = time.monotonic()
    await engine.score(LABELS.queries(prompts(1)))
    assert 0.3 <= time.monotonic() - began < 2
    await engine.aclose()


async def test_the_slot_is_free_while_waiting_to_retry(server: FakeVLLM) -> None:
    options = HttpOptions(retry=RetryPolicy(max_attempts=2, base=0.01), max_concurrent_requests=1)
    engine = await started(server, options=options, prompts_per_request=1)
    server.faults = [Fault(status=429, headers={"Retry-After": "0.5"}, only=lambda b: b["prompt"][0][-1] == 0)]
    finished: list[int] = []
    await engine.score(LABELS.queries(prompts(3)), on_answer=lambda positions, _: finished.extend(positions))
    assert finished == [1, 2, 0]
    await engine.aclose()


async def test_a_silent_server_times_out_and_a_slow_one_does_not(server: FakeVLLM) -> None:
    engine = await started(server, options=HttpOptions(retry=RetryPolicy(1), read_timeout=0.3))
    server.latency = 0.1
    await engine.score(LABELS.queries(prompts(1)))
    server.latency = 3
    with pytest.raises(RetriesExhausted, match=r"sent nothing for 0\.3 s"):
        await engine.score(LABELS.queries(prompts(1)))
    await engine.aclose()


async def test_connections_are_not_kept_as_long_as_vllm_keeps_them(server: FakeVLLM) -> None:
    engine = await started(server)
    assert engine._http._open().connector._keepalive_timeout < 5
    await engine.aclose()


async def test_no_server_at_start_is_final_and_says_how_to_start_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    engine = VLLMClient(url, "m", options=HttpOptions(retry=RetryPolicy(base=10)))
    began = time.monotonic()
    with pytest.raises(ServerUnreachable, match=r"scripts/launch_vllm_server\.sh local") as caught:
        await engine.start()
    assert url in str(caught.value)
    assert time.monotonic() - began < 2
    await engine.aclose()


async def test_a_server_that_restarts_is_waited_for() -> None:
    server = FakeVLLM()
    await server.__aenter__()
    engine = await started(server, options=HttpOptions(retry=RetryPolicy(50, base=0.05, cap=0.05)))
    await server.__aexit__()
    asking = asyncio.create_task(engine.score(LABELS.queries(prompts(1))))
    await asyncio.sleep(0.2)
    assert not asking.done()
    async with server:
        assert (await asking).retries > 0
    await engine.aclose()


async def test_a_wrong_model_is_named_with_what_is_served(server: FakeVLLM) -> None:
    for wrong, told in (("llama-405b", "."), ("Fake-8B", "; did you mean fake-8b?")):
        engine = client(server, model=wrong)
        with pytest.raises(ConfigurationError, match=re.escape(f"serves 'fake-8b', not '{wrong}'{told} Ask for what")):
            await engine.start()
        await engine.aclose()


@pytest.mark.parametrize("support", ["ignored", "rejected"])
async def test_an_old_server_is_asked_for_its_top_20(support: str, caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(exact_labels=support) as server:
        engine = await started(server)
        assert not engine.exact_labels
        assert "top 20" in caplog.text
        answer = await engine.score(LABELS.queries(prompts(4)))
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx(
            [hashed_log_odds(p.token_ids) for p in prompts(4)]
        )
        assert server.pools[0]["logprobs"] == 20
        assert "logprob_token_ids" not in server.pools[0]
        await engine.aclose()


async def test_a_server_with_fewer_logprobs() -> None:
    async with FakeVLLM(exact_labels="ignored", max_logprobs=5) as server:
        engine = await started(server)
        await engine.score(LABELS.queries(prompts(1)))
        assert server.completions[-1]["logprobs"] == 5
        await engine.aclose()


async def test_a_missing_label_names_its_prompt_and_is_not_retried() -> None:
    async with FakeVLLM(exact_labels="ignored") as server:
        engine = await started(server)
        server.drop = {TRUE}
        with pytest.raises(MissingLabel, match=r"'claim 0'.*token_id:5852"):
            await engine.score(LABELS.queries(prompts(2)))
        assert len(server.pools) == 1
        await engine.aclose()


async def test_a_missing_label_is_floored_by_request() -> None:
    async with FakeVLLM(exact_labels="ignored") as server:
        engine = await started(server, missing_label="floor")
        server.drop = {TRUE}
        (answer,) = (await engine.score(LABELS.queries(prompts(1)))).logprobs
        assert answer.floored
        assert log_odds(answer) < 0
        server.drop = {TRUE, FALSE}
        with pytest.raises(MissingLabel):
            await engine.score(LABELS.queries(prompts(1)))
        await engine.aclose()


async def test_a_server_without_logprobs() -> None:
    async with FakeVLLM(logprobs=False) as server:
        engine = client(server)
        with pytest.raises(ConfigurationError, match="no logprobs"):
            await engine.start()
        await engine.aclose()


async def test_tokenize(server: FakeVLLM) -> None:
    engine = await started(server)
    plain, special = await engine.tokenize([" True", "a b"]), await engine.tokenize([" True"], special=True)
    assert (plain[0], len(plain[1]), special) == ([TRUE], 2, [[1, TRUE]])
    assert await engine.tokenize([]) == []
    assert await spell_labels(engine) == two(TRUE, FALSE)
    server.split_labels = True
    assert (await spell_labels(engine)).texts == ("False", "True")
    await engine.aclose()


async def test_detokenize(server: FakeVLLM) -> None:
    engine = await started(server)
    tokens = await engine.tokenize([" True", "a b"])
    assert await engine.detokenize(tokens) == [" True", "a b"]
    assert await engine.detokenize([]) == []
    server.detokenizes = False  # a gateway that passes fewer paths
    assert await engine.detokenize(tokens) is None
    await engine.aclose()


async def test_prefix_cache_and_capacity(server: FakeVLLM) -> None:
    engine = await started(server)
    before = await engine.prefix_cache()
    await engine.score(LABELS.queries(prompts(4, length=64)))
    asked = await engine.prefix_cache() - before
    assert (asked.queries, asked.hits) == (4 * 65, 3 * 64)
    assert await engine.kv_cache_tokens() == 4096 * 16
    assert await engine.kv_block_size() == 16
    server.metrics = False
    assert await engine.kv_block_size() is None
    assert await engine.prefix_cache() is None
    assert await engine.kv_cache_tokens() is None
    await engine.aclose()


async def test_the_key_is_sent_and_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with FakeVLLM(api_key=KEY) as server:
            engine = await started(server, api_key=SecretStr(KEY))
            assert server.authorizations[0] == f"Bearer {KEY}"
            server.faults = [Fault(status=500, body={"error": {"message": f"key {KEY} broke"}}, times=None)]
            with pytest.raises(RetriesExhausted) as caught:
                await engine.score(LABELS.queries(prompts(1)))
            await engine.aclose()
            wrong = client(server, api_key=SecretStr(KEY + "wrong"))
            with pytest.raises(RequestRejected, match="Check VLLM_API_KEY") as refused:
                await wrong.start()
            await wrong.aclose()
            none = client(server)
            with pytest.raises(RequestRejected, match="Set VLLM_API_KEY"):
                await none.start()
            await none.aclose()
    seen = [str(caught.value), repr(caught.value), repr(caught.value.__cause__), str(refused.value), caplog.text]
    seen += [repr(vars(o)) for o in (engine, engine._http, wrong._http)] + [repr(engine), repr(engine._http)]
    assert not any(KEY in text for text in seen)
    assert any("broke" in text for text in seen)


async def test_redirects_do_not_carry_the_key_away(server: FakeVLLM) -> None:
    engine = await started(server)
    server.faults = [Fault(status=307, headers={"Location": "http://127.0.0.1:9/"})]
    with pytest.raises(RequestRejected, match="not followed"):
        await engine.score(LABELS.queries(prompts(1)))
    await engine.aclose()


async def test_a_large_body_travels_whole(server: FakeVLLM) -> None:
    engine = await started(server)
    shared = Segment("d", list(range(100_000, 107_000)))
    pool = [Prompt((shared, Segment("q", [i]))) for i in range(60)]
    before = engine.bytes_sent
    answer = await engine.score(LABELS.queries(pool))
    body = len(token_body(vllm_fields(server.model, LABELS.asked.ids), pool))
    assert engine.bytes_sent - before == body
    assert log_odds(answer.logprobs[59]) == pytest.approx(hashed_log_odds(pool[59].token_ids))
    await engine.aclose()


# What was paid for is kept, and only what the same server gave is taken


async def test_answers_beside_one_that_lacks_a_label_are_kept(server: FakeVLLM) -> None:
    engine = await started(server)
    server.faults = [Fault(patch=lambda answer: answer["choices"][2]["logprobs"]["top_logprobs"][0].clear())]
    heard: dict[int, float] = {}

    def on_answer(positions: Any, answer: EngineAnswer) -> None:
        heard.update(zip(positions, (log_odds(logprobs) for logprobs in answer.logprobs), strict=True))

    with pytest.raises(MissingLabel, match="claim 2"):
        await engine.score(LABELS.queries(prompts(4)), on_answer=on_answer)
    assert heard == {at: pytest.approx(hashed_log_odds(prompts(4)[at].token_ids)) for at in (0, 1, 3)}
    await engine.aclose()


async def test_answers_on_their_way_when_another_request_fails_are_kept(server: FakeVLLM) -> None:
    engine = await started(server, prompts_per_request=1)
    bad = Fault(status=400, body={"error": {"message": "bad prompt"}}, only=lambda b: b["prompt"][0][-1] == 2)
    server.faults = [bad, Fault(delay=0.3, times=None)]
    heard: list[int] = []
    with pytest.raises(RequestRejected, match="bad prompt"):
        await engine.score(LABELS.queries(prompts(5)), on_answer=lambda positions, _: heard.extend(positions))
    assert sorted(heard) == [0, 1, 3, 4]
    await engine.aclose()


async def test_nothing_new_is_sent_after_a_failure(server: FakeVLLM) -> None:
    options = HttpOptions(retry=QUICK, max_concurrent_requests=1)
    engine = await started(server, prompts_per_request=1, options=options)
    server.faults = [Fault(status=400, body={"error": {"message": "bad prompt"}})]
    asked = len(server.pools)
    with pytest.raises(RequestRejected, match="bad prompt"):
        await engine.score(LABELS.queries(prompts(20)))
    assert len(server.pools) == asked + 1
    await engine.aclose()


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": "0.99"}, "version '0.99', not '0.26.0"),
        ({"root": "/models/other"}, "root '/models/other'"),
        ({"log_odds": lambda tokens: 0.3 - hashed_log_odds(tokens)}, "other answers to a fixed prompt"),
        ({"model": "another"}, "serves 'another'|does not exist"),
    ],
)
async def test_a_server_that_comes_back_as_another_is_not_believed(
    changes: dict[str, Any], told: str, trees: bool
) -> None:
    server = FakeVLLM(trees=trees)
    await server.__aenter__()
    engine = await started(server)
    assert len((await engine.score(LABELS.queries(prompts(2)))).logprobs) == 2
    await server.__aexit__()
    for name, value in changes.items():
        setattr(server, name, value)
    heard: list[int] = []
    async with server:
        with pytest.raises((ServerChanged, RequestRejected), match=told):
            await engine.score(LABELS.queries(prompts(4)), on_answer=lambda positions, _: heard.extend(positions))
        assert not heard
        await engine.aclose()


async def test_a_server_that_comes_back_in_another_type_is_not_believed() -> None:
    async with FakeVLLM(trees=True, dtype="bfloat16") as server:
        engine = await started(server)
        engine._http.epoch += 1
        assert len((await engine.score(LABELS.queries(prompts(2)))).logprobs) == 2
        server.dtype = "float32"
        engine._http.epoch += 1
        with pytest.raises(ServerChanged, match="dtype 'float32', not 'bfloat16'"):
            await engine.score(LABELS.queries(prompts(2, length=5)))
        await engine.aclose()


async def test_a_server_that_comes_back_with_another_configuration_of_its_model_is_not_believed() -> None:
    async with FakeVLLM(trees=True, config="one") as server:
        engine = await started(server)
        assert engine._check is not None
        assert engine._check.known.config == "one"
        server.config = "another"
        engine._http.epoch += 1
        with pytest.raises(ServerChanged, match="another configuration of the model"):
            await engine.score(LABELS.queries(prompts(2)))
        await engine.aclose()


async def test_a_server_that_comes_back_as_it_was_is_believed_and_asked_once_who_it_is() -> None:
    server = FakeVLLM()
    await server.__aenter__()
    engine = await started(server, prompts_per_request=1)
    await server.__aexit__()
    async with server:
        before = len(server.requests)
        answer = await engine.score(LABELS.queries(prompts(4)))
        assert len(answer.logprobs) == 4
        assert server.requests[before:].count("/version") == 1
        assert server.requests.count("/version") == 2
        await engine.score(LABELS.queries(prompts(4, length=5)))
        assert server.requests.count("/version") == 2
        await engine.aclose()


async def test_kernels_may_differ_a_little_between_two_askings(server: FakeVLLM) -> None:
    engine = await started(server)
    server.log_odds = lambda tokens: hashed_log_odds(tokens) + 0.1
    engine._http.epoch += 1
    await engine.score(LABELS.queries(prompts(1)))
    await engine.aclose()


async def test_an_extension_that_was_lost_is_found_again(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(trees=True) as server:
        engine = await started(server)
        server.trees = False
        await engine.score(LABELS.queries(prompts(2)))
        assert not engine.takes_trees
        server.trees = True
        await engine.score(LABELS.queries(prompts(2, length=4)))
        assert not engine.takes_trees  # not asked at every request
        engine._extension.again = time.monotonic()  # a minute later
        await engine.score(LABELS.queries(prompts(2, length=5)))
        assert engine.takes_trees
        assert server.requests[-1] == PATH
        assert caplog.text.count("takes pools as trees again") == 1
        await engine.aclose()


async def test_an_answer_to_other_prompts_is_asked_for_again(server: FakeVLLM) -> None:
    engine = await started(server)
    server.faults = [Fault(patch=lambda answer: answer["usage"].update(prompt_tokens=999))]
    assert (await engine.score(LABELS.queries(prompts(2)))).retries == 1
    await engine.aclose()


# Servers as people run them


def odds(answer: EngineAnswer) -> list[float]:
    return [log_odds(logprobs) for logprobs in answer.logprobs]


def expected(pool: list[Prompt]) -> Any:
    return pytest.approx([hashed_log_odds(prompt.token_ids) for prompt in pool])


class Kept(dict[int, float]):
    """What on_answer hears, by position."""

    def __call__(self, positions: Any, answer: EngineAnswer) -> None:
        self.update(zip(positions, odds(answer), strict=True))


def has(token: int) -> Callable[[dict[str, Any]], bool]:
    return lambda body: any(prompt[-1] == token for prompt in body["prompt"])


@pytest.mark.parametrize("trees", [False, True])
async def test_every_path_lies_behind_a_gateways_prefix(trees: bool) -> None:
    async with FakeVLLM(prefix="/models/one", trees=trees, api_key=KEY) as server:
        assert server.url.endswith("/models/one")
        engine = await started(server, api_key=SecretStr(KEY), options=HttpOptions(liveness_timeout=0.3))
        server.latency = 0.3
        assert odds(await engine.score(LABELS.queries(prompts(4)))) == expected(prompts(4))
        assert engine.takes_trees == trees
        assert await engine.tokenize([" True"]) == [[TRUE]]
        assert await engine.kv_cache_tokens() == 4096 * 16
        assert await engine.prefix_cache() is not None
        paths = {"/v1/models", "/version", "/tokenize", "/v1/completions", "/metrics", "/health", PATH}
        assert set(server.requests) == paths, "and none outside of it"
        await engine.aclose()


async def test_without_tokenize_texts_are_tokenized_by_completing_them(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(chat_template="[{}]") as whole:
        engine = await started(whole)
        identity, texts = await engine.start(), [" True", "", "a b", "x" * 300_000, "\n\n"]
        asked = [await engine.tokenize(texts), await engine.tokenize(["a", "b"], special=True)]
        chat = await engine.tokenize_chat(["Is it?"])
        await engine.aclose()
    async with FakeVLLM(chat_template="[{}]", tokenizes=False) as server:
        engine = await started(server)
        assert await engine.start() == identity
        assert engine.exact_labels
        assert [await engine.tokenize(texts), await engine.tokenize(["a", "b"], special=True)] == asked
        assert await engine.tokenize_chat(["Is it?"]) == chat
        assert await engine.tokenize([]) == []
        assert await spell_labels(engine) == two(TRUE, FALSE)
        assert odds(await engine.score(LABELS.queries(prompts(4)))) == expected(prompts(4))
        engine._http.epoch += 1
        assert odds(await engine.score(LABELS.queries(prompts(4, length=5)))) == expected(prompts(4, length=5))
        assert caplog.text.count("passes no /tokenize on (HTTP 404)") == 1
        assert server.requests.count("/tokenize") == 1
        server.chat_template = None
        assert await engine.tokenize_chat(["Is it?"]) is None
        await engine.aclose()


async def test_without_any_token_ids_the_setting_is_named() -> None:
    async with FakeVLLM(tokenizes=False, tells_token_ids=False) as server:
        engine = client(server)
        with pytest.raises(ConfigurationError, match="passes no /tokenize on") as caught:
            await engine.start()
        assert f"USE_VLLM=false and LLAMA_API_BASE={server.url}/v1" in caught.value.hint
        assert server.completions[0]["prompt"] == [CANARY_TEXT]
        await engine.aclose()


@pytest.mark.parametrize("miscounts", [(1, 0), (0, 1), (0, -1)])
async def test_a_gateway_that_counts_a_token_more_or_less_is_believed(
    miscounts: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeVLLM(miscounts=miscounts) as server:
        engine = await started(server)
        answer = await engine.score(LABELS.queries(prompts(5)))
        assert (odds(answer), answer.retries, answer.prompt_tokens) == (expected(prompts(5)), 0, 5 * 4)
        assert caplog.text.count("this count is accepted") == 1
        engine._http.epoch += 1
        assert odds(await engine.score(LABELS.queries(prompts(3, length=5)))) == expected(prompts(3, length=5))
        server.faults = [Fault(patch=lambda answer: answer["usage"].update(prompt_tokens=5 * 4 + 7))]
        assert (await engine.score(LABELS.queries(prompts(5, length=6)))).retries == 1, "an answer to other prompts"
        await engine.aclose()


async def test_a_first_count_that_was_a_slip_is_forgotten(server: FakeVLLM) -> None:
    server.faults = [Fault(patch=lambda answer: answer["usage"].update(prompt_tokens=99), times=2)]
    engine = await started(server)
    assert odds(await engine.score(LABELS.queries(prompts(2)))) == expected(prompts(2))
    server.faults = [Fault(patch=lambda answer: answer["usage"].update(prompt_tokens=9))]
    assert (await engine.score(LABELS.queries(prompts(2, length=5)))).retries == 1
    await engine.aclose()


@pytest.mark.parametrize(
    ("knobs", "told", "todo"),
    [
        ({"miscounts": (0, 1), "adds_bos": True}, "it is sent on as something else", "chat template"),
        ({"adds_bos": True}, "it adds a token", "add_special_tokens"),
        ({"miscounts": (0, 14)}, "counts 20 tokens for a prompt of 6", "as they are"),
    ],
)
async def test_a_gateway_that_sends_on_other_tokens_is_refused(knobs: dict[str, Any], told: str, todo: str) -> None:
    async with FakeVLLM(**knobs) as server:
        if knobs.get("adds_bos"):  # which this model's answers show
            server.log_odds = lambda tokens: 3.0 if tokens[:2] == [BOS, BOS] else -3.0
            server.drop = set(range(200_000, 200_040))
        engine = client(server)
        with pytest.raises(ConfigurationError, match=told) as caught:
            await engine.start()
        assert todo in caught.value.hint
        assert server.url in str(caught.value)
        await engine.aclose()


@pytest.mark.parametrize("above", [20.0, 2.0, -40.0])
@pytest.mark.parametrize("support", ["yes", "ignored"])
async def test_logits_in_place_of_logprobs_are_named(above: float, support: str) -> None:
    async with FakeVLLM(logits=above, exact_labels=support) as server:
        engine = client(server)
        with pytest.raises(ConfigurationError, match="log-probabilit") as caught:
            await engine.start()
        assert "--logprobs-mode raw_logits or processed_logits" in caught.value.hint
        assert "--logprobs-mode raw_logprobs" in caught.value.hint
        assert len(str(caught.value).splitlines()) == 1
        assert len(server.completions) <= 3
        await engine.aclose()


async def test_a_server_that_comes_back_with_logits_is_not_believed(server: FakeVLLM) -> None:
    engine = await started(server)
    server.logits = 20.0
    engine._http.epoch += 1
    with pytest.raises((ServerChanged, RetriesExhausted), match="above 0"):
        await engine.score(LABELS.queries(prompts(2)))
    await engine.aclose()


async def test_an_old_server_that_lacks_a_label_is_told_from_a_prompt_that_ends_wrongly() -> None:
    async with FakeVLLM(exact_labels="ignored") as server:
        server.version = "0.19.1"
        engine = await started(server)
        server.drop = {TRUE}
        with pytest.raises(MissingLabel) as caught:
            await engine.score(LABELS.queries(prompts(2)))
        assert "This server (vLLM 0.19.1) lists only its top 20; vLLM 0.26 and newer" in caught.value.hint
        assert "missing_label to floor" in caught.value.hint
        await engine.aclose()


@pytest.mark.parametrize("trees", [False, True])
async def test_requests_too_large_for_what_stands_before_the_server_are_split(
    trees: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shared = Segment("d", list(range(100_000, 100_300)))
    pool = [Prompt((shared, Segment("q", list(range(i, i + 40)))), name=f"claim {i}") for i in range(64)]
    async with FakeVLLM(trees=trees, max_body=5_000) as server:
        engine = await started(server)
        kept = Kept()
        answer = await engine.score(LABELS.queries(pool), on_answer=kept)
        assert (odds(answer), sorted(kept)) == (expected(pool), list(range(64)))
        assert answer.requests == len(server.pools) > 1
        refused = server.requests.count(PATH if trees else "/v1/completions")
        again = len(server.pools)
        assert odds(await engine.score(LABELS.queries(pool))) == expected(pool)
        now = server.requests.count(PATH if trees else "/v1/completions")
        later = server.pools[again:]
        assert now - refused == len(later), "none is refused again"
        assert [body["prompt"][0][-1] for body in later] == sorted(body["prompt"][0][-1] for body in later)
        assert "takes no request of" in caplog.text
        await engine.aclose()


@pytest.mark.parametrize("trees", [False, True])
async def test_a_prompt_that_is_too_large_alone_is_named(trees: bool) -> None:
    pool = [*prompts(3), Prompt((Segment("long", list(range(100_000, 101_000))),), name="claim long")]
    async with FakeVLLM(trees=trees, max_body=5_000) as server:
        engine = await started(server)
        kept = Kept()
        with pytest.raises(RequestRejected, match=r"prompt 'claim long' alone is a request of 7,\d+ bytes") as caught:
            await engine.score(LABELS.queries(pool), on_answer=kept)
        assert (caught.value.status, "client_max_body_size" in caught.value.hint) == (413, True)
        assert set(kept) >= {0, 1}
        await engine.aclose()


NAN = Fault(patch=lambda answer: answer["choices"][-1]["logprobs"]["token_logprobs"].append(float("nan")))


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(status=500, body={"error": {"message": "out of range"}}), RetriesExhausted),
        (NAN, RetriesExhausted),
        (Fault(status=400, body={"error": {"message": "out of range"}}), RequestRejected),
    ],
)
@pytest.mark.parametrize("bad", [{0}, {37}, {63}, {20, 21, 50}])
@pytest.mark.parametrize("trees", [False, True])
async def test_a_prompt_that_fails_its_request_is_found_and_the_others_are_kept(
    fault: Fault, error: type[Exception], bad: set[int], trees: bool
) -> None:
    if trees and fault is NAN:
        fault = Fault(patch=lambda answer: answer["logprobs"].append(float("nan")))
    async with FakeVLLM(trees=trees) as server:
        engine = await started(server)
        server.faults = [
            Fault(**{**vars(fault), "times": None, "only": lambda body: any(has(token)(body) for token in bad)})
        ]
        kept = Kept()
        with pytest.raises(error) as caught:
            await engine.score(LABELS.queries(prompts(64)), on_answer=kept)
        for token in bad:
            assert f"'claim {token}'" in str(caught.value)
        assert str(caught.value).count("'claim ") == len(bad)
        assert server.url in str(caught.value)
        assert kept == {at: pytest.approx(hashed_log_odds(prompts(64)[at].token_ids)) for at in set(range(64)) - bad}
        assert len(server.pools) <= 3 + len(bad) * 3 * 6
        await engine.aclose()


@pytest.mark.parametrize(("status", "error"), [(500, RetriesExhausted), (400, RequestRejected)])
async def test_a_prompt_that_was_sent_alone_is_named(server: FakeVLLM, status: int, error: type[Exception]) -> None:
    engine = await started(server, prompts_per_request=1)
    server.faults = [Fault(status=status, body={"error": {"message": "boom"}}, only=has(2), times=None)]
    with pytest.raises(error, match=r"^prompt 'claim 2': .*boom"):
        await engine.score(LABELS.queries(prompts(4)))
    await engine.aclose()


async def test_a_prompt_that_failed_only_for_a_while_is_answered(server: FakeVLLM) -> None:
    engine = await started(server)
    server.faults = [Fault(status=500, times=4)]
    answer = await engine.score(LABELS.queries(prompts(8)))
    assert odds(answer) == expected(prompts(8))
    assert answer.requests == 2
    await engine.aclose()


@pytest.mark.parametrize("status", [400, 500])
async def test_a_server_that_fails_for_everything_is_soon_left_alone(server: FakeVLLM, status: int) -> None:
    engine = await started(server)
    server.faults = [Fault(status=status, body={"error": {"message": "boom"}}, times=None)]
    with pytest.raises((RetriesExhausted, RequestRejected), match="boom") as caught:
        await engine.score(LABELS.queries(prompts(1024)))
    assert "claim" not in str(caught.value)
    attempts = {400: (1, 1), 500: (3, 2)}[status]
    assert len(server.pools) <= attempts[0] + attempts[1] * 13
    await engine.aclose()


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}), "down"])
async def test_a_server_that_is_busy_or_gone_is_not_searched(fault: Fault | str, server: FakeVLLM) -> None:
    engine = await started(server)
    asked = len(server.completions)
    if isinstance(fault, str):
        await server.__aexit__()
    else:
        server.faults = [Fault(**{**vars(fault), "times": None})]
    with pytest.raises(RetriesExhausted, match="after 3 attempts"):
        await engine.score(LABELS.queries(prompts(64)))
    assert len(server.completions) - asked == (0 if fault == "down" else 3)
    await engine.aclose()


async def test_a_search_ends_where_another_request_fails_for_good(server: FakeVLLM) -> None:
    options = HttpOptions(retry=QUICK, max_concurrent_requests=1)
    engine = await started(server, options=options, prompts_per_request=16)
    server.faults = [
        Fault(status=400, body={"error": {"message": "bad prompt"}}, only=has(3), times=None),
        Fault(status=401, body={"error": {"message": "no more"}}, only=has(20), times=None),
    ]
    with pytest.raises(RequestRejected, match="no more"):
        await engine.score(LABELS.queries(prompts(64)))
    assert len(server.pools) <= 3
    await engine.aclose()


@pytest.mark.parametrize("trees", [False, True])
async def test_connections_that_end_after_every_answer_cost_a_check_an_answer_and_no_more(trees: bool) -> None:
    options = HttpOptions(retry=RetryPolicy(6, base=0.01, cap=0.05), max_concurrent_requests=1)
    async with FakeVLLM(trees=trees, dtype="float32", drops_connections=True) as server, asyncio.timeout(60):
        engine = await started(server, options=options, prompts_per_request=8)
        asked = len(server.requests)
        assert odds(await engine.score(LABELS.queries(prompts(32)))) == expected(prompts(32))
        a_check = 5 if trees else 4
        assert len(server.requests) - asked <= 4 * (1 + a_check) + 8  # some break before they are answered
        server.log_odds = lambda tokens: 0.3 - hashed_log_odds(tokens)
        kept = Kept()
        with pytest.raises(ServerChanged, match="other answers to a fixed prompt"):
            await engine.score(LABELS.queries(prompts(16, length=5)), on_answer=kept)
        assert not kept
        await engine.aclose()
