"""The batch-invariant kernels on this GPU: how exact, how far from float64, and how fast beside cuBLAS and vLLM's.

    python benchmarks/batch_invariant.py --json benchmarks/results/batch-invariant.json      # under 3 minutes

Needs one NVIDIA GPU, PyTorch and Triton; vLLM is compared where it can be imported. Four parts: tiles (do all tiles
give the same bits?), rows (does a row keep its bits over M and position? ours, cuBLAS, cuBLAS in blocks of rows of one
fixed size, vLLM), errors (against float64), speed (milliseconds with the weights coming from memory, not from the L2
cache; ratios to cuBLAS measured side by side). Then norms and softmax. Failures are printed and do not stop the rest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from core.flags import FlagParser

SHAPES: Final = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256))
"""(K, N) of the linear layers of an 8B model: qkv, output, gate and up, down, vocabulary."""

ROWS: Final = (1, 16, 64, 256, 1024, 2048, 8192)
VOCABULARY_ROWS: Final = 2048  # no step asks for more logits, and 8,192 x 128,256 of them would fill memory
CHUNKS: Final = (64, 256)
CACHE: Final = 200 << 20  # bytes of weights to alternate between, so that none is still in the L2 cache


def gpu() -> torch.device:
    """The current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def candidates() -> dict[str, Any]:
    """Tiles to compare: those that the library chooses from, and others that could replace them."""
    from icm_vllm.batch_invariant.tiles import HOPPER, Tile, capability_of, tiles

    device = gpu()
    found = {f"chosen {tile.name}": tile for tile in tiles(torch.bfloat16, capability_of(device))}
    if capability_of(device)[0] != 9:
        return found
    big = HOPPER[0]
    others = [
        dataclasses.replace(big, stages=3),
        dataclasses.replace(big, halves=1),
        dataclasses.replace(big, group=4),
        dataclasses.replace(big, group=16),
        Tile(256, 128, 64, warps=8, stages=3, halves=1, persistent=True),
        Tile(128, 128, 64, warps=8, stages=4, persistent=True),
        Tile(128, 128, 128, warps=8, stages=3),
        Tile(64, 256, 64, warps=4, stages=4, persistent=True),
        Tile(64, 256, 64, warps=8, stages=4),
        Tile(64, 128, 64, warps=4, stages=7),
        Tile(64, 64, 64, warps=4, stages=6),
        Tile(64, 64, 256, warps=4, stages=3),
        Tile(64, 32, 128, warps=4, stages=8),
    ]
    for tile in others:
        found[f"{tile.name} w{tile.warps} s{tile.stages} h{tile.halves} g{tile.group} p{int(tile.persistent)}"] = tile
    return found


def compile_one(name: str) -> int:
    """Compile and run one candidate; in a new process, which a compiler that aborts takes down with it."""
    from icm_vllm.batch_invariant import product

    device = gpu()
    a = torch.randn(80, 4096, device=device, dtype=torch.bfloat16)
    w = torch.randn(6144, 4096, device=device, dtype=torch.bfloat16)
    product(a, w.t(), tile=candidates()[name])
    torch.cuda.synchronize()
    return 0


