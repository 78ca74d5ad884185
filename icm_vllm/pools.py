"""A pool of prompts that vLLM's engine takes as one tree and answers as one list: the engine's side.

N single prompts of N demonstrations cost vLLM's processes work for every token of every prompt: the API server checks
and encodes them, the engine decodes them, and both keep state for N requests. Here the tree goes to the engine in one
call; the engine makes the requests itself, enough for a step at a time, so that prompts share the objects of their
common tokens and steps are full, and returns all label logprobs together.

In every other respect they are requests of vLLM: with its scheduler, prefix cache, kernels and statistics. The call is
one of those that vLLM's API server makes to an engine ("utility" calls, vllm/v1/engine/core.py), whose result may be a
Future. `pool_calls.py` makes it.
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from icm_vllm.block_hashes import PathHasher, RememberingHasher
from icm_vllm.prompt_tree import PromptTree

log = logging.getLogger(__name__)

SCORE: Final = "icm_score_pool"
CANCEL: Final = "icm_cancel_pool"
"""Methods that `install` adds to vLLM's EngineCore, by which its clients call them."""


@dataclass(slots=True)
class Tokens:
    """Prompt tokens of a pool: all, computed, and found in this engine's prefix cache or in another's (KV transfer)."""

    prompt: int = 0
    computed: int = 0
    cached: int = 0
    external: int = 0


