"""Whether the attention of a row depends on the batch, by FlashAttention's settings: to choose those for exact scores.

    python benchmarks/attention_rows.py --json benchmarks/results/attention-rows.json       # some minutes
    python benchmarks/attention_rows.py --backends triton latent      # windows, sinks, compressed keys alone

Needs one NVIDIA GPU (compute capability 9 for FlashAttention 3) and vLLM 0.26 or newer. The last tokens of a sequence
are computed again with all before them read from the paged KV cache: 1, 2, 15, 16, 17, 64, half or all of them at a
time, alone and in a batch of others. Every value must have the bits it had when the whole sequence was computed in one
call. Settings: FlashAttention's version, the number of splits, the longest query it is given (the real one; 2; just
above FlashAttention 3's small tile, as icm_vllm/exact.py does; a constant), pack_gqa, and scheduler metadata; for
head sizes 64 and 128, 4 and 8 query heads a key head, with and without a sliding window.

Of vLLM's Triton attention, in its batch-invariant mode: with vLLM's step of the softmax and with ours
(icm_vllm/triton_attention.py), and with other tiles (ICM_BATCH_INVARIANT_WINDOW_TILE), with windows and sinks. Of
compressed keys (MLA) the way that icm_vllm/latent_attention.py takes. Beside each: milliseconds to compute all
sequences whole.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")  # vLLM's Triton attention looks at it when it is imported

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.flags import FlagParser
from icm_vllm.query_length import least_query_length

BACKENDS: Final = ("flash3", "triton", "latent", "flash2", "packed")

LENGTH: Final = 1021
"""Tokens of the sequence: not a multiple of any block."""

LONG: Final = 2999
"""The same where a window of 1,024 tokens is to matter."""

FEW: Final = (1, 2, 15, 16, 17, 64)
"""Tokens that are computed again; and half of all, and all."""

OTHERS: Final = ((300, 300), (77, 1), (2000, 40), (16, 16), (513, 17), (1400, 1), (64, 3))
"""(length, query tokens) of the sequences beside it."""

CONSTANT: Final = 8192
DEVICE: Final = "cuda"


@dataclass(frozen=True, slots=True)
class Setting:
    """How FlashAttention is called. longest: the longest query that it is given (real, 2, floor or constant)."""

    version: int
    splits: int = 1
    longest: str = "real"
    pack: bool | None = None
    scheduled: bool = False

    @property
    def name(self) -> str:
        pack = "" if self.pack is None else f", pack_gqa {self.pack}"
        scheduled = ", scheduler metadata" if self.scheduled else ""
        return f"FA{self.version}, {self.splits or 'auto'} splits, longest {self.longest}{pack}{scheduled}"


SETTINGS: Final = (
    *(Setting(3, splits, longest) for splits in (0, 1) for longest in ("real", "2", "floor", "constant")),
    *(Setting(3, splits, longest, scheduled=True) for splits in (0, 1) for longest in ("real", "floor")),
)

OLDER: Final = tuple(Setting(2, splits, longest) for splits in (0, 1) for longest in ("real", "2", "floor"))
"""Asked after the others: on Hopper the driver compiles FlashAttention 2's kernels when they are first called, for
minutes (vLLM 0.26)."""


@dataclass(frozen=True, slots=True)
class Triton:
    """vLLM's Triton attention. ours: our step of the softmax in place of vLLM's. tile: of all rows; "": vLLM's own."""

    ours: bool = True
    tile: str = ""

    @property
    def name(self) -> str:
        return f"Triton, {'our' if self.ours else 'own'} step" + (f", tile {self.tile}" if self.tile else "")


TRITON: Final = (Triton(), Triton(tile="64x32"), Triton(tile="64x64"), Triton(ours=False))
"""Few: each is compiled for a step of one sequence, of sixteen and of other numbers, for seconds."""

LATENT: Final = tuple(Setting(3, 1, longest, scheduled=True) for longest in ("real", "floor"))