def compile_all(names: list[str]) -> list[str]:
    """Compile side by side into Triton's cache; returns the names of those that compiled and ran."""

    def one(name: str) -> bool:
        command = [sys.executable, __file__, "--compile", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=75, check=False)
        except subprocess.TimeoutExpired:
            print(f"  {name}: still compiling after 75 s, left out", flush=True)
            return False
        if done.returncode:
            print(f"  {name}: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(max(2, min(10, (os.cpu_count() or 2) // 2))) as pool:
        return [name for name, good in zip(names, pool.map(one, names), strict=True) if good]


class Measurements:
    """Results, part by part; failures are kept and do not stop the rest."""

    def __init__(self, seconds: float) -> None:
        self.parts: dict[str, list[dict[str, Any]]] = {}
        self.failures: list[str] = []
        self._end = time.monotonic() + seconds

    @property
    def late(self) -> bool:
        return time.monotonic() > self._end

    def add(self, part: str, **values: Any) -> None:
        self.parts.setdefault(part, []).append(values)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Print a failure and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  one chance on a rented machine: everything else must still run
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            if os.environ.get("TRACE"):
                traceback.print_exc()


def vllm_module() -> Any:
    """vLLM's batch-invariant module, or None."""
    from icm_vllm.patches import BATCH_INVARIANT_MODES

    reason = ""
    for name in BATCH_INVARIANT_MODES:
        try:
            return importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  a broken vLLM counts as none
            reason = f"{type(error).__name__}: {error}"
    print(f"vLLM's kernels are left out: {reason}", flush=True)
    return None


def in_blocks(x: torch.Tensor, w: torch.Tensor, rows: int) -> torch.Tensor:
    """x @ w.T by cuBLAS, in calls that all have `rows` rows, the last one padded."""
    m = x.shape[0]
    padded = -(-m // rows) * rows
    if padded != m:
        x = torch.cat([x, x.new_zeros(padded - m, x.shape[1])])
    y = x.new_empty(padded, w.shape[0])
    for start in range(0, padded, rows):
        torch.mm(x[start : start + rows], w.t(), out=y[start : start + rows])
    return y[:m]


def products(vllm: Any) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Ways to compute x (M, K) @ w (N, K).T."""
    from icm_vllm.batch_invariant import product

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "cuBLAS": lambda x, w: torch.mm(x, w.t()),
        "ours": lambda x, w: product(x, w.t()),
    }
    for rows in CHUNKS:
        ways[f"cuBLAS by {rows} rows"] = partial(in_blocks, rows=rows)
    if vllm is not None:
        ways["vLLM"] = lambda x, w: vllm.matmul_persistent(x, w.t())
    return ways


def tiles_agree(found: Measurements, names: list[str]) -> set[str]:
    """Candidates that give the same bits as the smallest chosen tile by pointers; prints those that do not."""
    from icm_vllm.batch_invariant import agreement, product

    device = gpu()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with found.trying(f"tiles {dtype}"):
            results = agreement(device, dtype)
            differing = [(what, count) for what, count in results if count]
            found.add("tiles", dtype=str(dtype), compared=len(results), differing=differing)
            print(f"tiles, {dtype}: {len(results)} comparisons, {len(differing)} differ {differing[:4]}", flush=True)
    exact = set()
    tiles = candidates()
    smallest = [tile for name, tile in tiles.items() if name.startswith("chosen")][-1]
    a = torch.randn(700, 4096, device=device, dtype=torch.bfloat16)
    w = torch.randn(6144, 4096, device=device, dtype=torch.bfloat16)
    expected = product(a, w.t(), tile=smallest, descriptors=False)
    for name in names:
        with found.trying(f"tile {name}"):
            count = sum(
                int((product(a[:m], w.t(), tile=tiles[name]) != expected[:m]).sum()) for m in (1, 17, 64, 255, 700)
            )
            found.add("candidates", tile=name, differing=count)
            if count:
                print(f"  {name}: {count} elements differ", flush=True)
            else:
                exact.add(name)
    print(f"candidates with the same bits: {len(exact)} of {len(names)}", flush=True)
    return exact


def rows_keep_bits(found: Measurements, ways: dict[str, Callable[..., torch.Tensor]]) -> None:
    """Rows of one large product, computed again among fewer rows, and at other places."""
    device = gpu()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        shapes = SHAPES[:4] if dtype == torch.bfloat16 else ((4096, 4096),)
        for k, n in shapes:
            most = 2048 if dtype != torch.float32 else 512
            x = torch.randn(most, k, device=device, dtype=dtype)
            w = torch.randn(n, k, device=device, dtype=dtype) * k**-0.5
            for way, compute in ways.items():
                with found.trying(f"rows {way} {dtype} {k} {n}"):
                    whole = compute(x, w)
                    worst, parts = 0.0, 0
                    for m in (1, 2, 7, 15, 16, 17, 63, 64, 65, 128, 200, 256, 511, 1024):
                        for start in (0, 1, 37, 300):
                            if start + m > most:
                                continue
                            part = compute(x[start : start + m], w)
                            same = whole[start : start + m]
                            if not torch.equal(part, same):
                                parts += 1
                                worst = max(worst, float((part.float() - same.float()).abs().max()))
                    found.add("rows", way=way, dtype=str(dtype), k=k, n=n, parts_differing=parts, largest=worst)
                    print(f"rows, {way}, {dtype}, {k}x{n}: {parts} parts differ, by {worst:.2e}", flush=True)


def errors(found: Measurements, ways: dict[str, Callable[..., torch.Tensor]]) -> None:
    """Largest and root mean square error against float64, in multiples of the largest exact result."""
    device = gpu()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(256, 4096, device=device, dtype=dtype)
        w = torch.randn(512, 4096, device=device, dtype=dtype)
        exact = x.double() @ w.double().t()
        for way in ("ours", "cuBLAS", "vLLM"):
            if way not in ways:
                continue
            with found.trying(f"error {way} {dtype}"):
                error = (ways[way](x, w).double() - exact).abs() / exact.abs().max()
                largest, rms = float(error.max()), float(error.square().mean().sqrt())
                found.add("errors", way=way, dtype=str(dtype), largest=largest, rms=rms)
                print(f"error of a product, {way}, {dtype}: largest {largest:.2e}, rms {rms:.2e}", flush=True)


def milliseconds(calls: Sequence[Callable[[], Any]], rounds: int = 5) -> float:
    """Median time of one of the calls, recorded as one CUDA graph so that launching costs nothing."""
    calls[0]()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / len(calls))
    del graph
    return statistics.median(times)


def speed(found: Measurements, ways: dict[str, Callable[..., torch.Tensor]], names: list[str], exact: set[str]) -> None:
    """Time of every way, and of every exact candidate, per shape and M; ratio = cuBLAS's time / this time."""
    from icm_vllm.batch_invariant import product

    device = gpu()
    tiles = candidates()
    for k, n in SHAPES:
        copies = max(2, min(8, -(-CACHE // (2 * k * n))))
        weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        for m in ROWS:
            if n == SHAPES[-1][1] and m > VOCABULARY_ROWS:
                continue
            if found.late:
                print("out of time: the rest of the speeds is left out", flush=True)
                return
            x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
            times: dict[str, float] = {}
            for way, compute in ways.items():
                if way.startswith("cuBLAS by") and m > 2048:
                    continue  # hundreds of calls
                with found.trying(f"speed {way} {m} {k} {n}"):
                    times[way] = milliseconds([partial(compute, x, w) for w in weights])
            for name in names:
                rows = tiles[name].rows
                if name not in exact or rows > max(64, 2 * m) or (m >= 2048 and rows * tiles[name].columns < 16384):
                    continue
                with found.trying(f"speed {name} {m} {k} {n}"):
                    calls = [partial(product, x, w.t(), tile=tiles[name]) for w in weights]
                    times[name] = milliseconds(calls, rounds=3)
            base = times.get("cuBLAS", float("nan"))
            for way, time_ in times.items():
                found.add("speed", way=way, m=m, k=k, n=n, milliseconds=time_, ratio=base / time_)
            best = sorted((time_, name) for name, time_ in times.items() if name in exact)[:3]
            rest = " ".join(f"{way} {base / t:.2f}" for way, t in times.items() if way in ways and way != "cuBLAS")
            top = ", ".join(f"{name} {base / time_:.2f}" for time_, name in best)
            print(f"{k}x{n} M={m}: cuBLAS {base:.4f} ms; {rest}; best tiles: {top}", flush=True)
        del weights


def norms(found: Measurements, vllm: Any) -> None:
    """RMS norms with a residual, whose rows vLLM 0.26 computes differently from 256 tokens on; and log-softmax."""
    from icm_vllm.batch_invariant import log_softmax, rms_norm

    device = gpu()
    x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    r = torch.randn_like(x)
    weight = torch.rand(4096, device=device, dtype=torch.bfloat16) + 0.5

    def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return rms_norm(a, weight, 1e-5, b)[0]

    def theirs(a: torch.Tensor, b: torch.Tensor) -> Any:
        return vllm.rms_norm_batch_invariant(a.clone(), weight, 1e-5, residual=b.clone())[0]

    for way, norm in {"ours": ours, "vLLM": theirs}.items():
        if way == "vLLM" and vllm is None:
            continue
        with found.trying(f"norm {way}"):
            whole = norm(x, r)
            differing = {m: int((norm(x[:m], r[:m]) != whole[:m]).any(dim=1).sum()) for m in (1, 16, 64, 255, 256, 999)}
            time_ = milliseconds([partial(norm, x, r)] * 10)
            found.add("norms", way=way, rows_differing=differing, milliseconds=time_)
            print(f"add + RMS norm, {way}: rows that differ by M {differing}, {time_:.4f} ms", flush=True)
    logits = torch.randn(256, 128256, device=device)
    softmaxes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ours": log_softmax,
        "PyTorch": partial(torch.log_softmax, dim=-1),
    }
    for way, compute in softmaxes.items():
        with found.trying(f"log_softmax {way}"):
            whole = compute(logits)
            differing = {m: int((compute(logits[:m]) != whole[:m]).any(dim=1).sum()) for m in (1, 2, 16, 100)}
            error = float((whole.double() - torch.log_softmax(logits.double(), -1)).abs().max())
            time_ = milliseconds([partial(compute, logits)] * 3)
            found.add("log_softmax", way=way, rows_differing=differing, error=error, milliseconds=time_)
            print(f"log_softmax, {way}: differ {differing}, error {error:.1e} nat, {time_:.3f} ms", flush=True)


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--seconds", type=float, default=165.0, help="start no further speed after this long")
    parser.add_argument("--no_sweep", action="store_true", help="measure only the chosen tiles")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 without a GPU."""
    options = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/batch_invariant.py needs an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2
    if options.compile:
        return compile_one(options.compile)
    # vLLM's norms read it when they are first called.
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    start = time.monotonic()
    found = Measurements(options.seconds)
    torch.manual_seed(0)
    names = [name for name in candidates() if name.startswith("chosen") or not options.no_sweep]
    names = compile_all(names)
    print(f"compiled {len(names)} tiles in {time.monotonic() - start:.0f} s", flush=True)
    vllm = vllm_module()
    ways = products(vllm)
    exact: set[str] = set()
    with found.trying("tiles"):
        exact = tiles_agree(found, names)
    with found.trying("norms"):
        norms(found, vllm)
    with found.trying("errors"):
        errors(found, ways)
    with found.trying("rows"):
        rows_keep_bits(found, ways)
    torch.cuda.empty_cache()
    with found.trying("speed"):
        speed(found, ways, names, exact)
    import triton

    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "seconds": round(time.monotonic() - start, 1),
        "failures": found.failures,
        **found.parts,
    }
    print(f"{len(found.failures)} failures, {result['seconds']} s", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
