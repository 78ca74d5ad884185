"""Where vLLM's batch-invariant mode is not invariant: vLLM alone, each cause by itself. For docs/upstream-report.md.

    python benchmarks/upstream_report.py --json report.json                   # every part, in 20 minutes at most
    python benchmarks/upstream_report.py --json report.json --parts norms attention-fa3 scores-fa3 --seconds 110
    python benchmarks/upstream_report.py --json report.json --model FOLDER --gpus 0 1 2 3     # a part a GPU at a time
    python benchmarks/upstream_report.py --json report.json --table               # the tables again, nothing is run

This file needs vLLM and what vLLM needs, and nothing else of this project: it can be copied. Every part runs with
VLLM_BATCH_INVARIANT=1 in a process of its own, without plugins, so that one that crashes or hangs does not stop the
others; what it had measured by then is kept. Results are added to the JSON file, which can hold several versions of
vLLM, GPUs and models side by side: run it once in each environment.

norms, products, experts: rows of one kernel computed alone, and the same rows among more. attention-*: the last n
tokens of a sequence behind a paged cache, against the whole sequence in one call. scores-*: prompts scored by vllm.LLM,
each alone and not cached, then cached, half cached, in one list: the log-probabilities of 20 tokens must keep their
bits. scores-*-raised does so with the change that the report proposes, made from outside.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import json
import math
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch

NAME: Final = "benchmarks/upstream_report.py"
MODEL: Final = "Qwen/Qwen2.5-0.5B"
"""Small, public, and with heads of 64 numbers, where FlashAttention 3 has two blocks of keys."""

MODES: Final = ("vllm.model_executor.determinism.batch_invariant", "vllm.model_executor.layers.batch_invariant")
"""Where vLLM keeps its batch-invariant mode: newer versions, 0.26."""

TOKENS: Final = 20
"""Log-probabilities that are compared for each prompt."""

LENGTH: Final = 1021
"""Tokens of the sequence whose attention is computed: not a multiple of any block."""

ASKED: Final = 128
"""Attention: the last 1 to this many tokens of the sequence are computed again."""

BLOCK: Final = 16
SMALL_TILE: Final = 64
"""FlashAttention 3 takes its small tile up to this many query rows of a key head (hopper/heuristics.h)."""


# What is found


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. compared and differ count what `unit` says; largest: the largest difference of two numbers."""

    what: str
    compared: int
    differ: int
    largest: float = 0.0
    unit: str = ""
    detail: str = ""


@dataclass(slots=True)
class Record:
    """What one part found. With a path, it is written there after every row."""

    part: str
    model: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Replace the file by what was found so far."""
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            beside.write_text(json.dumps(self.content()))
            beside.replace(self.path)

    def content(self) -> dict[str, Any]:
        """As JSON."""
        found = asdict(self)
        del found["path"]
        return found

    @classmethod
    def read(cls, content: dict[str, Any]) -> Record:
        """The other way."""
        return cls(**{**content, "rows": [Row(**row) for row in content["rows"]]})

    @property
    def key(self) -> tuple[str, ...]:
        """A later record of this key replaces an earlier one."""
        return (self.part, self.model, self.environment.get("vllm", ""), self.environment.get("device", ""))

    def try_each(self, name: str, measure: Callable[[], Iterable[Row]]) -> None:
        """Add what `measure` finds; an error is noted under `name`."""
        try:
            for row in measure():
                self.add(row)
        except Exception as error:  # noqa: BLE001  the others must still be measured
            traceback.print_exc()
            self.failures.append(f"{name}: {type(error).__name__}: {_one_line(str(error))}")
            self.write()


def spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{low} to {high}" if high > low else str(low) for low, high in found)


def _one_line(text: str, most: int = 300) -> str:
    """Without line breaks, and without the folders of files."""
    return re.sub(r"(?<![\w/])(?:/[\w.@+-]+)+/(?=[\w.])", "", " ".join(text.split()))[:most]


# Kernels


def device() -> torch.device:
    """The GPU; without one the CPU, for a look at Triton's kernels in its interpreter."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mode() -> Any:
    """vLLM's module of its batch-invariant mode, which is switched on as a worker does it."""
    for name in MODES:
        with suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            module.init_batch_invariance()
            return module
    raise RuntimeError("this vLLM has no batch-invariant mode")


@contextmanager
def configured() -> Iterator[None]:
    """Some layers of vLLM read the configuration that is set."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        yield


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normally distributed bfloat16 numbers, the same ones in every process on one kind of device."""
    import torch

    generator = torch.Generator(device=device()).manual_seed(seed)
    return (torch.randn(*shape, device=device(), generator=generator) * scale).to(torch.bfloat16)


