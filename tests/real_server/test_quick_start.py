"""The processes of a real vLLM server that our launcher started on a CPU (icm_vllm/quick_start.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import SamplingOptions
from core.vllm_server import group_members
from tests.conftest import RunningServer

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]


async def test_the_servers_processes_are_forks_and_use_every_core(vllm_server: RunningServer) -> None:
    if vllm_server.group is None or not (Path(sys.prefix) / "lib" / "libiomp5.so").is_file():
        pytest.skip("a server that somebody else started, or no Intel OpenMP library")
    async with ModelAPI(VLLMClient(vllm_server.url, vllm_server.model), scores=False) as api:
        await api.complete(["So that its threads are there."], SamplingOptions(max_tokens=1))
    names, cores = [], set()
    for pid in group_members(vllm_server.group):
        process = Path(f"/proc/{pid}")
        names.append((process / "comm").read_text().strip())
        assert "multiprocessing.spawn" not in (process / "cmdline").read_text()
        if names[-1] == "VLLM::Worker":
            for thread in (process / "task").iterdir():
                cores |= os.sched_getaffinity(int(thread.name))
    assert {"VLLM::EngineCor", "VLLM::Worker"} <= set(names)
    assert cores == os.sched_getaffinity(0)
