"""vLLM in this process: the same protocols with no server, no HTTP and no JSON in between.

A process has one vLLM at a time: a second DirectEngine of the same model and options shares it, one of others is
refused. vLLM starts child processes with the `spawn` method, so a script that uses this must do so under
`if __name__ == "__main__":`. vLLM is imported only in start(), which takes seconds and needs it installed.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
import os
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from pydantic import SecretStr

from core.cpu import KV_CACHE_SPACE, fast_type, kv_cache_gib
from core.errors import APIError, ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.engine_thread import EngineThread
from core.llm_api.http.completions import TOP_LOGPROBS, found_or_missing, keep_the_good, token_logprobs
from core.llm_api.http.pool_tree import tree_of
from core.llm_api.http.together import by_tokens
from core.llm_api.http.transport import MESSAGE_LIMIT
from core.llm_api.telemetry import RequestTelemetry
from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest
from core.llm_api.tokens import CANARY_TEXT, fingerprint
from core.llm_api.types import (
    Capabilities,
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Prompt,
    Query,
    Segment,
    TokenLogprobs,
    sum_known,
)
from core.settings import MissingLabelPolicy, Settings
from icm_vllm import pool_calls
from icm_vllm.plugin import BATCH_INVARIANT, FAST_PREFIXES, config_digest, dtype_of, kernels

T = TypeVar("T")

# Below vLLM's logger, which shows such lines among its own.
log = logging.getLogger(f"vllm.{__name__}")

_EXACT_ATTENTION: Final = {"backend": "FLASH_ATTN"}
"""Of configs/vllm_config.yaml, section gpu, where its reason is."""

_CPU_ENVIRONMENT: Final = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of configs/vllm_config.yaml, where each has its reason; what is set already stays. vLLM reads it when imported."""

_OPENMP: Final = Path(sys.prefix) / "lib" / "libiomp5.so"
"""Of the same section: LD_PRELOAD for the processes that vLLM starts, which sets it to another library otherwise. With
that other one a core must stay free."""


def set_cpu_environment(dtype: str) -> None:
    """For a vLLM on the CPU that this process is about to import, and that computes in `dtype`."""
    for name, value in {**_CPU_ENVIRONMENT, KV_CACHE_SPACE: str(kv_cache_gib(dtype))}.items():
        os.environ.setdefault(name, value)
    if _OPENMP.is_file() and os.environ.setdefault("LD_PRELOAD", str(_OPENMP)) == str(_OPENMP):
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


@dataclass(frozen=True, slots=True)
class DirectOptions:
    """How vLLM is started; None leaves vLLM's own default. Names and meanings are those of `vllm.LLM`.

    gpu_memory_utilization: share of the GPU's memory, 0 to 1. block_size: tokens a KV-cache block; on CPU a multiple of
    32. cpu: vLLM must be one for the CPU, and gets the settings of the local server (configs/vllm_config.yaml) where
    none are given here. deterministic: scores depend on their prompt alone, as with the launcher's --deterministic
    (docs/determinism.md); what the environment says of batch invariance already wins. chat_template: a Jinja template
    or the path of one, for models that have none. runner: "pooling" for embeddings in place of texts. extra: further
    engine arguments.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    block_size: int | None = None
    trust_remote_code: bool = False
    cpu: bool = False
    deterministic: bool = True
    chat_template: str | None = None
    runner: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def chosen_dtype(self) -> str:
        """`dtype`, in place of "auto" on a CPU the type that this one computes fast (core/cpu.py)."""
        return fast_type().dtype if self.cpu and self.dtype == "auto" else self.dtype

    def engine_arguments(self) -> dict[str, object]:
        """Keyword arguments of vllm.LLM, less the model. disable_log_stats=False is what makes get_metrics work."""
        optional = {
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "block_size": self.block_size or (32 if self.cpu else None),
            "runner": self.runner,
            "disable_hybrid_kv_cache_manager": True if self.cpu else None,
        }
        return {
            "dtype": self.chosen_dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager or self.cpu or (self.deterministic and self.tensor_parallel_size > 1),
            "enable_prefix_caching": self.enable_prefix_caching,
            "trust_remote_code": self.trust_remote_code,
            "disable_log_stats": False,
            **{name: value for name, value in optional.items() if value is not None},
            **self.extra,
        }


@dataclass(eq=False, slots=True)
class _Loaded:
    """The vLLM of this process. asked: what it was started with; users: how many DirectEngines hold it; takes_pools:
    whether its engine takes a pool in one call."""

    asked: Mapping[str, object] = field(repr=False)  # may hold a key
    thread: EngineThread = field(default_factory=EngineThread)
    users: int = 0
    vllm: Any = None
    llm: Any = None
    takes_pools: bool = False


class _Process:
    """Gives the one vLLM to whoever asks for it with the same settings, and stops it after the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def take(self, asked: Mapping[str, object]) -> _Loaded:
        """Blocks while one is being stopped. Raises ConfigurationError where another one runs."""
        with self._lock:
            if self._loaded is None:
                self._loaded = _Loaded(asked)
            elif self._loaded.asked != asked:
                there = self._loaded.asked
                unlike = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
                told = ", ".join(
                    name if name == "hf_token" else f"{name} {there.get(name)!r}, not {asked.get(name)!r}"
                    for name in unlike
                )
                raise ConfigurationError(
                    f"this process already runs vLLM with {told}.",
                    hint="One engine a process: close the first one, or start a server for one of them.",
                )
            self._loaded.users += 1
            return self._loaded

    def give_back(self, loaded: _Loaded) -> None:
        """Blocks until vLLM has stopped, where this was the last one."""
        with self._lock:
            loaded.users -= 1
            if loaded.users:
                return
            self._loaded = None
            if loaded.llm is not None:
                loaded.thread.call(functools.partial(_stop, loaded.llm), alone=True).result()
            loaded.thread.stop()


