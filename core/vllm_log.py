"""Why a vLLM server did not start, from its log: what its messages mean and what to do about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class StartFailure:
    """sign: words of vLLM, PyTorch or the system that show it. what: what happened; todo: what to do about it."""

    sign: str
    what: str
    todo: str


_LESS: Final = (
    "use more GPUs (--tensor-parallel-size), a smaller or quantized model, a shorter --max-model-len, or end what else "
    "uses the GPU (nvidia-smi)"
)
START_FAILURES: Final = (
    StartFailure(
        "Free memory on device",
        "out of memory at start: something else holds GPU memory",
        "end it (nvidia-smi), or lower --gpu-memory-utilization below the free share",
    ),
    StartFailure(
        "No available memory for the cache blocks",
        "out of memory at start: the weights leave no room for the KV cache",
        f"raise --gpu-memory-utilization, or {_LESS}",
    ),
    StartFailure(
        "KV cache is needed, which is larger than the available KV cache memory",
        "out of memory at start: the KV cache does not hold one prompt of full length",
        "lower --max-model-len, or raise --gpu-memory-utilization (on the CPU VLLM_CPU_KVCACHE_SPACE, in GiB)",
    ),
    StartFailure("CUDA out of memory", "out of memory at start: the GPU is too small for the weights", _LESS),
    StartFailure("OutOfMemoryError", "out of memory at start: the GPU is too small for the weights", _LESS),
    StartFailure(
        "Cannot allocate memory",
        "out of memory at start: the machine itself is short of memory",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB), or use a smaller model",
    ),
    StartFailure(
        "not enough memory: you tried to allocate",
        "out of memory at start: the machine itself is short of memory",
        "lower VLLM_CPU_KVCACHE_SPACE (GiB), or use a smaller model",
    ),
    StartFailure("address already in use", "the port is taken", "give another --port, or stop what listens there"),
    StartFailure(
        "is not a local folder and is not a valid model identifier",
        "there is no such model",
        "check its path or its name on Hugging Face",
    ),
    StartFailure(
        "gated repo", "the model is gated", "accept its licence on Hugging Face and set HF_TOKEN for the server"
    ),
)


def start_failure(log: str) -> StartFailure | None:
    """The failure that a log shows, the most specific one first; None where it shows none."""
    return next((failure for failure in START_FAILURES if failure.sign.lower() in log.lower()), None)
