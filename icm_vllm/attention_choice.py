"""Which attention of vLLM can be exact for a model, from its config.json; needs neither vLLM nor PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from icm_vllm.exactness import FLASH_LATENT, FLASH_WINDOWS, HYBRID, MLA, Server, features

FLASH: Final = "FLASH_ATTN"
TRITON: Final = "TRITON_ATTN"
"""Values of vLLM's --attention-config.backend, as is FLASH_LATENT."""


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder, or of a Hugging Face id that was downloaded before; {} where neither has one."""
    path = Path(model) / "config.json"
    if not path.is_file():
        try:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(model, "config.json", revision=revision)
        except (ImportError, ValueError):  # not installed; neither a folder nor an id
            return {}
        if not isinstance(found, str):
            return {}
        path = Path(found)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}


def has_windows(config: Mapping[str, Any]) -> bool:
    """Whether a layer's attention looks back over a limited number of tokens (Gemma 2 and 3, gpt-oss, Mistral 7B)."""
    return FLASH_WINDOWS in features(config, Server())


def has_states(config: Mapping[str, Any]) -> bool:
    """Whether a layer keeps a state in place of keys and values (Qwen3-Next, Qwen3.5, Mamba)."""
    return HYBRID in features(config, Server())


def exact_backend(config: Mapping[str, Any]) -> str:
    """The attention backend for exact scores (docs/determinism.md, "Attention"); {} as config gives the usual one.

    FlashAttention 3 is the fastest, is not exact with windows, and does not compute compressed keys (MLA).
    """
    if MLA in features(config, Server()):
        return FLASH_LATENT
    return TRITON if has_windows(config) else FLASH
