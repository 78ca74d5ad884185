"""Products of fp8 models: vLLM's Cutlass, the same in its batch-invariant mode, and ours, which chooses among tiles.

    python benchmarks/scaled_products.py --json benchmarks/results/scaled-products.json       # two minutes

Needs one NVIDIA GPU of compute capability 9 and vLLM. The shapes are those of 405B on four GPUs. Milliseconds (median)
with the weights coming from memory; how many rows have other bits among fewer rows; the largest error against float64,
relative to the largest exact result. Each way runs in a new process: vLLM reads its mode once. --sweep also times tiles
that the library does not choose from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import commit, hardware
from core.flags import FlagParser

SHAPES: Final = {"qkv": (16384, 4608), "output": (4096, 16384), "gate and up": (16384, 26624), "down": (13312, 16384)}
"""(K, N) of the linear layers."""

ROWS: Final = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192)
OURS: Final = "ours"
WAYS: Final[dict[str, dict[str, str]]] = {
    "Cutlass": {"VLLM_BATCH_INVARIANT": "0"},
    "Cutlass, batch-invariant": {"VLLM_BATCH_INVARIANT": "1"},
    OURS: {"VLLM_BATCH_INVARIANT": "0"},
}
CACHE: Final = 200 << 20  # bytes of weights to alternate between, so that none is still in the L2 cache


def multiplier(way: str) -> Callable[..., Any]:
    """A function (a, b, scale_a, scale_b) -> c in bfloat16."""
    import torch

    if way == OURS:
        from icm_vllm.batch_invariant import scaled_product

        return scaled_product
    from vllm import _custom_ops

    def by_cutlass(a: Any, b: Any, scale_a: Any, scale_b: Any) -> Any:
        return _custom_ops.cutlass_scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.bfloat16)

    return by_cutlass


def inputs(rows: int, k: int, n: int, copies: int = 1) -> tuple[Any, list[Any], Any, Any]:
    """a, `copies` of b, and the scales: numbers like a model's, scaled to the range of fp8."""
    import torch

    torch.manual_seed(0)
    a = torch.randn(rows, k, device="cuda")
    scale_a = a.abs().amax(1, keepdim=True) / 448
    weights, scale_b = [], torch.full((n, 1), 4.5 * 0.02 / 448, device="cuda")
    for _ in range(copies):
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
        weights.append((w / scale_b.bfloat16()).clamp(-448, 448).to(torch.float8_e4m3fn).t())
    return (a / scale_a).to(torch.float8_e4m3fn), weights, scale_a, scale_b


