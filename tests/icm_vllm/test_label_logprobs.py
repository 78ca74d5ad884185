"""The route's handlers with a stand-in for vLLM's engine; tests/real_server asks the real one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from icm_vllm import label_logprobs, pool_calls
from tests.icm_vllm.test_block_hashes import Adapter

TREE = {"segments": [[1, 2], [3]], "parents": [-1, 0], "pieces": [0, 1], "ends": [0, 1]}
TUNED = Adapter("tuned", "/tuned")


class Engine:
    """Answers prompts one by one, or pools, with 1.0 for the adapter and 0.0 for the base model."""

    errored = False
    model_config = SimpleNamespace(runner_type="generate", max_model_len=99, get_vocab_size=lambda: 99)
    vllm_config = None
    logger_manager = None

    def __init__(self) -> None:
        self.engine_core = self
        self.asked: list[Any] = []

    async def generate(self, prompt: Any, parameters: Any, name: str, *, lora_request: Any) -> AsyncIterator[Any]:
        self.asked.append(lora_request)
        listed = {label: SimpleNamespace(logprob=-float(bool(lora_request))) for label in parameters.logprob_token_ids}
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=[listed])], num_cached_tokens=1)

    async def call_utility_async(self, method: str, *arguments: Any) -> Any:
        adapter = arguments[6] if len(arguments) > 6 else None
        self.asked += [adapter] * 2
        tokens = {"prompt": 5, "computed": 3, "cached": 2, "external": 0}
        return {"logprobs": [[-float(bool(adapter))] * 2] * 2, "tokens": tokens, "times": []}


def request(body: Any, engine: Engine, adapters: dict[str, Adapter] | None) -> Any:
    models = SimpleNamespace(base_model_paths=[SimpleNamespace(name="base")])
    if adapters is not None:
        models.lora_requests = adapters
    state = SimpleNamespace(engine_client=engine, openai_serving_models=models)

    async def read() -> bytes:
        return json.dumps(body).encode()

    async def receive() -> dict[str, str]:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    return SimpleNamespace(app=SimpleNamespace(state=state), body=read, receive=receive)


@pytest.fixture(autouse=True)
def plain_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_logprobs, "_json", lambda status, content: (status, content))
    parameters = ModuleType("vllm.sampling_params")
    parameters.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    parameters.RequestOutputKind = SimpleNamespace(FINAL_ONLY=2)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


@pytest.mark.parametrize("pools", [True, False], ids=["pools", "one by one"])
@pytest.mark.parametrize("adapter", [None, TUNED], ids=["base", "adapter"])
async def test_the_adapter_that_is_named_answers(
    pools: bool, adapter: Adapter | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_calls, "usable", lambda config: pools)
    engine, named = Engine(), {} if adapter is None else {"adapter": "tuned"}
    body = {"labels": [7, 9], "tree": TREE, **named}
    status, content = await label_logprobs._answer(request(body, engine, {"tuned": TUNED}))
    assert (status, content["prompt_tokens"], content["cached_tokens"]) == (200, 5, 2)
    assert content["logprobs"] == [[-float(adapter is not None)] * 2] * 2
    assert engine.asked == [adapter, adapter]


@pytest.mark.parametrize("adapters", [{}, {"other": TUNED}, None], ids=["none", "another", "a vLLM without"])
async def test_an_adapter_that_is_not_there_is_missed_as_vllm_does(adapters: dict[str, Adapter] | None) -> None:
    engine = Engine()
    body = {"labels": [7, 9], "tree": TREE, "adapter": "tuned"}
    status, content = await label_logprobs._answer(request(body, engine, adapters))
    assert (status, content["error"]["code"]) == (404, 404)
    assert content["error"]["message"] == "The model `tuned` does not exist."
    assert not engine.asked


@pytest.mark.parametrize(("adapters", "named"), [({"tuned": TUNED}, ["tuned"]), ({}, []), (None, [])])
async def test_the_route_names_the_adapters_that_it_takes(
    adapters: dict[str, Adapter] | None, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_logprobs, "config_digest", lambda config: "")
    status, content = await label_logprobs._describe(request({}, Engine(), adapters))
    assert (status, content["models"], content["adapters"]) == (200, ["base"], named)
