"""torch.compile: make Inductor call the kernels where it would generate a reduction.

Inductor turns softmax, means and sums into kernels whose shape follows the sizes it compiles for, and may pick matrix
product templates by timing them. While the mode is on, its table of decompositions sends these operators to
torch.ops.icm.* instead, which it cannot take apart. That table is not a public interface: tests/gpu and
tests/icm_vllm/test_batch_invariant.py run it.

PyTorch's cache of compiled code on disk is keyed with TAG. This is a setting of a thread in PyTorch: compile in the
thread that switched the mode on, or set TORCH_COMPILE_CACHE_KEY_TAG for the whole process.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from icm_vllm.batch_invariant import ops
from icm_vllm.batch_invariant.matmul import SUPPORTED

_SOURCES: Final = b"".join(Path(m).read_bytes() for m in (__file__, ops.__file__))
_CPU: Final = torch.backends.cpu.get_cpu_capability().lower()
TAG: Final = f"icm-{hashlib.sha256(_SOURCES).hexdigest()[:16]}-{_CPU}"
"""Identifies what compiled code calls while the mode is on. It changes with this file and ops.py, and with the CPU's
instructions: PyTorch 2.13 would take kernels for AVX-512 out of its cache where it compiles for AVX2, and vice
versa."""

_MISSING = object()
_before: dict[Any, Any] = {}
_tag_before = ""


def use_kernels() -> None:
    """Make code that is compiled from now on call the kernels. Does nothing where this PyTorch has no Inductor."""
    global _tag_before
    modules = _modules()
    if modules is None or _before:
        return
    inductor, compiler = modules
    for operator, ours in _replacements().items():
        own = inductor.decompositions.get(operator, _MISSING)
        _before[operator] = own
        inductor.decompositions[operator] = _choose(ours, None if own is _MISSING else own)
    inductor.fast_random_decomps.cache_clear()
    # Code that was compiled and cached without the mode must not be used.
    _tag_before = compiler.cache_key_tag
    compiler.cache_key_tag = _tag_before + TAG


def use_pytorch() -> None:
    """Undo use_kernels."""
    modules = _modules()
    if modules is None or not _before:
        return
    inductor, compiler = modules
    for operator, own in _before.items():
        if own is _MISSING:
            del inductor.decompositions[operator]
        else:
            inductor.decompositions[operator] = own
    _before.clear()
    inductor.fast_random_decomps.cache_clear()
    compiler.cache_key_tag = _tag_before


def _modules() -> tuple[Any, Any] | None:
    try:
        return (
            importlib.import_module("torch._inductor.decomposition"),
            importlib.import_module("torch.compiler.config"),
        )
    except ImportError:
        return None


def _choose(ours: Callable[..., Any], own: Callable[..., Any] | None) -> Callable[..., Any]:
    def decompose(*arguments: Any, **named: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        if all(tensor.dtype in SUPPORTED and tensor.dtype == tensors[0].dtype for tensor in tensors):
            result = ours(*arguments, **named)
            if result is not NotImplemented:
                return result
        return NotImplemented if own is None else own(*arguments, **named)

    return decompose


def _replacements() -> dict[Any, Callable[..., Any]]:
    aten, icm = torch.ops.aten, torch.ops.icm
    assert ops.NAMESPACE == "icm"  # and the operators are registered, since the module is imported

    def product(a: Any, b: Any) -> Any:
        return icm.product(a, b)

    def scaled(c: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        plain = beta == 1 and alpha == 1 and c.dim() == 1 and c.shape[0] == b.shape[-1]
        # All others stay operators of PyTorch, whose kernels are replaced as well.
        return icm.product(a, b, c) if plain else NotImplemented

    def log_softmax(x: Any, dim: int, half_to_float: bool) -> Any:
        return icm.log_softmax(x, dim, torch.float32 if half_to_float else None)

    def softmax(x: Any, dim: int, half_to_float: bool) -> Any:
        return icm.softmax(x, dim, torch.float32 if half_to_float else None)

    def total(mean: bool) -> Callable[..., Any]:
        def reduce(
            x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
        ) -> Any:
            if dtype not in (None, *SUPPORTED):
                return NotImplemented
            return icm.total(x, list(dim or ()), keepdim, dtype, mean)

        return reduce

    return {
        aten.mm.default: product,
        aten.bmm.default: product,
        aten.addmm.default: scaled,
        aten.baddbmm.default: scaled,
        aten._log_softmax.default: log_softmax,
        aten._softmax.default: softmax,
        aten.mean.dim: total(mean=True),
        aten.sum.dim_IntList: total(mean=False),
    }
