"""Token ids that nothing reads are not copied; every other row is written as vLLM writes it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from icm_vllm import uncached_tokens


class Rows:
    """vLLM's StagedWriteTensor, as far as it is used: rows of ids, written when apply_write() is called."""

    def __init__(self) -> None:
        self.gpu: dict[int, dict[int, int]] = {}
        self._staged: list[tuple[int, int, list[int]]] = []

    def stage_write(self, index: int, start: int, ids: list[int]) -> None:
        self._staged.append((index, start, list(ids)))

    def apply_write(self) -> None:
        for index, start, ids in self._staged:
            self.gpu.setdefault(index, {}).update(enumerate(ids, start))
        self._staged.clear()


class Runner:
    """vLLM's GPUModelRunner, as far as it is patched."""

    def __init__(self, **config: Any) -> None:
        model = SimpleNamespace(logits_processors=config.pop("logits_processors", None))
        nothing = {"speculative_config": None, "kv_transfer_config": None}
        self.vllm_config = SimpleNamespace(model_config=model, **(nothing | config))
        self.req_states = SimpleNamespace(all_token_ids=Rows())

    def add_requests(self, scheduler_output: Any) -> str:
        for index, request in enumerate(scheduler_output.scheduled_new_reqs):
            self.req_states.all_token_ids.stage_write(index, 0, request.prefill_token_ids)
        self.req_states.all_token_ids.apply_write()
        return "added"


@pytest.fixture
def runner_class(monkeypatch: pytest.MonkeyPatch) -> type[Runner]:
    """A fresh Runner in the place of vLLM's, with the extension installed twice."""
    patched = type("GPUModelRunner", (Runner,), {"add_requests": Runner.add_requests})
    module = ModuleType("vllm.v1.worker.gpu.model_runner")
    module.GPUModelRunner = patched  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.model_runner", module)
    uncached_tokens.install()
    once = patched.add_requests
    uncached_tokens.install()
    assert patched.add_requests is once
    return patched


def request(computed: int, ids: list[int] | None = None, **more: Any) -> SimpleNamespace:
    plain = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "bad_words": None,
        "prompt_logprobs": None,
    }
    parameters = more.pop("sampling_params", SimpleNamespace(**(plain | more.pop("asked", {}))))
    return SimpleNamespace(
        prefill_token_ids=[7, 8, 9, 10] if ids is None else ids,
        num_computed_tokens=computed,
        sampling_params=parameters,
        **({"mm_features": []} | more),
    )


def written(runner: Runner, *requests: SimpleNamespace) -> list[list[int]]:
    """Places of each request's row that were written, each with the id that belongs there."""
    whole = runner.req_states.all_token_ids
    assert runner.add_requests(SimpleNamespace(scheduled_new_reqs=list(requests))) == "added"
    assert runner.req_states.all_token_ids is whole
    for index, one in enumerate(requests):
        assert all(one.prefill_token_ids[place] == token for place, token in whole.gpu[index].items())
    return [sorted(whole.gpu[index]) for index in range(len(requests))]


def test_what_is_cached_is_not_written(runner_class: type[Runner]) -> None:
    found = written(runner_class(), request(0), request(3), request(1, [1, 2, 3]), request(2, [5, 6, 7]))
    assert found == [[0, 1, 2, 3], [3], [1, 2], [2]]


@pytest.mark.parametrize(
    "more",
    [
        {"asked": {"presence_penalty": 0.5}},
        {"asked": {"frequency_penalty": -1.0}},
        {"asked": {"repetition_penalty": 1.1}},
        {"asked": {"bad_words": ["no"]}},
        {"asked": {"prompt_logprobs": 0}},
        {"asked": {"thinking_token_budget": 5}},
        {"sampling_params": None},
        {"mm_features": ["an image"]},
        {"replay_start": 1},
    ],
    ids=str,
)
def test_a_request_that_looks_back_is_written_whole(runner_class: type[Runner], more: dict[str, Any]) -> None:
    assert written(runner_class(), request(3, **more), request(3)) == [[0, 1, 2, 3], [3]]


@pytest.mark.parametrize("more", ["speculative_config", "kv_transfer_config", "logits_processors"])
def test_a_worker_that_looks_back_writes_everything(runner_class: type[Runner], more: str) -> None:
    assert written(runner_class(**{more: object()}), request(3)) == [[0, 1, 2, 3]]


def test_an_error_leaves_the_worker_as_it_was(runner_class: type[Runner]) -> None:
    runner = runner_class()
    whole = runner.req_states.all_token_ids
    with pytest.raises(TypeError):
        runner.add_requests(SimpleNamespace(scheduled_new_reqs=[request(1, ids=3)]))  # type: ignore[arg-type]
    assert runner.req_states.all_token_ids is whole


def test_without_such_a_worker_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.model_runner", None)
    uncached_tokens.install()
