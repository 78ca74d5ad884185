"""Pools in a stand-in for vLLM's engine core; tests/real_server asks the real one."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.llm_api.http.pool_tree import tree_of
from core.llm_api.types import Prompt, Segment
from icm_vllm import block_hashes, pool_calls, pools
from icm_vllm.block_hashes import PathHasher, RememberingHasher
from icm_vllm.pool_calls import PoolAnswer, Stopped
from icm_vllm.pools import Pools, Tokens
from icm_vllm.prompt_tree import PromptTree
from tests.icm_vllm.test_block_hashes import BLOCK, Adapter, PlainHasher
from tests.icm_vllm.test_block_hashes import Request as Hashed

TREE = PromptTree(segments=[[1, 2, 3], [4], [5, 6]], parents=[-1, 0, 0, 1], pieces=[0, 1, 2, 2], ends=[1, 2, 3])
"""Three prompts: 1 2 3 4, 1 2 3 5 6 and 1 2 3 4 5 6."""

LABELS = (7, 9)
ADAPTERS = (None, Adapter("one", "/1"), Adapter("two", "/2"), Adapter("one", "/later"))
"""No adapter, two, and one under the name of another."""
PATHS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=9)


class Scheduler:
    """Answers a request in the step that `answers` names it in."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.kv_cache_manager = SimpleNamespace(estimate_cached_tokens=lambda request: 5)

    def update_from_output(self, answers: list[SimpleNamespace]) -> dict[int, SimpleNamespace]:
        for answer in answers:
            self.requests.pop(answer.request_id, None)
        return {0: SimpleNamespace(outputs=answers, scheduler_stats="stats")}


class Core:
    """As much of vLLM's EngineCoreProc as pools touch."""

    def __init__(self, request_block_hasher: Any = None, step: int = 8192) -> None:
        self.request_block_hasher = request_block_hasher
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=step))
        self.scheduler = Scheduler()
        self.sent: list[Any] = []
        self.aborts: list[Any] = []

    def add_request(self, request: Any) -> None:
        if request.prompt_token_ids[-1] == 666:
            raise ValueError("a refused prompt")
        self.scheduler.requests[request.request_id] = request

    def abort_requests(self, ids: list[str]) -> None:
        self.scheduler.aborted += [key for key in ids if self.scheduler.requests.pop(key, None)]

    def step(self, *answers: SimpleNamespace) -> None:
        self.sent += self.scheduler.update_from_output(list(answers))[0].outputs
        self.post_step(True)

    def post_step(self, model_executed: bool) -> None:
        pass

    def _send_abort_outputs(self, aborted: list[Any]) -> None:
        self.aborts += aborted


def answer(key: str, logprobs: dict[int, float] | None, *, finished: bool = True, cached: int = 0) -> SimpleNamespace:
    listed = None
    if logprobs is not None:
        listed = SimpleNamespace(
            logprob_token_ids=np.array([list(logprobs)]), logprobs=np.array([[*logprobs.values()]])
        )
    stats = SimpleNamespace(
        num_prompt_tokens=5,
        num_computed_tokens=5 - cached,
        num_local_cached_tokens=cached,
        num_external_cached_tokens=0,
    )
    return SimpleNamespace(request_id=key, new_logprobs=listed, finished=finished, prefill_stats=stats, events=None)


class Request(SimpleNamespace):
    """vLLM's, which has its blocks hashed as soon as it is made, and again with every token that is written."""

    def __init__(self, *, block_hasher: Any, **fields: Any) -> None:
        self.block_hashes: list[int] = []
        super().__init__(**fields, mm_features=[], cache_salt=None, output=[], hasher=block_hasher)
        self.hash()

    def hash(self) -> None:
        if self.hasher is not None:
            self.block_hashes.extend(self.hasher(self))

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output)


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's classes that a pool is made of."""

    def module(name: str, **contents: object) -> None:
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("vllm")
    module("vllm.sampling_params", SamplingParams=SimpleNamespace)
    module("vllm.v1")
    module("vllm.v1.request", Request=Request)


def begun(core: Core, name: str = "p") -> tuple[Pools, Future[dict[str, object]]]:
    found = Pools(core)
    return found, found.score(name, TREE, LABELS)


