"""Which number format this machine's CPU computes fast, and how much memory a KV cache of it takes.

A CPU multiplies bfloat16 matrices fast only if it has instructions for them: Intel's AMX or AVX-512 BF16 (Intel since
Cooper Lake and Sapphire Rapids, AMD since Zen 4), or Arm's BF16 extension. Any other emulates them, and float32 is then
several times as fast (docs/installing.md has measurements).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CPUINFO: Final = Path("/proc/cpuinfo")
BFLOAT16: Final = "bfloat16"
FLOAT32: Final = "float32"
KV_CACHE_SPACE: Final = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's environment variable for the memory of its KV cache on a CPU, GiB, a whole number."""
KV_CACHE_GIB: Final = 2
"""GiB of KV cache for a type of two bytes: some 116,000 tokens of Gemma 3 270M, several trees of 256 short claims."""
_CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much memory a container may use, bytes: its second and its first version of control groups."""

_INSTRUCTIONS: Final = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
"""Flags of /proc/cpuinfo that mean fast bfloat16, the fastest first."""
_NO_BFLOAT16: Final = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_BELOW_BFLOAT16: Final = {
    # oneDNN's documentation, "CPU Dispatcher Control": the last instruction set that it may use.
    "ONEDNN_MAX_CPU_ISA": _NO_BFLOAT16,
    "DNNL_MAX_CPU_ISA": _NO_BFLOAT16,  # its older name
    # PyTorch's documentation, "Environment variables": the instruction set of its own kernels.
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
}
"""Environment variables that keep a library from using such instructions, and the values that do."""


@dataclass(frozen=True, slots=True)
class FastType:
    """A type by its name in vLLM and PyTorch, and why it was chosen, as the end of a sentence."""

    dtype: str
    why: str

    def __str__(self) -> str:
        return f"{self.dtype}, because {self.why}"


def fast_type(environ: Mapping[str, str] = os.environ, cpuinfo: Path = CPUINFO) -> FastType:
    """The floating-point type that this CPU computes fast: bfloat16 where it has instructions for it, else float32.

    environ: variables that limit which instructions are used are obeyed, so that another CPU can be imitated.
    """
    for variable, values in _BELOW_BFLOAT16.items():
        value = environ.get(variable, "")
        if value.lower() in map(str.lower, values):
            return FastType(FLOAT32, f"{variable}={value} leaves this CPU no fast bfloat16")
    flags = cpu_flags(cpuinfo)
    for flag, name in _INSTRUCTIONS.items():
        if flag in flags:
            return FastType(BFLOAT16, f"this CPU has {name}")
    if not flags:
        return FastType(FLOAT32, f"{cpuinfo} does not say what this CPU can do")
    return FastType(FLOAT32, "this CPU would have to emulate bfloat16 (no AMX, AVX-512 BF16 or Arm BF16)")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction sets of the first CPU, in Linux's words; empty where the file cannot be read or says nothing."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def kv_cache_gib(dtype: str, gib: int = KV_CACHE_GIB, memory: int | None = None) -> int:
    """GiB of KV cache that hold as many tokens in `dtype` as `gib` do in a type of two bytes.

    No more than a quarter of `memory` (bytes; None: memory_limit()), but at least 1: beside its cache a small model
    takes some 4 GB in float32.
    """
    wanted = 2 * gib if dtype in (FLOAT32, "float") else gib
    quarter = (memory_limit() if memory is None else memory) / 4
    return max(1, min(wanted, round(quarter / 2**30)))


def memory_limit(limits: Sequence[Path] = _CGROUP_LIMITS) -> int:
    """Bytes of memory that this process may use: the machine's, or less in a container. limits: files that say so."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in limits:
        with contextlib.suppress(OSError, ValueError):  # no such version of control groups, or "max"
            found.append(int(path.read_text()))
    return min(found)
