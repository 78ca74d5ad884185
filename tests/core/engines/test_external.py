from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from pydantic import SecretStr

from core.errors import (
    APIError,
    ConfigurationError,
    MissingLabel,
    RequestRejected,
    RetriesExhausted,
    ServerUnreachable,
)
from core.llm_api.engines import external
from core.llm_api.engines.external import ExternalAPI
from core.llm_api.http import gather
from core.llm_api.http.completions import text_body
from core.llm_api.http.rate_limit import RateLimiter
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.response_cache import ResponseCache
from core.llm_api.tokens import spell_labels
from core.llm_api.types import Engine, EngineIdentity, Prompt, Segment
from core.settings import Settings
from fakes.vllm_server import FALSE, TRUE, FakeVLLM, Fault, encode, hashed_log_odds
from tests.core.fake_endpoint import FakeEndpoint
from tests.core.two_labels import IN_TEXT, log_odds

KEY = "sk-planted-0123456789"
LABELS = IN_TEXT
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
    answer = await engine.score(LABELS.queries(prompts(9)), on_answer=lambda positions, _: heard.extend(positions))
    expected = [hashed_log_odds(encode(p.text)) for p in prompts(9)]
    assert [log_odds(a) for a in answer.logprobs] == pytest.approx(expected)
    assert answer.requests == 9
    assert sorted(heard) == list(range(9))
    assert server.max_in_flight == 4
    assert server.completions[-1]["prompt"] == prompts(9)[-1].text
    assert "logprob_token_ids" not in server.completions[-1]
    assert await engine.tokenize(["x"]) is None
    assert await engine.prefix_cache() is None
    assert await engine.kv_cache_tokens() is None
    assert await spell_labels(engine) == LABELS
    await engine.aclose()


async def test_fewer_logprobs_where_20_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeVLLM(max_logprobs=5) as server:
        engine = api(server)
        await engine.start()
        assert "top 5" in caplog.text
        await engine.score(LABELS.queries(prompts(1)))
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
        await engine.score(LABELS.queries(prompts(1)))
    server.faults = [Fault(patch=lambda a: rename(a, {" True": "\u2581True", " False": "\u0120False"}))]
    (answer,) = (await engine.score(LABELS.queries(prompts(1)))).logprobs
    assert log_odds(answer) == pytest.approx(hashed_log_odds(encode(prompts(1)[0].text)))
    await engine.aclose()


async def test_floor(server: FakeVLLM) -> None:
    engine = api(server, missing_label="floor")
    await engine.start()
    server.drop = {FALSE}
    (answer,) = (await engine.score(LABELS.queries(prompts(1)))).logprobs
    assert answer.floored
    server.drop = {FALSE, TRUE}
    with pytest.raises(MissingLabel):
        await engine.score(LABELS.queries(prompts(1)))
    await engine.aclose()


async def test_a_429_slows_everyone_down(server: FakeVLLM) -> None:
    time = Time()
    engine = api(server, limiter=RateLimiter(1000, clock=lambda: time.now, sleep=time.sleep))
    await engine.start()
    server.faults = [Fault(status=429, headers={"Retry-After": "0"}), Fault(status=429, headers={"Retry-After": "0.2"})]
    answer = await engine.score(LABELS.queries(prompts(3)))
    assert answer.retries == 2
    assert time.now == pytest.approx(0.2)
    server.faults = [Fault(status=429)]
    await engine.score(LABELS.queries(prompts(1)))
    assert time.now == pytest.approx(5.2)  # no Retry-After: the default
    await engine.aclose()


async def test_usage_corrects_the_token_estimate(server: FakeVLLM) -> None:
    limiter = RateLimiter(tokens_per_minute=10**6)
    engine = api(server, limiter=limiter)
    await engine.start()
    (prompt,) = prompts(1)
    answer = await engine.score(LABELS.queries([prompt]))
    tokens = len(encode(prompt.text))
    assert answer.prompt_tokens == tokens
    assert limiter._granted[-1].tokens == tokens + 1
    await engine.score(LABELS.queries([prompt]))
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


