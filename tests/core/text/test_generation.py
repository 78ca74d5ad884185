"""Texts, chats, streams and embeddings over HTTP, against the fake server: what comes back, how each fails."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from core.errors import (
    ConfigurationError,
    RateLimited,
    RequestRejected,
    RetriesExhausted,
    ServerUnreachable,
    TransientError,
)
from core.llm_api.engines.external import ExternalAPI
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.engines.vllm_group import VLLMGroup
from core.llm_api.http import transport
from core.llm_api.http.rate_limit import RateLimiter
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.text.generation import (
    End,
    Failed,
    Generation,
    Message,
    Metrics,
    SamplingOptions,
    StreamEvent,
    TextEngine,
    Token,
    collect,
)
from core.settings import Settings
from fakes.text_server import FakeTextServer, Manner, written
from fakes.vllm_server import Fault, encode

QUICK = HttpOptions(retry=RetryPolicy(max_attempts=3, deadline=10, base=0.01, cap=0.02), read_timeout=5)
SHORT = SamplingOptions(max_tokens=5)
QUESTION = [Message("system", "Be brief."), Message("user", "Name a river")]
ORDER = re.compile(r"started (token )*metrics (end|error)")


def client(server: FakeTextServer, options: HttpOptions = QUICK, **rest: object) -> VLLMClient:
    return VLLMClient(server.url, server.model, options=options, **rest)


@pytest.fixture
async def server() -> AsyncIterator[FakeTextServer]:
    async with FakeTextServer() as fake:
        yield fake


@pytest.fixture
async def api(server: FakeTextServer) -> AsyncIterator[ModelAPI]:
    async with ModelAPI(client(server), scores=False) as opened:
        yield opened


async def events_of(api: ModelAPI, messages: Sequence[Message] = QUESTION) -> list[StreamEvent]:
    """All of them, in an order that every stream keeps."""
    events = [event async for event in api.stream_chat(messages, SHORT)]
    kinds = " ".join(event.kind for event in events)
    assert ORDER.fullmatch(kinds), kinds
    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    return events


def answer_to(prompt: str, tokens: int = 5) -> str:
    return "".join(written(prompt, index) for index in range(tokens))


async def test_prompts_are_continued_in_their_order(server: FakeTextServer, api: ModelAPI) -> None:
    prompts = [f"tell p{i}" for i in range(30)]
    server.latency = 0.02
    generations = await api.complete(prompts, SHORT)
    assert generations == [Generation(answer_to(prompt), "length", 2, 5) for prompt in prompts]
    assert server.max_in_flight > 10
    assert await api.complete([]) == []


async def test_options_travel_by_their_usual_names_and_defaults_do_not(server: FakeTextServer, api: ModelAPI) -> None:
    await api.chat(QUESTION, SamplingOptions(9, 0.7, 0.9, 3, ("\n", "END"), 0.5, -0.5))
    sent = server.completions[-1]
    assert sent == {
        "model": "fake-8b", "max_tokens": 9, "temperature": 0.7, "top_p": 0.9, "seed": 3, "stop": ["\n", "END"],
        "frequency_penalty": 0.5, "presence_penalty": -0.5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a river"}],
    }  # fmt: skip
    await api.complete(["x"], SamplingOptions(max_tokens=1, stop="END"))
    assert server.completions[-1] == {
        "model": "fake-8b", "max_tokens": 1, "temperature": 0.0, "stop": ["END"], "prompt": "x",
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
        {"seed": -1}, {"seed": 2**63}, {"stop": ("a", "")}, {"stop": ("a",) * 17}, {"frequency_penalty": 2.1},
        {"presence_penalty": -3.0},
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingOptions(**wrong)


async def test_a_conversation_without_turns_and_an_unknown_role_are_refused(api: ModelAPI) -> None:
    with pytest.raises(ValueError, match="role"):
        Message("robot", "x")
    with pytest.raises(ValueError, match="at least one"):
        await api.chat([])
    with pytest.raises(ValueError, match="empty"):
        await api.complete(["x", ""])


async def test_a_stream_says_the_same_as_the_whole_answer_and_what_it_took(
    server: FakeTextServer, api: ModelAPI
) -> None:
    server.manner.delay = 0.01
    events = await events_of(api)
    assert await collect(api.stream_chat(QUESTION, SHORT)) == await api.chat(QUESTION, SHORT)
    assert "".join(event.text for event in events if isinstance(event, Token)) == answer_to("river")
    assert events[-1] == End("length")
    metrics = events[-2]
    assert isinstance(metrics, Metrics)
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (len(encode("Name a river")), 5)
    assert metrics.time_to_first_token is not None
    assert 0.01 <= metrics.time_to_first_token <= metrics.seconds
    assert metrics.tokens_per_second is not None
    assert metrics.tokens_per_second <= 100
    assert events[0].request_id == server.request_ids[0]
    assert events[0].model == "fake-8b"


async def test_prompts_stream_too(server: FakeTextServer, api: ModelAPI) -> None:
    whole = await collect(api.stream_complete("tell me", SHORT))
    assert (whole.text, whole.finish_reason) == (answer_to("me"), "length")
    assert server.requests[-1] == "/v1/completions"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
async def test_however_the_bytes_are_cut_the_events_are_the_same(
    server: FakeTextServer, api: ModelAPI, line_end: str
) -> None:
    server.manner = Manner(
        line_end=line_end, comments=True, cut=lambda event: [event[i : i + 7] for i in range(0, len(event), 7)]
    )
    events = await events_of(api, [Message("user", "ein Fluß \N{WAVING HAND SIGN}x")])
    assert "".join(e.text for e in events if isinstance(e, Token)) == answer_to("\N{WAVING HAND SIGN}x")


@pytest.mark.parametrize(
    ("manner", "tokens", "told"),
    [
        (Manner(silent_after=2), 2, "broke off"),
        (Manner(broken_after=3), 3, "broke"),
        (Manner(error_after=1), 1, "the engine died"),
        (Manner(done=False), 5, "broke off"),
        (Manner(finish=False), 5, "without a reason"),
        (Manner(cut=lambda event: [event.replace(b'"choices"', b'"chices"')]), 0, "cannot be read"),
        (Manner(cut=lambda event: [event.replace(b"{", b"")]), 0, "cannot be read"),
    ],
)
async def test_a_stream_that_breaks_ends_in_one_error(
    server: FakeTextServer, api: ModelAPI, manner: Manner, tokens: int, told: str
) -> None:
    server.manner = manner
    events = await events_of(api)
    failed = events[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, TransientError)
    assert told in str(failed.error)
    assert len(events) == tokens + 3, "what came before the failure stands"
    with pytest.raises(TransientError, match=told):
        await collect(api.stream_chat(QUESTION, SHORT))


SILENT = RetryPolicy(max_attempts=2, deadline=60, base=0.01)


async def silenced(server: FakeTextServer, **limits: float) -> tuple[int, Exception]:
    """Tokens and the error of a stream from a server that falls silent."""
    options = HttpOptions(retry=SILENT, **limits)  # type: ignore[arg-type]
    async with asyncio.timeout(60), ModelAPI(client(server, options), scores=False) as api:
        events = await events_of(api)
    failed = events[-1]
    assert isinstance(failed, Failed)
    return len(events) - 3, failed.error


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_stream_whose_host_is_gone_ends_long_before_the_read_timeout(
    server: FakeTextServer, tokens: int
) -> None:
    server.manner = Manner(gone_after=tokens)
    came, error = await silenced(server, read_timeout=600, liveness_timeout=0.5)
    assert came == tokens
    assert isinstance(error, TransientError)
    assert "no sign of life for 0.5 s" in str(error)


async def test_a_stream_that_is_never_begun_is_given_up_and_asked_for_again(server: FakeTextServer) -> None:
    server.faults = [Fault(delay=600, times=1)]

    async def hang() -> None:
        while not server.request_ids:
            await asyncio.sleep(0.01)
        server.gone = True

    hung = asyncio.create_task(hang())
    came, error = await silenced(server, read_timeout=600, liveness_timeout=0.5)
    await hung
    assert came == 0
    assert isinstance(error, RetriesExhausted)
    assert "no sign of life for 0.5 s" in str(error)
    assert server.requests.count("/v1/chat/completions") == 2


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_stream_that_stalls_at_a_live_server_ends_after_the_read_timeout(
    server: FakeTextServer, tokens: int
) -> None:
    server.manner = Manner(stalls_after=tokens)
    came, error = await silenced(server, read_timeout=2, liveness_timeout=3)
    assert came == tokens
    assert isinstance(error, TransientError)
    assert "sent nothing for 2 s" in str(error)
    assert "/health" in server.requests, "it gave signs of life, and was waited for"


async def test_comments_that_keep_a_connection_open_are_silence(server: FakeTextServer) -> None:
    server.manner = Manner(comments_after=2)
    came, error = await silenced(server, read_timeout=2)
    assert came == 2
    assert isinstance(error, TransientError)
    assert "no event for 2 s" in str(error)


async def test_a_server_that_ends_in_the_middle_ends_the_stream(server: FakeTextServer) -> None:
    server.manner = Manner(stalls_after=2)
    async with ModelAPI(client(server), scores=False) as api, asyncio.timeout(60):
        async with aclosing(api.stream_chat(QUESTION, SHORT)) as events:
            last: StreamEvent | None = None
            async for last in events:
                if isinstance(last, Token) and last.index == 1:
                    await server.__aexit__()
    assert isinstance(last, Failed)
    assert isinstance(last.error, TransientError)


async def test_a_slow_stream_of_a_live_server_is_waited_for(server: FakeTextServer) -> None:
    server.manner = Manner(delay=0.9)
    options = HttpOptions(retry=SILENT, read_timeout=60, liveness_timeout=0.6)
    async with ModelAPI(client(server, options), scores=False) as api:
        assert (await events_of(api))[-1] == End("length")
    assert server.requests.count("/health") >= 5


async def test_a_reader_who_takes_long_over_a_token_does_not_end_the_stream(server: FakeTextServer) -> None:
    options = HttpOptions(retry=SILENT, read_timeout=1.5, liveness_timeout=1.5)
    async with ModelAPI(client(server, options), scores=False) as api:
        async with aclosing(api.stream_chat(QUESTION, SHORT)) as events:
            async for last in events:
                if isinstance(last, Token) and last.index < 2:
                    await asyncio.sleep(2)
    assert last == End("length")


async def test_a_stream_without_end_is_cut_off(server: FakeTextServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER", 10_000)
    async with ModelAPI(client(server), scores=False) as api:
        with pytest.raises(TransientError, match="longer than"):
            await collect(api.stream_chat(QUESTION, SamplingOptions(max_tokens=4_000)))


async def test_before_its_first_byte_a_stream_is_retried(server: FakeTextServer, api: ModelAPI) -> None:
    server.faults = [Fault(status=503, body={}), Fault(status=429, body={}, headers={"Retry-After": "0"})]
    assert (await events_of(api))[-1] == End("length")
    assert len(server.request_ids) == 3
    assert len(set(server.request_ids)) == 1


async def test_a_stream_that_is_refused_ends_in_that_error(server: FakeTextServer, api: ModelAPI) -> None:
    server.faults = [Fault(status=400, body={"error": {"message": "too long"}}, times=1)]
    failed = (await events_of(api))[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RequestRejected)
    assert failed.error.status == 400
    server.faults = [Fault(status=500, body={}, times=None)]
    failed = (await events_of(api))[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RetriesExhausted)


async def test_a_model_without_a_chat_template_is_told_what_to_do(server: FakeTextServer, api: ModelAPI) -> None:
    server.template = False
    with pytest.raises(ConfigurationError, match="--chat-template"):
        await api.chat(QUESTION)
    failed = (await events_of(api))[-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ConfigurationError)


async def gone(server: FakeTextServer) -> None:
    async with asyncio.timeout(2):
        while server.streaming:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("way", ["aclosing", "task", "break"])
async def test_whoever_stops_reading_closes_the_connection_and_frees_the_slot(server: FakeTextServer, way: str) -> None:
    server.manner.delay = 0.005
    options = HttpOptions(retry=QUICK.retry, max_concurrent_requests=1)
    async with ModelAPI(client(server, options), scores=False) as api:
        long = SamplingOptions(max_tokens=2000)

        async def read(stop_at: int) -> None:
            async with aclosing(api.stream_chat(QUESTION, long)) as events:
                async for event in events:
                    if isinstance(event, Token) and event.index == stop_at:
                        return

        if way == "aclosing":
            await read(3)
        elif way == "task":
            reader = asyncio.create_task(read(10**9))
            while not server.streaming:
                await asyncio.sleep(0.01)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        else:
            async for event in api.stream_chat(QUESTION, long):
                if isinstance(event, Token) and event.index == 3:
                    break
        await gone(server)
        assert server.left == 1
        assert (await api.chat(QUESTION, SHORT)).text, "the only slot is free again"


async def test_ctrl_c_closes_the_connection(server: FakeTextServer) -> None:
    server.manner.delay = 0.01
    script = f"""