def test_a_pools_prompts_share_their_tokens_and_are_answered_together() -> None:
    core = Core()
    _, future = begun(core)
    asked = core.scheduler.requests
    assert [asked[f"p-{i}"].prompt_token_ids for i in range(3)] == [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 4, 5, 6]]
    parameters = asked["p-0"].sampling_params
    assert (parameters.max_tokens, parameters.logprob_token_ids) == (1, [7, 9])
    estimate = core.scheduler.kv_cache_manager.estimate_cached_tokens
    assert (estimate(asked["p-0"]), estimate(SimpleNamespace(request_id="chat"))) == (0, 5)
    core.step(answer("p-1", {9: -1.5, 7: -2.5}, cached=2), other := answer("chat", None))
    assert core.sent == [other]  # nobody else hears of the pool, and it hears of nobody else
    assert not future.done()
    core.step(answer("p-2", {4: -0.25, 7: -3.0, 9: -4.0}), answer("p-0", {7: -np.inf, 9: -0.5}))
    result = PoolAnswer.read(future.result(timeout=0))
    assert result.logprobs == [[-np.inf, -0.5], [-2.5, -1.5], [-3.0, -4.0]]
    assert result.tokens == Tokens(prompt=15, computed=13, cached=2, external=0)


@given(st.lists(st.tuples(PATHS, st.sampled_from(ADAPTERS)), max_size=4))
def test_blocks_have_the_hashes_that_they_have_without_the_tree(
    pools_of_paths: list[tuple[list[list[int]], Adapter | None]],
) -> None:
    segments = [Segment(str(i), list(range(i, i + 1 + i % 3))) for i in range(5)]
    plain = PlainHasher()
    core = Core(RememberingHasher(plain, BLOCK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm.v1.request", SimpleNamespace(Request=Request))
        patch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(SamplingParams=SimpleNamespace))
        asking = Pools(core)
        for number, (paths, adapter) in enumerate(pools_of_paths):
            tree = tree_of([Prompt(tuple(segments[i] for i in path)) for path in paths])
            asking.score(str(number), tree, LABELS, adapter)
    asked = list(core.scheduler.requests.values())
    every = {
        (request.lora_request, *request.prompt_token_ids[:end])
        for request in asked
        for end in range(BLOCK, len(request.prompt_token_ids) + 1, BLOCK)
    }
    assert plain.blocks <= len(every)  # each is hashed once, whichever pools it is in
    for written in ([3], [3, 1, 4, 1, 5]):
        for request in asked:
            request.output[:] = written
            request.hash()
            alone = Hashed(request.prompt_token_ids, written, lora_request=request.lora_request)
            assert request.block_hashes == PlainHasher()(alone)


@pytest.mark.parametrize("other", ADAPTERS[1:], ids=["another", "and another", "another path"])
def test_pools_of_two_adapters_in_turns_share_no_block(other: Adapter) -> None:
    """The engine has a step's prompts of one pool, then of the next: what it remembers of one is not the other's."""
    core = Core(RememberingHasher(PlainHasher(), BLOCK), step=1)
    tree = PromptTree([[1, 2, 3, 4, 5, 6, 7, 8], [4] * 4, [5] * 4], [-1, 0, 0], [0, 1, 2], [1, 2])
    asking = Pools(core)
    hashes: dict[Any, list[list[int]]] = {}
    for turn in range(6):
        adapter = (None, ADAPTERS[1], other)[turn % 3]
        asking.score(str(turn), tree, LABELS, adapter)
    while core.scheduler.requests:
        for request in core.scheduler.requests.values():
            assert request.block_hashes == PlainHasher()(
                Hashed(request.prompt_token_ids, lora_request=request.lora_request)
            )
            hashes.setdefault(request.lora_request, []).append(list(request.block_hashes))
        core.step(*(answer(key, {7: -1.0, 9: -2.0}) for key in list(core.scheduler.requests)))
    assert len(hashes) == len({None, ADAPTERS[1], other})
    every = [{block for request in of_one for block in request} for of_one in hashes.values()]
    assert sum(map(len, every)) == len(set().union(*every)) == 4 * len(hashes)


def test_an_adapter_of_another_process_arrives_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's way between processes writes a LoRARequest as its fields, without their names."""
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = Adapter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora", ModuleType("vllm.lora"))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    tuned = Adapter("tuned", "/tuned")
    of_base, of_adapter = pool_calls.arguments("p", TREE, LABELS), pool_calls.arguments("p", TREE, LABELS, tuned)
    assert of_adapter == (*of_base, tuned)
    for sent, expected in ((of_base, None), (of_adapter, tuned), ((*of_base, ["tuned", "/tuned"]), tuned)):
        core = Core()
        pools._score(core, *sent)
        assert {asked.lora_request for asked in core.scheduler.requests.values()} == {expected}


def test_remembered_hashes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_hashes, "REMEMBERED_TOKENS", 6 * BLOCK)
    plain = PlainHasher()
    hasher = PathHasher(plain, BLOCK)
    for start in range(40):
        tokens = list(range(start, start + 3 * BLOCK))
        request = Request(prompt_token_ids=tokens, lora_request=None, block_hasher=hasher)
        assert request.block_hashes == PlainHasher()(Hashed(tokens))
        assert len(hasher._known) <= 6 + 3


