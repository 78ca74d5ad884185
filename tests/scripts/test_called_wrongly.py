"""Scripts that a reader of the docs runs: with a Python that has none of the project's packages, and called wrongly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "benchmarks/asking.py",
    "benchmarks/engine_rows.py",
    "benchmarks/step.py",
    "scripts/claims_from_choices.py",
    "scripts/finetune_rounds.py",
    "scripts/test_determinism.py",
    "scripts/test_vllm_server.py",
    "scripts/versions.py",
    "scripts/with_server.py",
    "src/experiments/ICM.py",
)

HAND_ON = {"benchmarks/asking.py"}
"""Flags that they do not know are those of `icm label`."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_says_which_python_to_take(script: str, tmp_path: Path) -> None:
    # -S: without site-packages, as before `source .venv/bin/activate`.
    command = [sys.executable, "-I", "-S", str(REPOSITORY / script), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable} has no package ")
    assert line.endswith("/.venv/bin/activate")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in HAND_ON])
def test_a_flag_that_there_is_not_is_told_in_one_line(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / script), "--no-such-flag-at-all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
