"""vLLM in this process: the same protocol with no server, no HTTP and no JSON in between.

vLLM starts child processes with the `spawn` method, so a script that uses this must do so under
`if __name__ == "__main__":`. vLLM is imported only in start(), which takes seconds and needs it installed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import SecretStr

from core.llm_api.completions import TOP_LOGPROBS, label_logprobs
from core.llm_api.errors import APIError, ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.tokens import CANARY_TEXT, fingerprint
from core.llm_api.transport import MESSAGE_LIMIT
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    LabelLogprobs,
    LabelTokens,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Segment,
)
from core.settings import MissingLabelPolicy
from core.vllm_extension.plugin import kernels

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DirectOptions:
    """How vLLM is started; None leaves vLLM's own default. Names and meanings are those of `vllm.LLM`.

    gpu_memory_utilization: share of the GPU's memory, 0 to 1. block_size: tokens a KV-cache block; on CPU a multiple of
    32. extra: further engine arguments.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    block_size: int | None = None
    trust_remote_code: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)

    def engine_arguments(self) -> dict[str, object]:
        """Keyword arguments of vllm.LLM, less the model. disable_log_stats=False is what makes get_metrics work."""
        optional = {
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "block_size": self.block_size,
        }
        return {
            "dtype": self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager,
            "enable_prefix_caching": self.enable_prefix_caching,
            "trust_remote_code": self.trust_remote_code,
            "disable_log_stats": False,
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }


class DirectEngine:
    """An Engine on vllm.LLM. `model` is a path or a name on Hugging Face; `revision` a branch, tag or commit of it."""

    def __init__(
        self,
        model: str,
        options: DirectOptions | None = None,
        *,
        revision: str = "",
        hf_token: SecretStr | None = None,
        missing_label: MissingLabelPolicy = "error",
    ) -> None:
        self._model = model
        self._options = options or DirectOptions()
        self._revision = revision
        self._hf_token = hf_token
        self._missing = missing_label
        self._exact: bool | None = None
        self._vllm: Any = None
        self._llm: Any = None
        # One thread, because vllm.LLM is not made for several; a thread at all, so that the event loop stays free.
        self._thread: ThreadPoolExecutor | None = None

    @property
    def exact_labels(self) -> bool:
        """Whether this vLLM returns the labels' logprobs whatever their rank. Raises RuntimeError before start()."""
        if self._exact is None:
            raise RuntimeError("DirectEngine was not started")
        return self._exact

    async def start(self) -> EngineIdentity:
        """Import vLLM and load the model, which takes minutes for a large one."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")
        return await self._in_thread(self._start)

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text, from the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._encode, texts, special))

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat; by the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._encode_chat, messages))

    async def score(
        self, prompts: Sequence[Prompt], labels: LabelTokens, *, on_answer: OnAnswer | None = None
    ) -> EngineAnswer:
        """See Engine.score. The whole pool is one call, which cannot be stopped halfway: a cancelled one runs on."""
        if not prompts:
            return EngineAnswer([], 0, requests=0)
        answer = await self._in_thread(functools.partial(self._score, prompts, labels))
        if on_answer is not None:
            on_answer(range(len(prompts)), answer)
        return answer

    async def listed_logprobs(
        self, prompts: Sequence[tuple[Sequence[int], str]], chosen: Sequence[int] | None, *, top: int = TOP_LOGPROBS
    ) -> list[dict[int, float]]:
        """Log-probabilities after every prompt, nats, by token id: of `chosen` tokens, or of the `top` most probable.

        prompts: token ids, and the salt of the prefix cache that the prompt may use (vLLM's cache_salt). One call.
        """
        return await self._in_thread(functools.partial(self._listed, _salted(prompts), chosen, top))

    async def continuations(
        self, prompts: Sequence[tuple[Sequence[int], str]], *, max_tokens: int, temperature: float, seed: int | None
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        """What the model goes on with after every prompt: token ids and the log-probability of each, nats. One call.

        prompts: as in listed_logprobs. Always max_tokens tokens; an end-of-text token does not end them.
        """
        return await self._in_thread(
            functools.partial(self._continuations, _salted(prompts), max_tokens, temperature, seed)
        )

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """Summed over vLLM's engines; None where this vLLM does not count."""
        return await self._in_thread(self._counters)

    async def kv_cache_tokens(self) -> int | None:
        """Tokens the KV cache holds; None where this vLLM does not say."""
        return await self._in_thread(self._capacity)

    async def kv_block_size(self) -> int | None:
        """Tokens of one KV-cache block; None where this vLLM does not say."""
        return await self._in_thread(self._block_size)

    async def aclose(self) -> None:
        """Stop vLLM and its processes; idempotent. Waits for a call that is still running."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        await asyncio.get_running_loop().run_in_executor(thread, self._stop)
        thread.shutdown(wait=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._thread is None:
            raise RuntimeError("DirectEngine was not started")
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # What follows runs in the one thread.

    def _start(self) -> EngineIdentity:
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ConfigurationError(
                f"vLLM cannot be imported ({error}).", hint="Install it, or use a server: set VLLM_BASE_URL."
            ) from error
        arguments = self._options.engine_arguments()
        if self._revision:
            arguments |= {"revision": self._revision, "tokenizer_revision": self._revision}
        if self._hf_token is not None:
            arguments["hf_token"] = self._hf_token.get_secret_value()
        try:
            self._llm = self._vllm.LLM(model=self._model, **arguments)
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
            # No `from error`: a traceback of vLLM's could show its arguments, the token among them.
            raise ConfigurationError(
                f"vLLM did not start with {self._model!r}: {self._short(error)}.", hint="vLLM's own log says more."
            ) from None
        tokens = self._encode([CANARY_TEXT], special=True)[0]
        canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
        (top,) = self._ask([canary], None)
        self._exact = self._probe_exact(canary)
        config = self._llm.llm_engine.model_config
        return EngineIdentity(
            kind="vllm-direct",
            model=self._model,
            root=str(config.model),
            revision=self._revision,
            version=str(self._vllm.__version__),
            determinism=kernels(getattr(self._llm.llm_engine.vllm_config, "attention_config", None)),
            fingerprint=fingerprint(tokens, {f"token_id:{token}": logprob for token, logprob in top.items()}),
            max_model_len=int(config.max_model_len),
        )

    def _stop(self) -> None:
        llm, self._llm = self._llm, None
        engine_core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if engine_core is not None:
            engine_core.shutdown()

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        tokenizer = self._llm.get_tokenizer()
        return [list(tokenizer.encode(text, add_special_tokens=special)) for text in texts]

    def _encode_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        tokenizer = self._llm.get_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            return None
        asked = [[{"role": "user", "content": text}] for text in messages]
        return [
            list(tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=True, return_dict=False))
            for each in asked
        ]

    def _score(self, prompts: Sequence[Prompt], labels: LabelTokens) -> EngineAnswer:
        true, false = labels.ids
        tops = self._ask(prompts, labels if self.exact_labels else None)
        logprobs: list[LabelLogprobs] = [
            label_logprobs(top, true, false, missing=self._missing, name=prompt.name)
            for top, prompt in zip(tops, prompts, strict=True)
        ]
        return EngineAnswer(logprobs, sum(prompt.num_tokens for prompt in prompts))

    def _ask(self, prompts: Sequence[Prompt], labels: LabelTokens | None) -> list[dict[int, float]]:
        """Listed log-probabilities after each prompt, nats, by token id: of these labels, or the top ones."""
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        for prompt, tokens in zip(prompts, inputs, strict=True):
            if not tokens["prompt_token_ids"]:
                raise ValueError(f"prompt {prompt.name!r} has no token ids")
        return self._listed(inputs, None if labels is None else labels.ids, TOP_LOGPROBS)

    def _listed(
        self, inputs: Sequence[Mapping[str, object]], chosen: Sequence[int] | None, top: int
    ) -> list[dict[int, float]]:
        # vLLM refuses any other number of logprobs beside logprob_token_ids.
        wanted: dict[str, object] = (
            {"logprobs": top} if chosen is None else {"logprobs": len(chosen), "logprob_token_ids": list(chosen)}
        )
        outputs = self._generate(inputs, {"max_tokens": 1, "temperature": 0.0, "detokenize": False, **wanted})
        listed = [output.outputs[0].logprobs[0] for output in outputs]
        return [{token: float(entry.logprob) for token, entry in top.items()} for top in listed]

    def _continuations(
        self, inputs: Sequence[Mapping[str, object]], max_tokens: int, temperature: float, seed: int | None
    ) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
        wanted: dict[str, object] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        outputs = self._generate(inputs, {**wanted, "logprobs": 1, "ignore_eos": True, "detokenize": False})
        written = [output.outputs[0] for output in outputs]
        return [
            (
                tuple(one.token_ids),
                tuple(float(at[token].logprob) for token, at in zip(one.token_ids, one.logprobs, strict=True)),
            )
            for one in written
        ]

    def _generate(self, inputs: Sequence[Mapping[str, object]], parameters: Mapping[str, object]) -> list[Any]:
        """vLLM's own outputs, in order. Raises an APIError for whatever vLLM raises."""
        try:
            outputs = self._llm.generate(list(inputs), self._vllm.SamplingParams(**parameters), use_tqdm=False)
        except (ValueError, TypeError) as error:
            raise RequestRejected(f"vLLM refuses the request: {self._short(error)}.", status=400) from error
        except Exception as error:
            raise APIError(f"vLLM failed: {self._short(error)}.", hint="vLLM's own log says more.") from error
        if len(outputs) != len(inputs):
            raise APIError(f"vLLM answered {len(outputs)} of {len(inputs)} prompts.")
        return list(outputs)

    def _probe_exact(self, canary: Prompt) -> bool:
        """Whether two arbitrary tokens come back when asked for by id; older versions refuse or ignore that."""
        a, b = sorted(set(canary.token_ids))[-2:]
        try:
            (top,) = self._ask([canary], LabelTokens(true_id=a, false_id=b))
            label_logprobs(top, a, b, missing="error", name="canary")
        except (RequestRejected, MissingLabel):
            return False
        return True

    def _counters(self) -> PrefixCacheCounters | None:
        totals: dict[str, int] = {}
        for metric in self._llm.get_metrics():
            if metric.name in ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits"):
                totals[metric.name] = totals.get(metric.name, 0) + int(metric.value)
        if len(totals) != 2:
            return None
        return PrefixCacheCounters(totals["vllm:prefix_cache_queries"], totals["vllm:prefix_cache_hits"])

    def _capacity(self) -> int | None:
        config = self._llm.llm_engine.vllm_config.cache_config
        stated = getattr(config, "kv_cache_size_tokens", None)
        if stated:
            return int(stated)
        return int(config.num_gpu_blocks) * int(config.block_size) if config.num_gpu_blocks else None

    def _block_size(self) -> int | None:
        size = getattr(self._llm.llm_engine.vllm_config.cache_config, "block_size", None)
        return int(size) if size else None

    def _short(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        if self._hf_token is not None:
            text = text.replace(self._hf_token.get_secret_value(), "***")
        return text[:MESSAGE_LIMIT].rstrip(".")


def _salted(prompts: Sequence[tuple[Sequence[int], str]]) -> list[dict[str, object]]:
    return [{"prompt_token_ids": list(tokens), "cache_salt": salt} for tokens, salt in prompts]