def test_a_prompts_times_are_those_of_the_engine() -> None:
    core = Core()
    future = Pools(core).score("p", PromptTree([[1]], [-1], [0], [0]), LABELS)
    began = time.monotonic() + 0.01
    time.sleep(0.03)
    timed = answer("p-0", {4: -0.25, 7: -1.5, 9: -0.5})
    timed.events = [
        SimpleNamespace(type=SimpleNamespace(name=name), timestamp=at)
        for name, at in (("QUEUED", 0.0), ("SCHEDULED", began), ("PREEMPTED", 1e9), ("SCHEDULED", 1e9))
    ]
    core.step(timed)
    [(begun, ended)] = PoolAnswer.read(future.result(timeout=0)).times
    assert 0.009 < begun < 0.02 <= ended < 5


def test_statistics_of_the_last_step_leave_before_its_answer() -> None:
    core = Core()
    _, future = begun(core)
    core.scheduler.update_from_output([answer(f"p-{i}", {7: -1.0, 9: -2.0}) for i in range(3)])
    assert not future.done()
    core.post_step(True)
    assert future.done()


@pytest.mark.parametrize(
    "bad", [answer("p-1", None), answer("p-1", {7: -1.0}), answer("p-1", {7: -1.0, 9: -1.0}, finished=False)]
)
def test_a_prompt_without_an_answer_stops_its_pool_alone(bad: SimpleNamespace) -> None:
    core = Core()
    found, future = begun(core)
    other = found.score("q", TREE, LABELS)
    core.step(answer("p-0", {7: -1.0, 9: -2.0}), bad)
    with pytest.raises(Stopped, match="prompt 1 was stopped"):
        PoolAnswer.read(future.result(timeout=0))
    assert core.scheduler.aborted == ["p-2"]
    core.step(*(answer(f"q-{i}", {7: -1.0, 9: -2.0}) for i in range(3)))
    assert other.result(timeout=0)["logprobs"] == [[-1.0, -2.0]] * 3


def test_a_cancelled_pool_leaves_the_engine() -> None:
    core = Core()
    found, future = begun(core)
    core.step(answer("p-1", {7: -1.0, 9: -2.0}))
    found.cancel("p")
    assert core.scheduler.aborted == ["p-0", "p-2"]
    assert not core.scheduler.requests
    with pytest.raises(Stopped, match="cancelled"):
        PoolAnswer.read(future.result(timeout=0))
    found.cancel("p")
    found.cancel("never asked")
    late = answer("p-0", {7: -1.0, 9: -2.0})
    core.step(late)
    assert core.sent == [late]  # vLLM's clients ignore what they did not ask


def test_an_engine_that_is_paused_or_stopped_says_so() -> None:
    core = Core()
    _, future = begun(core)
    aborted = [SimpleNamespace(request_id="p-2"), SimpleNamespace(request_id="chat")]
    core._send_abort_outputs(aborted)
    with pytest.raises(Stopped, match="paused or stopped"):
        PoolAnswer.read(future.result(timeout=0))
    assert core.aborts == aborted
    assert core.scheduler.aborted == ["p-0", "p-1", "p-2"]


def test_a_refused_prompt_leaves_nothing_behind() -> None:
    core = Core()
    found = Pools(core)
    future = found.score("p", PromptTree([[1], [666]], [-1, -1], [0, 1], [0, 1]), LABELS)
    with pytest.raises(Stopped, match="a refused prompt"):
        PoolAnswer.read(future.result(timeout=0))
    assert core.scheduler.aborted == ["p-0"]
    assert not core.scheduler.requests


def test_prompts_are_made_a_step_at_a_time() -> None:
    """The engine begins with what fills a step, and has more before it would wait for other work."""
    core = Core(step=6)
    found, future = begun(core)
    other = found.score("q", TREE, LABELS)
    steps = []
    while core.scheduler.requests:
        steps.append(list(core.scheduler.requests))
        core.step(*(answer(key, {7: -1.0, 9: -2.0}) for key in steps[-1]))
    # 4 + 5 tokens; the second pool was asked while the first had prompts left.
    assert steps == [["p-0", "p-1", "p-2"], ["q-0", "q-1"], ["q-2"]]
    assert future.result(timeout=0)["logprobs"] == other.result(timeout=0)["logprobs"] == [[-1.0, -2.0]] * 3