async def test_where_one_fails_what_is_on_its_way_arrives_and_nothing_new_is_sent(server: FakeVLLM) -> None:
    engine = api(server)
    await engine.start()
    begun = len(server.completions)
    server.faults = [Fault(status=400, only=lambda b: "number 1 " in b["prompt"]), Fault(delay=0.2, times=None)]
    kept: list[int] = []
    with pytest.raises(RequestRejected, match="prompt 'claim 1': HTTP 400") as caught:
        await engine.score(LABELS.queries(prompts(20)), on_answer=lambda positions, _: kept.extend(positions))
    assert caught.value.status == 400
    assert sorted(kept) == [0, 2, 3]  # of the four that were sent at once
    assert len(server.completions) == begun + 4
    assert server.aborted == 0
    await engine.aclose()


async def test_what_arrived_beside_a_failure_is_not_paid_for_again(server: FakeVLLM, tmp_path: Path) -> None:
    async with ModelAPI(api(server), cache=ResponseCache(tmp_path / "cache.sqlite")) as model:
        server.faults = [Fault(status=400, only=lambda b: "number 2 " in b["prompt"]), Fault(delay=0.1, times=4)]
        with pytest.raises(RequestRejected, match="claim 2"):
            await model.score(prompts(4), LABELS)
        begun = len(server.completions)
        await model.score(prompts(4), LABELS)
        assert [body["prompt"] for body in server.completions[begun:]] == [prompts(4)[2].text]


async def test_what_never_arrives_is_not_waited_for_without_end(
    server: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "SETTLE", 0.1)
    engine = api(server)
    await engine.start()
    server.faults = [Fault(status=400, only=lambda b: "number 1 " in b["prompt"]), Fault(delay=30, times=None)]
    with pytest.raises(RequestRejected):
        await asyncio.wait_for(engine.score(LABELS.queries(prompts(20))), 5)
    await asyncio.sleep(0.05)
    assert server.in_flight == 0
    await engine.aclose()


async def test_a_failure_gives_back_the_turns_of_what_was_not_sent(server: FakeVLLM) -> None:
    limiter = RateLimiter(requests_per_minute=1000)
    engine = api(server, limiter=limiter)
    await engine.start()
    server.faults = [Fault(status=400, only=lambda b: "number 1 " in b["prompt"])]
    with pytest.raises(RequestRejected):
        await engine.score(LABELS.queries(prompts(20)))
    assert sum(r.requests for r in limiter._granted) == len(server.completions)
    await engine.aclose()


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        (Fault(status=500, times=None), RetriesExhausted, "prompt 'claim 0': gave up after 3 attempts.*HTTP 500"),
        (Fault(status=422), RequestRejected, "prompt 'claim 0': HTTP 422"),
        (Fault(status=401), RequestRejected, "^HTTP 401"),
    ],
)
async def test_an_error_names_the_prompt_that_it_may_be_about(
    server: FakeVLLM, fault: Fault, error: type[APIError], told: str
) -> None:
    engine = api(server)
    await engine.start()
    server.faults = [fault]
    with pytest.raises(error, match=told):
        await engine.score(LABELS.queries(prompts(1)))
    await engine.aclose()


async def test_a_body_that_a_proxy_refuses_names_the_prompt_its_size_and_both_remedies() -> None:
    async with FakeEndpoint(body_limit=1000) as server:
        engine = api(server)
        await engine.start()
        long = Prompt((Segment("word " * 300),), name="claim 7")
        with pytest.raises(RequestRejected, match="prompt 'claim 7', 1,500 bytes: HTTP 413") as caught:
            await engine.score(LABELS.queries([long]))
        assert "client_max_body_size" in str(caught.value)
        assert "--context_cap" in str(caught.value)
        assert "prompts_per_request" not in str(caught.value)
        await engine.aclose()


