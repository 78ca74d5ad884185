"""The types of the model layer: segments, prompts, queries and their answers, and the engine protocol.

A prompt is a path of *segments*. A segment (the instruction, one claim's question, one label) is tokenized and
serialized once and shared by every prompt that contains it, so laying out N prompts of N demonstrations costs
N * N references instead of N * N tokenizations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress, count, pairwise
from operator import is_not
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


class Segment:
    """A piece of a prompt: its text and, where the engine takes token ids, its tokens.

    Equal if text and tokens are. `json` is the comma-joined decimal form of the token ids, encoded once, from which
    request bodies and cache keys are joined.
    """

    __slots__ = ("json", "text", "tokens")

    def __init__(self, text: str, tokens: Sequence[int] | None = None) -> None:
        self.text = text
        self.tokens: tuple[int, ...] | None = None if tokens is None else tuple(tokens)
        self.json: bytes = b"" if tokens is None else ",".join(map(str, tokens)).encode()

    def __len__(self) -> int:
        """Number of tokens; 0 where the engine does not take token ids."""
        return 0 if self.tokens is None else len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and (self.text, self.tokens) == (other.text, other.tokens)

    def __hash__(self) -> int:
        return hash((self.text, self.tokens))

    def __repr__(self) -> str:
        return f"Segment({self.text!r}, {len(self)} tokens)"


@dataclass(frozen=True)
class Prompt:
    """Segments in order, ending right before the label. `name` names the claim in errors.

    place: position in the depth-first order of the pool's prefixes, 0 <= place < 1. Prompts near each other share the
    longest prefixes, so an engine of several servers sends neighbours to the same one. It decides which server is
    asked, never what: it is no part of the digest, of the request or of equality.
    """

    segments: tuple[Segment, ...]
    name: str = ""
    place: float = field(default=0.0, compare=False)

    @cached_property
    def num_tokens(self) -> int:
        """Length in tokens; 0 where the segments carry text only."""
        return sum(map(len, self.segments))

    @property
    def text(self) -> str:
        """The segments' texts, joined."""
        return "".join(s.text for s in self.segments)

    @property
    def token_ids(self) -> list[int]:
        """Token ids, shape [num_tokens]. Empty where the segments carry text only."""
        return [t for s in self.segments if s.tokens for t in s.tokens]

    @property
    def json(self) -> bytes:
        """The token ids as a JSON array, joined from the segments' encoded pieces.

        Joined anew every time and not kept: for a pool they are megabytes, and thousands of prompts wait for their
        answers.
        """
        return b"[" + _joined(self.segments) + b"]"

    @property
    def json_size(self) -> int:
        """Bytes of `json`, without making it."""
        sizes = [len(s.json) for s in self.segments if s.json]
        return sum(sizes) + max(len(sizes) - 1, 0) + 2

    @property
    def content(self) -> bytes:
        """What the engine is sent: the token ids as JSON if there are any, else the text."""
        return self.json if self._speaks_ids else self.text.encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def _speaks_ids(self) -> bool:
        return bool(self.segments) and self.segments[0].tokens is not None


def digests(prompts: Sequence[Prompt]) -> list[str]:
    """Every prompt's digest, which is also kept in the prompt.

    The beginning that a prompt shares with the one before it is not hashed again, so the prompts of a tree, depth
    first, cost N * log2(N) segments of hashing in place of N * N.
    """
    missing = [prompt for prompt in prompts if "digest" not in prompt.__dict__ and prompt._speaks_ids]
    shared = [common(a.segments, b.segments) for a, b in pairwise(missing)]
    # The depths at which later prompts leave the path of each, deepest first, as linked lists that share their ends.
    leaving: list[_Depths | None] = [None]
    for depth in reversed(shared):
        nearer = leaving[-1]
        while nearer is not None and nearer[0] >= depth:
            nearer = nearer[1]
        leaving.append((depth, nearer))
    # Hashes of the prompt's beginnings from which later prompts go on, the longest last: (segments, hash).
    begun = [(0, hashlib.sha256(b"["))]
    for prompt, places, with_next in zip(missing, reversed(leaving), [*shared, 0], strict=False):
        at, known = begun[-1]
        state = known.copy()
        for depth in _beyond(places, at):
            _add(state, prompt.segments, at, depth)
            begun.append((depth, state.copy()))
            at = depth
        _add(state, prompt.segments, at, len(prompt.segments))
        state.update(b"]")
        prompt.__dict__["digest"] = state.hexdigest()  # where cached_property looks for it
        while begun[-1][0] > with_next:
            begun.pop()
    return [prompt.digest for prompt in prompts]