def test_a_pool_behind_one_that_is_cancelled_is_asked() -> None:
    core = Core(step=1)
    found, first = begun(core)
    second, third = found.score("q", TREE, LABELS), found.score("r", TREE, LABELS)
    found.cancel("q")
    assert second.result(timeout=0) == {"stopped": "the pool was cancelled"}
    found.cancel("p")
    assert first.done()
    while core.scheduler.requests:
        core.step(*(answer(key, {7: -1.0, 9: -2.0}) for key in list(core.scheduler.requests)))
    assert third.result(timeout=0)["logprobs"] == [[-1.0, -2.0]] * 3


def test_a_pool_that_waits_does_not_outlive_the_engines_stop() -> None:
    core = Core(step=1)
    found, first = begun(core)
    second = found.score("q", TREE, LABELS)
    found.cancel("p")
    third = found.score("r", TREE, LABELS)
    core._send_abort_outputs([core.scheduler.requests[key] for key in core.scheduler.requests])
    for future in (first, second, third):
        assert "stopped" in future.result(timeout=0)


@pytest.mark.parametrize(
    ("labels", "longest", "vocabulary", "complaint"),
    [
        (LABELS, 7, 10, ""),
        (LABELS, 6, 10, "6 tokens, and the model takes 5"),
        (LABELS, 7, 9, "token id 9"),
        ((7,), 7, 8, ""),
        ((7, 1, 12), 7, 12, "token id 12"),
        ((0, 1), 7, 6, "token id 6"),
    ],
)
def test_what_vllm_would_refuse_is_refused(
    labels: tuple[int, ...], longest: int, vocabulary: int, complaint: str
) -> None:
    config = SimpleNamespace(runner_type="generate", max_model_len=longest, get_vocab_size=lambda: vocabulary)
    if not complaint:
        pool_calls.check(TREE, labels, config)
        return
    with pytest.raises(ValueError, match=complaint):
        pool_calls.check(TREE, labels, config)


def test_a_server_that_embeds_is_not_asked() -> None:
    config = SimpleNamespace(runner_type="pooling", max_model_len=99, get_vocab_size=lambda: 99)
    with pytest.raises(ValueError, match="embeds"):
        pool_calls.check(TREE, LABELS, config)


@pytest.mark.parametrize("labels", [(7,), (7, 9, 4), tuple(range(20, 40))])
def test_any_number_of_labels_is_answered_in_their_order(labels: tuple[int, ...]) -> None:
    core = Core()
    future = Pools(core).score("p", PromptTree([[1]], [-1], [0], [0]), labels)
    parameters = core.scheduler.requests["p-0"].sampling_params
    assert (parameters.logprobs, parameters.logprob_token_ids) == (len(labels), list(labels))
    core.step(answer("p-0", {2: -0.1} | {label: -float(label) for label in labels[::-1]}))
    assert PoolAnswer.read(future.result(timeout=0)).logprobs == [[-float(label) for label in labels]]


def test_zeros_behind_the_labels_are_nobodys() -> None:
    """vLLM fills rows up with id 0 and -inf where another request of the step asked for more."""
    core = Core()
    future = Pools(core).score("p", PromptTree([[1]], [-1], [0], [0]), (0, 9))
    padded = answer("p-0", {4: -0.25, 0: -1.5, 9: -0.5})
    padded.new_logprobs.logprob_token_ids = np.array([[4, 0, 9, 0, 0]])
    padded.new_logprobs.logprobs = np.array([[-0.25, -1.5, -0.5, -np.inf, -np.inf]])
    core.step(padded)
    assert PoolAnswer.read(future.result(timeout=0)).logprobs == [[-1.5, -0.5]]


@pytest.mark.parametrize("missing", ["post_step", "_send_abort_outputs"])
def test_another_engine_is_left_as_it_is(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    own = core.scheduler.update_from_output
    monkeypatch.delattr(Core, missing)
    with pytest.raises(AttributeError):
        Pools(core)
    assert core.scheduler.update_from_output == own


class DeadClient:
    """vLLM's synchronous client of an engine that died while a call was under way."""

    def call_utility(self, method: str, *arguments: object) -> object:
        return Future[object]().result(timeout=30)

    def ensure_alive(self) -> None:
        raise RuntimeError("EngineDeadError")


class DeafClient(DeadClient):
    """One whose thread that listens to the engine has ended."""

    output_queue_thread = threading.Thread()

    def ensure_alive(self) -> None:
        pass


def test_a_call_to_an_engine_that_dies_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_calls, "ALIVE_S", 0.05)
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        pool_calls.call(DeadClient(), "p", TREE, LABELS)
    with pytest.raises(RuntimeError, match="nobody listens"):
        pool_calls.call(DeafClient(), "p", TREE, LABELS)
