"""Switching the kernels on for everything PyTorch computes in this process, and off again.

    with set_batch_invariant_mode():
        logits = model(tokens)

Replaces PyTorch's own kernels for CUDA (for the CPU where Triton's interpreter runs, for tests) of the operators in
`OVERRIDDEN`, below everything that calls them: models, autograd, matmul, einsum, linear and attention written out in
PyTorch all come down to these. Types other than bfloat16, float16 and float32 still go to PyTorch's kernels.

Under torch.compile: what is compiled while the mode is on uses the kernels, and so does every matrix product that
compiled code leaves to PyTorch. Softmax and reductions that were compiled while it was off stay as they were compiled,
so compile inside the mode (or call torch.compiler.reset()). A CUDA graph keeps what was on when it was captured.

Not covered: convolutions, cumulative sums, variance, fused attention kernels (their rows do not depend on the batch as
long as they do not split the keys; docs/determinism.md), quantized products.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch

from icm_vllm.batch_invariant import compiled, kernels, rows
from icm_vllm.batch_invariant.matmul import SUPPORTED, product

_lock = threading.RLock()
_library: torch.library.Library | None = None
_settings: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """Switch the mode on, or off, for the time of the block, and then back. Can be nested.

    The mode is one of the process: it applies to all threads. Raises RuntimeError where the kernels cannot run.
    """
    before = is_batch_invariant_mode_enabled()
    _switch(enabled)
    try:
        yield
    finally:
        _switch(before)


def enable_batch_invariant_mode() -> None:
    """Switch the mode on, if it is not. Raises RuntimeError where the kernels cannot run."""
    _switch(True)


def disable_batch_invariant_mode() -> None:
    """Switch the mode off, if it is on."""
    _switch(False)


def is_batch_invariant_mode_enabled() -> bool:
    """Whether the mode is on in this process."""
    return _library is not None


def _switch(enabled: bool) -> None:
    global _library
    with _lock:
        if enabled and _library is None:
            key = _dispatch_key()
            _library = _install(key)
            compiled.use_kernels()
            _set_precision()
        elif not enabled and _library is not None:
            _library._destroy()
            _library = None
            compiled.use_pytorch()
            while _settings:
                owner, name, value = _settings.pop()
                setattr(owner, name, value)


def _dispatch_key() -> str:
    if kernels.INTERPRETED:
        return "CPU"
    if torch.version.cuda is None:
        raise RuntimeError("batch-invariant mode needs a PyTorch built for CUDA; this one is not")
    # Does not check for a GPU: that would start CUDA, and vLLM forks processes after loading plugins.
    return "CUDA"


def _set_precision() -> None:
    """Forbid cuBLAS, which still computes other types and products in fused operators, to reduce in 16 bits."""
    matmul = torch.backends.cuda.matmul
    for name, value in (
        ("allow_bf16_reduced_precision_reduction", False),
        ("allow_fp16_reduced_precision_reduction", False),
    ):
        _settings.append((matmul, name, getattr(matmul, name)))
        setattr(matmul, name, value)


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these; if not, PyTorch computes or refuses them."""
    return all(tensor.dtype in SUPPORTED and tensor.dtype == tensors[0].dtype for tensor in tensors)


def _multiply(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _fits(a, b) and a.dim() == b.dim() and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]


def _scaled(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float, alpha: float, out: torch.Tensor | None
) -> torch.Tensor:
    """beta * c + alpha * a @ b, where c may be anything that broadcasts; rounded once."""
    if beta == 1 and alpha == 1 and c.dim() == 1 and c.shape[0] == b.shape[-1]:
        return product(a, b, c, out=out)
    scaled = product(a, b, out_dtype=torch.float32) * alpha
    if beta != 0:  # else c is ignored, even where it is NaN
        scaled = scaled + c.float().expand(scaled.shape) * beta
    y = scaled.to(a.dtype)
    return y if out is None else out.copy_(y)