@dataclass(eq=False, slots=True)
class _Pool:
    name: str
    labels: Sequence[int]
    parameters: Any  # vLLM's SamplingParams
    prompts: Iterator[tuple[int, tuple[list[int], int]]]  # those that the engine has not been given yet
    left: int
    logprobs: list[list[float] | None]
    adapter: Any = None  # vLLM's LoRARequest; None: the base model
    times: list[tuple[float, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    future: Future[dict[str, object]] = field(default_factory=Future)
    tokens: Tokens = field(default_factory=Tokens)
    failure: str = ""

    def key(self, number: int) -> str:
        """The id of a prompt's request."""
        return f"{self.name}-{number}"


class Pools:
    """The pools that one vllm.v1.engine.core.EngineCore is computing. Everything runs in the engine's thread."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._asked: dict[str, tuple[_Pool, int]] = {}  # by the request's id
        self._waiting: deque[_Pool] = deque()  # with prompts that are not asked yet
        self._ended: list[_Pool] = []
        hasher = core.request_block_hasher
        known = isinstance(hasher, RememberingHasher)
        self._hasher = PathHasher(hasher.hasher, hasher.block_size) if known else hasher
        scheduler, manager = core.scheduler, core.scheduler.kv_cache_manager
        # All are looked up before any is replaced, so that a vLLM that lacks one is left unchanged.
        update, estimate = scheduler.update_from_output, manager.estimate_cached_tokens
        after_step, send_aborts = core.post_step, core._send_abort_outputs
        scheduler.update_from_output = self._without_ours(update)
        manager.estimate_cached_tokens = self._for_others(estimate)
        core.post_step = self._then_answer(after_step)
        core._send_abort_outputs = self._and_ours(send_aborts)

    def score(
        self, name: str, tree: PromptTree, labels: Sequence[int], adapter: Any = None
    ) -> Future[dict[str, object]]:
        """Begin a pool. PoolAnswer.read reads the result, which is set when the last prompt is answered.

        adapter: vLLM's LoRARequest that its prompts are for; None: the base model.
        """
        size = len(tree.ends)
        pool = _Pool(name, labels, label_parameters(labels), enumerate(tree.prompts()), size, [None] * size, adapter)
        self._waiting.append(pool)
        self._feed()
        self._answer()
        return pool.future

    def cancel(self, name: str) -> None:
        """Abort a pool's prompts; does nothing if it has ended."""
        for pool in self._begun():
            if pool.name == name:
                self._fail(pool, "the pool was cancelled")
        self._feed()  # there may be no further step that would do it
        self._answer()

    def _begun(self) -> set[_Pool]:
        """The pools that have not ended."""
        return {*self._waiting, *(pool for pool, _ in self._asked.values())}

    def _feed(self) -> None:
        """Give the scheduler as many waiting prompts as fill a step; the next ones are made while it computes."""
        step, fresh = self._core.vllm_config.scheduler_config.max_num_batched_tokens, 0
        while self._waiting:
            pool = self._waiting[0]
            try:
                for number, (tokens, shared) in pool.prompts:
                    fresh += self._ask(pool, number, tokens, shared)
                    if fresh >= step:
                        return
            except Exception as error:
                log.exception("a pool cannot be asked")
                self._fail(pool, f"it cannot be asked: {error}")
            else:
                self._waiting.popleft()

    def _ask(self, pool: _Pool, number: int, tokens: list[int], shared: int) -> int:
        """Give one prompt to the scheduler; returns an estimate of how many of its tokens must be computed."""
        from vllm.v1.request import Request

        if isinstance(self._hasher, PathHasher):
            self._hasher.shared = shared
        # As vLLM makes it for a request that arrives (preprocess_add_request), without images and grammars.
        request = Request(
            request_id=pool.key(number),
            prompt_token_ids=tokens,
            sampling_params=pool.parameters,
            pooling_params=None,
            lora_request=pool.adapter,
            block_hasher=self._hasher,
        )
        self._core.add_request(request)
        self._asked[pool.key(number)] = pool, number
        return self._hasher.fresh if isinstance(self._hasher, PathHasher) else len(tokens)

    def _fail(self, pool: _Pool, why: str) -> None:
        """End a pool without its answer."""
        if pool.failure:
            return
        pool.failure = why
        self._ended.append(pool)
        if pool in self._waiting:
            self._waiting.remove(pool)
        left = [key for number in range(len(pool.logprobs)) if self._asked.pop(key := pool.key(number), None)]
        self._core.abort_requests(left)

    def _without_ours(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def update_from_output(*args: Any, **arguments: Any) -> Any:
            answers = own(*args, **arguments)
            if self._asked:
                for answer in answers.values():
                    answer.outputs = [output for output in answer.outputs if not self._take(output)]
            return answers

        return update_from_output

    def _then_answer(self, own: Callable[..., Any]) -> Callable[..., Any]:
        # After the step has sent its statistics, so that they include the pool when its answer arrives. vLLM calls this
        # after every step that it starts or ends, and then waits for work only if it has no requests.
        @functools.wraps(own)
        def post_step(*args: Any, **arguments: Any) -> Any:
            result = own(*args, **arguments)
            self._feed()
            self._answer()
            return result

        return post_step

    def _for_others(self, own: Callable[[Any], int]) -> Callable[[Any], int]:
        # A statistic for which vLLM walks over all blocks of a request; it is not reported for a pool.
        @functools.wraps(own)
        def estimate_cached_tokens(request: Any) -> int:
            return 0 if request.request_id in self._asked else own(request)

        return estimate_cached_tokens

    def _and_ours(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def _send_abort_outputs(aborted: Any) -> Any:
            # vLLM has ended all requests; pools here would wait for a step that may never come.
            for pool in self._begun():
                self._fail(pool, "the engine was paused or stopped")
            self._answer()
            return own(aborted)

        return _send_abort_outputs

    def _take(self, output: Any) -> bool:
        """Record an EngineCoreOutput of a pool; returns whether it was one."""
        place = self._asked.pop(output.request_id, None)
        if place is None:
            return False
        pool, number = place
        listed = output.new_logprobs
        # One position: the token of greedy decoding, then the labels, then zeros where other requests in the step asked
        # for more tokens.
        width = 1 + len(pool.labels)
        ids, values = ((), ()) if listed is None else (listed.logprob_token_ids[0], listed.logprobs[0])
        logprobs = {int(token): float(value) for token, value in zip(ids[:width], values[:width], strict=True)}
        if not (output.finished and logprobs.keys() >= set(pool.labels)):
            self._fail(pool, f"prompt {number} was stopped")
            return True
        pool.logprobs[number] = [logprobs[label] for label in pool.labels]
        if (stats := output.prefill_stats) is not None:
            pool.tokens.prompt += stats.num_prompt_tokens
            pool.tokens.computed += stats.num_computed_tokens
            pool.tokens.cached += stats.num_local_cached_tokens
            pool.tokens.external += stats.num_external_cached_tokens
        now = time.monotonic()
        begun = [event.timestamp for event in output.events or () if event.type.name == "SCHEDULED"]
        pool.times.append((min(begun, default=now) - pool.began, now - pool.began))
        pool.left -= 1
        if not pool.left:
            self._ended.append(pool)
        return True

    def _answer(self) -> None:
        ended, self._ended = self._ended, []
        for pool in ended:
            result: dict[str, object] = {
                "logprobs": pool.logprobs,
                "tokens": asdict(pool.tokens),
                "times": pool.times,
            }
            # Not set_exception: vLLM would write a traceback into its log for every client that leaves.
            pool.future.set_result({"stopped": pool.failure} if pool.failure else result)


def label_parameters(labels: Sequence[int], **more: Any) -> Any:
    """vLLM's SamplingParams for only the logprobs of the labels after a prompt. more: further fields."""
    from vllm.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=len(labels),
        logprob_token_ids=list(labels),
        detokenize=False,
        **more,
    )


def _score(
    self: Any,
    name: str,
    segments: list[list[int]],
    parents: list[int],
    pieces: list[int],
    ends: list[int],
    labels: list[int],
    adapter: Any = None,
) -> Future[dict[str, object]]:
    return _pools(self).score(name, PromptTree(segments, parents, pieces, ends), labels, _adapter(adapter))


def _adapter(given: Any) -> Any:
    """vLLM's LoRARequest, which arrives from another process as the list of its fields."""
    if not isinstance(given, list):
        return given
    from vllm.lora.request import LoRARequest

    return LoRARequest(*given)


def _cancel(self: Any, name: str) -> None:
    _pools(self).cancel(name)


def _pools(core: Any) -> Pools:
    found: Pools | None = getattr(core, "icm_pools", None)
    if found is None:
        found = core.icm_pools = Pools(core)
    return found


def installed() -> bool:
    """Whether engines that this process starts would take pools."""
    try:
        core: Any = importlib.import_module("vllm.v1.engine.core")
    except ImportError:
        return False
    return hasattr(core.EngineCore, SCORE)


def install() -> None:
    """Add the methods to the engines of this process; does nothing the second time, or to another vLLM."""
    try:
        core: Any = importlib.import_module("vllm.v1.engine.core")
        process, places = core.EngineCoreProc, ("add_request", "post_step", "_send_abort_outputs")
    except (ImportError, AttributeError) as error:
        log.warning("this vLLM takes prompts one by one: %s", error)
        return
    if missing := [name for name in places if not hasattr(process, name)]:
        log.warning("this vLLM takes prompts one by one: it has no %s", ", ".join(missing))
        return
    setattr(core.EngineCore, SCORE, _score)
    setattr(core.EngineCore, CANCEL, _cancel)