def milliseconds(call: Callable[[int], Any], repeats: int) -> float:
    """Median of one call; call(i) is the i-th."""
    import torch

    for i in range(3):
        call(i)
    taken: list[float] = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return statistics.median(taken)


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    multiply = multiplier(way)
    found: dict[str, Any] = {"milliseconds": {}, "rows_with_other_bits": {}, "largest_error": {}}
    for name, (k, n) in SHAPES.items():
        a, weights, scale_a, scale_b = inputs(max(ROWS), k, n, copies=max(1, CACHE // (k * n)))
        whole = multiply(a, weights[0], scale_a, scale_b)
        exact = (a[:64].double() * scale_a[:64]) @ (weights[0][:, :512].double() * scale_b[:512].t())
        error = (whole[:64, :512].double() - exact).abs().max() / exact.abs().max()
        found["largest_error"][name] = float(f"{float(error):.2g}")
        found["milliseconds"][name], found["rows_with_other_bits"][name] = {}, {}
        for rows in ROWS:
            x, scale = a[:rows], scale_a[:rows]
            differing = (multiply(x, weights[0], scale, scale_b) != whole[:rows]).any(1).sum()
            found["rows_with_other_bits"][name][rows] = int(differing)

            def call(i: int, x: Any = x, scale: Any = scale, weights: Any = weights, scale_b: Any = scale_b) -> Any:
                return multiply(x, weights[i % len(weights)], scale, scale_b)

            found["milliseconds"][name][rows] = round(milliseconds(call, args.repeats), 4)
    if way == OURS:
        found["tiles"] = tiles(args.repeats, args.sweep)
    return found


def tiles(repeats: int, sweep: bool) -> list[dict[str, Any]]:
    """Milliseconds of each tile by itself for gate and up, and whether its bits are those of the smallest."""
    import torch

    from icm_vllm.batch_invariant.scaled import scaled_product
    from icm_vllm.batch_invariant.tiles import HOPPER_FP8, Tile

    big = HOPPER_FP8[0]
    others = [
        dataclasses.replace(big, halves=1),
        dataclasses.replace(big, group=16),
        dataclasses.replace(big, group=4),
        dataclasses.replace(big, persistent=False),
        Tile(128, 256, 64, warps=8, stages=5, halves=2, persistent=True),
        Tile(256, 128, 128, warps=8, stages=3, persistent=True),
        Tile(128, 128, 128, warps=8, stages=4, persistent=True),
        Tile(128, 128, 128, warps=4, stages=4, persistent=True),
        Tile(128, 128, 128, warps=8, stages=5),
        Tile(64, 256, 128, warps=4, stages=4, persistent=True),
        Tile(64, 128, 256, warps=4, stages=3),
        Tile(64, 64, 128, warps=4, stages=8),
    ]
    k, n = SHAPES["gate and up"]
    a, weights, scale_a, scale_b = inputs(max(ROWS), k, n)
    found = []
    expected = scaled_product(a, weights[0], scale_a, scale_b, tile=HOPPER_FP8[-1])
    for tile in [HOPPER_FP8[-1], *HOPPER_FP8[:-1], *(others if sweep else [])]:
        row: dict[str, Any] = {"tile": dataclasses.asdict(tile)}
        try:
            for rows in (64, 256, 1024, 8192):
                x, scale = a[:rows], scale_a[:rows]
                y = scaled_product(x, weights[0], scale, scale_b, tile=tile)
                row[f"differing_{rows}"] = int((y != expected[:rows]).sum())

                def call(i: int, x: Any = x, scale: Any = scale, tile: Tile = tile) -> Any:
                    return scaled_product(x, weights[0], scale, scale_b, tile=tile)

                row[f"milliseconds_{rows}"] = round(milliseconds(call, max(5, repeats // 3)), 4)
        except Exception as error:  # noqa: BLE001 - a tile that does not fit this GPU must not stop the others
            row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            torch.cuda.synchronize()
        print(json.dumps(row), file=sys.stderr, flush=True)
        found.append(row)
    return found


def table(ways: dict[str, Any]) -> str:
    """Milliseconds of each way, and how many rows had other bits."""
    lines = [f"{'layer':12}{'rows':>6}" + "".join(f"{way:>26}" for way in ways)]
    for name in SHAPES:
        for rows in ROWS:
            times = [found["milliseconds"][name][str(rows)] for found in ways.values()]
            differing = [found["rows_with_other_bits"][name][str(rows)] for found in ways.values()]
            cells = [f"{time:.3f} ({count} differ)" for time, count in zip(times, differing, strict=True)]
            lines.append(f"{name:12}{rows:>6}" + "".join(f"{cell:>26}" for cell in cells))
    lines += [
        f"error {name}: " + ", ".join(f"{w} {f['largest_error'][name]}" for w, f in ways.items()) for name in SHAPES
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit code 1 if a way failed, 2 without a GPU."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--inside", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/scaled_products.py needs an NVIDIA GPU, and there is none here", file=sys.stderr)
        return 2
    if torch.cuda.get_device_capability()[0] != 9:
        print("benchmarks/scaled_products.py needs a GPU of compute capability 9 (Hopper)", file=sys.stderr)
        return 2
    if args.inside:
        print("RESULT " + json.dumps(measure(args.inside, args)))
        return 0
    ways: dict[str, Any] = {}
    for way, environment in WAYS.items():
        print(f"{way} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--inside", way, "--repeats", str(args.repeats)]
        done = subprocess.run(
            [*command, *(["--sweep"] if args.sweep else [])],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            print(f"error: {way} failed with exit code {done.returncode}", file=sys.stderr)
            continue
        ways[way] = json.loads(lines[-1].removeprefix("RESULT "))
    print(table(ways))
    if args.json is not None:
        result = {"machine": hardware(), "commit": commit(), "ways": ways}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if len(ways) == len(WAYS) else 1


if __name__ == "__main__":
    sys.exit(main())
