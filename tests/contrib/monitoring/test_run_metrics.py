"""A search's metrics while it runs, and that the dashboard asks for nothing that does not exist."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from contrib.monitoring.client_metrics import ClientMetrics
from contrib.monitoring.relabel import page
from contrib.monitoring.run_metrics import RunMetrics
from contrib.monitoring.vllm_scrape import Replica, build_parser
from core.errors import ConfigurationError
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from core.vllm_server import free_port
from fakes.vllm_server import FakeVLLM
from scripts.render_dashboard import DASHBOARD, Line, Panel, draw, read_panels, without_variables
from src.icm.searches import search_named
from src.icm.searches.seam import Standing
from tests.icm.searches.answers import Lines, Model, make_problem

REPOSITORY = Path(__file__).resolve().parents[3]
NAMES_OF_VLLM = Path(__file__).with_name("vllm-0.32-metric-names.txt")
POOL = 8


def samples(text: str) -> dict[str, float]:
    """By name and the values of its labels other than the run's and the client's own."""
    own = ("run", "engine", "engine_version", "pool_id", "model_id", "server")
    return {
        " ".join([s.name, *(value for name, value in s.labels.items() if name not in own)]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


async def test_a_run_shows_itself_while_it_searches_and_no_longer(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    async with FakeVLLM() as server:
        server.latency = 0.01
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "src.experiments.commands", "label", "--testbed", "builtin", "--batch_size",
            str(POOL), "--num_seed", "2", "--model", server.model, "--runs_dir", str(tmp_path), "--run", "mine",
            "--K", "60",
            "--stop", "K", "--quiet", "--metrics_port", str(port), cwd=REPOSITORY,
            env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)},
            stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        pages: list[dict[str, float]] = []
        while process.returncode is None:
            with suppress(OSError):
                pages.append(samples((await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()))
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 0.05)
        assert process.returncode == 0
    assert pages, "it was never seen"
    last = pages[-1]
    iterations = sum(last[f"icm_run_iterations_total {decision}"] for decision in ("accepted", "rejected", "unchanged"))
    assert 0 < iterations <= 60
    assert last["icm_run_step_seconds_count"] == iterations
    assert last["icm_run_pool_size"] == POOL
    assert 2 <= last["icm_run_labelled"] <= POOL
    assert "icm_run_utility" in last
    assert 0 <= last["icm_run_acceptance"] <= 1
    assert last["icm_run_tokens_total cached"] + last["icm_run_tokens_total computed"] > 0
    assert last["icm_client_prompts_total engine"] > 0
    assert [p["icm_run_iteration"] for p in pages if "icm_run_iteration" in p] == sorted(
        p["icm_run_iteration"] for p in pages if "icm_run_iteration" in p
    )
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(urllib.request.urlopen, url)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("False", "True"), {"icm_run_true_labels": 3.0}),
        (("no", "yes"), {"icm_run_labels no": 2.0, "icm_run_labels yes": 3.0}),
        (("a", "b", "c"), {"icm_run_labels a": 2.0, "icm_run_labels b": 3.0, "icm_run_labels c": 0.0}),
    ],
    ids=["true-false", "yes-no", "three"],
)
def test_labels_are_counted_by_their_names(names: tuple[str, ...], expected: dict[str, float]) -> None:
    metrics = RunMetrics("r", POOL, names)
    labels = [False, True, None, True, True, False]
    evaluation = SimpleNamespace(utility=1.0, num_labels=len(names))
    state = SimpleNamespace(evaluation=evaluation, labels=labels, labelled=range(5), iteration=1, accepted=1)
    metrics.update(cast("Standing", state), {"event": "start"})
    registry = CollectorRegistry()
    registry.register(metrics)
    found = samples(generate_latest(registry).decode())
    assert {name: value for name, value in found.items() if "_labels" in name} == expected


async def existing_names() -> set[str]:
    """Of every sample that Prometheus can get from us or from vLLM."""
    run = RunMetrics("r", POOL)
    run._now = dict.fromkeys(
        ("utility", "labelled", "true_labels", "iteration", "acceptance", "temperature", "last_step_seconds"), 0.0
    )
    registry = CollectorRegistry()
    registry.register(run)
    async with FakeVLLM() as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            registry.register(ClientMetrics(api))
            text = generate_latest(registry).decode()
    text += page([Replica({"pool_id": "p"}, None, 0.0)])
    names = {s.name for f in text_string_to_metric_families(text) for s in f.samples}
    return names | set(NAMES_OF_VLLM.read_text().split())


def queries() -> Iterator[tuple[str, str]]:
    for panel in read_panels():
        for query, _ in panel.queries:
            yield panel.title, query


async def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    names = await existing_names()
    asked = {(title, name) for title, query in queries() for name in re.findall(r"\b(?:icm_|vllm:)\w+", query)}
    assert len(asked) > 25
    assert {(title, name) for title, name in asked if name not in names} == set()


def test_the_dashboard_shows_what_a_run_is_judged_by() -> None:
    text = DASHBOARD.read_text()
    for name in ("icm_run_step_seconds", "icm_run_utility", "icm_run_acceptance", "icm_run_tokens_total"):
        assert name in text
    assert all(without_variables(query, "1m").count("$") == 0 for _, query in queries())


def test_prometheus_asks_where_our_commands_listen() -> None:
    configured = yaml.safe_load((REPOSITORY / "configs" / "monitoring" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in configured["scrape_configs"]}
    assert targets["vllm"] == [f"127.0.0.1:{build_parser().get_default('port')}"]
    assert "9465" in targets["icm-run"][0]


def test_panels_are_drawn_with_and_without_data(tmp_path: Path) -> None:
    panels = [Panel("row", "one", "s", ()), Panel("row", "two", "none", ())]
    draw(panels, [[Line("a", [1.0, 2.0], [3.0, -4.0])], []], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


async def test_a_port_that_is_taken_is_an_error_in_one_line(tmp_path: Path) -> None:
    from contrib.monitoring.run_metrics import published

    pool = SimpleNamespace(problem=SimpleNamespace(size=1), names=("False", "True"))
    async with FakeVLLM() as server, ModelAPI(VLLMClient(server.url, server.model)) as api:
        with pytest.raises(ConfigurationError, match="--metrics_port"):
            with published(server.port, api, "r", pool, lambda *_: None):
                pass


async def test_where_the_port_is_taken_no_run_has_begun(tmp_path: Path) -> None:
    async with FakeVLLM() as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "src.experiments.commands", "label", "--testbed", "builtin", "--batch_size",
            str(POOL), "--num_seed", "2", "--model", server.model, "--runs_dir", str(tmp_path), "--run", "mine",
            "--quiet", "--metrics_port", str(server.port), cwd=REPOSITORY,
            env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": str(REPOSITORY)},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, err = await process.communicate()
    assert process.returncode == 2
    assert f"cannot publish metrics at port {server.port}" in err.decode()
    assert not (tmp_path / "mine" / "run.json").exists()
    assert not (tmp_path / "mine" / "log.jsonl").exists()


async def test_a_search_that_labels_all_claims_at_once_counts_its_rounds() -> None:
    problem, journal = make_problem(bootstrap_rounds=3), Lines()
    await search_named("bootstrapping").run(problem, Model(problem), journal)
    metrics, registry = RunMetrics("mine", problem.size), CollectorRegistry()
    registry.register(metrics)
    for standing, record in zip(journal.standings, journal.written, strict=True):
        metrics.update(standing, record | {"seconds": 0.5})
    found = samples(generate_latest(registry).decode())
    rounds = len(journal.written)
    assert found["icm_run_iteration"] == found["icm_run_step_seconds_count"] == rounds > 1
    assert found["icm_run_iterations_total accepted"] + found["icm_run_iterations_total rejected"] == rounds
    assert found["icm_run_labelled"] == problem.size
    assert found["icm_run_utility"] == max(record["U_proposed"] for record in journal.written)
