"""Several servers' metrics on one page, against fake servers and the command line."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from contrib.monitoring.relabel import page
from contrib.monitoring.vllm_scrape import Replica, VLLMScraper
from core.settings import Settings
from core.vllm_server import free_port
from fakes.vllm_server import FakeVLLM

REPOSITORY = Path(__file__).resolve().parents[3]
ADDED = {"engine", "engine_version", "pool_id", "replica_id", "model_id"}


def samples_of(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    return [(s.labels, s.value) for f in text_string_to_metric_families(text) for s in f.samples if s.name == name]


async def test_every_sample_says_whose_it_is_and_a_server_that_is_down_hides_no_other() -> None:
    async with FakeVLLM() as first, FakeVLLM(model="other") as second:
        first.queries, first.hits, second.queries = 30, 12, 3
        down = f"http://127.0.0.1:{free_port()}"
        scraper = VLLMScraper(Settings(vllm_base_url=(first.url, second.url, down)), pool_id="p")
        text = await scraper.scrape()
        await scraper.aclose()
    names = [urls.removeprefix("http://") for urls in (first.url, second.url, down)]
    up = {labels["replica_id"]: (value, labels["model_id"]) for labels, value in samples_of(text, "icm_replica_up")}
    assert up == {names[0]: (1, "fake-8b"), names[1]: (1, "other"), names[2]: (0, "")}
    queries = samples_of(text, "vllm:prefix_cache_queries_total")
    assert {labels["exported_engine"] for labels, _ in queries} == {"0", "1"}, "vLLM's own label is kept"
    assert {(labels["replica_id"], labels["engine_version"]) for labels, _ in queries} == {
        (name, "0.26.0+fake") for name in names[:2]
    }
    assert all(labels.keys() >= ADDED and labels["engine"] == "vllm" for labels, _ in queries)
    assert sum(value for labels, value in queries if labels["replica_id"] == names[0]) == 30
    assert text.count("# TYPE vllm:prefix_cache_queries_total counter") == 1, "one family, whoever shows it"


async def test_servers_behind_one_gateway_are_told_apart_by_their_paths() -> None:
    async with FakeVLLM(prefix="/models/one") as server:
        elsewhere = server.url.replace("/models/one", "/models/two")
        scraper = VLLMScraper(Settings(vllm_base_url=(server.url, elsewhere)))
        up = {labels["replica_id"]: value for labels, value in samples_of(await scraper.scrape(), "icm_replica_up")}
        await scraper.aclose()
    host = f"127.0.0.1:{server.port}"
    assert up == {f"{host}/models/one": 1, f"{host}/models/two": 0}


async def test_a_server_started_anew_as_another_is_named_as_it_is() -> None:
    async with FakeVLLM() as server:
        scraper = VLLMScraper(Settings(vllm_base_url=(server.url,)))
        await scraper.scrape()
        server.model = "next"
        [(labels, _)] = samples_of(await scraper.scrape(), "icm_replica_up")
        await scraper.aclose()
    assert labels["model_id"] == "next"


@pytest.mark.parametrize("text", ["", "{}}}", "no number", "vllm:x 1 2 3 4 nonsense\n", 'a{,\x0c="b"} 1\n', None])
def test_a_page_that_cannot_be_read_counts_as_a_server_that_is_down(text: str | None) -> None:
    labels = dict.fromkeys(ADDED, "x")
    good = Replica({**labels, "replica_id": "good"}, 'a_total{engine="0"} 5\n', 0.1)
    merged = page([Replica({**labels, "replica_id": "bad"}, text, 0.1), good])
    assert {of["replica_id"]: value for of, value in samples_of(merged, "icm_replica_up")} == {"bad": 0, "good": 1}
    assert len(samples_of(merged, "a_total")) == 1


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "src.experiments.commands", "metrics", *arguments]


ENVIRONMENT = {**os.environ, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)}


async def test_the_command_serves_until_it_is_stopped() -> None:
    port = free_port()
    async with FakeVLLM() as server:
        process = await asyncio.create_subprocess_exec(
            *command("--url", server.url, "--port", str(port)), env=ENVIRONMENT, stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        assert b"1 of 1 servers" in await process.stdout.readline()
        assert str(port).encode() in await process.stdout.readline()
        taken = await asyncio.create_subprocess_exec(
            *command("--url", server.url, "--port", str(port)),
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        _, told = await taken.communicate()
        assert taken.returncode == 2
        assert b"--port" in told
        answer = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10))
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"icm_replica_up" in answer.read()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0


def test_once_prints_the_page_and_fails_if_nobody_answers() -> None:
    done = subprocess.run(
        command("--once", "--url", "http://127.0.0.1:9"),
        capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert 'replica_id="127.0.0.1:9"} 0.0' in done.stdout


def test_without_the_package_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['prometheus_client'] = sys.modules['prometheus_client.core'] = None\n"
        "from src.experiments.commands import main\n"
        "sys.exit(main(['metrics', '--once', '--url', 'http://127.0.0.1:9']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=REPOSITORY,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: metrics need the package prometheus-client. Install it: pip install 'icm-elicitation[metrics]'\n"
    )
