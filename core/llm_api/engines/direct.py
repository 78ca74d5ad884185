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
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import SecretStr

from core.cpu import fast_type
from core.errors import APIError, ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.http.completions import TOP_LOGPROBS, found_or_missing, keep_the_good, token_logprobs
from core.llm_api.http.pool_tree import tree_of
from core.llm_api.http.server_errors import MESSAGE_LIMIT
from core.llm_api.http.together import by_tokens
from core.llm_api.in_process.options import (
    ALL_BLOCKS,
    DirectOptions,
    check_hub,
    check_path,
    set_cpu_environment,
)
from core.llm_api.in_process.vllm_process import PROCESS, Loaded
from core.llm_api.telemetry import RequestTelemetry
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
from icm_vllm import environment, pool_calls
from icm_vllm.attention_choice import exact_backend, has_states, read_config
from icm_vllm.plugin import BATCH_INVARIANT, FAST_PREFIXES, config_digest, dtype_of, kernels

if TYPE_CHECKING:
    from core.llm_api.text.direct_text import DirectText
    from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest

T = TypeVar("T")

__all__ = ["DirectEngine", "DirectOptions", "open_engine"]

# A child of vLLM's logger, which shows these lines among its own.
log = logging.getLogger(f"vllm.{__name__}")


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
        self._shared: Loaded | None = None

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
        return await self._in_thread(functools.partial(self._encode, texts, special), exclusive=False)

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """See Engine.detokenize; by the model's own tokenizer."""
        return await self._in_thread(functools.partial(self._decode, tokens), exclusive=False)

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
        return await self._in_thread(self._counters, exclusive=False)

    async def kv_cache_tokens(self) -> int | None:
        """Tokens the KV cache holds; None where this vLLM does not say."""
        return await self._in_thread(self._capacity, exclusive=False)

    async def kv_block_size(self) -> int | None:
        """Tokens of one KV-cache block; None where this vLLM does not say."""
        return await self._in_thread(self._block_size, exclusive=False)

    async def generate(self, request: TextRequest) -> Generation:
        """See TextEngine.generate. Texts that are asked for at the same time are written as one batch."""
        return await self._text.generate(request)

    def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream."""
        return self._text.stream(request)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed; needs DirectOptions(runner="pooling")."""
        if self._options.runner != "pooling":
            raise ConfigurationError(
                f"{self._model!r} runs to write texts, not for embeddings.",
                hint='Start it with DirectOptions(runner="pooling"), and ModelAPI with scores=False.',
            )
        return await self._text.embed(texts)

    @property
    def _text(self) -> DirectText:
        from core.llm_api.text.direct_text import DirectText  # not imported where nobody asks for texts

        return DirectText(self._model, self._loaded, self._template, self._explained)

    async def models(self) -> list[str]:
        """The one model."""
        await self._in_thread(lambda: None, exclusive=False)  # raises where vLLM no longer runs
        return [self._model]

    @property
    def telemetry(self) -> list[RequestTelemetry]:
        """Nothing: there are no requests."""
        return []

    async def aclose(self) -> None:
        """Stop vLLM and its processes, if no other DirectEngine uses them; idempotent. Waits for running calls."""
        shared, self._shared = self._shared, None
        if shared is not None:
            await asyncio.to_thread(PROCESS.give_back, shared)

    async def _begin(self, begin: Callable[[], EngineIdentity]) -> EngineIdentity:
        self._template = _template(self._options.chat_template)
        if self._shared is None:
            self._shared = await asyncio.to_thread(PROCESS.take, self._arguments())
        try:
            return await self._in_thread(begin)
        except BaseException:  # also a cancelled start: others must not wait for this vLLM
            await self.aclose()
            raise

    async def _in_thread(self, call: Callable[[], T], *, exclusive: bool = True) -> T:
        """exclusive: not while texts are being written; needed by every call that makes vLLM generate."""
        return await asyncio.wrap_future(self._loaded.thread.call(call, exclusive=exclusive))

    @property
    def _loaded(self) -> Loaded:
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
        if ALL_BLOCKS not in self._options.extra and has_states(read_config(self._model, self._revision or None)):
            arguments.pop(ALL_BLOCKS, None)  # its layers have no kind of block in common; as the launcher
        if self._revision:
            arguments |= {"revision": self._revision, "tokenizer_revision": self._revision}
        if self._hf_token is not None:
            arguments["hf_token"] = self._hf_token.get_secret_value()
        return arguments

    # What follows runs in the one thread.

    def _load(self) -> EngineIdentity:
        """Start vLLM where no other DirectEngine did."""
        loaded, token = self._loaded, self._hf_token
        if loaded.llm is None:
            try:
                environment.check()
            except ValueError as error:
                raise ConfigurationError(f"{error}.") from None
            os.environ.setdefault(FAST_PREFIXES, "1")  # as the servers that we launch
            loaded.vllm = self._import()
            check_hub(self._model, self._revision, None if token is None else token.get_secret_value())
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
            # An engine that runs in this very process has no such calls.
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
        if "attention_config" in asked or "attention_backend" in asked:
            return {}
        config = read_config(self._model, self._revision or None)
        return {"attention_config": {"backend": exact_backend(config)}}  # as the launcher chooses it

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
        """The answer to every query, and how many of their tokens were cached, None if unknown."""
        prompts = [query.prompt for query in queries]
        cached: int | None = None
        tops: Sequence[Mapping[int, float]]
        if self.exact_labels and self._loaded.takes_pools:
            tops, cached = self._pool(prompts, token_ids)
        else:
            tops = self._ask(prompts, token_ids if self.exact_labels else None)
        return found_or_missing(tops, queries, lambda tokens: tokens.ids, missing=self._missing), cached

    def _pool(self, prompts: Sequence[Prompt], token_ids: tuple[int, ...]) -> tuple[list[dict[int, float]], int]:
        """As _ask, but the pool as one tree (icm_vllm/pools.py), and how many of its tokens were cached."""
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
        """vLLM's outputs, in order. Raises an APIError for whatever vLLM raises."""
        try:
            outputs = self._llm.generate(list(inputs), self._vllm.SamplingParams(**parameters), use_tqdm=False)
        except Exception as error:
            raise self._explained(error) from error
        if len(outputs) != len(inputs):
            raise APIError(f"vLLM answered {len(outputs)} of {len(inputs)} prompts.")
        return list(outputs)

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
    """options: DirectOptions. Raises ConfigurationError for a path where no model is."""
    check_path(model)
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
    """A Jinja template as given, or read from the file that it names. Raises ConfigurationError for a missing file."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read the chat template {given}: {error.strerror}.") from None
