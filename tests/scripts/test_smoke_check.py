"""scripts/test_vllm_server.py against the fake server of the model layer, and against a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from core.llm_api.types import LabelTokens, Prompt, Segment
from core.llm_api.vllm_llm import VLLMClient
from core.settings import Settings
from scripts.test_vllm_server import Check, examine
from tests.conftest import RunningServer
from tests.core.fake_server import FakeVLLM

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "test_vllm_server.py"

Examination = Callable[..., Coroutine[Any, Any, tuple[int, dict[str, Check]]]]


@pytest.fixture
def checks_of(monkeypatch: pytest.MonkeyPatch) -> Examination:
    monkeypatch.setenv("ICM_SECRETS", os.devnull)

    async def run(url: str, model: str | None = None, wait: float = 0.0) -> tuple[int, dict[str, Check]]:
        checks: dict[str, Check] = {}
        code = await examine(
            Settings.load({"vllm_base_url": url}), model, wait, lambda check: checks.__setitem__(check.name, check)
        )
        return code, checks

    return run


async def test_a_good_server_passes_every_check(checks_of: Examination) -> None:
    async with FakeVLLM() as server:
        code, checks = await checks_of(server.url)
    assert code == 0
    assert list(checks) == ["reachable", "model served", "exact label logprobs", "pools travel", "prefix caching"]
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize(
    ("server", "found"),
    [
        (FakeVLLM(), "whole prompts"),
        (FakeVLLM(trees=True), "trees of segments; shared prefixes are worked on again"),
        (FakeVLLM(trees=True, fast_prefixes=True), "trees of segments"),
    ],
)
async def test_it_says_what_a_server_lacks_to_be_fast(checks_of: Examination, server: FakeVLLM, found: str) -> None:
    async with server:
        code, checks = await checks_of(server.url)
    assert code == 0
    assert found in checks["pools travel"].found
    assert ("install" in checks["pools travel"].found) == (server.trees and not server.fast_prefixes)


@pytest.mark.parametrize(("salt", "code"), [("", 0), ("another model", 1)])
async def test_every_server_of_a_list_is_checked_and_whether_they_are_alike(
    monkeypatch: pytest.MonkeyPatch, salt: str, code: int
) -> None:
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    async with FakeVLLM() as first, FakeVLLM(salt=salt) as second:
        checks: list[Check] = []
        settings = Settings.load({"vllm_base_url": f"{first.url},{second.url}"})
        assert await examine(settings, None, 0.0, checks.append) == code
    names = ["reachable", "model served", "exact label logprobs", "pools travel", "prefix caching"]
    assert [(check.server, check.name) for check in checks] == [
        *((first.url, name) for name in names),
        *((second.url, name) for name in names),
        ("", "servers alike"),
    ]
    assert all(check.passed for check in checks[:-1])
    assert checks[-1].passed == (code == 0)
    assert ("fingerprint '" in checks[-1].found) == (code == 1)


async def test_one_server_of_two_that_is_missing_is_exit_code_2(checks_of: Examination) -> None:
    async with FakeVLLM() as server:
        code, checks = await checks_of(f"{server.url},http://127.0.0.1:9")
    assert code == 2
    assert "servers alike" not in checks
    assert checks["prefix caching"].passed


async def test_nothing_at_the_url_is_exit_code_2(checks_of: Examination) -> None:
    code, checks = await checks_of("http://127.0.0.1:9")
    assert code == 2
    assert "launch_vllm_server.sh" in checks["reachable"].todo


async def test_it_waits_as_long_as_it_is_told(checks_of: Examination) -> None:
    async with FakeVLLM() as server:
        assert (await checks_of(server.url, wait=5.0))[0] == 0


async def test_another_model_is_named(checks_of: Examination) -> None:
    async with FakeVLLM(model="served") as server:
        code, checks = await checks_of(server.url, model="wanted")
    assert code == 1
    assert "served, not wanted" in checks["model served"].found


@pytest.mark.parametrize("manner", ["ignored", "rejected"])
async def test_a_server_without_exact_labels_fails_that_check(checks_of: Examination, manner: str) -> None:
    async with FakeVLLM(exact_labels=manner) as server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert not checks["exact label logprobs"].passed
    assert checks["prefix caching"].passed, "the checks after a failed one are still made"


async def test_a_server_without_counters_fails_the_cache_check(checks_of: Examination) -> None:
    async with FakeVLLM(metrics=False) as server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert "/metrics" in checks["prefix caching"].found


async def test_a_wrong_key_is_told_and_not_shown(checks_of: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sk-wrong")
    async with FakeVLLM(api_key="sk-right") as server:
        code, checks = await checks_of(server.url)
    assert code == 2
    assert "VLLM_API_KEY" in checks["reachable"].todo
    assert "sk-" not in repr(checks)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ICM_SECRETS": os.devnull}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=600,
    )


def test_the_command_line_tells_a_wrong_url() -> None:
    done = run_script("--url", "nonsense")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_json_says_the_same_as_the_lines() -> None:
    done = run_script("--url", "http://127.0.0.1:9", "--json")
    assert done.returncode == 2
    [check] = json.loads(done.stdout)
    assert (check["name"], check["passed"]) == ("reachable", False)


@pytest.mark.real_server
def test_a_real_server_passes(vllm_server: RunningServer) -> None:
    done = run_script("--url", vllm_server.url, "--model", vllm_server.model, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["passed"] for check in json.loads(done.stdout)] == [True] * 5


@pytest.mark.real_server
async def test_prompts_start_with_the_models_own_first_token(vllm_server: RunningServer) -> None:
    """The GGUF's wish for <bos> must survive the conversion: without it Gemma hardly predicts anything."""
    client = VLLMClient(vllm_server.url, vllm_server.model)
    try:
        await client.start()
        [special] = await client.tokenize(["Paris"], special=True)
        [plain] = await client.tokenize(["Paris"], special=False)
        assert special == [2, *plain] if vllm_server.model.startswith("gemma") else special == plain
        [[true], [false]] = await client.tokenize([" True", " False"])
        text = "Water is wet: True. Stones are soft: False. Fire is hot: True. Ice is warm:"
        [tokens] = await client.tokenize([text], special=True)
        score = (
            await client.score([Prompt((Segment(text, tokens),))], LabelTokens(true_id=true, false_id=false))
        ).logprobs
        assert -8 < score[0].false < 0, "a label is a likely continuation here"
    finally:
        await client.aclose()