import asyncio
import signal
from core.llm_api.text.generation import SamplingOptions
from core.llm_api.llm import ModelAPI
from core.llm_api.engines.vllm import VLLMClient

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored

async def main():
    async with ModelAPI(VLLMClient({server.url!r}, {server.model!r}), scores=False) as api:
        async for event in api.stream_complete("count", SamplingOptions(max_tokens=100_000)):
            print(event.kind, flush=True)

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
    )  # fmt: skip
    assert process.stdout is not None
    while b"token" not in await process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    await gone(server)
    _, told = await process.communicate()
    assert server.left == 1
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in told
    assert b"never retrieved" not in told


async def test_a_stream_that_waits_for_a_slot_can_be_cancelled(server: FakeTextServer) -> None:
    server.manner.delay = 0.01
    options = HttpOptions(retry=QUICK.retry, max_concurrent_requests=1)
    async with ModelAPI(client(server, options), scores=False) as api:
        async with aclosing(api.stream_chat(QUESTION, SamplingOptions(max_tokens=500))) as first:
            async for event in first:
                if isinstance(event, Token):
                    break
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await collect(api.stream_chat(QUESTION, SHORT))
        assert (await collect(api.stream_chat(QUESTION, SHORT))).text


async def test_many_streams_at_once_lose_double_and_misplace_nothing() -> None:
    """benchmarks/streams.py does the same with 10,000 streams, 200 at once."""
    rng = random.Random(5)

    def cut(event: bytes) -> list[bytes]:
        at = rng.randrange(len(event) + 1)
        return [event[:at], event[at:]]

    async with FakeTextServer(manner=Manner(cut=cut)) as server:
        options = HttpOptions(retry=QUICK.retry, max_concurrent_requests=50)
        async with ModelAPI(client(server, options), scores=False) as api:
            texts = await asyncio.gather(
                *(
                    collect(api.stream_complete(f"say s{number}x", SamplingOptions(max_tokens=10)))
                    for number in range(300)
                )
            )
    assert [text.text for text in texts] == [answer_to(f"s{number}x", 10) for number in range(300)]
    assert 25 < server.max_streaming <= 50


