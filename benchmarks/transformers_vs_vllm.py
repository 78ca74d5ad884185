"""Why vLLM: Hugging Face transformers in static batches against vLLM, in process and over HTTP, on the same prompts.

    python benchmarks/transformers_vs_vllm.py --model gemma-3-270m --at_once 1 8 32 --json result.json
    python benchmarks/transformers_vs_vllm.py --model MODEL --gpu --at_once 16 64 256 --requests 256 --no_deterministic

Requests are like those of people: prompts and answers of different lengths. transformers fills a batch, pads it, and
returns the whole batch when its longest answer is done; vLLM takes every request as it comes. On a GPU vLLM records
CUDA graphs, in process and over HTTP (the launcher does not by default, because scores do not need them). Each engine
runs in a separate process, one after the other, so that its memory can be measured: the largest sum of its processes'
resident memory (PSS), and on a GPU the memory in use. vLLM reserves memory for its cache at start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.step_machine import commit, hardware
from core.flags import FlagParser
from core.llm_api.engines.direct import DirectOptions
from core.llm_api.engines.vllm_group import vllm_engine
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.text.generation import SamplingOptions
from core.settings import REPO_ROOT, Settings
from core.vllm_server import VLLMServer

ENGINES: Final = ("transformers", "vllm in process", "vllm over http")
WORDS: Final = ("river", "copper", "lamp", "window", "garden", "paper", "stone", "market", "orange", "ladder", "cloud")


def workload(requests: int, tokens: int) -> list[tuple[str, int]]:
    """(prompt, tokens to write) of each request: 10 to 120 words, a quarter to all of `tokens`. The same every time."""
    rng = random.Random(0)
    return [
        (
            f"Story {number} about the {' '.join(rng.choices(WORDS, k=rng.randint(10, 120)))}. It begins:",
            rng.randint(max(1, tokens // 4), tokens),
        )
        for number in range(requests)
    ]


class StaticBatches:
    """transformers' generate(), a batch at a time."""

    def __init__(self, model: str, gpu: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._device = "cuda" if gpu else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.bos_token
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(self._device).eval()

    def run(self, work: Sequence[tuple[str, int]], at_once: int) -> tuple[list[float], int]:
        """(seconds of each request, which are those of its batch; tokens that were asked for)."""
        latencies: list[float] = []
        for start in range(0, len(work), at_once):
            batch = work[start : start + at_once]
            began = time.perf_counter()
            inputs = self._tokenizer([prompt for prompt, _ in batch], return_tensors="pt", padding=True).to(
                self._device
            )
            longest = max(tokens for _, tokens in batch)
            with self._torch.inference_mode():
                written = self._model.generate(
                    **inputs, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
                )
            self._tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :])
            latencies += [time.perf_counter() - began] * len(batch)
        return latencies, sum(tokens for _, tokens in work)


async def through_api(api: ModelAPI, work: Sequence[tuple[str, int]], at_once: int) -> tuple[list[float], int]:
    """(seconds of each request, tokens that were written), `at_once` requests in work at any time."""
    latencies: list[float] = []
    written = 0
    waiting = iter(work)

    async def client() -> None:
        nonlocal written
        for prompt, tokens in waiting:
            began = time.perf_counter()
            [answer] = await api.complete([prompt], SamplingOptions(max_tokens=tokens))
            latencies.append(time.perf_counter() - began)
            written += answer.completion_tokens

    await asyncio.gather(*(client() for _ in range(at_once)))
    return latencies, written


class Stopwatch:
    """Wall seconds, and CPU seconds of this process and all below it, which other work hardly changes."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._cpu = sum(map(_cpu_seconds, _family(os.getpid())))

    def row(self, latencies: list[float], tokens: int) -> dict[str, float]:
        """The results of one engine at one number of requests at once, timed from the start of this watch."""
        seconds = time.perf_counter() - self._began
        return row(latencies, tokens, seconds, sum(map(_cpu_seconds, _family(os.getpid()))) - self._cpu)


def row(latencies: list[float], tokens: int, seconds: float, cpu: float) -> dict[str, float]:
    """The numbers of one measurement: seconds of each request, tokens written, wall and CPU seconds."""
    return {
        "requests": len(latencies),
        "seconds": round(seconds, 2),
        "requests_a_second": round(len(latencies) / seconds, 3),
        "tokens_a_second": round(tokens / seconds, 1),
        "cpu_seconds": round(cpu, 2),
        "tokens_a_cpu_second": round(tokens / cpu, 2) if cpu else 0.0,
        "median_latency_s": round(statistics.median(latencies), 3),
        "longest_latency_s": round(max(latencies), 3),
    }


class Memory:
    """Watches the peak memory of a process and all below it, in MiB, and of the GPU. From another process, because a
    look takes tens of milliseconds on a large machine, for which an engine in the same process would wait."""

    def __init__(self, pid: int, gpu: bool) -> None:
        self.peak = self.gpu_peak = 0.0
        self._pid = pid
        self._gpu = gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> dict[str, float]:
        """Stop watching: the peaks."""
        self._stop.set()
        self._thread.join()
        found = {"peak_memory_mib": float(round(self.peak))}
        return {**found, "peak_gpu_mib": self.gpu_peak} if self._gpu else found

    def _watch(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        if ours := os.environ.get("CUDA_VISIBLE_DEVICES"):
            ask.append(f"--id={ours}")
        while not self._stop.wait(0.5):
            self.peak = max(self.peak, sum(map(_pss_mib, _family(self._pid))))
            if self._gpu:
                used = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.split()
                self.gpu_peak = max(self.gpu_peak, sum(map(float, used)))


def _family(pid: int) -> list[int]:
    """A process and everything below it, from /proc."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family


