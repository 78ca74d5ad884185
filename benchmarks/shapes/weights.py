"""Random weights of usual scale for a config.json, tensor by tensor into safetensors files; and a LoRA adapter.

The product of a row of norm 1 with a layer has numbers of about 1, as in a trained model, also where weights are
quantized. Weights are made on the GPU where there is one, and written while the next ones are made.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from benchmarks.shapes.tensors import Config, Kind, Tensor, tensors

FILE_BYTES: Final = 2 << 30
WRITERS: Final = 4
LARGEST_FP8: Final = 448.0
GROUP: Final = 128
"""Inputs that share a scale in AWQ and GPTQ; side of a square of fp8 weights that share one."""
RANK: Final = 16
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns has the bits 4i to 4i + 3 of an AWQ word."""
_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The positive numbers of four bits (e2m1)."""


class RandomWeights:
    """Makes the stored tensors of a checkpoint; the same seed gives the same ones on the same kind of device."""

    def __init__(self, quantization: Config | None, device: str, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._stored = _stored_as(quantization)
        self._quantized = quantization is not None

    def of(self, tensor: Tensor) -> Iterator[tuple[str, Any]]:
        """(name, numbers on the device) of everything that is stored for `tensor`."""
        size = tensor.size
        match tensor.kind:
            case Kind.LINEAR if self._stored != "bf16":
                yield from getattr(self, f"_{self._stored}")(tensor.name.removesuffix(".weight"), *size)
            case Kind.LINEAR | Kind.PLAIN:
                yield tensor.name, self._normal(size, scale_of(size[-1]))
            case Kind.EMBEDDING:
                yield tensor.name, self._normal(size, 0.02)
            case Kind.NORM:
                yield tensor.name, 1 + self._normal(size, 0.1)
            case Kind.NORM_FROM_0 | Kind.BIAS:
                yield tensor.name, self._normal(size, 0.1)
            case Kind.SINKS:
                yield tensor.name, self._normal(size, 1.0)
            case Kind.CORRECTION:
                yield tensor.name, self._normal(size, 0.05, torch.float32)
            case Kind.CONVOLUTION:
                yield tensor.name, self._normal(size, scale_of(size[-1]))
            case Kind.DECAY:
                yield tensor.name, self._uniform(size, 1.0, 16.0).log()
            case Kind.TIME_STEP:
                # Steps from 0.001 to 0.1 before softplus, as state-space models are initialized with.
                step = 10 ** self._uniform(size, -3.0, -1.0)
                yield tensor.name, step.expm1().log().bfloat16()
            case Kind.EXPERTS_MXFP4 if not self._quantized:  # as (experts, in, out) then
                yield tensor.name, self._normal((size[0], size[2], size[1]), scale_of(size[2]))
            case Kind.EXPERTS_MXFP4:
                yield from self._mxfp4(tensor.name, *size)

    def adapter(self, name: str, out: int, into: int) -> Iterator[tuple[str, Any]]:
        """The two factors of a LoRA update, as PEFT names them; the update is a tenth of the layer, roughly."""
        prefix = f"base_model.model.{name}"
        yield f"{prefix}.lora_A.weight", self._normal((RANK, into), scale_of(into))
        yield f"{prefix}.lora_B.weight", self._normal((out, RANK), 0.1 * RANK**-0.5)

    def _normal(self, size: tuple[int, ...], scale: float, dtype: Any = torch.bfloat16) -> Any:
        made = torch.empty(size, dtype=dtype, device=self._device)
        return made.normal_(0.0, scale, generator=self._generator)

    def _uniform(self, size: tuple[int, ...], least: float, most: float) -> Any:
        made = torch.empty(size, dtype=torch.float32, device=self._device)
        return made.uniform_(least, most, generator=self._generator)

    def _scales(self, size: tuple[int, ...], scale: float) -> Any:
        """Scales that differ by up to a tenth, float32."""
        return scale * self._uniform(size, 0.9, 1.1)

    def _fp8(self, name: str, out: int, into: int) -> Iterator[tuple[str, Any]]:
        scale = self._scales((), 5 * scale_of(into) / LARGEST_FP8)
        numbers = self._normal((out, into), LARGEST_FP8 / 5, torch.float32)
        yield f"{name}.weight", numbers.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        yield f"{name}.weight_scale", scale

    def _fp8_blocks(self, name: str, out: int, into: int) -> Iterator[tuple[str, Any]]:
        numbers = self._normal((out, into), LARGEST_FP8 / 5, torch.float32)
        yield f"{name}.weight", numbers.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        squares = (-(-out // GROUP), -(-into // GROUP))
        yield f"{name}.weight_scale_inv", self._scales(squares, 5 * scale_of(into) / LARGEST_FP8)

    def _codes(self, out: int, into: int) -> Any:
        """Four bits each, 8 standing for 0, a standard deviation of 2.5 (in, out); int32."""
        numbers = self._normal((into, out), 2.5, torch.float32)
        return numbers.round_().add_(8).clamp_(0, 15).to(torch.int32)

    def _gptq(self, name: str, out: int, into: int) -> Iterator[tuple[str, Any]]:
        codes, groups = self._codes(out, into), into // GROUP
        yield f"{name}.qweight", packed(codes.view(into // 8, 8, out), 1)
        # The format keeps zero points less 1: 7 in every place.
        yield f"{name}.qzeros", torch.full((groups, out // 8), 0x77777777, dtype=torch.int32, device=self._device)
        yield f"{name}.scales", self._scales((groups, out), scale_of(into) / 2.5).half()
        yield f"{name}.g_idx", torch.arange(into, dtype=torch.int32, device=self._device) // GROUP

    def _awq(self, name: str, out: int, into: int) -> Iterator[tuple[str, Any]]:
        codes, groups = self._codes(out, into), into // GROUP
        yield f"{name}.qweight", packed(codes.view(into, out // 8, 8)[..., _AWQ_ORDER], 2)
        zeros = self._uniform((groups, out // 8, 8), 7.0, 10.0).to(torch.int32)  # 7, 8 or 9
        yield f"{name}.qzeros", packed(zeros[..., _AWQ_ORDER], 2)
        yield f"{name}.scales", self._scales((groups, out), scale_of(into) / 2.5).half()

    def _mxfp4(self, name: str, count: int, out: int, into: int) -> Iterator[tuple[str, Any]]:
        blocks = torch.empty((count, out, into // 32, 16), dtype=torch.uint8, device=self._device)
        borders = torch.tensor([(a + b) / 2 for a, b in pairwise(_FP4)], device=self._device)
        for expert in range(count):
            numbers = self._normal((out, into), 2.4, torch.float32)
            codes = torch.bucketize(numbers.abs(), borders).to(torch.uint8) | ((numbers < 0).to(torch.uint8) << 3)
            pairs = codes.view(out, into // 32, 16, 2)
            blocks[expert] = pairs[..., 0] | (pairs[..., 1] << 4)
        yield f"{name}_blocks", blocks
        # Powers of two with 127 standing for 1, around the one nearest to the scale that makes products about 1.
        nearest = round(torch.tensor(scale_of(into) / 2.4).log2().item()) + 127
        powers = self._uniform((count, out, into // 32), -1.0, 2.0).floor().to(torch.int32) + nearest
        yield f"{name}_scales", powers.to(torch.uint8)


def scale_of(into: int) -> float:
    """The standard deviation of weights of a layer with that many inputs: what models are initialized with, or more."""
    return float(max(0.02, into**-0.5))


def packed(codes: Any, dimension: int) -> Any:
    """Eight numbers of four bits along `dimension` as one int32, the first in the lowest bits."""
    shape = [1] * codes.dim()
    shape[dimension] = 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device).view(shape)
    # Bits that do not overlap add up to their union; the sum of int32 is int64.
    return (codes << shifts).sum(dimension).to(torch.int32)


def _stored_as(quantization: Config | None) -> str:
    """How the layers of a checkpoint are stored. Raises ValueError for what is not here."""
    if quantization is None or quantization["quant_method"] == "mxfp4":
        return "bf16"
    method = quantization["quant_method"]
    if method == "fp8":
        return "fp8_blocks" if "weight_block_size" in quantization else "fp8"
    if method in ("awq", "gptq"):
        return str(method)
    raise ValueError(f"there are no random weights for quantization {method!r}")


def write_weights(folder: Path, *, adapter: bool = False, seed: int = 0) -> None:
    """Write weights for the config.json in `folder`, and an adapter in `folder`/adapter; says on stderr how far it is.

    Raises ValueError for an architecture or quantization that is not here, before anything is written.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = RandomWeights(config.get("quantization_config"), device, seed)
    listed = list(tensors(config))
    with ThreadPoolExecutor(WRITERS) as pool:
        _write(folder, weights, listed, pool)
    if adapter:
        _write_adapter(folder / "adapter", folder.name, RandomWeights(None, device, seed + 1), listed)