def rows_alone(
    what: str, compute: Callable[[slice], torch.Tensor], whole: int, counts: Sequence[int], limit: float = math.inf
) -> Iterator[Row]:
    """Compares rows that are computed together with the same rows among `whole` ones.

    compute: the results of a slice of the rows, one result a row. The first and the last rows are computed again,
    `counts` at a time. limit: time.monotonic() after which no further count is begun.
    """
    together = compute(slice(0, whole)).float()
    compared, differ, largest, found = 0, 0, 0.0, []
    for count in counts:
        if time.monotonic() > limit:
            break
        for rows in (slice(0, count), slice(whole - count, whole)):
            gap = (compute(rows).float() - together[rows]).abs().flatten(1).amax(dim=1)
            different = int((gap != 0).sum())
            compared, differ, largest = compared + count, differ + different, max(largest, float(gap.max()))
            if different:
                found.append(f"{different} of {count}")
    detail = f"{', '.join(found[:6])}{', ...' if len(found) > 6 else ''} rows alone" if found else ""
    yield Row(what, compared, differ, largest, "rows", detail)


COUNTS: Final = (1, 2, 4, 8, 16, 17, 32, 33, 64, 65, 128, 255, 256, 257, 512, 1024)
MANY: Final = 4096


def measure_norms(_: argparse.Namespace, record: Record) -> None:
    """Norms."""
    import torch

    invariant = mode()
    operators = importlib.import_module("vllm._custom_ops")
    for hidden in (1536, 2048, 4096, 8192):
        x, residual = normal(MANY, hidden), normal(MANY, hidden, seed=1)
        weight = normal(hidden, scale=0.1, seed=2) + 1

        def added(
            rows: slice, x: torch.Tensor = x, residual: torch.Tensor = residual, weight: torch.Tensor = weight
        ) -> torch.Tensor:
            y, rest = x[rows].clone(), residual[rows].clone()
            operators.fused_add_rms_norm(y, rest, weight, 1e-6)
            return y

        def plain(rows: slice, x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
            y = torch.empty_like(x[rows])
            torch.ops._C.rms_norm(y, x[rows].clone(), weight, 1e-6)
            return y

        def triton(rows: slice, x: torch.Tensor = x, weight: torch.Tensor = weight) -> Any:
            return invariant.rms_norm_batch_invariant(x[rows].clone(), weight, 1e-6)

        kernels: tuple[tuple[str, Callable[[slice], torch.Tensor]], ...] = (
            ("fused_add_rms_norm (CUDA), bf16", added),
            ("rms_norm (CUDA), bf16", plain),
            ("rms_norm_batch_invariant (Triton), bf16", triton),
        )
        for name, kernel in kernels:
            what = f"{name}, hidden size {hidden}"
            record.try_each(what, functools.partial(rows_alone, what, kernel, MANY, COUNTS))


PRODUCTS: Final = (
    (6144, 4096, "Llama-3.1-8B qkv"),
    (10240, 2560, "in no table"),
    (4096, 14336, "Llama-3.1-8B down"),
    (12288, 2048, "Qwen3-1.7B gate and up"),
    (2048, 6144, "Qwen3-1.7B down"),
    (28672, 4096, "Llama-3.1-8B gate and up"),
    (128256, 4096, "Llama-3.1-8B vocabulary"),
)
"""(columns of the result, inner dimension, what it is): most are in 0.33's table of tiles for Hopper."""


def measure_products(_: argparse.Namespace, record: Record) -> None:
    """Linear layers, other products, softmax, mean."""
    import torch

    invariant = mode()
    for wide, deep, name in PRODUCTS:
        many = MANY if wide < 100_000 else 1024
        counts = [count for count in COUNTS if count < many]
        x, weight = normal(many, deep), normal(wide, deep, scale=0.02, seed=1)

        def linear(rows: slice, x: torch.Tensor = x, weight: torch.Tensor = weight) -> Any:
            return invariant.linear_batch_invariant(x[rows], weight)

        def torch_linear(rows: slice, x: torch.Tensor = x, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch.nn.functional.linear(x[rows], weight)

        what = f"linear_batch_invariant, {deep} to {wide} ({name}), bf16"
        record.try_each(what, functools.partial(rows_alone, what, linear, many, counts))
        what = f"torch.nn.functional.linear in the mode, {deep} to {wide}, bf16"
        record.try_each(what, functools.partial(rows_alone, what, torch_linear, many, counts))
    logits = normal(512, 128256).float()
    what = "torch.log_softmax in the mode, 128256 wide, fp32"
    record.try_each(
        what,
        lambda: rows_alone(what, lambda rows: torch.log_softmax(logits[rows], dim=-1), 512, (1, 2, 16, 64, 256)),
    )
    squares = normal(MANY, 4096).float().pow(2)
    name = "torch.mean in the mode (Gemma's norm), 4096 wide, fp32"
    record.try_each(name, lambda: rows_alone(name, lambda rows: squares[rows].mean(dim=-1, keepdim=True), MANY, COUNTS))


def measure_experts(_: argparse.Namespace, record: Record) -> None:
    """Experts of Qwen3-30B-A3B's shape: 128, of which 8 are taken."""
    import torch

    mode()
    fused = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe")
    experts, taken, hidden, inner, many = 128, 8, 2048, 768, 2048
    x = normal(many, hidden)
    w1 = normal(experts, 2 * inner, hidden, scale=0.02, seed=1)
    w2 = normal(experts, hidden, inner, scale=0.02, seed=2)
    shares = torch.softmax(normal(many, experts, seed=3).float(), dim=-1)
    weights, chosen = shares.topk(taken, dim=-1)
    weights, chosen = weights / weights.sum(dim=-1, keepdim=True), chosen.to(torch.int32)

    def compute(rows: slice) -> Any:
        return fused.fused_experts(x[rows].clone(), w1, w2, weights[rows].contiguous(), chosen[rows].contiguous())

    what = f"fused_experts (Triton), {experts} experts, {taken} taken, {hidden} and {inner}, bf16"
    with configured():
        record.try_each(what, lambda: rows_alone(what, compute, many, [c for c in COUNTS if c < many]))


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention: head size, query heads, key heads, sliding window in tokens (0: none).

    negative: queries and keys are such that every score is below 0, where a running maximum that is not kept at minus
    infinity over masked keys shows.
    """

    size: int
    queries: int
    keys: int
    window: int = 0
    negative: bool = False

    @property
    def name(self) -> str:
        window = f", window {self.window}" if self.window else ""
        return f"head size {self.size}, {self.queries}/{self.keys} heads{window}" + ", scores < 0" * self.negative

    @property
    def raised(self) -> int:
        """The least length of the longest query with which FlashAttention 2 and 3 take one path for any batch."""
        return max(2, SMALL_TILE // (self.queries // self.keys) + 1)


HEADS: Final = (
    Heads(64, 32, 8),
    Heads(64, 14, 2),
    Heads(128, 32, 8),
    Heads(128, 12, 2),
    Heads(128, 16, 16),
    Heads(256, 8, 4),
    Heads(64, 32, 8, 512),
    Heads(128, 32, 8, 512),
    Heads(64, 64, 8, 128),
    Heads(256, 8, 4, 512),
    Heads(64, 32, 8, 512, negative=True),
    Heads(128, 32, 8, 512, negative=True),
)

NEIGHBOUR: Final = (300, 200)
"""Tokens of the other sequence in a batch, and how many of them are computed."""

Attend = Callable[..., Any]
"""(queries, keys, values, starts, used, tables, longest query, longest sequence, window) -> outputs, one a query."""


def flash_attention(version: int) -> Attend:
    """FlashAttention as vLLM calls it in its batch-invariant mode: one split."""
    interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")

    def attend(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor,
        used: torch.Tensor,
        tables: torch.Tensor,
        longest: int,
        furthest: int,
        window: int,
    ) -> Any:
        return interface.flash_attn_varlen_func(
            q=queries,
            k=keys,
            v=values,
            max_seqlen_q=longest,
            cu_seqlens_q=starts,
            max_seqlen_k=furthest,
            seqused_k=used,
            softmax_scale=1 / math.sqrt(queries.shape[-1]),
            causal=True,
            window_size=[window - 1, 0] if window else [-1, -1],
            block_table=tables,
            num_splits=1,
            fa_version=version,
        )

    return attend


def triton_attention() -> Attend:
    """vLLM's Triton kernel as the batch-invariant mode calls it: never split."""
    kernels = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")

    def attend(
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor,
        used: torch.Tensor,
        tables: torch.Tensor,
        longest: int,
        furthest: int,
        window: int,
    ) -> Any:
        import torch

        out = torch.empty_like(queries)
        kernels.unified_attention(
            q=queries,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=longest,
            seqused_k=used,
            max_seqlen_k=furthest,
            softmax_scale=1 / math.sqrt(queries.shape[-1]),
            causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
            block_table=tables,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out

    return attend


class Cache:
    """Paged keys and values of two sequences, and the queries of all their tokens."""

    def __init__(self, heads: Heads) -> None:
        import torch

        self.lengths = (LENGTH, NEIGHBOUR[0])
        blocks = [-(-length // BLOCK) for length in self.lengths]
        shape = (sum(blocks), BLOCK, heads.keys, heads.size)
        self.keys, self.values = normal(*shape, seed=1), normal(*shape, seed=2)
        self.queries = [normal(length, heads.queries, heads.size, scale=2.0, seed=3) for length in self.lengths]
        if heads.negative:
            self.keys, self.queries = self.keys - 2, [queries / 2 + 0.5 for queries in self.queries]
        order = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = torch.zeros(2, max(blocks), device=device(), dtype=torch.int32)
        for row, count in enumerate(blocks):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], device=device())
        self.heads = heads

    def attend(self, attend: Attend, asked: Sequence[tuple[int, int]], raised: bool) -> Any:
        """Outputs of the last tokens of sequences: asked is [(which, how many), ...]."""
        import torch

        heads = self.heads
        queries = torch.cat([self.queries[which][self.lengths[which] - count :] for which, count in asked])
        starts = torch.tensor([0, *(count for _, count in asked)], device=device()).cumsum(0).to(torch.int32)
        rows = torch.tensor([which for which, _ in asked], device=device())
        used = torch.tensor([self.lengths[which] for which, _ in asked], device=device(), dtype=torch.int32)
        longest, furthest = max(count for _, count in asked), max(self.lengths[which] for which, _ in asked)
        if raised:
            longest, furthest = max(longest, heads.raised), max(furthest, heads.window + 1)
        tables = self.tables[rows].contiguous()
        return attend(queries, self.keys, self.values, starts, used, tables, longest, furthest, heads.window)


def tails(cache: Cache, attend: Attend, raised: bool) -> Iterator[Row]:
    """Compares the last 1 to ASKED tokens of the sequence, behind its cache, with the whole sequence in one call."""
    whole = cache.attend(attend, [(0, LENGTH)], raised).float()
    for company in ([], [(1, NEIGHBOUR[1])]):
        different, largest = [], 0.0
        for count in range(1, ASKED + 1):
            part = cache.attend(attend, [(0, count), *company], raised)[:count].float()
            gap = float((part - whole[LENGTH - count :]).abs().max())
            if gap:
                different.append(count)
                largest = max(largest, gap)
        what = cache.heads.name + (f", beside {NEIGHBOUR[1]} tokens of another" if company else ", alone")
        what += ", longest query raised" if raised else ""
        detail = f"n = {spans(different)}" if different else ""
        yield Row(what, ASKED, len(different), largest, "lengths n", detail)


def measure_attention(_: argparse.Namespace, record: Record, kernel: Callable[[], Attend], raised: bool) -> None:
    """One attention kernel, over shapes of heads; also with the longest query raised, where that may help."""
    attend = kernel()
    for heads in HEADS:
        cache = Cache(heads)
        for change in (False, True) if raised else (False,):
            record.try_each(heads.name, functools.partial(tails, cache, attend, change))


# Scores


@dataclass(frozen=True, slots=True)
class Backend:
    """An attention backend of vLLM; "" leaves vLLM's choice. raised: the change that the report proposes is made."""

    name: str = ""
    version: int | None = None
    raised: bool = False

    def arguments(self) -> dict[str, Any]:
        """Of vllm.LLM."""
        chosen: dict[str, Any] = {"backend": self.name} if self.name else {}
        if self.version is not None:
            chosen["flash_attn_version"] = self.version
        return {"attention_config": chosen} if chosen else {}


def raise_longest_query() -> None:
    """Let FlashAttention think that a step's longest query is longer than its small tile: an upper bound for it."""
    builder = importlib.import_module("vllm.v1.attention.backends.flash_attn").FlashAttentionMetadataBuilder
    own = builder.build

    @functools.wraps(own)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *rest: Any, **named: Any) -> Any:
        raised = copy.copy(common_attn_metadata)
        least = Heads(self.headdim, self.num_heads_q, self.num_heads_kv).raised
        raised.max_query_len = max(raised.max_query_len, least)
        return own(self, common_prefix_len, raised, *rest, **named)

    builder.build = build


def prompts_of(options: argparse.Namespace, vocabulary: int) -> list[list[int]]:
    """Random token ids, of lengths around options.tokens that leave every remainder of 16."""
    chance = random.Random(0)
    low, high = vocabulary // 50, vocabulary - vocabulary // 10  # not the special ones, which stand at the ends
    shortest = options.tokens * 3 // 4
    lengths = [shortest + number * 37 % (options.tokens // 2) for number in range(options.prompts)]
    return [[chance.randrange(low, high) for _ in range(length)] for length in lengths]


def measure_scores(options: argparse.Namespace, record: Record, backend: Backend) -> None:
    """Scores of prompts by vllm.LLM with one attention backend."""
    from vllm import LLM, SamplingParams

    if backend.raised:
        raise_longest_query()
    engine: dict[str, Any] = {
        "max_model_len": options.tokens * 3,
        "max_num_batched_tokens": 2048,
        "enforce_eager": not options.compiled,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        "seed": 0,
        **backend.arguments(),
    }
    if not options.cpu:
        engine |= {"dtype": "bfloat16", "gpu_memory_utilization": options.memory}
    llm = LLM(options.model, **engine)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    with suppress(Exception):  # only to say what is measured
        record.notes = sorted(set(llm.apply_model(attention_layers)[0]))
    prompts = prompts_of(options, vocabulary)
    chance = random.Random(1)
    tokens = sorted(chance.sample(range(vocabulary // 50, vocabulary - vocabulary // 10), TOKENS))
    sampling = SamplingParams(
        max_tokens=1, temperature=0.0, logprobs=TOKENS, logprob_token_ids=tokens, detokenize=False
    )

    def generate(asked: Sequence[Sequence[int]], salts: Sequence[str]) -> list[tuple[list[float], int]]:
        """20 log-probabilities of each prompt, and how many of its tokens were cached; in one list."""
        requests = [{"prompt_token_ids": list(ids), "cache_salt": salt} for ids, salt in zip(asked, salts, strict=True)]
        found = []
        for output in llm.generate(requests, sampling, use_tqdm=False):
            listed = output.outputs[0].logprobs[0]
            found.append(([listed[token].logprob for token in tokens], output.num_cached_tokens or 0))
        return found

    def alone(asked: Sequence[Sequence[int]], salts: Sequence[str]) -> list[tuple[list[float], int]]:
        return [generate([ids], [salt])[0] for ids, salt in zip(asked, salts, strict=True)]

    def salts(name: str) -> list[str]:
        """Prompts with equal salts share what is cached of them; every other salt begins with nothing cached."""
        return [f"{name}{number}" for number in range(len(prompts))]

    halves = [ids[: len(ids) // 2] for ids in prompts]
    stranger = [chance.randrange(vocabulary // 50, vocabulary // 2) for _ in range(options.tokens * 2)]

    def half_cached(ask: Callable[..., list[tuple[list[float], int]]], name: str) -> list[tuple[list[float], int]]:
        generate(halves, salts(name))
        return ask(prompts, salts(name))

    reference = [scores for scores, _ in alone(prompts, salts("reference"))]
    record.write()
    ways: tuple[tuple[str, Callable[[], list[tuple[list[float], int]]]], ...] = (
        ("not cached, each alone, once more", lambda: alone(prompts, salts("again"))),
        ("wholly cached, each alone", lambda: alone(prompts, salts("reference"))),
        ("half cached, each alone", lambda: half_cached(alone, "half")),
        ("not cached, one list", lambda: generate(prompts, salts("list"))),
        ("wholly cached, one list", lambda: generate(prompts, salts("reference"))),
        ("half cached, one list", lambda: half_cached(generate, "halves")),
        (
            "wholly cached, one list with a long prompt that is not",
            lambda: generate([stranger, *prompts], ["stranger", *salts("reference")])[1:],
        ),
    )
    for what, ask in ways:
        record.try_each(what, lambda what=what, ask=ask: [compare_scores(what, reference, ask())])  # type: ignore[misc]


def compare_scores(what: str, reference: Sequence[Sequence[float]], found: Sequence[tuple[list[float], int]]) -> Row:
    """How many prompts have another log-probability than in the reference."""
    gaps = [
        max(abs(one - other) for one, other in zip(expected, scores, strict=True))
        for expected, (scores, _) in zip(reference, found, strict=True)
    ]
    cached = sum(count for _, count in found) / len(found)
    unit, detail = "prompts", f"{cached:.0f} tokens a prompt cached"
    return Row(what, len(gaps), sum(gap != 0 for gap in gaps), max(gaps), unit, detail)


def attention_layers(model: Any) -> list[str]:
    """What a model's attention is computed by, of every kind of layer; called in vLLM's worker."""
    found = []
    for layer in model.modules():
        kernel = getattr(layer, "impl", None)
        if kernel is not None and hasattr(kernel, "head_size"):
            version = getattr(kernel, "vllm_flash_attn_version", None)
            window = getattr(kernel, "sliding_window", None)
            found.append(
                f"{type(kernel).__name__}{f', FlashAttention {version}' if version else ''}, head size "
                f"{kernel.head_size}, {kernel.num_heads}/{kernel.num_kv_heads} heads, window {window}"
            )
    return found


# Parts


@dataclass(frozen=True, slots=True)
class Part:
    """What runs in a process of its own. scores: it needs the model."""

    title: str
    measure: Callable[[argparse.Namespace, Record], None]
    scores: bool = False


def _scores(title: str, backend: Backend) -> Part:
    return Part(title, functools.partial(measure_scores, backend=backend), scores=True)


def _attention(title: str, kernel: Callable[[], Attend], raised: bool = True) -> Part:
    return Part(title, functools.partial(measure_attention, kernel=kernel, raised=raised))


PARTS: Final[dict[str, Part]] = {
    "norms": Part("Norms: rows alone and among 4,096", measure_norms),
    "attention-fa3": _attention("FlashAttention 3: the last n tokens", functools.partial(flash_attention, 3)),
    "scores-fa3": _scores("Scores, FLASH_ATTN version 3", Backend("FLASH_ATTN", 3)),
    "scores-fa3-raised": _scores(
        "Scores, FLASH_ATTN version 3, longest query raised", Backend("FLASH_ATTN", 3, raised=True)
    ),
    "scores-triton": _scores("Scores, TRITON_ATTN", Backend("TRITON_ATTN")),
    "attention-triton": _attention("Triton attention: the last n tokens", triton_attention, raised=False),
    "products": Part("Products and softmax: rows alone and among more", measure_products),
    "experts": Part("Experts: rows alone and among 2,048", measure_experts),
    "scores-default": _scores("Scores, the backend that vLLM chooses", Backend()),
    "scores-fa2": _scores("Scores, FLASH_ATTN version 2", Backend("FLASH_ATTN", 2)),
    "attention-fa2": _attention("FlashAttention 2: the last n tokens", functools.partial(flash_attention, 2)),
    "scores-flex": _scores("Scores, FLEX_ATTENTION", Backend("FLEX_ATTENTION")),
    "scores-flashinfer": _scores("Scores, FLASHINFER", Backend("FLASHINFER")),
}
"""In the order in which they run: those that may take minutes to compile (FlashAttention 2 on Hopper) come last."""

CPU_PARTS: Final = ("scores-default",)


def environment() -> dict[str, str]:
    """Versions and device of this process."""
    import torch
    import vllm

    found = {"vllm": vllm.__version__, "torch": torch.__version__}
    with suppress(ImportError):
        found["triton"] = importlib.import_module("triton").__version__
    found["mode"] = "on" if os.environ.get("VLLM_BATCH_INVARIANT") == "1" else "off"
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = "CPU"
    return found


def run_child(options: argparse.Namespace) -> int:
    """Measure one part and write its record."""
    [name] = options.parts
    record = Record(name, model_name(options) if PARTS[name].scores else "", path=options.child)
    start = time.monotonic()
    try:
        record.environment = environment()
        record.write()
        PARTS[name].measure(options, record)
    except Exception as error:  # noqa: BLE001  told by the process that started this one
        traceback.print_exc()
        record.failures.append(f"{type(error).__name__}: {_one_line(str(error))}")
    record.seconds = round(time.monotonic() - start, 1)
    record.write()
    return 1 if record.failures else 0


def model_name(options: argparse.Namespace) -> str:
    """Without the folder that a model lies in; with what makes its scores others."""
    model = Path(options.model)
    name = model.resolve().name if model.is_dir() else str(options.model)
    return f"{name}, compiled" if options.compiled else name


class Runner:
    """Runs parts in processes of their own, and tells of what they find. program: this one, as a command."""

    def __init__(self, options: argparse.Namespace, logs: Path, program: Sequence[str] = ()) -> None:
        self.options, self.logs = options, logs
        self._program = list(program) or [sys.executable, "-P", str(Path(__file__).resolve())]
        self.stopped = threading.Event()
        self._end = time.monotonic() + options.seconds
        self._gpus: queue.Queue[str | None] = queue.Queue()
        for gpu in options.gpus or [None]:
            self._gpus.put(gpu)

    def run(self, name: str) -> Record:
        """One part, when a GPU is free, until it ends or its time is over."""
        gpu = self._gpus.get()
        try:
            return self._run(name, gpu)
        finally:
            self._gpus.put(gpu)

    def _run(self, name: str, gpu: str | None) -> Record:
        record = Record(name, model_name(self.options) if PARTS[name].scores else "")
        limit = min(self.options.part_seconds, self._end - time.monotonic())
        if limit <= 0 or self.stopped.is_set():
            record.failures.append("not begun: out of time")
            return record
        tell(f"{name}: begins" + (f" on GPU {gpu}" if gpu is not None else ""))
        # The same part may run on another GPU at the same time.
        stem = name if gpu is None else f"{name}-gpu{gpu}"
        result, log = self.logs / f"{stem}.json", self.logs / f"{stem}.log"
        result.unlink(missing_ok=True)
        start = told = time.monotonic()
        with log.open("w") as output:
            child = subprocess.Popen(
                self._command(name, result),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(gpu),
                start_new_session=True,
            )
            seen = 0
            try:
                while child.poll() is None and time.monotonic() - start < limit and not self.stopped.is_set():
                    time.sleep(0.2)
                    record = self._read(result, record)
                    for row in record.rows[seen:]:
                        tell(f"{name}: {row.what}: {cell(row)}")
                        told = time.monotonic()
                    seen = len(record.rows)
                    if time.monotonic() - told > 15:
                        told = time.monotonic()
                        tell(f"{name}: {told - start:.0f} s")
                ended = child.poll()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        record = self._read(result, record)
        for row in record.rows[seen:]:
            tell(f"{name}: {row.what}: {cell(row)}")
        record.seconds = round(time.monotonic() - start, 1)
        if ended is None:
            record.failures.append(f"stopped after {record.seconds:.0f} s; the rows below were measured by then")
        elif ended != 0 and not record.failures:
            record.failures.append(f"ended with code {ended}: {last_words(log)}")
        for failure in record.failures:
            tell(f"{name}: {failure}")
        return record

    def _command(self, name: str, result: Path) -> list[str]:
        options = self.options
        command = [*self._program, "--child", str(result), "--parts", name]
        command += ["--model", options.model, "--prompts", str(options.prompts), "--tokens", str(options.tokens)]
        command += ["--memory", str(options.memory)]
        return command + ["--cpu"] * options.cpu + ["--compiled"] * options.compiled

    def _environment(self, gpu: str | None) -> dict[str, str]:
        chosen = {
            "VLLM_PLUGINS": "",  # none: vLLM alone
            "VLLM_BATCH_INVARIANT": "0" if self.options.cpu else "1",  # vLLM has no such mode on a CPU
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if gpu is not None:
            chosen["CUDA_VISIBLE_DEVICES"] = gpu
        return {**os.environ, **chosen}

    @staticmethod
    def _read(path: Path, known: Record) -> Record:
        with suppress(FileNotFoundError):
            return Record.read(json.loads(path.read_text()))
        return known


def last_words(log: Path) -> str:
    """The end of a log, in one line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return _one_line(" / ".join(lines[-3:]))


def tell(line: str) -> None:
    """Progress, so that standard output is the table."""
    print(line, file=sys.stderr, flush=True)


# Tables


def cell(row: Row) -> str:
    """What a row found, in words."""
    detail = f"; {row.detail}" if row.detail else ""
    if not row.differ:
        return f"0 of {row.compared:,}{detail}"
    size = f"up to {row.largest:.2g}{' nat' if row.unit == 'prompts' else ''}"
    return f"{row.differ:,} of {row.compared:,}, {size}{detail}"


def tables(records: Sequence[Record]) -> str:
    """Markdown: a table for each part and model, with a column for each environment."""
    text = []
    for name, part in PARTS.items():
        for model in dict.fromkeys(record.model for record in records if record.part == name):
            mine = [record for record in records if (record.part, record.model) == (name, model)]
            text.append(f"#### {part.title}{f': {model}' if model else ''}\n")
            for record in mine:
                text += [f"- {place(record)}: {line}" for line in (*record.notes, *record.failures)]
            if any(record.notes or record.failures for record in mine):
                text.append("")
            rows = dict.fromkeys((row.what, row.unit) for record in mine for row in record.rows)
            if not rows:
                continue
            measured = [record for record in mine if record.rows]
            text.append(f"| {next(iter(rows))[1]} that differ | " + " | ".join(map(place, measured)) + " |")
            text.append("| --- |" + " --- |" * len(measured))
            for what, unit in rows:
                cells = [
                    next((cell(row) for row in record.rows if (row.what, row.unit) == (what, unit)), "")
                    for record in measured
                ]
                text.append(f"| {what} | " + " | ".join(cells) + " |")
            text.append("")
    return "\n".join(text).rstrip() + "\n"


def place(record: Record) -> str:
    """Version and device of a record."""
    found = record.environment
    if not found:
        return "not begun"
    off = "" if found.get("mode") == "on" else ", mode off"
    return f"vLLM {found['vllm']}, torch {found['torch']}, {found['device']}{off}"


def read_records(path: Path) -> list[Record]:
    """The records of a results file; none where it does not exist. Raises ValueError if it is another file."""
    if not path.exists():
        return []
    try:
        return [Record.read(content) for content in json.loads(path.read_text())["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of this program: {type(error).__name__}: {error}") from error


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Replace the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    content = {"records": [record.content() for record in records]}
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def merged(records: Sequence[Record], new: Record) -> list[Record]:
    """The records, with the new one in the place of an earlier one of its key.

    One that never began replaces nothing, and one that began replaces the note that it had not.
    """
    if not new.environment and any((new.part, new.model) == (old.part, old.model) for old in records):
        return list(records)
    kept = [
        old
        for old in records
        if old.key != new.key and (old.environment or (old.part, old.model) != (new.part, new.model))
    ]
    return [*kept, new]


# Command line


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--table", action="store_true", help="print the tables of --json FILE and run nothing")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--model", default=MODEL, help="a folder or a name on Hugging Face (default: %(default)s)")
    parser.add_argument("--prompts", type=_at_least(2), default=64, help="to score (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        type=_at_least(64),
        default=640,
        help="mean length of a prompt; take twice the window of a model that has one (default: %(default)s)",
    )
    parser.add_argument("--gpus", nargs="+", metavar="N", help="GPUs to use at the same time, a part on each")
    parser.add_argument("--memory", type=float, default=0.5, help="share of a GPU's memory (default: %(default)s)")
    parser.add_argument("--compiled", action="store_true", help="scores: torch.compile and CUDA graphs, not eager")
    parser.add_argument("--seconds", type=float, default=1200.0, help="for everything (default: %(default)g)")
    parser.add_argument("--part_seconds", type=float, default=150.0, help="for each part (default: %(default)g)")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep what each part printed")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help=f"on a CPU, to try this program: {', '.join(CPU_PARTS)} alone, and without the mode, which is for GPUs",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
        return int(text)

    return whole


def refusal(options: argparse.Namespace) -> str:
    """Why these options cannot be run here; "" if they can."""
    if options.table:
        return "" if options.json and options.json.exists() else "--table needs --json FILE with results"
    if options.cpu and set(options.parts) - set(CPU_PARTS):
        return f"--cpu: only {', '.join(CPU_PARTS)} runs on a CPU"
    if importlib.util.find_spec("vllm") is None:
        return "needs vLLM, which this Python does not have"
    if options.cpu:
        return ""
    import torch

    return "" if torch.cuda.is_available() else "needs an NVIDIA GPU, and there is none here"


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 whatever was found, 1 if a part failed or was stopped, 2 for what cannot be run, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    options.parts = options.parts or list(CPU_PARTS if options.cpu else PARTS)
    if options.child:
        return run_child(options)
    try:
        records = read_records(options.json) if options.json else []
        why = refusal(options)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    if why:
        print(f"{NAME} {why}", file=sys.stderr)
        return 2
    if options.table:
        print(tables(records), end="")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `timeout` ends it: the parts must end, too
    new, interrupted = [], False
    with tempfile.TemporaryDirectory() as temporary:
        logs = options.logs or Path(temporary)
        logs.mkdir(parents=True, exist_ok=True)
        runner = Runner(options, logs)
        with ThreadPoolExecutor(max_workers=len(options.gpus or [None])) as pool:
            begun = [pool.submit(runner.run, name) for name in options.parts]
            try:
                for future in as_completed(begun):
                    new.append(future.result())
                    records = merged(records, new[-1])
                    if options.json:
                        write_records(options.json, records)
            except KeyboardInterrupt:
                interrupted = True
                runner.stopped.set()
                pool.shutdown(cancel_futures=True)
    print(tables(new), end="")
    if interrupted:
        done = {record.part for record in new}
        tell(f"stopped; for the rest: --parts {' '.join(name for name in options.parts if name not in done)}")
        return 130
    return 1 if any(record.failures for record in new) else 0


if __name__ == "__main__":
    raise SystemExit(main())