async def test_waiting_for_the_rate_limit_is_no_latency(server: FakeVLLM) -> None:
    limiter = RateLimiter(requests_per_minute=1000)
    engine = api(server, limiter=limiter)
    await engine.start()
    (counted,) = engine.telemetry
    assert counted.limited.total < 0.3
    before = sum(counted.latency.counts)
    limiter.slow_down(0.4)
    waiting = asyncio.create_task(engine.score(LABELS.queries(prompts(1))))
    while not counted.waiting:
        await asyncio.sleep(0.01)
    assert counted.in_flight == 0
    await waiting
    assert counted.limited.total > 0.3
    assert counted.latency.total < counted.limited.total
    assert sum(counted.latency.counts) == before + 1
    # One that is given up before its turn has no latency at all.
    limiter.slow_down(60)
    waiting = asyncio.create_task(engine.score(LABELS.queries(prompts(1))))
    while not counted.waiting:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert sum(counted.latency.counts) == before + 1
    assert counted.outcomes["cancelled"] == 1
    assert (counted.waiting, counted.in_flight) == (0, 0)
    await engine.aclose()


async def test_llama_server_lists_labels_in_its_own_way() -> None:
    async with FakeEndpoint(style="llama", model="smollm2") as server:
        server.cached = 3
        engine = api(server)
        identity = await engine.start()
        assert (identity.kind, identity.model) == ("openai-compatible", "smollm2")
        answer = await engine.score(LABELS.queries(prompts(3)))
        expected = [hashed_log_odds(encode(p.text)) for p in prompts(3)]
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx(expected)
        assert (answer.requests, answer.cached_tokens) == (3, 9)
        await engine.aclose()


async def test_at_llama_server_a_label_that_is_not_listed_is_looked_for_in_the_whole_vocabulary() -> None:
    async with FakeEndpoint(style="llama", hidden_below=1000) as server:
        engine = api(server, missing_label="floor")
        await engine.start()
        begun = len(server.completions)
        answer = await engine.score(LABELS.queries(prompts(2)))
        assert [body["logprobs"] > 10**6 for body in server.completions[begun:]].count(True) == 2
        expected = [hashed_log_odds(encode(p.text)) for p in prompts(2)]
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx(expected)
        assert answer.requests == 4
        assert not any(a.floored for a in answer.logprobs)
        server.hidden_below = 10**9
        with pytest.raises(MissingLabel, match="claim 0"):
            await engine.score(LABELS.queries(prompts(1)))
        await engine.aclose()


async def test_llama_server_answers_to_any_name_so_the_name_is_checked() -> None:
    async with FakeEndpoint(style="llama", model="smollm2") as server:
        engine = ExternalAPI(server.url + "/v1", "gemma", options=OPTIONS)
        with pytest.raises(ConfigurationError, match=r"serves 'smollm2', not 'gemma'.*--alias"):
            await engine.start()
        await engine.aclose()
        first = await started(server)
        assert first == await started(server)
        server.size += 1  # another file under the same name
        assert (await started(server)).fingerprint != first.fingerprint


@pytest.mark.parametrize("at_most", [0, 1])
@pytest.mark.parametrize("style", ["completions", "llama-like"])
async def test_an_endpoint_that_lists_one_alternative_is_refused_at_once(at_most: int, style: str) -> None:
    async with FakeEndpoint(at_most=at_most) as server:
        if style != "completions":
            server.faults = [Fault(patch=_as_chat_without_alternatives)]
        engine = api(server)
        with pytest.raises(
            ConfigurationError,
            match=r"lists the log-probability of 1 token where 20 were asked for.*at least 2.*better 20",
        ) as caught:
            await engine.start()
        assert "\n" not in str(caught.value)
        assert len(server.completions) == 1
        await engine.aclose()


