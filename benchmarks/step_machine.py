"""What a benchmark ran on: hardware, versions, commit. No host names, no paths of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO_ROOT = Path(__file__).resolve().parents[1]


def hardware() -> dict[str, Any]:
    """The client's machine, which is the server's too where the server is local: CPU, cores, memory (GiB), GPUs."""
    cpu = next((line.partition(":")[2].strip() for line in _lines("lscpu") if line.startswith("Model name")), "")
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        memory = None
    return {
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": memory,
        "gpus": _lines("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
    }


def commit() -> str:
    """This repository's commit, with "+changes" where files differ from it; "" where there is no git."""
    head = _lines("git", "-C", str(REPO_ROOT), "rev-parse", "HEAD")
    changed = _lines("git", "-C", str(REPO_ROOT), "status", "--porcelain", "--untracked-files=no")
    return head[0][:12] + ("+changes" if changed else "") if head else ""


def without_folders(options: Sequence[str]) -> list[str]:
    """Command-line words with absolute paths cut to their last part."""
    words = []
    for option in options:
        name, equals, value = option.partition("=")
        words.append(name + equals + _cut(value) if equals else _cut(option))
    return words


def _cut(word: str) -> str:
    return Path(word).name if word.startswith(("/", "~", "./", "../")) else word


def _lines(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