async def test_embeddings_keep_the_texts_order(server: FakeTextServer, api: ModelAPI) -> None:
    vectors = await api.embed(["a", "bbb", "cc"])
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 0, 0.5], [3, 1, 0.5], [2, 2, 0.5]]
    assert (await api.embed(["x"] * 600)).shape == (600, 3)
    assert server.requests.count("/v1/embeddings") == 1 + 3
    assert (await api.embed([])).shape[0] == 0
    server.embeds = False
    with pytest.raises(ConfigurationError, match="--runner pooling"):
        await api.embed(["a"])


async def test_liveness_and_readiness(server: FakeTextServer, api: ModelAPI) -> None:
    assert await api.models() == ["fake-8b"]
    assert 0 < await api.ready() < 2
    server.faults = [Fault(status=500, body={}, times=None)]
    assert await api.models() == ["fake-8b"], "alive, but not ready"
    with pytest.raises(RetriesExhausted):
        await api.ready()


async def test_texts_alone_ask_nothing_of_the_model_at_start(server: FakeTextServer, api: ModelAPI) -> None:
    assert server.completions == []
    assert api.identity.model == "fake-8b"
    with pytest.raises(ConfigurationError, match="scores=True"):
        await api.score([], await api.spell_labels())


async def test_another_model_is_named_at_start(server: FakeTextServer) -> None:
    with pytest.raises(ConfigurationError, match="serves 'fake-8b', not 'other'"):
        async with ModelAPI(VLLMClient(server.url, "other", options=QUICK), scores=False):
            pass