_Depths = tuple[int, "_Depths | None"]


def _beyond(places: _Depths | None, at: int) -> list[int]:
    """The depths above `at`, ascending."""
    found = []
    while places is not None and places[0] > at:
        found.append(places[0])
        places = places[1]
    return found[::-1]


def common(a: Sequence[Segment], b: Sequence[Segment]) -> int:
    """How many segments two prompts begin with alike; by identity, for a pool's prompts share their segments."""
    return next(compress(count(), map(is_not, a, b)), min(len(a), len(b)))


def _joined(segments: Iterable[Segment]) -> bytes:
    return b",".join([s.json for s in segments if s.json])


def _add(state: hashlib._Hash, segments: Sequence[Segment], start: int, end: int) -> None:
    """Go on with the hash of a prompt's JSON, which holds segments[:start], up to segments[:end]."""
    more = _joined(segments[start:end])
    if more and any(s.json for s in segments[:start]):
        state.update(b",")
    state.update(more)


@dataclass(frozen=True, slots=True)
class NextTokens:
    """Different tokens whose log-probabilities are asked for, in order.

    texts: of each; "" where an engine that is asked in text is never asked for it. token_ids: None for such an engine.
    """

    texts: tuple[str, ...]
    token_ids: tuple[int, ...] | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """The token ids. Raises ValueError where the engine was never asked for them."""
        if self.token_ids is None:
            raise ValueError("these tokens carry no token ids")
        return self.token_ids

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class Query:
    """What an engine is asked: the log-probability of each of `tokens` as the token after `prompt`."""

    prompt: Prompt
    tokens: NextTokens


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The answer to a query: log-probabilities of its tokens, nats, in their order.

    `floored` marks an answer that lacked a token and was floored by request (`--missing_label floor`).
    """

    values: tuple[float, ...]
    floored: bool = False

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.values)):
            raise ValueError(f"log-probabilities must be finite, got {' and '.join(map(str, self.values))}")


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """What an engine says to one batch: one TokenLogprobs a query, in order, and what it cost.

    cached_tokens: how many of the prompt tokens it found in its prefix cache, None where it does not say for a batch.
    """

    logprobs: list[TokenLogprobs]
    prompt_tokens: int
    requests: int = 1
    retries: int = 0
    cached_tokens: int | None = None

    @classmethod
    def joined(cls, parts: Iterable[EngineAnswer]) -> EngineAnswer:
        """One answer of those to the parts of a batch, in the queries' order."""
        parts = list(parts)
        return cls(
            [logprobs for part in parts for logprobs in part.logprobs],
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            requests=sum(part.requests for part in parts),
            retries=sum(part.retries for part in parts),
            cached_tokens=sum_known(part.cached_tokens for part in parts),
        )


def sum_known(values: Iterable[int | None]) -> int | None:
    """The sum, None where a part of it is not known."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


OnAnswer = Callable[[Sequence[int], EngineAnswer], None]
"""Called as on_answer(positions, answer): answer.logprobs[i] is the answer to the batch's queries[positions[i]]."""


@dataclass(frozen=True, slots=True)
class PrefixCacheCounters:
    """Tokens that a vLLM engine looked up in, and found in, its prefix cache since it started.

    From vllm:prefix_cache_queries_total and vllm:prefix_cache_hits_total (vLLM's production metrics).
    """

    queries: int = 0
    hits: int = 0

    def __add__(self, other: PrefixCacheCounters) -> PrefixCacheCounters:
        return PrefixCacheCounters(self.queries + other.queries, self.hits + other.hits)

    def __sub__(self, earlier: PrefixCacheCounters) -> PrefixCacheCounters:
        return PrefixCacheCounters(self.queries - earlier.queries, self.hits - earlier.hits)

    @property
    def computed(self) -> int:
        """Prompt tokens the engine had to compute."""
        return self.queries - self.hits

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens read from the cache, 0 to 1."""
        return self.hits / self.queries if self.queries else 0.0


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """Everything about an engine that can change an answer; part of every cache key and of run.json.

    fingerprint: what the engine answered to a fixed short prompt, so that other weights, another precision or
    another kernel behind the same model name are told apart. dtype: the type that it computes in, in PyTorch's words
    without `torch.`; empty where it does not say. config: SHA-256 of the model's configuration and of its KV cache's
    type (icm_vllm.plugin.config_digest); empty where it does not say.
    """

    kind: str
    model: str
    root: str = ""
    revision: str = ""
    version: str = ""
    determinism: str = ""
    fingerprint: str = ""
    max_model_len: int | None = None
    dtype: str = ""
    config: str = ""

    def describe(self) -> str:
        """One line for a user."""
        version = f" {self.version}" if self.version else ""
        dtype = f"{self.dtype}, " if self.dtype else ""
        return f"{self.model} on {self.kind}{version} ({dtype}fingerprint {self.fingerprint[:12] or 'none'})"

    @property
    def unusual_dtype(self) -> str:
        """dtype where it is known and not bfloat16, which was the only one before types were recorded: so old cache
        keys and check records stay valid."""
        return "" if self.dtype == "bfloat16" else self.dtype

    def has_content_of(self, other: Mapping[str, object]) -> bool:
        """Whether an engine recorded earlier (its fields by name) has the same content, under any path and name: the
        same answers to the canary by the same vLLM, kernels, type and configuration. False where either has no
        fingerprint. response_cache.cache_keys says what a fingerprint can tell.
        """
        alike = ("kind", "revision", "version", "determinism", "fingerprint")
        if not self.fingerprint or any(getattr(self, name) != other.get(name) for name in alike):
            return False
        return not any(known_to_differ(getattr(self, name), str(other.get(name, ""))) for name in ("dtype", "config"))


def known_to_differ(one: str, other: str) -> bool:
    """Whether two engines' types, or configurations, are both known and differ; "" is unknown."""
    return bool(one and other) and one != other