def _stop(llm: Any) -> None:
    engine_core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if engine_core is not None:
        engine_core.shutdown()


_PROCESS: Final = _Process()


class DirectEngine:
    """An Engine and a TextEngine on vllm.LLM.

    `model` is a path or a name on Hugging Face; `revision` a branch, tag or commit of it.
    """

    capabilities: Final = Capabilities()

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
        self._template: str | None = None
        self._shared: _Loaded | None = None

    @property
    def exact_labels(self) -> bool:
        """Whether this vLLM returns the labels' logprobs whatever their rank. Raises RuntimeError before start()."""
        if self._exact is None:
            raise RuntimeError("DirectEngine was not started")
        return self._exact

    async def start(self) -> EngineIdentity:
        """Import vLLM and load the model, which takes minutes for a large one."""
        return await self._begin(self._start)

    async def connect(self) -> EngineIdentity:
        """Load the model, and ask it nothing; see TextEngine.connect."""
        return await self._begin(self._load)

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Token ids of each text, from the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._encode, texts, special), alone=False)

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize; by the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._decode, tokens), alone=False)

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """See Engine.tokenize_chat; by the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._encode_chat, messages))

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        """See Engine.score. The whole pool is one call, which cannot be stopped halfway: a cancelled one runs on.

        Queries for more tokens together than one call may ask for are several calls.
        """
        if not queries:
            return EngineAnswer([], 0, requests=0)
        calls = by_tokens(queries)
        found: dict[int, TokenLogprobs | MissingLabel] = {}
        cached: list[int | None] = []
        for call in calls:
            asked = [queries[position] for position in call.positions]
            answers, hits = await self._in_thread(functools.partial(self._score, asked, call.token_ids))
            found.update(zip(call.positions, answers, strict=True))
            cached.append(hits)
        tokens = sum(query.prompt.num_tokens for query in queries)
        answer = EngineAnswer([], tokens, requests=len(calls), cached_tokens=sum_known(cached))
        return keep_the_good([found[position] for position in range(len(queries))], answer, on_answer)

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
        return await self._in_thread(self._counters, alone=False)

    async def kv_cache_tokens(self) -> int | None:
        """Tokens the KV cache holds; None where this vLLM does not say."""
        return await self._in_thread(self._capacity, alone=False)

    async def kv_block_size(self) -> int | None:
        """Tokens of one KV-cache block; None where this vLLM does not say."""
        return await self._in_thread(self._block_size, alone=False)

    async def generate(self, request: TextRequest) -> Generation:
        """See TextEngine.generate. Texts that are asked for at the same time are written as one batch."""
        last = Piece()
        async for piece in self._write(request, "FINAL_ONLY"):
            last = piece
        return Generation(last.text, last.finish_reason or "stop", last.prompt_tokens, last.completion_tokens)

    def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream."""
        return self._write(request, "DELTA")

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed; needs DirectOptions(runner="pooling")."""
        if self._options.runner != "pooling":
            raise ConfigurationError(
                f"{self._model!r} runs to write texts, not for embeddings.",
                hint='Start it with DirectOptions(runner="pooling"), and ModelAPI with scores=False.',
            )
        return await self._in_thread(functools.partial(self._embed, texts))

    async def models(self) -> list[str]:
        """The one model."""
        await self._in_thread(lambda: None, alone=False)  # says whether it still runs
        return [self._model]

    @property
    def telemetry(self) -> list[RequestTelemetry]:
        """Nothing: there are no requests."""
        return []

    async def aclose(self) -> None:
        """Stop vLLM and its processes, if no other DirectEngine uses them; idempotent. Waits for running calls."""
        shared, self._shared = self._shared, None
        if shared is not None:
            await asyncio.to_thread(_PROCESS.give_back, shared)

    async def _begin(self, begin: Callable[[], EngineIdentity]) -> EngineIdentity:
        self._template = _template(self._options.chat_template)
        if self._shared is None:
            self._shared = await asyncio.to_thread(_PROCESS.take, self._arguments())
        try:
            return await self._in_thread(begin)
        except BaseException:  # also a cancelled start: nobody else may have to wait for this vLLM
            await self.aclose()
            raise

    async def _in_thread(self, call: Callable[[], T], *, alone: bool = True) -> T:
        """alone: not while texts are being written; whatever has vLLM generate must be."""
        return await asyncio.wrap_future(self._loaded.thread.call(call, alone=alone))

    async def _write(self, request: TextRequest, kind: str) -> AsyncGenerator[Piece, None]:
        """Pieces of a text, as many as the kind of vLLM's outputs (RequestOutputKind) makes."""
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        thread = self._loaded.thread

        def heard(output: Any) -> None:
            with suppress(RuntimeError):  # the event loop of whoever asked has ended
                loop.call_soon_threadsafe(outputs.put_nowait, output)

        thread.write(request.request_id, functools.partial(self._prepare, request, kind), heard)
        finished = False
        completion_tokens = 0
        try:
            while not finished:
                output = await outputs.get()
                if isinstance(output, Exception):
                    finished = True
                    raise self._explained(output)
                finished = output.finished
                (choice,) = output.outputs
                completion_tokens += len(choice.token_ids)
                prompt_tokens = len(output.prompt_token_ids or ())
                yield Piece(choice.text, choice.finish_reason, prompt_tokens, completion_tokens)
        finally:
            if not finished:
                thread.abort(request.request_id)

    @property
    def _loaded(self) -> _Loaded:
        if self._shared is None:
            raise RuntimeError("DirectEngine was not started")
        return self._shared

    @property
    def _llm(self) -> Any:
        return self._loaded.llm

    @property
    def _vllm(self) -> Any:
        return self._loaded.vllm

    def _arguments(self) -> dict[str, object]:
        arguments = {"model": self._model, **self._options.engine_arguments()}
        if self._revision:
            arguments |= {"revision": self._revision, "tokenizer_revision": self._revision}
        if self._hf_token is not None:
            arguments["hf_token"] = self._hf_token.get_secret_value()
        return arguments

    # What follows runs in the one thread.

    def _load(self) -> EngineIdentity:
        """Start vLLM where no other DirectEngine did."""
        loaded = self._loaded
        if loaded.llm is None:
            os.environ.setdefault(FAST_PREFIXES, "1")  # as the servers that we launch
            loaded.vllm = self._import()
            if self._options.cpu and self._options.dtype == "auto" and "dtype" not in self._options.extra:
                log.info("%s", fast_type())
            try:
                loaded.llm = loaded.vllm.LLM(**loaded.asked, **self._exactness(loaded.asked))
            except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
                # No `from error`: a traceback of vLLM's could show its arguments, the token among them.
                raise ConfigurationError(
                    f"vLLM did not start with {self._model!r}: {self._short(error)}.", hint="vLLM's own log says more."
                ) from None
            engine = loaded.thread.engine = loaded.llm.llm_engine
            # Without a process of its own an engine has no such calls.
            loaded.takes_pools = hasattr(engine.engine_core, "call_utility") and pool_calls.usable(engine.vllm_config)
        config = loaded.llm.llm_engine.model_config
        return EngineIdentity(
            kind="vllm-direct",
            model=self._model,
            root=str(config.model),
            revision=self._revision,
            version=str(loaded.vllm.__version__),
            determinism=kernels(getattr(loaded.llm.llm_engine.vllm_config, "attention_config", None)),
            max_model_len=int(config.max_model_len),
            dtype=dtype_of(config),
            config=config_digest(getattr(loaded.llm.llm_engine, "vllm_config", None)),
        )

    def _import(self) -> Any:
        if self._options.cpu and "vllm" not in sys.modules:
            set_cpu_environment(str(self._loaded.asked["dtype"]).removeprefix("torch."))
        try:
            vllm = importlib.import_module("vllm")
            if not hasattr(vllm, "LLM"):  # only a folder of that name was found, such as vllm/ of this repository
                raise ImportError("No module named 'vllm'")
        except ImportError as error:
            raise ConfigurationError(
                f"vLLM cannot be imported ({error}).", hint="Install it, or use a server: set VLLM_BASE_URL."
            ) from error
        if self._options.cpu and not importlib.import_module("vllm.platforms").current_platform.is_cpu():
            raise ConfigurationError(
                "the installed vLLM is not one for the CPU.", hint="make setup-local installs one; or leave cpu out."
            )
        return vllm

    def _exactness(self, asked: Mapping[str, object]) -> dict[str, object]:
        """Set the environment for exact scores, and return the engine arguments that they need beside `asked`."""
        if not self._options.deterministic:
            return {}
        if importlib.import_module("vllm.platforms").current_platform.is_cpu():
            os.environ.setdefault(BATCH_INVARIANT, "1")
            return {}
        if os.environ.setdefault("VLLM_BATCH_INVARIANT", "1") != "1":
            return {}
        os.environ.setdefault(BATCH_INVARIANT, "1")
        return {} if "attention_config" in asked else {"attention_config": dict(_EXACT_ATTENTION)}

    def _start(self) -> EngineIdentity:
        identity = self._load()
        tokens = self._encode([CANARY_TEXT], special=True)[0]
        canary = Prompt((Segment(CANARY_TEXT, tokens),), name="canary")
        (top,) = self._ask([canary], None)
        self._exact = self._probe_exact(canary)
        named = {f"token_id:{token}": logprob for token, logprob in top.items()}
        return replace(identity, fingerprint=fingerprint(tokens, named))

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        tokenizer = self._llm.get_tokenizer()
        return [list(tokenizer.encode(text, add_special_tokens=special)) for text in texts]

    def _decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        tokenizer = self._llm.get_tokenizer()
        return [str(tokenizer.decode(list(ids))) for ids in tokens]

    def _encode_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        tokenizer = self._llm.get_tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            return None
        asked = [[{"role": "user", "content": text}] for text in messages]
        return [
            list(tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=True, return_dict=False))
            for each in asked
        ]

    def _score(
        self, queries: Sequence[Query], token_ids: tuple[int, ...]
    ) -> tuple[list[TokenLogprobs | MissingLabel], int | None]:
        """What every query's answer is, and how many of their tokens were cached, where that is known."""
        prompts = [query.prompt for query in queries]
        cached: int | None = None
        tops: Sequence[Mapping[int, float]]
        if self.exact_labels and self._loaded.takes_pools:
            tops, cached = self._pool(prompts, token_ids)
        else:
            tops = self._ask(prompts, token_ids if self.exact_labels else None)
        return found_or_missing(tops, queries, lambda tokens: tokens.ids, missing=self._missing), cached

    def _pool(self, prompts: Sequence[Prompt], token_ids: tuple[int, ...]) -> tuple[list[dict[int, float]], int]:
        """As _ask, the pool in one piece (icm_vllm/pools.py), and how many of its tokens were cached."""
        engine, name = self._llm.llm_engine, f"pool-{uuid.uuid4().hex}"
        try:
            tree = tree_of(prompts)
            pool_calls.check(tree, token_ids, engine.model_config)
            answer = pool_calls.call(engine.engine_core, name, tree, token_ids)
            pool_calls.record(engine)
        except Exception as error:
            raise self._explained(error) from error
        pool_calls.count(engine, answer)
        return [dict(zip(token_ids, row, strict=True)) for row in answer.logprobs], answer.tokens.cached

    def _ask(self, prompts: Sequence[Prompt], token_ids: Sequence[int] | None) -> list[dict[int, float]]:
        """Listed log-probabilities after each prompt, nats, by token id: of these tokens, or the top ones."""
        inputs = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts]
        for prompt, tokens in zip(prompts, inputs, strict=True):
            if not tokens["prompt_token_ids"]:
                raise ValueError(f"prompt {prompt.name!r} has no token ids")
        return self._listed(inputs, token_ids, TOP_LOGPROBS)

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
        except Exception as error:
            raise self._explained(error) from error
        if len(outputs) != len(inputs):
            raise APIError(f"vLLM answered {len(outputs)} of {len(inputs)} prompts.")
        return list(outputs)

    def _prepare(self, request: TextRequest, kind: str) -> tuple[dict[str, object], Any]:
        kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        parameters = self._vllm.SamplingParams(**request.options.as_dict(), output_kind=kinds[kind])
        if request.messages:
            tokens = self._encode([self._render(request)], special=False)[0]
        else:
            tokens = self._encode([request.prompt], special=True)[0]
        return {"prompt_token_ids": tokens}, parameters

    def _render(self, request: TextRequest) -> str:
        tokenizer = self._llm.get_tokenizer()
        if self._template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigurationError(
                f"{self._model!r} has no chat template.",
                hint="Pass one: DirectOptions(chat_template=FILE), configs/chat_template.jinja being a simple one; or "
                "ask for a completion instead.",
            )
        turns = [{"role": turn.role, "content": turn.content} for turn in request.messages]
        return str(
            tokenizer.apply_chat_template(
                turns, chat_template=self._template, add_generation_prompt=True, tokenize=False
            )
        )

    def _embed(self, texts: Sequence[str]) -> Embeddings:
        if not texts:
            return np.zeros((0, 0), np.float32)
        try:
            outputs = self._llm.embed(list(texts), use_tqdm=False)
        except Exception as error:
            raise self._explained(error) from error
        return np.array([output.outputs.embedding for output in outputs], dtype=np.float32)

    def _explained(self, error: Exception) -> APIError:
        if isinstance(error, APIError):
            return error
        # vLLM 0.32 has a class for what the caller did wrong; 0.26 raises ValueError.
        if isinstance(error, ValueError | TypeError) or "VLLMClientError" in (c.__name__ for c in type(error).__mro__):
            return RequestRejected(f"vLLM refuses the request: {self._short(error)}.", status=400)
        return APIError(f"vLLM failed: {self._short(error)}.", hint="vLLM's own log says more.")

    def _probe_exact(self, canary: Prompt) -> bool:
        """Whether two arbitrary tokens come back when asked for by id; older versions refuse or ignore that."""
        a, b = sorted(set(canary.token_ids))[-2:]
        try:
            (top,) = self._ask([canary], (a, b))
            token_logprobs(top, (a, b), missing="error", name="canary")
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


def open_engine(settings: Settings, model: str, options: object) -> DirectEngine:
    """options: DirectOptions."""
    assert options is None or isinstance(options, DirectOptions)
    return DirectEngine(
        model,
        options,
        revision=settings.model_revision or "",
        hf_token=settings.hf_token,
        missing_label=settings.missing_label,
    )


def _salted(prompts: Sequence[tuple[Sequence[int], str]]) -> list[dict[str, object]]:
    return [{"prompt_token_ids": list(tokens), "cache_salt": salt} for tokens, salt in prompts]


def _template(given: str | None) -> str | None:
    """A Jinja template as it stands, or out of the file that it names. Raises ConfigurationError for a missing one."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read the chat template {given}: {error.strerror}.") from None
