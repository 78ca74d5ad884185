"""A pool of prompts that vLLM's engine takes as one tree and answers as one list.

Asked one by one, N prompts of N demonstrations cost vLLM's processes work for every token of every prompt: the API
server checks and encodes them, the engine decodes them, and both keep books on N requests. Here the tree goes to the
engine as it came, in one call; the engine makes the requests itself, a step's worth at a time, so that prompts share
the very objects of their common tokens and steps are full, and hands back the label logprobs together.

The requests are vLLM's own in every other respect: its scheduler, prefix cache, kernels and statistics. The way in is
vLLM's for calls that an API server makes to an engine ("utility" calls, vllm/v1/engine/core.py), whose result may be a
Future. Not for data parallel engines, of which a call reaches every one.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from core.llm_api.prompt_tree import PromptTree
from core.vllm_extension.block_hashes import Hasher, RememberingHasher, continued

log = logging.getLogger(__name__)

SCORE: Final = "icm_score_pool"
CANCEL: Final = "icm_cancel_pool"
"""Methods that `install` adds to vLLM's EngineCore, by which its clients call them."""

ALIVE_S: Final = 1.0
"""Seconds between looks at whether the engine still lives; vLLM leaves calls to a dead one waiting."""

REMEMBERED_TOKENS: Final = 1 << 20
"""Of how many tokens an engine keeps the block hashes, some 50 bytes a token."""


class Stopped(Exception):
    """The engine ended a prompt without an answer: it is being paused or stopped."""


@dataclass(slots=True)
class Tokens:
    """Prompt tokens of a pool: all, computed, and found in this engine's prefix cache or in another's (KV transfer)."""

    prompt: int = 0
    computed: int = 0
    cached: int = 0
    external: int = 0