@dataclass(slots=True)
class ScoreStats:
    """Running totals of a ModelAPI, for progress bars and summaries. All counts, tokens in tokens.

    cached_tokens: prompt tokens that the engine said it had in its prefix cache; untold_tokens: prompt tokens of which
    it did not say. label_misses: calls that failed because an answer lacked a label. What is asked, found and sent is
    counted in queries: one a prompt, more where labels have several tokens.
    """

    asked: int = 0
    cache_hits: int = 0
    in_flight_hits: int = 0
    engine_prompts: int = 0
    prompt_tokens: int = 0
    requests: int = 0
    retries: int = 0
    floored: int = 0
    damaged_rows: int = 0
    cached_tokens: int = 0
    untold_tokens: int = 0
    label_misses: int = 0

    def as_dict(self) -> dict[str, int]:
        """The totals by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, eq=False)
class PoolScores:
    """A model's log-probabilities of the labels of a pool, in the prompts' order.

    logprobs: log P(label k | prompt i), nats, float64, shape [num_prompts, K]. prompt_tokens: sent to the engine.
    """

    logprobs: npt.NDArray[np.float64]
    prompt_tokens: int = 0

    @property
    def log_odds(self) -> list[float]:
        """log P(True | prompt) - log P(False | prompt), nats, shape [num_prompts]: the s_i of Wen et al. 2025, section
        2. Label 1 against label 0; raises ValueError where there are more."""
        if self.logprobs.shape[1] != 2:
            raise ValueError(f"log-odds are of two labels, and these scores have {self.logprobs.shape[1]}")
        odds: list[float] = (self.logprobs[:, 1] - self.logprobs[:, 0]).tolist()
        return odds


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How engines differ for their callers.

    billed: every query is paid for, so none is asked ahead of need. checkable: the determinism check (core/determinism)
    can ask it the same in many ways.
    """

    billed: bool = False
    checkable: bool = True


@runtime_checkable
class Engine(Protocol):
    """What ModelAPI needs of an engine. One file each in engines/."""

    @property
    def capabilities(self) -> Capabilities:
        """Known before the engine is started."""
        ...

    async def start(self) -> EngineIdentity:
        """Connect, and check the model and its logprobs. Raises an APIError that says what to do."""
        ...

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]] | None:
        """Token ids of each text, with the model's special tokens if asked; None: the engine is asked in text."""
        ...

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str] | None:
        """The text of each list of token ids; None where the engine does not say."""
        ...

    async def tokenize_chat(self, messages: Sequence[str]) -> list[list[int]] | None:
        """Token ids of each user message in the model's chat template, up to where its answer begins.

        None where the model has no chat template, or the engine is asked in text.
        """
        ...

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        """The log-probabilities that every query asks for, in order. All or none: any failure raises an APIError.

        `on_answer` is called for every finished request before score returns, so that what was answered before a
        failure is not lost.
        """
        ...

    async def prefix_cache(self) -> PrefixCacheCounters | None:
        """The engine's prefix-cache counters, or None where it has none to show."""
        ...

    async def kv_cache_tokens(self) -> int | None:
        """How many tokens the engine's KV cache holds, or None where it does not say."""
        ...

    async def aclose(self) -> None:
        """Give back connections and processes; idempotent."""
        ...