async def test_scores_and_texts_of_one_api(server: FakeTextServer) -> None:
    async with ModelAPI(client(server)) as api:
        assert api.identity.fingerprint
        assert (await api.chat(QUESTION, SHORT)).text == answer_to("river")


async def test_a_key_is_sent_and_never_shown() -> None:
    async with FakeTextServer(api_key="sk-right") as server:
        async with ModelAPI(client(server, api_key=SecretStr("sk-right")), scores=False) as api:
            assert (await events_of(api))[-1] == End("length")
        async with ModelAPI(ExternalAPI(server.url + "/v1", "m", api_key=SecretStr("sk-wrong")), scores=False) as api:
            failed = (await events_of(api))[-1]
    assert isinstance(failed, Failed)
    assert "sk-" not in str(failed.error)


async def test_a_hosted_api_writes_texts_under_its_rate_limits(server: FakeTextServer) -> None:
    waits: list[float] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    limiter = RateLimiter(2, None, clock=lambda: now[0], sleep=sleep)
    engine = ExternalAPI(server.url + "/v1", server.model, limiter=limiter, options=QUICK)
    assert isinstance(engine, TextEngine)
    async with ModelAPI(engine, scores=False) as api:
        await api.complete(["a", "b"], SHORT)
        assert waits == []
        assert (await events_of(api))[-1] == End("length")
        assert waits == [60.0]
        assert (await api.embed(["a"])).shape == (1, 3)
        assert await api.models() == [server.model]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_429_slows_everyone_down(server: FakeTextServer, streamed: bool) -> None:
    waits: list[float] = []
    now = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    limiter = RateLimiter(clock=lambda: now[0], sleep=sleep)
    options = HttpOptions(retry=RetryPolicy(max_attempts=1))
    engine = ExternalAPI(server.url + "/v1", server.model, limiter=limiter, options=options)
    async with ModelAPI(engine, scores=False) as api:
        server.faults = [Fault(status=429, body={}, headers={"Retry-After": "7"}, times=1)]
        call = collect(api.stream_chat(QUESTION, SHORT)) if streamed else api.chat(QUESTION, SHORT)
        with pytest.raises(RetriesExhausted) as caught:
            await call
        assert isinstance(caught.value.__cause__, RateLimited)
        assert waits == []
        assert (await api.embed(["x"])).shape == (1, 3)
        assert waits == [7.0]


