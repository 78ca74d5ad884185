"""Asking vLLM's engine for a pool in one call, with the checks and counts that its front end makes for a request.

Used by the API server (label_logprobs.py) and in process (core/llm_api/engines/direct.py); the engine's side is
`pools.py`. Not for data-parallel engines, where a call would reach every engine.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Final

from icm_vllm.pools import SCORE, Tokens, installed
from icm_vllm.prompt_tree import PromptTree

log = logging.getLogger(__name__)

ALIVE_S: Final = 1.0
"""Seconds between checks that the engine is alive; in vLLM a call to a dead engine waits for ever."""


class Stopped(Exception):
    """The engine ended a prompt without an answer, because it is paused or stopped."""


@dataclass(frozen=True, slots=True)
class PoolAnswer:
    """An engine's answer to a pool. logprobs: for each prompt one a label, nats. times: for each prompt the seconds
    from the pool's arrival to its begin and end, in the order in which they ended."""

    logprobs: list[list[float]]
    tokens: Tokens
    times: list[tuple[float, float]]

    @classmethod
    def read(cls, result: Mapping[str, Any]) -> PoolAnswer:
        """From the result of a SCORE call. Raises Stopped."""
        if "stopped" in result:
            raise Stopped(result["stopped"])
        return cls(result["logprobs"], Tokens(**result["tokens"]), result["times"])


def check(tree: PromptTree, labels: Sequence[int], model_config: Any) -> list[int]:
    """The number of tokens of each prompt. Raises ValueError for prompts that vLLM's API server would refuse."""
    if model_config.runner_type != "generate":
        raise ValueError("this server embeds, and has no log-probabilities of labels")
    lengths, limit = tree.lengths(), model_config.max_model_len
    if max(lengths) >= limit:
        raise ValueError(f"a prompt has {max(lengths)} tokens, and the model takes {limit - 1}")
    largest = max(max(map(max, tree.segments)), *labels)
    if largest >= model_config.get_vocab_size():
        raise ValueError(f"token id {largest} is out of vocabulary")
    return lengths


def arguments(name: str, tree: PromptTree, labels: Sequence[int], adapter: Any = None) -> tuple[object, ...]:
    """The arguments of a SCORE call. adapter: vLLM's LoRARequest; None: the base model."""
    of_base = name, tree.segments, tree.parents, tree.pieces, tree.ends, list(labels)
    return of_base if adapter is None else (*of_base, adapter)


def usable(vllm_config: Any) -> bool:
    """Whether an engine of this configuration takes pools; assumes that its processes have the plugin if this one has.

    An engine with limits on its queue (vLLM 0.32) gets prompts one by one, because each has to pass them.
    """
    limits = ("max_num_queued_reqs", "max_num_queued_tokens")
    if any(getattr(vllm_config.scheduler_config, limit, None) is not None for limit in limits):
        return False
    return installed() and vllm_config.parallel_config.data_parallel_size == 1


def record(engine: Any) -> None:
    """Record the statistics of a pool's steps, which vLLM's LLMEngine only does together with its own outputs."""
    client = engine.engine_core
    while not client.outputs_queue.empty():
        stats = client.get_output().scheduler_stats
        if stats is not None and engine.logger_manager is not None:
            engine.logger_manager.record(scheduler_stats=stats, iteration_stats=None)


def call(client: Any, name: str, tree: PromptTree, labels: Sequence[int]) -> PoolAnswer:
    """Score a pool through vLLM's synchronous client (SyncMPClient). Raises vLLM's error for a dead engine."""
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
    """Add a pool's tokens and times to the /metrics of an API server (AsyncLLM), which only counts requests that it
    made itself; everything else, such as hits of the prefix cache, is counted by the engine.

    Nothing is added for a pool that was cancelled.
    """
    try:
        _count(engine.logger_manager, answer)
    except (ImportError, AttributeError, TypeError) as error:  # another version; the answer is still right
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
