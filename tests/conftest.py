"""The one real vLLM server that all tests marked real_server share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import settings

from core.vllm_server import VLLMServer, is_healthy

# A busy machine is slow: how long an example takes is no property of the code. The same code passes or fails the same
# tests each time; to look for examples that were never tried, pytest --hypothesis-profile=new-examples.
settings.register_profile("new-examples", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO_ROOT = Path(__file__).resolve().parents[1]
MODEL = os.environ.get("ICM_TEST_MODEL", "gemma-3-270m")


@dataclass(frozen=True)
class RunningServer:
    """Base URL, without /v1, the name of the served model, and the server's process group if it was started here."""

    url: str
    model: str
    group: int | None = None


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A local vLLM server, started once a session; or the one at ICM_TEST_SERVER, left running."""
    running = os.environ.get("ICM_TEST_SERVER")
    if running:
        url = running.rstrip("/").removesuffix("/v1")
        assert is_healthy(url), f"ICM_TEST_SERVER={running} does not answer"
        yield RunningServer(url, MODEL)
        return
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with VLLMServer(model=MODEL, log=log) as server:
        yield RunningServer(server.url, server.model, server.pid)


def stand_in_platform(monkeypatch: pytest.MonkeyPatch, *, cpu: bool) -> None:
    """Let vLLM be one for a CPU or a GPU, in an environment that says nothing of batch invariance."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in ("VLLM_BATCH_INVARIANT", "ICM_BATCH_INVARIANT"):
        monkeypatch.setenv(name, "")  # so that what the engine sets is undone after the test
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that shares the real server may be the one that waits for its start; it gets the time for that."""
    for item in items:
        if item.get_closest_marker("real_server") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
