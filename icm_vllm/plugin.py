"""The plugin that vLLM runs in each of its processes (entry point group vllm.general_plugins).

It changes nothing unless the environment asks for it, as our launcher does: installing this package must not change
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
"""Environment variable: "1" makes every score depend only on its prompt; on GPUs needs VLLM_BATCH_INVARIANT=1, too
(docs/determinism.md)."""

QUICK_START: Final = "ICM_QUICK_START"
"""Environment variable: "1" makes a server on a CPU start faster (quick_start.py)."""

ATTENTION: Final = "ICM_BATCH_INVARIANT_ATTENTION"
ALL_REDUCE: Final = "ICM_BATCH_INVARIANT_ALL_REDUCE"
FP8: Final = "ICM_BATCH_INVARIANT_FP8"
"""Environment variables: "0" keeps vLLM's attention, its sums over GPUs, or its products of fp8 models (exact.py)."""

EXPERTS: Final = "ICM_BATCH_INVARIANT_EXPERTS"
"""Environment variable: "0" keeps vLLM's tiles for mixtures of experts (experts.py)."""

CHECK: Final = "ICM_BATCH_INVARIANT_CHECK"
"""Environment variable: "0" starts what is known not to be exact, with a warning (exactness.py)."""

WINDOW_TILE: Final = "ICM_BATCH_INVARIANT_WINDOW_TILE"
"""Environment variable: the tile of vLLM's Triton attention, which computes windows (triton_attention.py)."""

TILE: Final = "ICM_BATCH_INVARIANT_TILE"
"""Environment variable: the tile of matrix products (batch_invariant/tiles.py, which needs PyTorch)."""

_CHOOSE_KERNELS: Final = (
    *("VLLM_BATCH_INVARIANT", "VLLM_ATTENTION_BACKEND"),
    *(BATCH_INVARIANT, ATTENTION, ALL_REDUCE, FP8, WINDOW_TILE, EXPERTS),
)


def register() -> None:
    """Called by vLLM, possibly several times in a process. Raises ValueError for a wrong value of our variables."""
    from icm_vllm import environment

    environment.check()
    if os.environ.get(FAST_PREFIXES) == "1":
        from icm_vllm import block_hashes, block_lookup, pools, uncached_tokens

        block_hashes.install()
        block_lookup.install()
        pools.install()
        uncached_tokens.install()
    if "1" in (os.environ.get(FAST_PREFIXES), os.environ.get(BATCH_INVARIANT)) and _on_cpu():
        from icm_vllm import cpu_adapters

        cpu_adapters.install()
    if os.environ.get(QUICK_START) == "1" and _on_cpu():
        from icm_vllm import quick_start

        quick_start.install()
    if os.environ.get(BATCH_INVARIANT) == "1":
        from icm_vllm import exactness

        exactness.install()
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
    """The settings that choose this process's kernels, as `NAME=VALUE,...`: part of an engine's identity.

    attention: vLLM's attention_config; its backend and version are added where they are set.
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
    """SHA-256 of what the answer to a short prompt does not show: the model's configuration as vLLM uses it (windows,
    scaled positions, --hf-overrides), and the type of the KV cache. From a vllm_config; empty where it does not say.

    Left out is what does not affect answers or is recorded elsewhere: the model's path, the file's version, the type.
    """
    model = getattr(getattr(config, "model_config", None), "hf_config", None)
    if model is None:
        return ""
    cache = getattr(getattr(config, "cache_config", None), "cache_dtype", "auto")
    content = json.dumps(
        [_relevant(model.to_dict()), str(cache)], sort_keys=True, default=lambda value: type(value).__name__
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = ("transformers_version", "dtype", "torch_dtype")
        return {
            str(key): _relevant(part)
            for key, part in value.items()
            if str(key) not in left_out and not str(key).startswith("_")
        }
    return [_relevant(part) for part in value] if isinstance(value, list | tuple) else value
