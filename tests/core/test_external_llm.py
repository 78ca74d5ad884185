from __future__ import annotations

import asyncio
import logging

import pytest
from pydantic import SecretStr

from core.llm_api import external_llm
from core.llm_api.completions import text_body
from core.llm_api.errors import ConfigurationError, MissingLabel, RequestRejected, ServerUnreachable
from core.llm_api.external_llm import ExternalAPI
from core.llm_api.rate_limit import RateLimiter
from core.llm_api.retry import RetryPolicy
from core.llm_api.tokens import resolve_label_tokens
from core.llm_api.transport import HttpOptions
from core.llm_api.types import Engine, LabelTokens, Prompt, Segment
from tests.core.fake_server import FALSE, TRUE, FakeVLLM, Fault, encode, hashed_log_odds

KEY = "sk-planted-0123456789"
LABELS = LabelTokens()
OPTIONS = HttpOptions(retry=RetryPolicy(3, base=0.01), max_concurrent_requests=4)


class Time:
    def __init__(self) -> None:
        self.now, self.slept = 0.0, []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def api(server: FakeVLLM, **kwargs: object) -> ExternalAPI:
    return ExternalAPI(server.url + "/v1", server.model, options=OPTIONS, **kwargs)


def prompts(n: int) -> list[Prompt]:
    return [Prompt((Segment(f"The number {i} is even:"),), name=f"claim {i}") for i in range(n)]


async def test_one_prompt_a_request_in_text(server: FakeVLLM) -> None:
    engine = api(server)
    assert isinstance(engine, Engine)
    identity = await engine.start()
    assert (identity.kind, identity.model, identity.root) == ("openai-compatible", "fake-8b", server.url + "/v1")
    server.latency = 0.01
    heard: list[int] = []
    answer = await engine.score(prompts(9), LABELS, on_answer=lambda positions, _: heard.extend(positions))
    expected = [hashed_log_odds(encode(p.text)) for p in prompts(9)]
    assert [a.log_odds for a in answer.logprobs] == pytest.approx(expected)
    assert answer.requests == 9
    assert sorted(heard) == list(range(9))
    assert server.max_in_flight == 4
    assert server.completions[-1]["prompt"] == prompts(9)[-1].text
    assert "logprob_token_ids" not in server.completions[-1]
    assert await engine.tokenize(["x"]) is None
    assert await engine.prefix_cache() is None
    assert await engine.kv_cache_tokens() is None
    assert await resolve_label_tokens(engine) == LABELS
    await engine.aclose()


async def test_fewer_logprobs_where_20_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(max_logprobs=5) as server:
        engine = api(server)
        await engine.start()
        assert "top 5" in caplog.text
        await engine.score(prompts(1), LABELS)
        assert server.completions[-1]["logprobs"] == 5
        await engine.aclose()


@pytest.mark.parametrize("broken", [{"logprobs": False}, {"max_logprobs": 3}])
async def test_an_endpoint_without_logprobs_is_refused_by_name(broken: dict[str, object]) -> None:
    async with FakeVLLM(**broken) as server:
        engine = api(server)
        with pytest.raises(ConfigurationError, match=r"'fake-8b' at http://127.*/v1 gives no logprobs"):
            await engine.start()
        await engine.aclose()


