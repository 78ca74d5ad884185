"""Texts in this process against a stand-in for vLLM that writes; tests/real_server has the real one."""

from __future__ import annotations

import asyncio
import enum
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core.errors import APIError, ConfigurationError, RequestRejected
from core.llm_api.engines.direct import DirectEngine, DirectOptions
from core.llm_api.llm import ModelAPI
from core.llm_api.local_model import LocalModel
from core.llm_api.text.generation import End, Failed, Message, Metrics, SamplingOptions, TextEngine, Token
from tests.conftest import stand_in_platform

QUESTION = [Message("user", "Name a river")]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Kind(enum.Enum):
    DELTA = 1
    FINAL_ONLY = 2


class VLLMClientError(Exception):
    """As in vLLM 0.32, where it is no ValueError."""


class TooLong(VLLMClientError):
    pass


class WritingLLM:
    """Writes " t0", " t1", ... one token a step for every request; a prompt of more than 50 tokens is too long."""

    made: list[WritingLLM]
    template: str | None = None

    def __init__(self, *, model: str, **arguments: Any) -> None:
        self.arguments = arguments
        self.llm_engine = self
        self.model_config = SimpleNamespace(model=model, max_model_len=50)
        self.vllm_config = SimpleNamespace()
        self.engine_core = SimpleNamespace(shutdown=lambda: None)
        self.requests: dict[str, list[Any]] = {}
        self.aborted: list[str] = []
        self.most_at_once = 0
        self.rendered: list[str] = []
        type(self).made.append(self)

    def get_tokenizer(self) -> SimpleNamespace:
        def apply(turns: list[dict[str, str]], *, chat_template: str | None, **_: object) -> str:
            self.rendered.append(chat_template or str(self.template))
            return " ".join(turn["content"] for turn in turns)

        return SimpleNamespace(
            encode=lambda text, add_special_tokens: [1] * add_special_tokens + [len(word) for word in text.split()],
            apply_chat_template=apply,
            chat_template=self.template,
        )

    def add_request(self, key: str, prompt: dict[str, list[int]], parameters: Any) -> None:
        if len(prompt["prompt_token_ids"]) > 50:
            raise TooLong("the prompt is too long. ")
        self.requests[key] = [prompt["prompt_token_ids"], parameters, 0]

    def step(self) -> list[SimpleNamespace]:
        time.sleep(0.002)
        self.most_at_once = max(self.most_at_once, len(self.requests))
        outputs = []
        for key, request in list(self.requests.items()):
            prompt, parameters, written = request
            if 666 in prompt:
                raise RuntimeError("engine died")
            request[2] = written + 1
            finished = request[2] == parameters.max_tokens
            whole = parameters.output_kind is Kind.FINAL_ONLY
            if finished:
                del self.requests[key]
            if finished or not whole:
                first = 0 if whole else written
                text = "".join(f" t{n}" for n in range(first, written + 1))
                choice = SimpleNamespace(
                    text=text, token_ids=list(range(first, written + 1)), finish_reason="length" if finished else None
                )
                outputs.append(
                    SimpleNamespace(request_id=key, finished=finished, outputs=[choice], prompt_token_ids=prompt)
                )
        return outputs

    def abort_request(self, keys: list[str]) -> None:
        self.aborted += keys
        for key in keys:
            self.requests.pop(key, None)

    def embed(self, texts: list[str], use_tqdm: bool) -> list[SimpleNamespace]:
        return [SimpleNamespace(outputs=SimpleNamespace(embedding=[float(len(text)), 1.0])) for text in texts]


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module, parameters = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    WritingLLM.made, WritingLLM.template = [], None
    module.LLM, module.SamplingParams, module.__version__ = WritingLLM, SimpleNamespace, "0.32.0"
    parameters.RequestOutputKind = Kind
    monkeypatch.setitem(sys.modules, "vllm", module)
    stand_in_platform(monkeypatch, cpu=True)
    monkeypatch.setattr("core.llm_api.engines.direct.check_hub", lambda *_: None)  # these models are nowhere
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    yield
    assert all(not llm.requests for llm in WritingLLM.made), "nothing is left in the engine"


