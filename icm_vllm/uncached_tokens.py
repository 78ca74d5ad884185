"""Only the token ids that will be computed go to the GPU.

vLLM's GPU worker copies every token id of every new request to the GPU. Nothing reads the ids before the first token to
compute, whose keys and values are in the cache, unless the request asks for penalties or the like. For a pool whose
tree is cached these are 2.7 million ids, and copying them was 30% of the engine's time (docs/lab-log.md).
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

log = logging.getLogger(__name__)


class UncachedWrites:
    """vLLM's StagedWriteTensor of token ids, which leaves out the beginnings of known rows."""

    def __init__(self, tensor: Any, skipped: dict[int, int]) -> None:
        """skipped: how many leading ids not to write, by the id() of the list that is written."""
        self._tensor = tensor
        self._skipped = skipped

    def stage_write(self, index: int, start: int, ids: Sequence[int]) -> None:
        """As vLLM's: `ids` go to row `index` from `start` on, at the next apply_write()."""
        skipped = self._skipped.get(id(ids), 0)
        self._tensor.stage_write(index, start + skipped, ids[skipped:] if skipped else ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def skipped_tokens(requests: Iterable[Any]) -> dict[int, int]:
    """How many ids of each vllm.v1.core.sched.output.NewRequestData nothing will read, by the id() of its list.

    Left out are requests that need their whole prompt (penalties, bad words, prompt logprobs, images, thinking budgets)
    and those of which nothing is cached.
    """
    found = {}
    for request in requests:
        parameters = request.sampling_params
        if (
            parameters is not None
            and request.num_computed_tokens > 0
            and not request.mm_features
            and not getattr(request, "replay_start", 0)
            and parameters.presence_penalty == parameters.frequency_penalty == 0.0
            and parameters.repetition_penalty == 1.0
            and not parameters.bad_words
            and parameters.prompt_logprobs is None
            and getattr(parameters, "thinking_token_budget", None) is None
        ):
            found[id(request.prefill_token_ids)] = request.num_computed_tokens
    return found


def install() -> None:
    """Make the GPU worker of this process do so; does nothing the second time, or for another vLLM."""
    try:
        runner: Any = importlib.import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
        own = runner.add_requests
    except (ImportError, AttributeError) as error:
        log.debug("this vLLM copies token ids in its own way: %s", error)
        return
    if getattr(own, "uncached_only", False):
        return

    @functools.wraps(own)
    def add_requests(self: Any, scheduler_output: Any) -> Any:
        config = self.vllm_config
        # These may read whole prompts; and where transferring a cache fails, its tokens are computed again.
        if config.speculative_config or config.kv_transfer_config or config.model_config.logits_processors:
            return own(self, scheduler_output)
        states = self.req_states
        whole = states.all_token_ids
        states.all_token_ids = UncachedWrites(whole, skipped_tokens(scheduler_output.scheduled_new_reqs))
        try:
            return own(self, scheduler_output)
        finally:
            states.all_token_ids = whole

    add_requests.uncached_only = True  # type: ignore[attr-defined]
    runner.add_requests = add_requests