async def test_of_several_servers_the_least_busy_one_writes() -> None:
    async with FakeTextServer(manner=Manner(delay=0.01)) as first, FakeTextServer(manner=Manner(delay=0.01)) as second:
        async with ModelAPI(VLLMGroup([client(first), client(second)]), scores=False) as api:
            assert isinstance(api._engine, TextEngine)
            await asyncio.gather(*(collect(api.stream_chat(QUESTION, SHORT)) for _ in range(20)))
            assert first.max_streaming == second.max_streaming == 10
            await api.complete(["x"] * 8, SHORT)
            assert len(first.completions) == len(second.completions) == 14
            assert (await api.embed(["x"])).shape == (1, 3)


async def test_a_server_that_is_lost_gives_its_texts_to_another() -> None:
    options = HttpOptions(retry=RetryPolicy(max_attempts=2, base=0.01, cap=0.01))
    async with FakeTextServer() as first, FakeTextServer() as second:
        async with ModelAPI(
            VLLMGroup([client(first, options), client(second, options)], patience=options.retry), scores=False
        ) as api:
            first.faults = [Fault(status=500, body={}, times=None)]
            assert (await events_of(api))[-1] == End("length")
            assert (await api.chat(QUESTION, SHORT)).text == answer_to("river")
            assert len(second.completions) == 2
            second.faults = first.faults
            failed = (await events_of(api))[-1]
            assert isinstance(failed, Failed)


async def test_nobody_there_is_told_at_once() -> None:
    settings = Settings(vllm_base_url=("http://127.0.0.1:9",))
    started = time.monotonic()
    with pytest.raises(ServerUnreachable, match="launch_vllm_server"):
        async with open_model_api(settings, model="m", scores=False):
            pass
    assert time.monotonic() - started < 5
