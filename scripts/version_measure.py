"""Measure the vLLM of this environment: patches, start, smoke check, determinism check, token counts of a step.

Each is measured by the command that users have for it, in a process of its own; scripts/versions.py keeps the result.
"""

from __future__ import annotations

import asyncio
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import orjson

from benchmarks.step_machine import commit, hardware
from benchmarks.step_report import middle, read_json
from core.errors import APIError
from core.llm_api.types import EngineIdentity
from core.settings import Settings
from core.vllm_server import ServerFailed, VLLMServer
from scripts.test_determinism import server_engine
from scripts.version_environment import not_as_locked
from scripts.version_rows import SHOWN_SIZE, Determinism, PatchRow, Row, SmokeCheck, Start, Tokens

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
SHORT: Final = ("--prompts", "4", "--seconds", "120")
"""How the determinism check is cut short on a CPU; a GPU makes the whole quick one."""
STEP: Final = ("--quick", "--claim_tokens", "12", "--cases", "c", "d", "e")
"""What of a step is counted: not upstream's order, which takes longer than all else."""
LIMIT: Final = 1800.0
"""Seconds after which a check is stopped; none takes that long."""
_WARNED: Final = re.compile(r"\b(this vLLM(?:'s)? .+)$", re.MULTILINE)
"""How every warning of our plugin begins where vLLM lacks something."""
_CAUSE: Final = re.compile(
    r"^\s*(?:\(.*?\)\s*)*(?:\S+ \S+ \S+ \[\S+\]\s*)?((?:\w+\.)*\w*(?:Error|Exception): .+)$", re.M
)


_REFUSED: Final = re.compile(r"^ *(launch_vllm_server: (?!\w+, because ).+)$", re.MULTILINE)
"""Why the launcher started nothing; what it says first, the type it chose and why, is not that."""


class NotMeasurable(Exception):
    """This environment cannot be measured; one line for a user."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """The vLLM of this environment and our patches in it."""

    version: str
    package: str
    device: str
    patches: list[PatchRow]


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers. url: without /v1."""

    url: str
    start: Start


def measure(*, model: str, url: str | None, options: Sequence[str], log: Path | None) -> Row:
    """A row for this environment. url: of a running server; else one is started with `model`, a folder or the name of
    one in models/, and vLLM's `options`. log: of the running server, for the warnings in it, or where that of a started
    one is kept.

    Raises NotMeasurable without vLLM, or with a server of another version. A check that fails is part of the row.
    """
    vllm = look()
    print(f"vLLM {vllm.version} on a {vllm.device}: {_count(vllm)}", file=sys.stderr, flush=True)
    row = Row(
        vllm=vllm.version,
        package=vllm.package,
        device="cpu" if vllm.device == "cpu" else "gpu",
        hardware=_hardware(vllm.device),
        python=platform.python_version(),
        torch=_version("torch"),
        triton=_version("triton"),
        transformers=_version("transformers"),
        changed=not_as_locked() if vllm.device == "cpu" else {},
        model=Path(model).name,
        dtype="",
        date=time.strftime("%Y-%m-%d"),
        commit=commit(),
        patches=vllm.patches,
        start=Start(),
    )
    try:
        with _running(vllm, url, model, options, log) as served:
            identity = asyncio.run(_identity(served.url))
            if identity.version.partition("+")[0] != vllm.version:
                raise NotMeasurable(
                    f"{served.url} runs vLLM {identity.version or 'of unknown version'}, but this environment has "
                    f"{vllm.version}: run this with the server's own Python"
                )
            return row.model_copy(
                update={
                    "start": served.start,
                    "model": identity.model,
                    "dtype": identity.dtype,
                    "smoke": _smoke(served.url),
                    "determinism": _determinism(served.url, vllm.device),
                    "tokens": _tokens(served.url, identity.model),
                }
            )
    except ServerFailed as error:
        if refused := _REFUSED.search(str(error)):  # nothing that the version can be blamed for
            raise NotMeasurable(refused[1]) from error
        print(f"error: {error}", file=sys.stderr)
        return row.model_copy(update={"start": Start(error=_cause(str(error)))})
    except APIError as error:
        raise NotMeasurable(str(error)) from error