async def test_five_alternatives_are_announced_and_floored_if_wanted(caplog: pytest.LogCaptureFixture) -> None:
    async with FakeEndpoint(at_most=5) as server:
        engine = api(server, missing_label="floor")
        await engine.start()
        assert "lists only the top 5 logprobs" in caplog.text
        server.drop = {FALSE}
        assert (await engine.score(LABELS.queries(prompts(1)))).logprobs[0].floored
        await engine.aclose()


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("wrapper", "told"),
    [
        ({"template": CHATML}, "counts 25 tokens in '1 2 3 4 5', which has 9 characters"),
        ({"template": CHATML, "miscount": None, "counts_on": "It looks like"}, "goes on from .* with 'It looks like'"),
        ({"template": CHATML, "miscount": None, "counts_on": "6 7 8 9"}, "with '6 7 8 9' and not with ' 6'"),
        ({"template": CHATML, "miscount": None, "counts_on": " 60"}, "with ' 60'"),
        ({"template": CHATML, "miscount": None, "counts_on": ""}, "with ''"),
    ],
)
async def test_an_endpoint_that_wraps_prompts_in_a_chat_template_is_refused(
    wrapper: dict[str, object], told: str
) -> None:
    async with FakeEndpoint(**wrapper) as server:
        engine = api(server)
        with pytest.raises(ConfigurationError, match=told) as caught:
            await engine.start()
        assert "ICM_CHECK_CONTINUATION=false" in str(caught.value)
        assert "\n" not in str(caught.value)
        await engine.aclose()
        settings = Settings.load(
            {"llama_api_base": server.url + "/v1", "use_vllm": False}, environ={"ICM_CHECK_CONTINUATION": "false"}
        )
        async with open_model_api(settings, model=server.model) as known_better:
            await known_better.score(prompts(1), LABELS)


@pytest.mark.parametrize("miscount", [1, -1, None])
async def test_usage_that_is_off_by_one_or_absent_is_no_reason_to_refuse(miscount: int | None) -> None:
    async with FakeEndpoint(miscount=miscount) as server:
        engine = api(server)
        await engine.start()
        answer = await engine.score(LABELS.queries(prompts(2)))
        expected = [hashed_log_odds(encode(p.text)) for p in prompts(2)]
        assert [log_odds(a) for a in answer.logprobs] == pytest.approx(expected)
        await engine.aclose()


async def test_a_gateway_behind_a_path_that_lists_no_models() -> None:
    async with FakeEndpoint(mounted_at="/gateway/team-a/openai", lists_models=False) as server:
        engine = ExternalAPI(server.url + "/gateway/team-a/openai", server.model, options=OPTIONS)
        await engine.start()
        await engine.score(LABELS.queries(prompts(2)))
        assert {path.rpartition("/")[0] for path in server.requests} == {"/gateway/team-a/openai"}
        await engine.aclose()
        lost = ExternalAPI(server.url + "/gateway", server.model, options=OPTIONS)
        with pytest.raises(RequestRejected, match=r"HTTP 404.*LLAMA_API_BASE: /completions is appended to it"):
            await lost.start()
        await lost.aclose()


def _as_chat_without_alternatives(answer: dict) -> None:
    answer["choices"][0]["logprobs"] = {"content": [{"token": "?", "logprob": -0.5, "top_logprobs": []}]}


async def started(server: FakeEndpoint) -> EngineIdentity:
    engine = api(server)
    identity = await engine.start()
    await engine.aclose()
    return identity


async def test_only_requests_in_flight_hold_a_body(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def counted(fields: dict[str, object], prompt: Prompt) -> bytes:
        nonlocal made
        made += 1
        return text_body(fields, prompt)

    engine = api(server)
    await engine.start()
    monkeypatch.setattr(external, "text_body", counted)
    server.latency = 60
    waiting = asyncio.create_task(engine.score(LABELS.queries(prompts(200))))
    while server.in_flight < OPTIONS.max_concurrent_requests:
        await asyncio.sleep(0.01)
    assert made == OPTIONS.max_concurrent_requests
    waiting.cancel()
    await asyncio.wait([waiting])
    await engine.aclose()