def _write(folder: Path, weights: RandomWeights, listed: list[Tensor], pool: ThreadPoolExecutor) -> None:
    files: dict[str, str] = {}
    writing: list[Future[None]] = []
    waiting: dict[str, Any] = {}
    size = written = 0
    start = shown = time.monotonic()

    def send() -> None:
        name = f"model-{len(writing) + 1:05}.safetensors"
        if len(writing) >= WRITERS:
            writing[len(writing) - WRITERS].result()  # so that memory holds a few files at most
        files.update(dict.fromkeys(waiting, name))
        writing.append(pool.submit(save_file, dict(waiting), folder / name, {"format": "pt"}))
        waiting.clear()

    for number, tensor in enumerate(listed):
        for name, numbers in weights.of(tensor):
            waiting[name] = numbers.contiguous().cpu()
            size += waiting[name].nbytes
        if size >= FILE_BYTES:
            written += size
            size = 0
            send()
        if time.monotonic() - shown > 2:
            shown = time.monotonic()
            print(f"weights: {number + 1} of {len(listed)} tensors, {shown - start:.0f} s", file=sys.stderr, flush=True)
    if waiting:
        written += size
        send()
    for file in writing:
        file.result()
    index = {"metadata": {"total_size": written}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_adapter(folder: Path, base: str, weights: RandomWeights, listed: list[Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    targets = [tensor for tensor in listed if tensor.kind is Kind.LINEAR]
    factors: dict[str, Any] = {}
    for tensor in targets:
        for name, numbers in weights.adapter(tensor.name.removesuffix(".weight"), *tensor.size):
            factors[name] = numbers.cpu()
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": sorted({tensor.name.split(".")[-2] for tensor in targets}),
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