def _mm(own: Callable[..., Any], a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
    if not _multiply(a, b) or (out is not None and out.dtype != a.dtype):
        return own(a, b) if out is None else own(a, b, out=out)
    if out is not None:
        out.resize_(*a.shape[:-1], b.shape[-1])
    return product(a, b, out=out)


def _addmm(
    own: Callable[..., Any],
    c: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> Any:
    if not (_multiply(a, b) and _fits(a, c)) or (out is not None and out.dtype != a.dtype):
        extra = {} if out is None else {"out": out}
        return own(c, a, b, beta=beta, alpha=alpha, **extra)
    if out is not None:
        out.resize_(*a.shape[:-1], b.shape[-1])
    return _scaled(c, a, b, beta, alpha, out)


def _mv(own: Callable[..., Any], a: torch.Tensor, v: torch.Tensor) -> Any:
    return product(a, v.unsqueeze(1)).squeeze(1) if _multiply(a, v.unsqueeze(1)) else own(a, v)


def _addmv(
    own: Callable[..., Any], c: torch.Tensor, a: torch.Tensor, v: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if not (_multiply(a, v.unsqueeze(1)) and _fits(a, c)):
        return own(c, a, v, beta=beta, alpha=alpha)
    column = c.unsqueeze(-1) if c.dim() else c
    return _scaled(column, a, v.unsqueeze(1), beta, alpha, None).squeeze(1)


def _dot(own: Callable[..., Any], v: torch.Tensor, w: torch.Tensor) -> Any:
    return product(v[None], w[:, None]).reshape(()) if _multiply(v[None], w[:, None]) else own(v, w)


def _softmax(own: Callable[..., Any], x: torch.Tensor, dim: int, half_to_float: bool) -> Any:
    if not _fits(x):
        return own(x, dim, half_to_float)
    return rows.softmax(x, dim, out_dtype=torch.float32 if half_to_float else None)


def _log_softmax(own: Callable[..., Any], x: torch.Tensor, dim: int, half_to_float: bool) -> Any:
    if not _fits(x):
        return own(x, dim, half_to_float)
    return rows.log_softmax(x, dim, out_dtype=torch.float32 if half_to_float else None)


def _reduction(mean: bool) -> Callable[..., Any]:
    def reduce(
        own: Callable[..., Any],
        x: torch.Tensor,
        dim: Sequence[int] | None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        if not _fits(x) or dtype not in (None, *SUPPORTED):
            return own(x, dim, keepdim, dtype=dtype)
        return rows.total(x, dim, keepdim, out_dtype=dtype, mean=mean)

    return reduce


OVERRIDDEN: Final[dict[str, Callable[..., Any]]] = {
    "mm": _mm,
    "mm.out": _mm,
    "bmm": _mm,
    "bmm.out": _mm,
    "addmm": _addmm,
    "addmm.out": _addmm,
    "baddbmm": _addmm,
    "baddbmm.out": _addmm,
    "mv": _mv,
    "addmv": _addmv,
    "dot": _dot,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "mean.dim": _reduction(mean=True),
    "sum.dim_IntList": _reduction(mean=False),
}
"""Operators of PyTorch (aten) whose kernels are replaced."""


def _install(key: str) -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            # PyTorch warns about every replaced kernel.
            warnings.simplefilter("ignore", UserWarning)
            for name, ours in OVERRIDDEN.items():
                library.impl(name, _with_fallback(ours, _kernel_before(name, key)), key, allow_override=True)
    except BaseException:
        library._destroy()
        raise
    return library


def _kernel_before(name: str, key: str) -> Callable[..., Any]:
    """The kernel that computed this operator until now."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    kernel = torch.library.get_kernel(operator, key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def own(*arguments: Any, **named: Any) -> Any:
        return kernel.call_boxed(keys, *arguments, **named)

    return own


def _with_fallback(ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*arguments: Any, **named: Any) -> Any:
        return ours(own, *arguments, **named)

    return kernel