def look() -> Vllm:
    """The vLLM of this environment. In a process of its own: importing vLLM changes much. Raises NotMeasurable."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "patches.json"
        done = subprocess.run(
            [sys.executable, "-m", "icm_vllm.patches", "--json", str(found)],
            cwd=REPO_ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        if not found.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
            raise NotMeasurable(f"{sys.executable} -m icm_vllm.patches: {lines[-1]}")
        document: dict[str, Any] = json.loads(found.read_bytes())
    patches = [PatchRow.model_validate(row) for row in document["patches"]]
    # Without the build: 0.33.0 of 0.33.0+cu130.
    return Vllm(document["vllm"].partition("+")[0], document["package"], document["device"], patches)


@contextmanager
def _running(vllm: Vllm, url: str | None, model: str, options: Sequence[str], log: Path | None) -> Iterator[Served]:
    """The server at `url`, or one that is started for this block. Raises ServerFailed."""
    if url is not None:
        yield Served(url.rstrip("/").removesuffix("/v1"), Start(said=_said(log)))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "vllm.log"
        log.unlink(missing_ok=True)
        begun = time.monotonic()
        size = "local" if vllm.device == "cpu" else _place(model)
        with VLLMServer(size=size, model=model, options=tuple(options), log=log) as server:
            yield Served(server.url, Start(seconds=round(time.monotonic() - begun, 1), said=_said(log)))


def _place(model: str) -> str:
    """What launch_vllm_server.sh takes on a GPU: a folder, the name of one in models/, a size, or an id."""
    own = REPO_ROOT / "models" / model
    return str(own) if "/" not in model and own.is_dir() else model


async def _identity(url: str) -> EngineIdentity:
    async with server_engine(url, None, Settings.load({"vllm_base_url": url})) as engine:
        return engine.identity


def _smoke(url: str) -> list[SmokeCheck]:
    done = _call("scripts/test_vllm_server.py", "--url", url, "--json", output=True)
    try:
        checks = json.loads(done.stdout)
    except ValueError:
        return [SmokeCheck(name="answers", passed=False, found=_last_line(done))]
    # The address says nothing of a version; nor does what was found where a check passed.
    found = [
        SmokeCheck(name=c["name"], passed=c["passed"], found=c["found"].replace(url, "the server")) for c in checks
    ]
    for check in found:
        print(f"{'pass' if check.passed else 'FAIL'}  {check.name:<20} {check.found}", flush=True)
    return found


def _determinism(url: str, device: str) -> Determinism:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        short = SHORT if device == "cpu" else ()
        done = _call(
            "scripts/test_determinism.py", "--url", url, "--quick", *short, "--runs_dir", folder, "--json", str(path)
        )
        if not path.is_file():
            return Determinism(error=_last_line(done))
        rows = json.loads(path.read_bytes())["rows"]
        (record,) = (Path(folder) / "determinism").glob("*.json")
        not_reached = orjson.loads(record.read_bytes())["not_reached"]
    return determinism_of(rows, not_reached)


def determinism_of(rows: Sequence[dict[str, Any]], not_reached: Sequence[str]) -> Determinism:
    """From the rows of test_determinism.py --json."""
    differing = [row for row in rows if row["compared"]["differing"]]
    largest = [row["compared"]["largest"] for row in differing]
    return Determinism(
        prompts=rows[1]["compared"]["prompts"] if len(rows) > 1 else 0,  # the first row repeats one prompt
        rows=len(rows),
        differing=[row["name"] for row in differing],
        largest=None if None in largest else max(largest, default=0.0),
        not_reached=list(not_reached),
    )


def _tokens(url: str, model: str) -> Tokens:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        done = _call("benchmarks/step.py", "--server", url, "--model", model, *STEP, "--json", str(path))
        if done.returncode not in (0, 1) or not path.is_file():
            return Tokens(error=_last_line(done))
        report = read_json(path)
    computed = {}
    for entry in report.cases:
        value = middle(entry, lambda repetition: repetition.computed_tokens) if entry.size == SHOWN_SIZE else None
        if value is not None:
            computed[entry.case] = round(value)
    return Tokens(
        bounds=len(report.checks),
        violated=[f"{c.name} ({c.value:g} > {c.bound:g})" for c in report.checks if not c.holds],
        computed=computed,
        block=report.block_tokens,
    )


def _call(script: str, *arguments: str, output: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command of this repository with this Python; what it prints is shown, or returned with `output`."""
    command = [sys.executable, str(REPO_ROOT / script), *arguments]
    out = subprocess.PIPE if output else None
    try:
        return subprocess.run(command, cwd=REPO_ROOT, stdout=out, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    script = Path(done.args[1]).name
    if done.returncode == 124:
        return f"{script} did not end within {LIMIT:.0f} s"
    return f"{script} ended with exit code {done.returncode}"


def _said(log: Path | None) -> list[str]:
    """What our plugin warned of in a server's log, each once."""
    if log is None or not log.is_file():
        return []
    return list(dict.fromkeys(_WARNED.findall(log.read_text(encoding="utf-8", errors="replace"))))


def _cause(message: str) -> str:
    """The line of a failed start that names what was raised; else its first line."""
    found: list[str] = _CAUSE.findall(message)
    return found[0].strip() if found else message.splitlines()[0]


def _count(vllm: Vllm) -> str:
    ours = [patch for patch in vllm.patches if patch.device in ("any", vllm.device)]
    return f"{sum(patch.state == 'has' for patch in ours)} of {len(ours)} names that are replaced are there"


def _hardware(device: str) -> str:
    machine = hardware()
    gpus: list[str] = machine["gpus"]
    return gpus[0] if device == "gpu" and gpus else f"{machine['cores']} cores, {machine['cpu']}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
