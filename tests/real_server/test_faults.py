"""Faults on the way to a real vLLM server: a few of those that `python -m tests.faults.campaign --real 20` plays."""

from __future__ import annotations

import pytest

from tests.conftest import RunningServer
from tests.faults.campaign import real_campaign
from tests.faults.world import RealWorld

pytestmark = [pytest.mark.real_server, pytest.mark.timeout(900)]


def test_faulted_runs_end_as_undisturbed_ones(vllm_server: RunningServer) -> None:
    with RealWorld(vllm_server.url, vllm_server.model, claims=12) as world:
        report = real_campaign(world, 3, seed=3)
    assert not report.failures
    assert sum(report.by_kind.values()) >= 3
