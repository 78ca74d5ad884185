"""What a CPU server leaves out when it starts: against stand-ins for vLLM's modules, and in the real ones."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from icm_vllm import quick_start
from icm_vllm.quick_start import METHOD

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Modules with what is replaced; `did` says what of it was called."""
    did: list[object] = []

    class CpuPlatform:
        @classmethod
        def check_and_update_config(cls, config: SimpleNamespace) -> None:
            did.append((cls.__name__, config.name))
            os.environ[METHOD] = "spawn"

    class OnlineRenderer:
        def warmup(self) -> None:
            did.append("warmed up")

    modules = {
        "vllm.platforms.cpu": {"CpuPlatform": CpuPlatform},
        "vllm.tokenizers.registry": {"cached_tokenizer_from_config": lambda model: did.append(f"read {model}")},
        "vllm.renderers.hf": {"maybe_make_thread_pool": lambda tokenizer, copies=1: did.append((tokenizer, copies))},
        "vllm.renderers.online_renderer": {"OnlineRenderer": OnlineRenderer},
    }
    made = {}
    for name, content in modules.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content, did=did)
        monkeypatch.setitem(sys.modules, name, made[name])
    monkeypatch.setenv(METHOD, "")
    monkeypatch.setenv("LD_PRELOAD", "/somewhere/libiomp5.so")
    monkeypatch.setattr(quick_start, "_end_with_parent", lambda: did.append("forks end with their parent"))
    return made


def test_processes_are_forked_with_the_tokenizer_already_read(vllm: dict[str, ModuleType]) -> None:
    quick_start.install()
    quick_start.install()
    platform, did = vllm["vllm.platforms.cpu"].CpuPlatform, vllm["vllm.platforms.cpu"].did
    for caller in (platform, platform()):  # vLLM asks an instance
        did.clear()
        caller.check_and_update_config(SimpleNamespace(name="config", model_config="model"))
        assert did == [("CpuPlatform", "config"), "forks end with their parent", "read model"]
        assert os.environ[METHOD] == "fork"
    did.clear()
    platform.check_and_update_config(SimpleNamespace(name="none", model_config=None))
    assert did == [("CpuPlatform", "none"), "forks end with their parent"]


@pytest.mark.parametrize("preloaded", ["", "/usr/lib/libjemalloc.so"])
def test_without_intels_openmp_nothing_is_forked(
    vllm: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, preloaded: str
) -> None:
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    quick_start.install()
    vllm["vllm.platforms.cpu"].CpuPlatform.check_and_update_config(SimpleNamespace(name="c", model_config="m"))
    assert vllm["vllm.platforms.cpu"].did == [("CpuPlatform", "c")]
    assert os.environ[METHOD] == "spawn"
    vllm["vllm.renderers.hf"].maybe_make_thread_pool("tokenizer", 2)
    assert vllm["vllm.renderers.hf"].did[-1] == ("tokenizer", 1)


PARENT = """
import os, sys, time
from icm_vllm.quick_start import _end_with_parent
_end_with_parent()
if os.fork() == 0:
    if os.fork() == 0:
        print(os.getpid(), os.getppid(), flush=True)
    time.sleep(60)
time.sleep(60)
"""


def test_forks_end_when_their_parent_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        forks = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(forks) == 2
        parent.kill()
        deadline = time.monotonic() + 20
        while any(map(_alive, forks)):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_tokenizer_is_copied_once_and_no_chat_template_is_looked_for(vllm: dict[str, ModuleType]) -> None:
    quick_start.install()
    did = vllm["vllm.renderers.hf"].did
    vllm["vllm.renderers.hf"].maybe_make_thread_pool("tokenizer", 2)
    vllm["vllm.renderers.online_renderer"].OnlineRenderer().warmup()
    assert did == [("tokenizer", 1)]


def test_a_vllm_that_lacks_a_part_starts_without_it(
    vllm: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(vllm["vllm.renderers.hf"], "maybe_make_thread_pool")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level("WARNING"):
        quick_start.install()
    assert [record.getMessage() for record in caplog.records] == [
        "this vLLM has no place for quick_start's copy_tokenizer_once: module 'vllm.renderers.hf' has no attribute "
        "'maybe_make_thread_pool'"
    ]
    assert vllm["vllm.platforms.cpu"].CpuPlatform.check_and_update_config.quick_start


PROGRAM = """
import os
os.environ["ICM_QUICK_START"], os.environ["LD_PRELOAD"] = "1", "libiomp5.so"
from icm_vllm.plugin import register
register(); register()
from vllm.platforms.cpu import CpuPlatform
from vllm.renderers import hf
from vllm.renderers.online_renderer import OnlineRenderer
for replaced in (CpuPlatform.check_and_update_config, hf.maybe_make_thread_pool, OnlineRenderer.warmup):
    assert replaced.quick_start and not hasattr(replaced.__wrapped__, "quick_start"), replaced
print("all parts are in place")
"""


@pytest.mark.real_server
def test_the_vllm_of_the_lock_has_every_part() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all parts are in place\n")
    assert "has no place for" not in done.stderr
