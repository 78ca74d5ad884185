"""scripts/as_avx2.sh: a command runs as on a CPU that has AVX2 and nothing newer."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "as_avx2.sh"

TYPE = "from core.cpu import fast_type; print(fast_type())"
TORCH = """
import torch
print(torch.backends.cpu.get_cpu_capability())
print(*(getattr(torch.cpu, name)() for name in dir(torch.cpu) if name.startswith("_is_") and name.endswith("_supported")
        and name != "_is_avx2_supported"))
print(torch.cpu.__name__, torch.cpu._is_avx2_supported())
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_fast_type_there_is_float32() -> None:
    done = run(sys.executable, "-c", TYPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("float32, because ")


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch (make setup-local)")
def test_pytorch_finds_nothing_newer() -> None:
    done = run(sys.executable, "-c", TORCH)
    assert done.returncode == 0, done.stderr
    capability, newer, avx2 = done.stdout.splitlines()
    assert capability in ("AVX2", "DEFAULT")
    assert set(newer.split()) == {"False"}
    assert avx2.startswith("torch.cpu ")


def test_the_exit_code_is_the_commands_and_without_one_it_explains_itself() -> None:
    assert run(sys.executable, "-c", "import sys; sys.exit(7)").returncode == 7
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Run a command as if this CPU had AVX2 and nothing newer")
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "as_avx2: give a command to run; --help says more\n"