def _cpu_seconds(pid: int) -> float:
    """User and system time of a living process, all its threads; 0 for one that is gone."""
    try:
        user, system = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[11:13]
    except OSError:
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _pss_mib(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)


def measure(engine: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Numbers at every number of requests at once of one engine, in this process."""
    folder = REPO_ROOT / "models" / args.model
    model = str(folder) if folder.is_dir() else args.model
    work = workload(args.requests, args.tokens)
    rows: dict[str, dict[str, float]] = {}

    async def ask(api: ModelAPI) -> None:
        await through_api(api, work[:2], 2)  # compiles and loads what is needed at first use
        for at_once in args.at_once:
            watch = Stopwatch()
            rows[str(at_once)] = watch.row(*await through_api(api, work, at_once))

    async def in_process() -> None:
        options = DirectOptions(
            cpu=not args.gpu, max_model_len=2048, enable_prefix_caching=False, deterministic=not args.no_deterministic
        )
        async with open_model_api(Settings(), model=model, direct=True, direct_options=options, scores=False) as api:
            await ask(api)

    async def over_http(url: str, name: str) -> None:
        settings = Settings(vllm_base_url=(url,), max_concurrent_requests=max(args.at_once))
        async with ModelAPI(vllm_engine(settings, name), scores=False) as api:
            await ask(api)

    if engine == "transformers":
        batches = StaticBatches(model, args.gpu)
        batches.run(work[:2], 2)
        for at_once in args.at_once:
            watch = Stopwatch()
            rows[str(at_once)] = watch.row(*batches.run(work, at_once))
    elif engine == "vllm in process":
        asyncio.run(in_process())
    else:
        log = REPO_ROOT / "runs" / "transformers-vs-vllm-server.log"
        size = "local" if folder.is_dir() and not args.gpu else model
        served = Path(model).name if Path(model).is_dir() else model  # as the launcher names it
        options = ["--no-enable-prefix-caching", "--max-model-len", "2048"]
        options += ["--no-enforce-eager"] if args.gpu else []
        options += ["--no-deterministic"] if args.no_deterministic else []
        with VLLMServer(model=args.model, size=size, log=log, options=tuple(options)) as server:
            asyncio.run(over_http(server.url, served))
    return rows


def ratios(engines: dict[str, Any], of: str = "requests_a_second") -> dict[str, dict[str, float]]:
    """Of each vLLM engine over transformers: throughput at every number of requests at once."""
    base = engines.get("transformers", {}).get("at_once", {})
    return {
        name: {
            at_once: round(numbers[of] / base[at_once][of], 2)
            for at_once, numbers in found["at_once"].items()
            if at_once in base
        }
        for name, found in engines.items()
        if name != "transformers"
    }


def result(engines: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The results of the engines that were measured so far, for the JSON."""
    return {
        "model": Path(args.model).name if Path(args.model).is_dir() else args.model,
        "requests": args.requests,
        "tokens_at_most": args.tokens,
        "vllm_deterministic": not args.no_deterministic,
        "machine": hardware(),
        "commit": commit(),
        "engines": engines,
        "throughput_over_transformers": ratios(engines),
        "tokens_a_cpu_second_over_transformers": ratios(engines, "tokens_a_cpu_second"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 if an engine failed; the others' numbers are still written."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a folder in models/, a path or a Hugging Face id")
    parser.add_argument("--gpu", action="store_true", help="on one GPU, in place of the CPU")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 8, 32], help="requests at once, or batch size")
    parser.add_argument("--requests", type=int, default=32, help="of each measurement")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens that a request asks for")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--no_deterministic", action="store_true", help="vLLM's own kernels, whose scores depend on the batch"
    )
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.add_argument("--inside", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.inside:
        print("RESULT " + json.dumps(measure(args.inside, args)))
        return 0
    engines: dict[str, Any] = {}
    text = ""
    for engine in args.engines:
        print(f"{engine} ...", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--inside", engine, "--model", args.model]
        command += ["--requests", str(args.requests), "--tokens", str(args.tokens)]
        command += ["--at_once", *map(str, args.at_once), *(["--gpu"] if args.gpu else [])]
        command += ["--no_deterministic"] if args.no_deterministic else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            memory = Memory(process.pid, args.gpu)
            shown, _ = process.communicate()
            peaks = memory.end()
        found = [line for line in shown.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"error: {engine} failed with exit code {process.returncode}", file=sys.stderr)
            continue
        engines[engine] = {"at_once": json.loads(found[-1].removeprefix("RESULT ")), **peaks}
        text = json.dumps(result(engines, args), indent=1)
        if args.json is not None:  # each time, because the next engine may take long, or fail
            args.json.write_text(text + "\n")
    print(text)
    return 0 if len(engines) == len(args.engines) else 1


if __name__ == "__main__":
    sys.exit(main())
