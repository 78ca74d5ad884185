"""LlamaServer against answers of a real llama-server (recorded/llama_server_native.json) and a fake in their form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest

from core.errors import ConfigurationError, MissingLabel, RequestRejected, ServerChanged, TransientError
from core.llm_api.engines.llama_server import LlamaServer, _read
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.completions import read_answers, token_logprobs
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.types import Capabilities, Prompt, Segment
from core.settings import MissingLabelPolicy, Settings
from fakes.vllm_server import BOS, FALSE, TRUE, Fault, encode
from tests.core.fake_llama import FakeLlama
from tests.core.two_labels import two

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "recorded" / "llama_server_native.json").read_text("utf-8")
)
PROMPT = Prompt((Segment(RECORDED["text"], RECORDED["tokenize"]["tokens"]),), name="claim 1")
LABELS = two(TRUE, FALSE)


def prompts(count: int) -> list[Prompt]:
    """They share their beginning with the one before."""
    shared = Segment("a b c", (11, 12, 13))
    return [
        Prompt((shared, Segment("", (100 + at, 200, 300))), name=f"claim {at}", place=at / count) for at in range(count)
    ]


def test_a_real_answer_has_the_labels_that_the_openai_compatible_route_lists_to_the_last_bit() -> None:
    true, false = (tokens["tokens"][0] for tokens in RECORDED["labels_tokens"])
    listed = _read(orjson.dumps(RECORDED["from_cache"]), PROMPT).logprobs  # both were asked with the same cached
    by_text = read_answers(orjson.dumps(RECORDED["openai"]), [PROMPT]).top[0]
    ours = token_logprobs(listed, (true, false), missing="error", name="claim 1").values
    assert ours == token_logprobs(by_text, (" True", " False"), missing="error", name="claim 1").values
    assert sum(map(math.exp, listed.values())) < 1


def test_a_real_answer_says_what_its_slot_held_and_depends_on_it_a_little() -> None:
    cold, warm = (_read(orjson.dumps(RECORDED[name]), PROMPT) for name in ("completion", "from_cache"))
    assert (cold.cached, warm.cached) == (0, PROMPT.num_tokens - 1)
    true, false = (tokens["tokens"][0] for tokens in RECORDED["labels_tokens"])
    odds = [listed.logprobs[true] - listed.logprobs[false] for listed in (cold, warm)]
    assert odds[0] == pytest.approx(odds[1], abs=0.05)


def test_an_answer_to_another_prompt_is_none() -> None:
    longer = Prompt((*PROMPT.segments, Segment("", (30,))), name="claim 2")
    with pytest.raises(TransientError, match=f"claim 2.*{longer.num_tokens} were sent"):
        _read(orjson.dumps(RECORDED["completion"]), longer)
    with pytest.raises(ConfigurationError, match=r"newer llama\.cpp"):
        _read(b'{"tokens_evaluated": 1, "completion_probabilities": [{"content": "a", "probs": []}]}', PROMPT)
    with pytest.raises(TransientError, match="malformed"):
        _read(orjson.dumps(RECORDED["completion"])[:200], PROMPT)


def test_special_tokens_in_a_text_are_spelled() -> None:
    assert len(RECORDED["spelled_special"]["tokens"]) > 1


async def test_the_fake_answers_in_the_real_ones_form() -> None:
    async with FakeLlama() as server, aiohttp.ClientSession(server.url) as session:
        fields = {"n_predict": 1, "n_probs": 8, "cache_prompt": True, "id_slot": 0}
        body = {**fields, "prompt": PROMPT.token_ids}
        async with session.post("/completion", json=body) as response:
            fake = await response.json()
        assert set(fake) <= set(RECORDED["completion"])
        assert set(fake["timings"]) <= set(RECORDED["completion"]["timings"])
        for path, name in (("/props", "props"), ("/v1/models", "models")):
            async with session.get(path) as response:
                assert set(await response.json()) <= set(RECORDED[name])


async def test_scores_are_the_servers_and_each_answer_says_what_was_cached() -> None:
    async with FakeLlama() as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        assert api.capabilities == Capabilities(checkable=False)
        assert (api.identity.kind, api.identity.root, api.identity.max_model_len) == (
            "llama-server",
            "/models/fake",
            8192,
        )
        assert len(api.identity.fingerprint) == len(api.identity.config) == 64
        scores = await api.score(prompts(4), LABELS)
        expected = [server.log_odds(prompt.token_ids) for prompt in prompts(4)]
        assert np.allclose(scores.log_odds, expected, rtol=0, atol=1e-12)
        assert api.stats.cached_tokens == 3 * 3
        assert api.stats.untold_tokens == 0
        sent = [body for body in server.completions if body["cache_prompt"]]
        assert [body["prompt"] for body in sent] == [prompt.token_ids for prompt in prompts(4)]
        assert {body["post_sampling_probs"] for body in sent} == {False}


async def test_each_slot_has_its_part_of_the_pool_one_prompt_after_the_other() -> None:
    async with FakeLlama(slots=2) as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        server.latency = 0.01
        await api.score(prompts(6), LABELS)
        asked = [prompt.token_ids for prompt in prompts(6)]
        assert server.by_slot == [asked[:3], asked[3:]]
        assert server.clashes == 0
        assert server.max_in_flight == 2


async def test_tokens_and_texts() -> None:
    async with FakeLlama(chat_template="<{}>") as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        assert await api.tokenize([" True", "a b"]) == [[TRUE], encode("a b")]
        assert await api.tokenize(["a b"], special=True) == [[BOS, *encode("a b")]]
        assert await api.detokenize([encode("a b")]) == ["a b"]
        assert await api.tokenize_chat(["hi"]) == [[BOS, *encode("<hi>")]]
        assert await api.models() == [server.model]


async def test_a_label_far_down_is_looked_for_in_the_whole_vocabulary() -> None:
    async with FakeLlama(hidden_below=1000) as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        scores = await api.score(prompts(1), LABELS)
        assert scores.log_odds == pytest.approx([server.log_odds(prompts(1)[0].token_ids)])
        assert [body["n_probs"] for body in server.completions[-2:]] == [200, 2**20]
        assert api.stats.requests == 2
        assert api.stats.prompt_tokens == 2 * 6


@pytest.mark.parametrize("policy", ["error", "floor"])
async def test_a_label_that_is_nowhere_is_an_error_or_flagged_and_never_a_zero(policy: MissingLabelPolicy) -> None:
    async with FakeLlama() as server:
        server.drop = {FALSE}
        engine = LlamaServer(server.url, server.model, missing_label=policy)
        async with ModelAPI(engine, accept_floored=True) as api:
            if policy == "error":
                with pytest.raises(MissingLabel, match=r"claim 0.*7983"):
                    await api.score(prompts(1), LABELS)
            else:
                scores = await api.score(prompts(1), LABELS)
                assert scores.log_odds[0] > 0
                assert api.stats.floored == 1


async def test_a_refused_prompt_is_named_and_what_was_answered_is_kept() -> None:
    async with FakeLlama() as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        bad = prompts(4)[2].token_ids
        error = {"error": {"code": 400, "message": "Prompt contains invalid tokens", "type": "invalid_request_error"}}
        server.faults.append(Fault(status=400, body=error, times=None, only=lambda body: body["prompt"] == bad))
        with pytest.raises(RequestRejected, match=r"prompt 'claim 2'.*invalid tokens"):
            await api.score(prompts(4), LABELS)
        assert api.stats.engine_prompts == 2
        assert prompts(4)[3].token_ids not in server.by_slot[0]


async def test_another_model_under_the_same_name_is_noticed() -> None:
    async with FakeLlama() as server, ModelAPI(LlamaServer(server.url, server.model)) as api:
        await api.score(prompts(1), LABELS)
        server.faults.append(Fault(disconnect=True))
        await api.score(prompts(2), LABELS)  # the same server after a broken connection
        server.size += 1
        server.faults.append(Fault(disconnect=True))
        with pytest.raises(ServerChanged, match="another model"):
            await api.score(prompts(3), LABELS)


async def test_another_name_than_the_served_one_and_another_kind_of_server_are_refused() -> None:
    async with FakeLlama() as server:
        misnamed = LlamaServer(server.url, "other")
        with pytest.raises(ConfigurationError, match="serves 'fake-8b', not 'other'"):
            await misnamed.start()
        await misnamed.aclose()
        client = VLLMClient(server.url, server.model)
        with pytest.raises(ConfigurationError, match=f"is a llama-server, not vLLM. Set LLAMA_SERVER_URL={server.url}"):
            await client.start()
        await client.aclose()


@pytest.mark.parametrize(
    ("given", "use_vllm", "kind"),
    [
        ({"llama_server_url": "http://127.0.0.1:9/v1/"}, None, "LlamaServer"),
        ({"llama_server_url": "http://127.0.0.1:9", "llama_api_base": "http://127.0.0.1:9"}, None, "LlamaServer"),
        ({"llama_server_url": "http://127.0.0.1:9", "vllm_base_url": "http://127.0.0.1:8"}, None, "VLLMClient"),
        ({"llama_server_url": "http://127.0.0.1:9", "vllm_base_url": "http://127.0.0.1:8"}, False, "LlamaServer"),
        ({"llama_server_url": "http://127.0.0.1:9"}, True, "VLLMClient"),
        ({"llama_api_base": "http://127.0.0.1:9"}, False, "ExternalAPI"),
    ],
)
async def test_it_is_chosen_by_its_url(given: dict[str, str], use_vllm: bool | None, kind: str) -> None:
    api = open_model_api(Settings(**given), model="m", use_vllm=use_vllm)  # type: ignore[arg-type]
    assert type(api._engine).__name__ == kind
    await api.aclose()
