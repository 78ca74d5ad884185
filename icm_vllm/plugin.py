"""What vLLM runs in each of its processes where this package is installed (entry point group vllm.general_plugins).

Changes nothing unless the environment asks for it, as our launcher does: installing the package must not alter the
other vLLM servers of the same Python.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from typing import Any, Final

FAST_PREFIXES: Final = "ICM_FAST_PREFIXES"
"""Environment variable: "1" makes the engine reuse its work on prefixes that successive prompts share."""

BATCH_INVARIANT: Final = "ICM_BATCH_INVARIANT"
"""Environment variable: "1" makes every score a function of its prompt alone; on GPUs beside VLLM_BATCH_INVARIANT=1
(docs/determinism.md)."""

QUICK_START: Final = "ICM_QUICK_START"
"""Environment variable: "1" makes a server on a CPU start faster (quick_start.py)."""

ATTENTION: Final = "ICM_BATCH_INVARIANT_ATTENTION"
ALL_REDUCE: Final = "ICM_BATCH_INVARIANT_ALL_REDUCE"
FP8: Final = "ICM_BATCH_INVARIANT_FP8"
"""Environment variables: "0" leaves vLLM's attention, its sums over GPUs, or its products of fp8 models, as they are
(exact.py)."""

_CHOOSE_KERNELS: Final = ("VLLM_BATCH_INVARIANT", "VLLM_ATTENTION_BACKEND", BATCH_INVARIANT, ATTENTION, ALL_REDUCE, FP8)


def register() -> None:
    """Called by vLLM, possibly several times a process."""
    if os.environ.get(FAST_PREFIXES) == "1":
        from icm_vllm import block_hashes, block_lookup, pools, uncached_tokens

        block_hashes.install()
        block_lookup.install()
        pools.install()
        uncached_tokens.install()
    if os.environ.get(QUICK_START) == "1" and _on_cpu():
        from icm_vllm import quick_start

        quick_start.install()
    if os.environ.get(BATCH_INVARIANT) == "1":
        if _on_cpu():
            from icm_vllm import cpu_exact

            cpu_exact.install()
        else:
            from icm_vllm import exact

            exact.install()


def _on_cpu() -> bool:
    platforms: Any = importlib.import_module("vllm.platforms")
    return bool(platforms.current_platform.is_cpu())


def kernels(attention: Any = None) -> str:
    """What chooses this process's kernels, as `NAME=VALUE,...`: part of an engine's identity.

    attention: vLLM's attention_config, whose backend and version are added where they were chosen.
    """
    chosen = {name: os.environ.get(name) for name in _CHOOSE_KERNELS}
    for name in ("backend", "flash_attn_version"):
        value = getattr(attention, name, None)
        chosen[f"attention.{name}"] = None if value is None else str(getattr(value, "name", value))
    return ",".join(f"{name}={value}" for name, value in chosen.items() if value)


def dtype_of(model: Any) -> str:
    """The type that vLLM computes in, from its model_config: bfloat16, float32, ...; empty where it does not say."""
    return str(getattr(model, "dtype", "")).removeprefix("torch.")


def config_digest(config: Any) -> str:
    """SHA-256 of what a short prompt does not show of an engine: its model's configuration as vLLM uses it (windows,
    scaled positions, --hf-overrides), and the type of its KV cache. From its vllm_config; empty where it does not say.

    Left out is what says nothing of answers, or is told elsewhere: where the model lay, who wrote the file, the type.
    """
    model = getattr(getattr(config, "model_config", None), "hf_config", None)
    if model is None:
        return ""
    cache = getattr(getattr(config, "cache_config", None), "cache_dtype", "auto")
    told = json.dumps(
        [_telling(model.to_dict()), str(cache)], sort_keys=True, default=lambda value: type(value).__name__
    )
    return hashlib.sha256(told.encode()).hexdigest()


def _telling(value: Any) -> Any:
    if isinstance(value, dict):
        silent = ("transformers_version", "dtype", "torch_dtype")
        return {
            str(key): _telling(part)
            for key, part in value.items()
            if str(key) not in silent and not str(key).startswith("_")
        }
    return [_telling(part) for part in value] if isinstance(value, list | tuple) else value