PACKED: Final = tuple(Setting(3, 1, longest, pack=pack) for longest in ("real", "floor") for pack in (True, False))
"""Called without vLLM's interface, and last: if one reads out of bounds, the GPU can no longer be used."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Shape of the attention: head size, query and key heads, tokens of a cache block, sliding window in tokens, a sink
    for each query head, tokens of the sequence; compressed: size of a compressed key, beside which `size` is that of
    its rotated part (MLA)."""

    size: int
    queries: int
    keys: int
    block: int = 16
    window: int | None = None
    sinks: bool = False
    length: int = LENGTH
    compressed: int = 0

    @property
    def name(self) -> str:
        window = f", window {self.window}" if self.window else ""
        parts = (f"compressed to {self.compressed}" if self.compressed else "", "sinks" if self.sinks else "")
        more = "".join(f", {part}" for part in parts if part)
        return f"head size {self.size}, {self.queries}/{self.keys} heads, blocks of {self.block}{window}{more}"

    @property
    def asked(self) -> tuple[int, ...]:
        """How many of the last tokens are computed again."""
        return (*FEW, self.length // 2, self.length)


SHAPES: Final = (
    Heads(64, 32, 8),
    Heads(128, 32, 8),
    Heads(64, 64, 8),
    Heads(128, 64, 8),
    Heads(128, 16, 16),
    Heads(256, 8, 4),
    Heads(64, 32, 8, window=512),
    Heads(128, 32, 8, window=512),
    Heads(64, 32, 8, block=256),
    Heads(128, 32, 8, block=256),
)


WINDOWS: Final = (
    Heads(256, 8, 4, window=1024, length=LONG),  # Gemma 3 4B
    Heads(64, 64, 8, window=128, sinks=True),  # gpt-oss
    Heads(64, 64, 8, sinks=True),
    Heads(128, 32, 8, window=512),
)
COMPRESSED: Final = (
    Heads(64, 128, 1, compressed=512),  # DeepSeek V3 on one GPU, on four, on eight
    Heads(64, 32, 1, compressed=512),
    Heads(64, 16, 1, compressed=512),
)


class Cache:
    """Paged keys and values of the sequence and the others, in vLLM's layout, and the queries of all their tokens."""

    def __init__(self, heads: Heads, dtype: torch.dtype) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        self.heads = heads
        self.lengths = [heads.length, *(length for length, _ in OTHERS)]
        blocks = [-(-length // heads.block) for length in self.lengths]
        total, widest = sum(blocks), max(blocks)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

        # (blocks, heads, tokens, keys and values next to each other), seen as (blocks, tokens, heads, size)
        if heads.compressed:  # the rotated part is the keys, the compressed one is both
            stored = random(total, heads.block, 1, heads.compressed + heads.size)
            self.values, self.keys = stored.split([heads.compressed, heads.size], dim=-1)
        else:
            stored = random(total, heads.keys, heads.block, 2 * heads.size)
            self.keys, self.values = stored.transpose(1, 2).split(heads.size, dim=-1)
        self.queries = [random(length, heads.queries, heads.compressed + heads.size) * 2 for length in self.lengths]
        self.sinks = random(heads.queries) if heads.sinks else None
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = torch.zeros(len(blocks), widest, device=DEVICE, dtype=torch.int32)
        for row, count in enumerate(blocks):
            self.tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], device=DEVICE)

    def attend(self, setting: Setting | Triton, asked: list[tuple[int, int]]) -> list[torch.Tensor]:
        """Outputs (tokens, heads, size) of the last tokens of sequences: asked is [(which, how many), ...]."""
        heads = self.heads
        queries = torch.cat([self.queries[which][self.lengths[which] - count :] for which, count in asked])
        starts = torch.tensor([0, *(count for _, count in asked)], device=DEVICE).cumsum(0, dtype=torch.int32)
        rows = torch.tensor([which for which, _ in asked], device=DEVICE)
        used = torch.tensor([self.lengths[which] for which, _ in asked], device=DEVICE, dtype=torch.int32)
        real = max(count for _, count in asked)
        if isinstance(setting, Triton):
            out = self._triton(setting, queries, starts, used, self.tables[rows].contiguous(), real)
            return list(out.split([count for _, count in asked]))
        floor = {
            "real": 1,
            "2": 2,
            "floor": least_query_length(heads.queries, heads.keys),
            "constant": CONSTANT,
        }[setting.longest]
        longest, furthest = max(real, floor), max(self.lengths[which] for which, _ in asked)
        if heads.window:
            furthest = max(furthest, heads.window + 1)
        window = (-1, -1) if heads.window is None else (heads.window - 1, 0)
        out = self._call(setting, queries, starts, used, self.tables[rows].contiguous(), longest, furthest, window)
        return list(out.split([count for _, count in asked]))

    def milliseconds(self, setting: Setting | Triton, repeats: int = 5) -> float:
        """To compute all sequences whole, in one call; the median."""
        every = list(enumerate(self.lengths))
        seconds = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.attend(setting, every)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds[1:])

    def _triton(
        self,
        setting: Triton,
        queries: torch.Tensor,
        starts: torch.Tensor,
        used: torch.Tensor,
        tables: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        out = torch.empty_like(queries)
        heads = self.heads
        _triton_kernels(setting).unified_attention(
            q=queries,
            k=self.keys,
            v=self.values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=max(longest, 2),
            seqused_k=used,
            max_seqlen_k=int(used.max()),
            softmax_scale=1 / math.sqrt(heads.size),
            causal=True,
            window_size=(heads.window - 1, 0) if heads.window else (-1, -1),
            block_table=tables,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            sinks=self.sinks,
        )
        return out

    def _call(
        self,
        setting: Setting,
        queries: torch.Tensor,
        starts: torch.Tensor,
        used: torch.Tensor,
        tables: torch.Tensor,
        longest: int,
        furthest: int,
        window: tuple[int, int],
    ) -> torch.Tensor:
        from vllm.vllm_flash_attn import flash_attn_interface as interface

        heads = self.heads
        # Of compressed keys the scale is that of what they stand for: 128 numbers beside the rotated ones.
        scale = 1 / math.sqrt(heads.size + (128 if heads.compressed else 0))
        metadata, compressed = None, None
        if heads.compressed:
            compressed, queries = queries.split([heads.compressed, heads.size], dim=-1)
        if setting.scheduled:
            metadata = interface.get_scheduler_metadata(
                batch_size=len(used),
                max_seqlen_q=longest,
                max_seqlen_k=furthest,
                num_heads_q=heads.queries,
                num_heads_kv=heads.keys,
                headdim=heads.size,
                headdim_v=heads.compressed or None,
                cache_seqlens=used,
                qkv_dtype=queries.dtype,
                cu_seqlens_q=starts,
                page_size=heads.block,
                causal=True,
                window_size=window,
                num_splits=setting.splits,
            )
        if setting.pack is None:
            return interface.flash_attn_varlen_func(
                q=queries,
                k=self.keys,
                v=self.values,
                q_v=compressed,
                s_aux=self.sinks,
                max_seqlen_q=longest,
                cu_seqlens_q=starts,
                max_seqlen_k=furthest,
                seqused_k=used,
                softmax_scale=scale,
                causal=True,
                window_size=list(window),
                block_table=tables,
                scheduler_metadata=metadata,
                num_splits=setting.splits,
                fa_version=setting.version,
            )
        out = torch.empty_like(queries)
        before_rotary = (queries, self.keys, self.values, None, None, None, out, starts, None, None, None, used)
        torch.ops._vllm_fa3_C.fwd(
            *before_rotary,
            longest,
            furthest,
            tables,
            *(None,) * 8,  # batch index, left padding, three of rotary embeddings, three scales
            scale,
            True,
            *window,
            0.0,
            True,
            metadata,
            setting.splits,
            setting.pack,
            0,
            None,
            1,
            0,
            None,
        )
        return out


@functools.cache
def _triton_kernels(setting: Triton) -> Any:
    """vLLM's module with a kernel of its own for each setting: one that was compiled would not see the change."""

    from icm_vllm.triton_attention import OneTile, softmax_step, tile_of

    name = "vllm.v1.attention.ops.triton_unified_attention"
    module: Any = importlib.util.module_from_spec(importlib.util.find_spec(name))  # type: ignore[arg-type]
    module.__loader__.exec_module(module)
    if setting.ours:
        module.softmax_step = softmax_step
    if setting.tile:
        module.kernel_unified_attention = OneTile(module.kernel_unified_attention, tile_of(setting.tile))
    return module


def compare(cache: Cache, setting: Setting | Triton) -> dict[str, dict[int, tuple[int, float]]]:
    """By what is beside it (nothing, a batch after or before it) and tokens: differing elements, largest gap."""
    length = cache.heads.length
    whole = cache.attend(setting, [(0, length)])[0]
    others = [(number + 1, count) for number, (_, count) in enumerate(OTHERS)]
    short = [(which, 1) for which, _ in others]
    found: dict[str, dict[int, tuple[int, float]]] = {}
    for company, before, after in (
        ("alone", [], []),
        ("first of a batch", [], others),
        ("last of a batch", others, []),
        ("among single tokens", short, short),
        ("last of sixteen", [*short, *short, (1, 1)], []),
    ):
        found[company] = {}
        for count in cache.heads.asked:
            part = cache.attend(setting, [*before, (0, count), *after])[len(before)]
            difference = (part.float() - whole[length - count :].float()).abs()
            found[company][count] = (int((difference != 0).sum()), float(difference.max()))
    return found


class Report:
    """Measures, prints and keeps results; failures are kept, too, and do not stop the rest."""

    def __init__(self, vllm: str, path: Path | None, seconds: float) -> None:
        self.failures: list[str] = []
        self._results: list[dict[str, Any]] = []
        self._vllm, self._path = vllm, path
        self._start = time.monotonic()
        self._end = self._start + seconds

    def measure(self, heads: Heads, settings: Sequence[Setting | Triton]) -> None:
        """One shape of attention, under each setting."""
        if time.monotonic() > self._end:
            self.failures.append(f"{heads.name}: out of time")
            return
        print(
            f"\n{heads.name}: elements that differ with {', '.join(map(str, heads.asked))} of {heads.length} tokens "
            "computed",
            flush=True,
        )
        try:
            cache = Cache(heads, torch.bfloat16)
        except Exception as error:  # noqa: BLE001  one chance on a rented machine: the rest must still run
            self._failed(heads.name, error)
            return
        for setting in settings:
            try:
                found = compare(cache, setting)
                milliseconds = cache.milliseconds(setting)
            except Exception as error:  # noqa: BLE001
                self._failed(f"{heads.name}, {setting.name}", error)
                continue
            counts = {company: [number for number, _ in by_count.values()] for company, by_count in found.items()}
            largest = max(value for by_count in found.values() for _, value in by_count.values())
            exact = not any(number for numbers in counts.values() for number in numbers)
            self._results.append(
                {
                    "heads": heads.name,
                    "setting": setting.name,
                    "exact": exact,
                    "largest": largest,
                    "tokens": list(heads.asked),
                    "differing": counts,
                    "milliseconds": round(milliseconds, 3),
                }
            )
            detail = "exact"
            if not exact:
                worst = max(counts, key=lambda company: sum(counts[company]))
                detail = f"up to {largest:.1e}: alone {counts['alone']}"
                if counts[worst] != counts["alone"]:
                    detail += f", {worst} {counts[worst]}"
            print(f"  {setting.name}: {detail}; {milliseconds:.3f} ms for all whole", flush=True)

    def exact_everywhere(self, setting: str) -> bool:
        """Whether a setting was measured, and exact in every measurement."""
        found = [result["exact"] for result in self._results if result["setting"] == setting]
        return bool(found) and all(found)

    def write(self) -> None:
        """Write everything so far as JSON."""
        if self._path is None:
            return
        record = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "vllm": self._vllm,
            "seconds": round(time.monotonic() - self._start, 1),
            "failures": self.failures,
            "results": self._results,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(record, indent=1) + "\n")

    def _failed(self, what: str, error: Exception) -> None:
        self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
        print(f"  FAILED {self.failures[-1]}", flush=True)


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all counts here")
    parser.add_argument(
        "--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="in this order (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=110.0, help="start no further shape after this long")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, whatever the results; 2 without a GPU or vLLM."""
    options = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/attention_rows.py needs an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2
    try:
        import vllm
    except ImportError as error:
        print(f"benchmarks/attention_rows.py needs vLLM: {error}", file=sys.stderr)
        return 2
    report = Report(vllm.__version__, options.json, options.seconds)
    groups: dict[str, tuple[Sequence[Setting | Triton], tuple[Heads, ...]]] = {
        "flash3": (SETTINGS, (*SHAPES, *(heads for heads in WINDOWS if heads.sinks))),
        "triton": (TRITON, WINDOWS),
        "latent": (LATENT, COMPRESSED),
        "flash2": (OLDER, (*SHAPES, *(heads for heads in WINDOWS if not heads.sinks))),
        "packed": (PACKED, SHAPES),
    }
    names = []
    for backend in options.backends:
        settings, shapes = groups[backend]
        names += [setting.name for setting in settings]
        for heads in shapes:
            report.measure(heads, settings)
        report.write()
    exact = [name for name in names if report.exact_everywhere(name)]
    print(f"\nexact for every shape that ran: {exact or 'none'}; {len(report.failures)} failures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
