"""How vLLM is started in this process: its arguments, and the environment that one for the CPU reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from core.cpu import KV_CACHE_SPACE, fast_type, kv_cache_gib
from core.errors import ConfigurationError
from core.flags import meant

_CPU_ENVIRONMENT: Final = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""From configs/vllm_config.yaml, which gives the reasons; variables that are set already stay. vLLM reads them when
it is imported."""

ALL_BLOCKS: Final = "disable_hybrid_kv_cache_manager"
"""The argument by which all layers share one kind of cache block, and all blocks of a prompt are kept."""
HUB_SECONDS: Final = 10.0
"""To wait for Hugging Face's answer about a name."""

OPENMP: Final = Path(sys.prefix) / "lib" / "libiomp5.so"
"""From the same section: LD_PRELOAD for the processes that vLLM starts. Without it vLLM sets another library, which
needs a core that stays free."""


def set_cpu_environment(dtype: str) -> None:
    """For a vLLM on the CPU that this process is about to import, and that computes in `dtype`."""
    for name, value in {**_CPU_ENVIRONMENT, KV_CACHE_SPACE: str(kv_cache_gib(dtype))}.items():
        os.environ.setdefault(name, value)
    if OPENMP.is_file() and os.environ.setdefault("LD_PRELOAD", str(OPENMP)) == str(OPENMP):
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")


@dataclass(frozen=True, slots=True)
class DirectOptions:
    """How vLLM is started; None leaves vLLM's default. Names and meanings are those of `vllm.LLM`.

    gpu_memory_utilization: share of the GPU's memory, 0 to 1. block_size: tokens a KV-cache block; on CPU a multiple of
    32. cpu: vLLM must be one for the CPU, and gets the settings of the local server (configs/vllm_config.yaml) where
    none are given here. deterministic: scores depend only on their prompt, as with the launcher's --deterministic
    (docs/determinism.md), unless the environment already sets batch invariance. chat_template: a Jinja template
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
            ALL_BLOCKS: True if self.cpu else None,
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


def check_path(model: str) -> None:
    """Raises ConfigurationError for a path that does not exist: vLLM would look for it on Hugging Face for a minute.

    `folder/name` counts as a path where that folder exists, unless a model of that name was downloaded before.
    """
    path = Path(model)
    if path.exists() or "://" in model:
        return
    if _surely_a_path(model) or (model.count("/") == 1 and path.parent.is_dir() and not _downloaded(model)):
        there = path.parent.is_dir()
        names = sorted(each.name for each in path.parent.iterdir() if each.is_dir()) if there else []
        found = f"{path.parent}/ holds {', '.join(names[:10])}." if names else "Check the path."
        near = meant(path.name, names)
        raise ConfigurationError(f"there is no model at {model}{near or '.'}", hint=found)


def _surely_a_path(model: str) -> bool:
    return Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1


def check_hub(model: str, revision: str = "", token: str | None = None) -> None:
    """Raises ConfigurationError for a name that Hugging Face does not have, or where it cannot be asked: vLLM would
    ask again and again, for minutes.

    Nothing is asked about a path, a model that was downloaded before, or where vLLM takes models from elsewhere.
    """
    elsewhere = "://" in model or _downloaded(model) or os.environ.get("VLLM_USE_MODELSCOPE")
    if Path(model).exists() or _surely_a_path(model) or elsewhere:
        return
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:  # it comes with vLLM, whose absence is told when it is imported
        return
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        api.model_info(model, revision=revision or None, timeout=HUB_SECONDS)
    except RevisionNotFoundError:
        raise ConfigurationError(f"{model} has no revision {revision} on Hugging Face.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ConfigurationError(
            f"there is no model {model} on Hugging Face.",
            hint="Check the name, or give the path of its folder; a private model needs HF_TOKEN.",
        ) from None
    except HfHubHTTPError:  # it answers, and does not say more: vLLM may do better
        return
    except Exception as error:  # noqa: BLE001 - of its HTTP library, which is another one from version to version
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise ConfigurationError(
            f"{model} is no folder here and was not downloaded, and Hugging Face cannot be asked for it: {reason}.",
            hint="Give the path of a model's folder.",
        ) from None


def _downloaded(model: str) -> bool:
    """Whether Hugging Face's cache on this machine has the model."""
    cache = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub")
    return (Path(cache).expanduser() / f"models--{model.replace('/', '--')}").is_dir()
