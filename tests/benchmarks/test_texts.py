"""The benchmarks of texts, small, against the fake server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks import cancel, streams
from benchmarks.transformers_vs_vllm import Memory, Stopwatch, ratios, row, workload
from core.settings import Settings
from fakes.text_server import FakeTextServer, Manner


def test_many_streams_are_all_as_they_were_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "r.json"
    assert streams.main(["--streams", "300", "--at_once", "50", "--tokens", "6", "--json", str(told)]) == 0
    result = json.loads(told.read_text())
    assert (result["wrong"], result["events"], result["most_at_once"]) == (0, 300 * (6 + 3), 50)


async def test_a_stream_that_is_not_as_it_was_sent_is_counted() -> None:
    async with FakeTextServer(manner=Manner(cut=lambda event: [event.replace(b" s3x1", b" s3x2")])) as server:
        result = await streams.measure(server.url, 10, 2, 5)
    assert result["wrong"] == 1


async def test_cancelled_streams_are_watched_until_their_slot_is_free() -> None:
    async with FakeTextServer(manner=Manner(delay=0.01)) as server:
        settings = Settings(vllm_base_url=(server.url,))
        result = await cancel.measure(settings, server.model, 7, 2.0, True)
        assert (result["cancelled"], result["free_within_limit"]) == (7, 7)
        assert server.left == 7


async def test_a_slot_that_stays_taken_is_counted() -> None:
    async with FakeTextServer(manner=Manner(delay=0.01)) as server:
        server.streaming = 1  # as if another request hung
        result = await cancel.measure(Settings(vllm_base_url=(server.url,)), server.model, 2, 0.1, False)
    assert result["free_within_limit"] == 0


def test_every_engine_gets_the_same_work() -> None:
    work = workload(50, 64)
    assert work == workload(50, 64)
    assert len({prompt for prompt, _ in work}) == 50
    assert all(16 <= tokens <= 64 for _, tokens in work)


def test_ratios_are_of_equal_numbers_at_once() -> None:
    def engine(rates: dict[str, float]) -> dict[str, object]:
        return {"at_once": {at: {"requests_a_second": rate} for at, rate in rates.items()}}

    engines = {"transformers": engine({"1": 2.0, "8": 4.0}), "vllm": engine({"1": 3.0, "8": 20.0, "64": 9.0})}
    assert ratios(engines) == {"vllm": {"1": 1.5, "8": 5.0}}
    found = row([1.0, 2.0, 6.0], 30, 6.0, 10.0)
    assert (found["requests_a_second"], found["tokens_a_cpu_second"]) == (0.5, 3.0)


def test_memory_is_that_of_a_process_and_its_children() -> None:
    memory = Memory(os.getpid(), gpu=False)
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(1.2)
    assert memory.end()["peak_memory_mib"] > 64
    assert block


def test_cpu_seconds_are_those_of_work_and_not_of_waiting() -> None:
    watch = Stopwatch()
    time.sleep(0.3)
    idle = watch.row([1.0], 1)["cpu_seconds"]
    began = time.process_time()
    while time.process_time() - began < 0.3:
        pass
    assert watch.row([1.0], 1)["cpu_seconds"] - idle >= 0.25
    assert idle < 0.25