async def test_labels_are_matched_by_their_exact_text(server: FakeVLLM) -> None:
    engine = api(server)
    await engine.start()

    def rename(answer: dict, names: dict[str, str]) -> None:
        (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        answer["choices"][0]["logprobs"]["top_logprobs"] = [{names.get(t, t): lp for t, lp in top.items()}]

    server.faults = [Fault(patch=lambda a: rename(a, {" True": "True"}))]
    with pytest.raises(MissingLabel, match=r"'claim 0'.*' True'"):
        await engine.score(prompts(1), LABELS)
    server.faults = [Fault(patch=lambda a: rename(a, {" True": "\u2581True", " False": "\u0120False"}))]
    (answer,) = (await engine.score(prompts(1), LABELS)).logprobs
    assert answer.log_odds == pytest.approx(hashed_log_odds(encode(prompts(1)[0].text)))
    await engine.aclose()


async def test_floor(server: FakeVLLM) -> None:
    engine = api(server, missing_label="floor")
    await engine.start()
    server.drop = {FALSE}
    (answer,) = (await engine.score(prompts(1), LABELS)).logprobs
    assert answer.floored
    server.drop = {FALSE, TRUE}
    with pytest.raises(MissingLabel):
        await engine.score(prompts(1), LABELS)
    await engine.aclose()


async def test_a_429_slows_everyone_down(server: FakeVLLM) -> None:
    time = Time()
    engine = api(server, limiter=RateLimiter(1000, clock=lambda: time.now, sleep=time.sleep))
    await engine.start()
    server.faults = [Fault(status=429, headers={"Retry-After": "0"}), Fault(status=429, headers={"Retry-After": "0.2"})]
    answer = await engine.score(prompts(3), LABELS)
    assert answer.retries == 2
    assert time.now == pytest.approx(0.2)
    server.faults = [Fault(status=429)]
    await engine.score(prompts(1), LABELS)
    assert time.now == pytest.approx(5.2)  # no Retry-After: the default
    await engine.aclose()


async def test_usage_corrects_the_token_estimate(server: FakeVLLM) -> None:
    limiter = RateLimiter(tokens_per_minute=10**6)
    engine = api(server, limiter=limiter)
    await engine.start()
    (prompt,) = prompts(1)
    answer = await engine.score([prompt], LABELS)
    tokens = len(encode(prompt.text))
    assert answer.prompt_tokens == tokens
    assert limiter._granted[-1].tokens == tokens + 1
    await engine.score([prompt], LABELS)
    characters = len("The capital of France is") + 2 * len(prompt.text) + 4
    assert engine._characters == characters
    await engine.aclose()


async def test_a_request_that_was_never_sent_is_refunded(server: FakeVLLM) -> None:
    limiter = RateLimiter(requests_per_minute=100)
    engine = ExternalAPI("http://127.0.0.1:9/v1", "m", limiter=limiter, options=OPTIONS)
    with pytest.raises(ServerUnreachable, match="LLAMA_API_BASE"):
        await engine.start()
    assert [r.requests for r in limiter._granted] == [0]
    await engine.aclose()


async def test_the_key_goes_out_as_bearer_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with FakeVLLM(api_key=KEY) as server:
            engine = api(server, api_key=SecretStr(KEY))
            await engine.start()
            await engine.aclose()
            wrong = api(server, api_key=SecretStr(KEY + "x"))
            with pytest.raises(RequestRejected, match="Check API_KEY") as caught:
                await wrong.start()
            await wrong.aclose()
    assert server.authorizations[0] == f"Bearer {KEY}"
    assert not any(KEY in text for text in (str(caught.value), caplog.text, repr(vars(wrong)), repr(vars(wrong._http))))


async def test_the_first_failure_cancels_the_rest(server: FakeVLLM) -> None:
    engine = api(server)
    await engine.start()
    server.faults = [Fault(status=400, only=lambda b: "number 1 " in b["prompt"]), Fault(delay=30, times=None)]
    with pytest.raises(RequestRejected):
        await asyncio.wait_for(engine.score(prompts(20), LABELS), 5)
    await asyncio.sleep(0.05)
    assert server.in_flight == 0
    await engine.aclose()


async def test_only_requests_in_flight_hold_a_body(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def counted(fields: dict[str, object], prompt: Prompt) -> bytes:
        nonlocal made
        made += 1
        return text_body(fields, prompt)

    engine = api(server)
    await engine.start()
    monkeypatch.setattr(external_llm, "text_body", counted)
    server.latency = 60
    waiting = asyncio.create_task(engine.score(prompts(200), LABELS))
    while server.in_flight < OPTIONS.max_concurrent_requests:
        await asyncio.sleep(0.01)
    assert made == OPTIONS.max_concurrent_requests
    waiting.cancel()
    await asyncio.wait([waiting])
    await engine.aclose()