def test_prompts_and_conversations_are_written_as_one_batch() -> None:
    with LocalModel("m", chat_template=PLAIN) as model:
        answers = model.completion(["a b c", "d"] * 4, max_tokens=30, temperature=0.5, seed=3, stop="x")
        assert [answer.text.split()[-1] for answer in answers] == ["t29"] * 8
        assert [answer.prompt_tokens for answer in answers[:2]] == [4, 2]
        assert (answers[0].completion_tokens, answers[0].finish_reason) == (30, "length")
        [llm] = WritingLLM.made
        assert llm.most_at_once == 8
        assert model.chat_completion(QUESTION, max_tokens=2).text == " t0 t1"
        assert len(model.chat_completions([QUESTION] * 3, SamplingOptions(max_tokens=2))) == 3
        assert set(llm.rendered) == {PLAIN}
        events = list(model.stream_chat(QUESTION, SamplingOptions(max_tokens=3)))
    assert [event.kind for event in events] == ["started", "token", "token", "token", "metrics", "end"]
    metrics = events[-2]
    assert isinstance(metrics, Metrics)
    assert (metrics.prompt_tokens, metrics.completion_tokens, events[-1]) == (3, 3, End("length"))


def test_its_arguments_are_vllms() -> None:
    with LocalModel("m", gpu_memory_utilization=0.5, max_model_len=99, tensor_parallel_size=2, trust_remote_code=True):
        told = WritingLLM.made[0].arguments
    assert (told["gpu_memory_utilization"], told["max_model_len"]) == (0.5, 99)
    assert (told["tensor_parallel_size"], told["trust_remote_code"]) == (2, True)


def test_leaving_a_stream_early_stops_the_engine() -> None:
    with LocalModel("m", chat_template=PLAIN) as model:
        for event in model.stream_chat(QUESTION, SamplingOptions(max_tokens=10_000)):
            if isinstance(event, Token) and event.index == 2:
                break
        assert model.completion(["x"], max_tokens=1)[0].text == " t0"
        assert len(WritingLLM.made[0].aborted) == 1


def test_use_it_wrongly() -> None:
    model = LocalModel("m")
    with pytest.raises(RuntimeError, match="with"):
        model.completion(["x"])
    with model:
        with pytest.raises(ValueError, match="list of one"):
            model.completion("x")
        with pytest.raises(ValueError, match="temperature"):
            model.completion(["x"], temperature=9.0)
        with pytest.raises(ConfigurationError, match="chat_template"):
            model.chat_completion(QUESTION)
        with pytest.raises(RequestRejected, match=r"too long\.$"):
            model.completion(["word " * 60])
        with pytest.raises(ConfigurationError, match="already runs vLLM"):
            LocalModel("other").open()
        with LocalModel("m") as same:
            assert same.completion(["x"], max_tokens=1)[0].text == " t0"
        assert model.completion(["x"], max_tokens=1)[0].text == " t0", "the first one is still open"
    assert len(WritingLLM.made) == 1
    model.close()


def test_a_models_own_template_is_taken_where_none_is_given() -> None:
    WritingLLM.template = "its own"
    with LocalModel("m") as model:
        model.chat_completion(QUESTION, max_tokens=1)
    assert WritingLLM.made[0].rendered == ["its own"]


def test_embeddings_need_an_engine_for_them() -> None:
    with LocalModel("m", options=DirectOptions(runner="pooling")) as model:
        vectors = model.embed(["a", "bbb"])
        assert model.embed([]).shape == (0, 0)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[1, 1], [3, 1]]
    assert WritingLLM.made[0].arguments["runner"] == "pooling"


async def test_cancelled_texts_leave_the_engine() -> None:
    engine = DirectEngine("m", DirectOptions(chat_template=PLAIN))
    assert isinstance(engine, TextEngine)
    async with ModelAPI(engine, scores=False) as api:
        texts = asyncio.create_task(api.complete(["a", "b", "c"], SamplingOptions(max_tokens=10**6)))
        async with aclosing(api.stream_chat(QUESTION, SamplingOptions(max_tokens=10**6))) as events:
            async for event in events:
                if isinstance(event, Token) and event.index == 3:
                    break
        texts.cancel()
        with pytest.raises(asyncio.CancelledError):
            await texts
        assert (await api.ready()) < 5
        assert len(WritingLLM.made[0].aborted) == 4


async def test_an_engine_that_dies_ends_every_stream_in_an_error() -> None:
    async with ModelAPI(DirectEngine("m", DirectOptions(chat_template=PLAIN)), scores=False) as api:
        running = asyncio.create_task(api.complete(["fine"], SamplingOptions(max_tokens=10**6)))
        await asyncio.sleep(0.05)
        deadly = [Message("user", "x" * 666)]
        events = [event async for event in api.stream_chat(deadly, SamplingOptions(max_tokens=3))]
        assert isinstance(events[-1], Failed)
        assert "engine died" in str(events[-1].error)
        with pytest.raises(APIError, match="engine died"):
            await running
        WritingLLM.made[0].requests.clear()