class PathHasher:
    """A vLLM request block hasher for the prompts of trees. Two things spare it vLLM's own work, some 10 us a block:
    a prompt begins with the hashes that it shares with the one before, and one pool is much like the next, so that
    hashes are remembered by what they are made of, the hash of the block before and the block's token ids.

    shared: how many tokens the next new request has in common with the last one.
    fresh: how many tokens of the last one no prompt before it can have left in the cache.
    """

    def __init__(self, own: Hasher, block_size: int) -> None:
        self.shared = 0
        self.fresh = 0
        self._own = own
        self._block_size = block_size
        self._last: list[Any] = []
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, request: Any) -> list[Any]:
        """Hashes of the full blocks that have none yet."""
        tokens, size = request.prompt_token_ids, self._block_size
        if request.block_hashes or request.num_tokens != len(tokens):  # it has begun to generate
            return self._own(request)
        hashes = self._last[: self.shared // size]
        blocks = len(tokens) // size
        while len(hashes) < blocks and (found := self._known.get(self._parts(tokens, hashes, len(hashes)))):
            hashes.append(found)
        remembered = len(hashes)
        hashes = continued(self._own, request, hashes)
        if len(self._known) * size > REMEMBERED_TOKENS:
            self._known.clear()
        for block in range(remembered, len(hashes)):
            self._known[self._parts(tokens, hashes, block)] = hashes[block]
        self._last = hashes
        self.fresh = len(tokens) - remembered * size
        return list(hashes)

    def _parts(self, tokens: list[int], hashes: list[Any], block: int) -> tuple[Any, ...]:
        """What the hash of a block is made of, for prompts without images, adapters and salts."""
        start = block * self._block_size
        return (hashes[block - 1] if block else None, *tokens[start : start + self._block_size])


@dataclass(eq=False, slots=True)
class _Pool:
    name: str
    labels: tuple[int, int]
    parameters: Any  # vLLM's SamplingParams
    prompts: Iterator[tuple[int, tuple[list[int], int]]]  # those that the engine has not been given yet
    left: int
    logprobs: list[list[float] | None]
    times: list[tuple[float, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    future: Future[dict[str, object]] = field(default_factory=Future)
    tokens: Tokens = field(default_factory=Tokens)
    failure: str = ""

    def key(self, number: int) -> str:
        """Of a prompt's request."""
        return f"{self.name}-{number}"


class Pools:
    """The pools that one vllm.v1.engine.core.EngineCore is computing. All of it runs in the engine's own thread."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._asked: dict[str, tuple[_Pool, int]] = {}  # by the request's id
        self._waiting: deque[_Pool] = deque()  # with prompts that are not asked yet
        self._ended: list[_Pool] = []
        hasher = core.request_block_hasher
        known = isinstance(hasher, RememberingHasher)
        self._hasher = PathHasher(hasher.hasher, hasher.block_size) if known else hasher
        scheduler, manager = core.scheduler, core.scheduler.kv_cache_manager
        # All are found before any is replaced: another vLLM is left as it is.
        update, estimate = scheduler.update_from_output, manager.estimate_cached_tokens
        after_step, send_aborts = core.post_step, core._send_abort_outputs
        scheduler.update_from_output = self._without_ours(update)
        manager.estimate_cached_tokens = self._for_others(estimate)
        core.post_step = self._then_answer(after_step)
        core._send_abort_outputs = self._and_ours(send_aborts)

    def score(self, name: str, tree: PromptTree, labels: tuple[int, int]) -> Future[dict[str, object]]:
        """Begin with a pool. The result, when its last prompt is answered, is for PoolAnswer.read."""
        size = len(tree.ends)
        pool = _Pool(name, labels, label_parameters(labels), enumerate(tree.prompts()), size, [None] * size)
        self._waiting.append(pool)
        self._feed()
        self._answer()
        return pool.future

    def cancel(self, name: str) -> None:
        """Take a pool's prompts out of the engine; nothing happens if it has ended."""
        for pool in self._begun():
            if pool.name == name:
                self._fail(pool, "the pool was cancelled")
        self._feed()  # there may be no step to do it after
        self._answer()

    def _begun(self) -> set[_Pool]:
        """Those that have not ended."""
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
        """Give one prompt to the scheduler; how many of its tokens must be computed, for all that is known here."""
        from vllm.v1.request import Request

        if isinstance(self._hasher, PathHasher):
            self._hasher.shared = shared
        # As vLLM makes it of one that arrives (preprocess_add_request), images and grammars apart.
        request = Request(
            request_id=pool.key(number),
            prompt_token_ids=tokens,
            sampling_params=pool.parameters,
            pooling_params=None,
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
        # After the step has sent its statistics, so that whoever has the answer finds it counted in them. vLLM calls it
        # after every step that it starts or ends, and waits for other work only if it has no requests then.
        @functools.wraps(own)
        def post_step(*args: Any, **arguments: Any) -> Any:
            result = own(*args, **arguments)
            self._feed()
            self._answer()
            return result

        return post_step

    def _for_others(self, own: Callable[[Any], int]) -> Callable[[Any], int]:
        # A statistic that vLLM walks over all blocks of a request for; nobody is told it of a pool.
        @functools.wraps(own)
        def estimate_cached_tokens(request: Any) -> int:
            return 0 if request.request_id in self._asked else own(request)

        return estimate_cached_tokens

    def _and_ours(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def _send_abort_outputs(aborted: Any) -> Any:
            # vLLM has ended all requests; what waits here would wait for a step that may never come.
            for pool in self._begun():
                self._fail(pool, "the engine was paused or stopped")
            self._answer()
            return own(aborted)

        return _send_abort_outputs

    def _take(self, output: Any) -> bool:
        """Whether this EngineCoreOutput is of a pool; then it is noted."""
        place = self._asked.pop(output.request_id, None)
        if place is None:
            return False
        pool, number = place
        listed = output.new_logprobs
        # Of one position: the token that greedy decoding took, then the labels; then zeros, where others in the step
        # asked for more.
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


@dataclass(frozen=True, slots=True)
class PoolAnswer:
    """What an engine answers to a pool. logprobs: [log P(True), log P(False)] of each prompt, nats. times: seconds from
    the pool's arrival to a prompt's begin and end, in the order in which they ended."""

    logprobs: list[list[float]]
    tokens: Tokens
    times: list[tuple[float, float]]

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> PoolAnswer:
        """From the result of a SCORE call. Raises Stopped."""
        if "stopped" in result:
            raise Stopped(result["stopped"])
        return cls(result["logprobs"], Tokens(**result["tokens"]), result["times"])


def label_parameters(labels: tuple[int, int], **more: Any) -> Any:
    """vLLM's SamplingParams for the logprobs of the labels after a prompt, and nothing else. more: of its fields."""
    from vllm.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        logprobs=len(labels),
        logprob_token_ids=list(labels),
        detokenize=False,
        **more,
    )


def check(tree: PromptTree, labels: tuple[int, int], model_config: Any) -> list[int]:
    """Tokens of each prompt. Raises ValueError for what vLLM's API server would have refused in each of them."""
    if model_config.runner_type != "generate":
        raise ValueError("this server embeds, and has no log-probabilities of labels")
    lengths, limit = tree.lengths(), model_config.max_model_len
    if max(lengths) >= limit:
        raise ValueError(f"a prompt has {max(lengths)} tokens, and the model takes {limit - 1}")
    largest = max(max(map(max, tree.segments)), *labels)
    if largest >= model_config.get_vocab_size():
        raise ValueError(f"token id {largest} is out of vocabulary")
    return lengths


def arguments(name: str, tree: PromptTree, labels: tuple[int, int]) -> tuple[object, ...]:
    """Of a SCORE call."""
    return name, tree.segments, tree.parents, tree.pieces, tree.ends, list(labels)


def usable(vllm_config: Any) -> bool:
    """Whether an engine of this configuration takes pools; its processes have the plugin as this one has.

    One with limits on what may be queued (vLLM 0.32) gets prompts one by one, for it is asked before each.
    """
    limits = ("max_num_queued_reqs", "max_num_queued_tokens")
    if any(getattr(vllm_config.scheduler_config, limit, None) is not None for limit in limits):
        return False
    return installed() and vllm_config.parallel_config.data_parallel_size == 1


def record(engine: Any) -> None:
    """Take in the statistics of the steps of a pool, which vLLM's LLMEngine only does beside outputs of its own."""
    client = engine.engine_core
    while not client.outputs_queue.empty():
        stats = client.get_output().scheduler_stats
        if stats is not None and engine.logger_manager is not None:
            engine.logger_manager.record(scheduler_stats=stats, iteration_stats=None)


def call(client: Any, name: str, tree: PromptTree, labels: tuple[int, int]) -> PoolAnswer:
    """Score a pool by vLLM's synchronous client (SyncMPClient). Raises what vLLM raises for a dead engine."""
    result: Future[Any] = Future()

    def ask() -> None:
        try:
            result.set_result(client.call_utility(SCORE, *arguments(name, tree, labels)))
        except BaseException as error:  # noqa: BLE001 - it is the caller's, whatever it is
            result.set_exception(error)

    threading.Thread(target=ask, name=name, daemon=True).start()
    while not wait([result], timeout=ALIVE_S).done:
        client.ensure_alive()
        if not client.output_queue_thread.is_alive():
            raise RuntimeError("nobody listens to vLLM's engine any more")
    return PoolAnswer.read(result.result())


def count(engine: Any, answer: PoolAnswer) -> None:
    """Add a pool to the /metrics of an API server (AsyncLLM), which counts tokens and times of the requests it made
    itself; the rest, such as hits of the prefix cache, the engine counts for every request.

    Of a pool that was cancelled nothing is added.
    """
    try:
        _count(engine.logger_manager, answer)
    except (ImportError, AttributeError, TypeError) as error:  # another vLLM; the answer is none the worse
        _warn_uncounted(str(error))


@functools.cache
def _warn_uncounted(why: str) -> None:
    log.warning("this vLLM's /metrics leave out the tokens of pools: %s", why)


def _count(manager: Any, answer: PoolAnswer) -> None:
    if manager is None:  # --disable-log-stats
        return
    from vllm.v1.engine import FinishReason
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

    asked, tokens, stats = len(answer.logprobs), answer.tokens, IterationStats()
    stats.num_generation_tokens = asked
    stats.time_to_first_tokens_iter = [ended for _, ended in answer.times]
    stats.max_num_generation_tokens_iter = stats.n_params_iter = [1] * asked
    counted = stats.prompt_token_stats
    counted.total, counted.computed = tokens.prompt, tokens.computed
    counted.local_cache_hit, counted.external_kv_transfer = tokens.cached, tokens.external
    counted.cached_tokens = tokens.cached + tokens.external
    stats.finished_requests = [
        FinishedRequestStats(
            finish_reason=FinishReason.LENGTH,
            e2e_latency=ended,
            queued_time=begun,
            prefill_time=ended - begun,
            inference_time=ended - begun,
            num_prompt_tokens=tokens.prompt // asked,
            num_generation_tokens=1,
            max_tokens_param=1,
            num_cached_tokens=counted.cached_tokens // asked,
        )
        for begun, ended in answer.times
    ]
    manager.record(engine_idx=0, scheduler_stats=None, iteration_stats=stats, mm_cache_stats=None)


def _score(
    self: Any,
    name: str,
    segments: list[list[int]],
    parents: list[int],
    pieces: list[int],
    ends: list[int],
    labels: list[int],
) -> Future[dict[str, object]]:
    true, false = labels
    return _pools(self).score(name, PromptTree(segments, parents, pieces, ends), (true, false))


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
