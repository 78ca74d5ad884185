"""Several servers as one engine: parts of the tree, servers that fail, come back, differ; against real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigurationError, RequestRejected, RetriesExhausted, ServerUnreachable
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import VLLMGroup, server_for
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI
from core.llm_api.types import Engine, EngineAnswer, Prompt, Segment
from fakes.vllm_server import BOS, FALSE, TRUE, FakeVLLM, Fault, encode, hashed_log_odds
from src.icm.prefix_tree import TreeLayout
from src.icm.prompts import PromptBook
from tests.core.two_labels import log_odds, two

LABELS = two(TRUE, FALSE)
QUICK = RetryPolicy(max_attempts=4, deadline=10, base=0.01, cap=0.02)
SIZE = 32


def group_of(servers: Iterable[FakeVLLM], *, probe_after: float = 60.0, **kwargs: object) -> VLLMGroup:
    options = HttpOptions(retry=QUICK, read_timeout=5)
    clients = [VLLMClient(server.url, "fake-8b", options=options, **kwargs) for server in servers]
    return VLLMGroup(clients, patience=QUICK, probe_after=probe_after)


@contextlib.asynccontextmanager
async def servers(count: int) -> AsyncIterator[list[FakeVLLM]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeVLLM()) for _ in range(count)]


@contextlib.asynccontextmanager
async def started(fakes: Sequence[FakeVLLM], **kwargs: object) -> AsyncIterator[VLLMGroup]:
    before = asyncio.all_tasks()
    group = group_of(fakes, **kwargs)
    try:
        await group.start()
        yield group
    finally:
        await group.aclose()
        await asyncio.sleep(0)
        ours = asyncio.all_tasks() - before
        # Handlers of the fake servers live in this loop too.
        assert not [task for task in ours if "RequestHandler" not in repr(task.get_coro())]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def pool(size: int = 8) -> list[Prompt]:
    return [Prompt((Segment("q", [50 + i]),), name=f"claim {i}", place=i / size) for i in range(size)]


def asked(server: FakeVLLM) -> list[list[int]]:
    """The prompts that a server was sent, without canaries and probes."""
    return [prompt for body in server.completions for prompt in body["prompt"] if body.get("logprobs") != 20
            and prompt != body_of_probe(server)]  # fmt: skip


def body_of_probe(server: FakeVLLM) -> list[int]:
    return server.completions[0]["prompt"][0]


def expected(prompts: Sequence[Prompt]) -> list[float]:
    return [hashed_log_odds(prompt.token_ids) for prompt in prompts]


def odds(answer: EngineAnswer) -> list[float]:
    return [log_odds(logprobs) for logprobs in answer.logprobs]


# Who is asked


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 9))
def test_every_server_has_an_equal_part_in_order(place: float, count: int) -> None:
    server = server_for(place, count, range(count))
    assert 0 <= server < count
    assert server / count <= place + 1e-12
    assert place <= (server + 1) / count + 1e-12


@given(st.integers(2, 8), st.data())
def test_those_that_are_up_keep_their_parts_and_divide_the_others_evenly(count: int, data: st.DataObject) -> None:
    up = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    grid = count * len(up) * 4
    places = [(i + 0.5) / grid for i in range(grid)]
    homes = [server_for(place, count, range(count)) for place in places]
    now = [server_for(place, count, up) for place in places]
    assert all(there == home for there, home in zip(now, homes, strict=True) if home in up)
    for lost in set(range(count)) - set(up):
        heirs = [there for there, home in zip(now, homes, strict=True) if home == lost]
        assert heirs == sorted(heirs), "neighbours stay together"
        assert set(Counter(heirs).values()) == {4}
        assert set(heirs) == set(up)


@given(st.integers(1, 64), st.integers(0, 5))
def test_two_to_the_n_servers_hold_subtrees(size: int, seed: int) -> None:
    layout = TreeLayout.build(range(size), [str(i // 2) for i in range(size)], np.random.default_rng(seed))
    subtrees = [layout.root]
    for count in (2, 4, 8):
        subtrees = [half for node in subtrees if isinstance(node, tuple) for half in node]
        held: dict[int, set[int]] = {}
        for claim in layout.questions:
            held.setdefault(server_for(layout.place(claim), count, range(count)), set()).add(claim)
        for node in subtrees:
            assert any(_leaves(node) <= claims for claims in held.values())


def _leaves(node: object) -> set[int]:
    return {node} if isinstance(node, int) else _leaves(node[0]) | _leaves(node[1])


def book(size: int) -> PromptBook:
    texts = [f"c{i}" for i in range(size)]
    return PromptBook.build(texts, LABELS, tokens=[[100 * i + j for j in range(5)] for i in range(1, size + 1)])


def questions(layout: TreeLayout, labels: Sequence[bool], book_: PromptBook) -> list[Prompt]:
    return [book_.prompt(c, layout.context(c), labels, layout.place(c)) for c in layout.questions]


def distinct_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """What an unlimited prefix cache computes: the edges of the prompts' trie."""
    seen: set[int] = set()
    for prompt in prompts:
        prefix = 0
        for token in prompt:
            prefix = hash((prefix, token))
            seen.add(prefix)
    return len(seen)


@pytest.mark.parametrize("count", [2, 4])
async def test_every_server_computes_its_own_part_and_keeps_it_as_the_tail_grows(count: int) -> None:
    labels = [i % 3 == 0 for i in range(SIZE)]
    texts = book(SIZE)
    layout = TreeLayout.build(range(SIZE - 4), [str(i) for i in range(SIZE)], np.random.default_rng(0))
    async with servers(count) as fakes, started(fakes) as group:
        prompts = questions(layout, labels, texts)
        assert odds(await group.score(LABELS.queries(prompts))) == pytest.approx(expected(prompts))
        own = [asked(fake) for fake in fakes]
        assert [prompt for part in own for prompt in part] == [p.token_ids for p in prompts], "contiguous, in order"
        # A level's edges hold every demonstration once; level n (from 0) is shared by count / 2**(n + 1) servers.
        demonstrations = sum(len(true) for _, true in texts.demonstrations[: SIZE - 4])
        shared = sum(demonstrations * (count // 2 ** (level + 1) - 1) for level in range(count.bit_length() - 2))
        whole = distinct_tokens(p.token_ids for p in prompts)
        assert sum(map(distinct_tokens, own)) == whole + shared
        home = {claim: at for claim in layout.questions for at, part in enumerate(own)
                if texts.questions[claim].tokens in {tuple(p[-5:]) for p in part}}  # fmt: skip
        for claim in range(SIZE - 4, SIZE):
            layout = layout.append(claim)
            for fake in fakes:
                fake.completions[2:] = []
            await group.score(LABELS.queries(questions(layout, labels, texts)))
            for at, fake in enumerate(fakes):
                for prompt in asked(fake):
                    claim_asked = next(c for c in range(SIZE) if texts.questions[c].tokens == tuple(prompt[-5:]))
                    assert home.setdefault(claim_asked, at) == at


async def test_it_is_one_engine_whose_identity_tells_neither_number_nor_order() -> None:
    async with servers(3) as fakes:
        async with started(fakes[:1]) as one:
            alone = await one.start()
        async with started(fakes[::-1]) as three:
            assert isinstance(three, Engine)
            assert await three.start() == alone
            assert await three.tokenize(["a b"]) == await one.tokenize(["a b"])
            assert await three.detokenize(await three.tokenize(["a b"])) == ["a b"]
            assert await three.score(LABELS.queries([])) == EngineAnswer([], 0, requests=0, cached_tokens=0)
        await one.aclose()


async def test_shares_of_two_labelings_come_back_in_order_and_are_heard_once() -> None:
    async with servers(3) as fakes, started(fakes, prompts_per_request=2) as group:
        prompts = [*pool(9), *(Prompt((Segment("r", [90 + i]),), place=i / 9) for i in range(9))]
        heard: list[int] = []

        def on_answer(positions: Sequence[int], answer: EngineAnswer) -> None:
            assert odds(answer) == pytest.approx(expected([prompts[at] for at in positions]))
            heard.extend(positions)

        answer = await group.score(LABELS.queries(prompts), on_answer=on_answer)
        assert odds(answer) == pytest.approx(expected(prompts))
        assert sorted(heard) == list(range(18))
        assert (answer.requests, answer.prompt_tokens, answer.retries) == (9, 18, 0)
        assert [len(asked(fake)) for fake in fakes] == [6, 6, 6]


# Servers that fail


async def test_a_server_lost_before_a_request_is_stood_in_for_and_the_others_keep_their_parts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with servers(3) as fakes, started(fakes) as group:
        prompts = pool(12)
        await group.score(LABELS.queries(prompts))
        before = [asked(fake) for fake in fakes]
        await fakes[1].__aexit__()
        for _ in range(2):
            for fake in fakes:
                fake.completions[2:] = []
            assert odds(await group.score(LABELS.queries(prompts))) == pytest.approx(expected(prompts))
            for kept, heir in ((0, before[1][:2]), (2, before[1][2:])):
                assert sorted(asked(fakes[kept])) == sorted(before[kept] + heir)
        assert caplog.text.count("dropped out") == 1


async def test_a_server_killed_in_the_middle_of_a_request_costs_only_what_it_had_not_answered() -> None:
    async with servers(2) as fakes, started(fakes, prompts_per_request=1) as group:
        prompts = pool(8)
        # It answers two prompts at once and would take for ever for the others.
        fakes[0].faults = [Fault(delay=30, times=None, only=lambda body: body["prompt"][0][0] > 51)]
        heard: Counter[int] = Counter()
        scoring = asyncio.create_task(
            group.score(LABELS.queries(prompts), on_answer=lambda positions, _: heard.update(positions))
        )
        await until(lambda: len(heard) == 6)
        await fakes[0].__aexit__()
        assert odds(await scoring) == pytest.approx(expected(prompts))
        assert set(heard.values()) == {1}
        assert sorted(prompt[0] for prompt in asked(fakes[1])) == [52, 53, 54, 55, 56, 57]


async def test_what_one_server_answered_is_paid_once_though_another_refuses() -> None:
    async with servers(2) as fakes:
        fakes[1].faults = [
            Fault(status=400, body={"error": "bad"}, only=lambda body: [54] in body["prompt"], times=None)
        ]
        fakes[1].faults[0].delay = 0.2
        async with ModelAPI(group_of(fakes)) as api:
            with pytest.raises(RequestRejected, match="bad"):
                await api.score(pool(), LABELS)
            assert api.stats.engine_prompts == 7, "all but the one"
        assert len(asked(fakes[0])) == 4, "what every server would refuse is not sent to another one"


async def test_many_servers_may_fail_one_after_the_other() -> None:
    async with servers(5) as fakes, started(fakes) as group:
        prompts = pool(20)
        for fake in fakes[:4]:
            fake.faults = [Fault(status=500, times=None)]
        assert odds(await group.score(LABELS.queries(prompts))) == pytest.approx(expected(prompts))
        assert odds(await group.score(LABELS.queries(prompts))) == pytest.approx(expected(prompts))
        assert fakes[4].pools


async def test_a_server_with_others_beside_it_is_given_up_sooner_than_the_last_one() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        for fake in fakes:
            fake.faults = [Fault(status=500, times=None)]
        with pytest.raises(RetriesExhausted, match="after 4 attempts"):
            await group.score(LABELS.queries(pool()))
        tries = sorted(len(fake.pools) for fake in fakes)
        assert tries[0] == 3
        fakes[0].faults = fakes[1].faults = []
        assert odds(await group.score(LABELS.queries(pool()))) == pytest.approx(expected(pool())), (
            "it goes on afterwards"
        )


async def test_the_last_server_is_waited_for_even_if_it_was_asked_in_a_hurry() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        fakes[1].faults = [Fault(status=500, times=None)]
        fakes[0].faults = [Fault(status=500, delay=0.05, times=5)]
        assert odds(await group.score(LABELS.queries(pool()))) == pytest.approx(expected(pool()))


async def test_two_batches_at_once_survive_a_loss() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        await fakes[0].__aexit__()
        first, second = await asyncio.gather(group.score(LABELS.queries(pool(8))), group.score(LABELS.queries(pool(4))))
        assert odds(first) == pytest.approx(expected(pool(8)))
        assert odds(second) == pytest.approx(expected(pool(4)))


async def test_a_lost_server_gets_its_part_back_when_it_is_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    async with servers(2) as fakes, started(fakes, probe_after=0.05) as group:
        await fakes[1].__aexit__()
        await group.score(LABELS.queries(pool()))
        assert asked(fakes[1]) == []
        fakes[1].salt = "another model"
        async with fakes[1]:
            await until(lambda: "stays out: fingerprint" in caplog.text)
            await group.score(LABELS.queries(pool()))
            assert len(asked(fakes[0])) == 16
            fakes[1].salt = ""
            await until(lambda: "is back" in caplog.text)
            fakes[1].completions[2:] = []
            await group.score(LABELS.queries(pool()))
            assert [prompt[0] for prompt in asked(fakes[1])] == [54, 55, 56, 57]
        assert caplog.text.count("stays out") == 1


async def test_a_server_that_is_down_at_the_start_may_join_later(caplog: pytest.LogCaptureFixture) -> None:
    async with servers(1) as fakes:
        late = FakeVLLM()
        async with late:
            pass  # a port of its own, where nothing answers
        async with started([late, *fakes], probe_after=0.05) as group:
            assert "cannot be asked yet" in caplog.text
            assert odds(await group.score(LABELS.queries(pool()))) == pytest.approx(expected(pool()))
            async with late:
                await until(lambda: "is back" in caplog.text)
                await group.score(LABELS.queries(pool()))
                assert [prompt[0] for prompt in asked(late)] == [50, 51, 52, 53]


async def test_tokenizing_goes_on_with_another_server() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        await fakes[0].__aexit__()
        assert await group.tokenize([" True"]) == [[TRUE]]
        assert await group.detokenize([[TRUE]]) == [" True"]
        assert await group.tokenize_chat(["Hello"]) is None
        fakes[1].chat_template = "{}:"
        assert await group.tokenize_chat(["Hello"]) == [[BOS, *encode("Hello:")]]


# Servers that cannot be used


@pytest.mark.parametrize("known", [0, 1])
async def test_a_server_that_does_not_say_its_type_is_no_other_engine(known: int) -> None:
    async with servers(2) as fakes:
        fakes[known].trees, fakes[known].dtype, fakes[known].config = True, "bfloat16", "c" * 64
        group = group_of(fakes)
        identity = await group.start()
        assert (identity.dtype, identity.config) == ("bfloat16", "c" * 64)
        assert len((await group.score(LABELS.queries(pool()))).logprobs) == 8
        await group.aclose()
        fakes[1 - known].trees, fakes[1 - known].dtype = True, "float32"
        other = group_of(fakes)
        with pytest.raises(ConfigurationError, match=r"is not like .*: dtype '"):
            await other.start()
        await other.aclose()
        fakes[1 - known].dtype, fakes[1 - known].config = "bfloat16", "d" * 64
        other = group_of(fakes)
        with pytest.raises(ConfigurationError, match=r"is not like .*: config '[cd]{12}', not '[cd]{12}'"):
            await other.start()
        await other.aclose()


@pytest.mark.parametrize(("knob", "value"), [("salt", "x"), ("root", "/models/other"), ("max_model_len", 4096)])
async def test_servers_that_differ_are_refused_by_name(knob: str, value: object) -> None:
    async with servers(3) as fakes:
        setattr(fakes[2], knob, value)
        group = group_of(fakes)
        what = {"salt": "fingerprint"}.get(knob, knob)
        with pytest.raises(ConfigurationError, match=f"{fakes[2].url} is not like {fakes[0].url}: {what} "):
            await group.start()
        await group.aclose()


async def test_no_server_at_all_is_told_with_every_url() -> None:
    async with servers(2) as fakes:
        pass
    group = group_of(fakes)
    with pytest.raises(ServerUnreachable, match=rf"{fakes[0].url}, {fakes[1].url}.*launch_vllm_server"):
        await group.start()
    with pytest.raises(RuntimeError, match="not started"):
        await group.tokenize(["x"])
    await group.aclose()
    await group.aclose()


async def test_all_lost_is_an_error_within_the_policy() -> None:
    async with servers(2) as fakes:
        async with started(fakes, probe_after=0.05) as group:
            for fake in fakes:
                await fake.__aexit__()
            began = time.monotonic()
            with pytest.raises(RetriesExhausted):
                await group.score(LABELS.queries(pool()))
            assert time.monotonic() - began < 5


async def test_a_server_that_dies_of_a_batch_and_is_restarted_is_not_asked_for_ever() -> None:
    async with servers(2) as fakes, started(fakes, probe_after=0.001) as group:
        for fake in fakes:
            # Time enough for the other one to be found again: it greets well, and dies of whole batches only.
            fake.faults = [Fault(disconnect=True, delay=0.1, times=None, only=lambda body: len(body["prompt"]) > 1)]
        async with asyncio.timeout(5):
            with pytest.raises(RetriesExhausted):
                await group.score(LABELS.queries(pool()))


# Counters, capacity, cancellation


async def test_counters_add_up_and_never_go_back() -> None:
    async with servers(2) as fakes, started(fakes, probe_after=0.02) as group:
        prompts = [Prompt((Segment("d", range(64)), Segment("q", [i])), place=i / 4) for i in range(4)]
        before = await group.prefix_cache()
        assert before is not None
        await group.score(LABELS.queries(prompts))
        both = await group.prefix_cache()
        assert both is not None
        assert (both - before).queries == 4 * 65
        assert (both - before).hits == 2 * 64
        assert await group.kv_cache_tokens() == 4096 * 16
        await fakes[0].__aexit__()
        alone = await group.prefix_cache()
        assert alone == both
        assert await group.kv_cache_tokens() == 4096 * 16
        fakes[0].queries = fakes[0].hits = 0  # a new process
        async with fakes[0]:
            await until(lambda: not group._probes)
            again = await group.prefix_cache()
            assert again is not None
            assert 0 <= (again - both).queries < 50, "the greeting of a server is all that it was asked"
        for fake in fakes:
            fake.metrics = False
        assert await group.prefix_cache() == again


async def test_no_counters_where_no_server_shows_any() -> None:
    async with servers(2) as fakes:
        for fake in fakes:
            fake.metrics = False
        async with started(fakes) as group:
            assert await group.prefix_cache() is None
            assert await group.kv_cache_tokens() is None


@pytest.mark.parametrize("lost", [False, True])
async def test_a_cancelled_request_leaves_nothing_running(lost: bool) -> None:
    async with servers(2) as fakes, started(fakes, probe_after=0.01) as group:
        if lost:
            await fakes[0].__aexit__()
            await group.score(LABELS.queries(pool()))
        fakes[1].latency = fakes[0].latency = 30
        scoring: Coroutine[object, object, EngineAnswer] = group.score(LABELS.queries(pool()))
        task = asyncio.create_task(scoring)
        await until(lambda: fakes[1].in_flight == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: fakes[0].in_flight == fakes[1].in_flight == 0)


def fails_for(token: int, status: int = 500) -> Fault:
    return Fault(status=status, body={"error": "ill"}, only=lambda body: [token] in body["prompt"], times=None)


async def test_a_claim_that_every_server_fails_for_is_named_and_the_others_are_kept() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        for fake in fakes:
            fake.faults = [fails_for(54)]
        heard: set[int] = set()
        with pytest.raises(RetriesExhausted, match="fails for 'claim 4'"):
            await group.score(LABELS.queries(pool()), on_answer=lambda positions, _: heard.update(positions))
        assert len(heard) == len(pool()) - 1


async def test_a_claim_that_one_server_fails_for_is_answered_by_another() -> None:
    async with servers(2) as fakes, started(fakes) as group:
        fakes[1].faults = [fails_for(54)]
        assert odds(await group.score(LABELS.queries(pool()))) == pytest.approx(expected(pool()))
