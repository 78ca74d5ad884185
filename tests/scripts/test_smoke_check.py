"""scripts/test_vllm_server.py against the fake server of the model layer, and against a real one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.types import Prompt, Segment
from core.settings import Settings
from fakes.vllm_server import FakeVLLM, Fault
from scripts.test_vllm_server import START, Check, examine, tree_saves
from src.pipeline.tree_saving import Saving
from tests.conftest import RunningServer
from tests.core.two_labels import two

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "test_vllm_server.py"

NAMES = [
    *("reachable", "model served", "ready", "logprobs", "exact label logprobs", "pools travel", "prefix caching"),
    "tree saves",
]
Examination = Callable[..., Coroutine[Any, Any, tuple[int, dict[str, Check]]]]


@pytest.fixture
def checks_of(monkeypatch: pytest.MonkeyPatch) -> Examination:
    monkeypatch.setenv("ICM_SECRETS", os.devnull)

    async def run(
        url: str, model: str | None = None, wait: float = 0.0, log: Path | None = None
    ) -> tuple[int, dict[str, Check]]:
        checks: dict[str, Check] = {}
        settings = Settings.load({"vllm_base_url": url, "max_attempts": 1})
        code = await examine(settings, model, wait, lambda check: checks.__setitem__(check.name, check), log)
        return code, checks

    return run


async def test_a_good_server_passes_every_check(checks_of: Examination) -> None:
    async with FakeVLLM() as server:
        code, checks = await checks_of(server.url)
    assert code == 0
    assert list(checks) == NAMES
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize(
    ("server", "found"),
    [
        (FakeVLLM(), "whole prompts"),
        (FakeVLLM(trees=True), "trees of segments; work on shared prefixes is repeated"),
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
    assert [(check.server, check.name) for check in checks] == [
        *((first.url, name) for name in NAMES),
        *((second.url, name) for name in NAMES),
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


@pytest.mark.parametrize(
    ("said", "todo"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "--tensor-parallel-size"),
        ("ValueError: No available memory for the cache blocks. Try increasing", "--gpu-memory-utilization"),
        ("ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired", "nvidia-smi"),
        (
            "ValueError: To serve at least one request with the models's max seq len (131072), (16.0 GiB KV cache is "
            "needed, which is larger than the available KV cache memory (9.4 GiB).",
            "--max-model-len",
        ),
        ("OSError: [Errno 98] error while attempting to bind: address already in use", "--port"),
    ],
)
async def test_the_log_of_a_server_that_does_not_come_up_says_why(
    checks_of: Examination, tmp_path: Path, said: str, todo: str
) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(f"INFO loading\nERROR {said}\nTraceback ...\n")
    code, checks = await checks_of("http://127.0.0.1:9", log=log)
    assert code == 2
    assert "log tells of" in checks["reachable"].found
    assert todo in checks["reachable"].todo


async def test_a_wait_ends_when_the_log_says_that_it_is_in_vain(checks_of: Examination, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text("torch.OutOfMemoryError of an earlier start\n")
    waiting = asyncio.create_task(checks_of("http://127.0.0.1:9", wait=60.0, log=log))
    await asyncio.sleep(1.2)
    assert not waiting.done(), "what the log said before does not count"
    with log.open("a") as more:
        more.write("torch.OutOfMemoryError: CUDA out of memory.\n")
    code, checks = await asyncio.wait_for(waiting, 5)
    assert code == 2
    assert "out of memory at start" in checks["reachable"].found


async def test_a_log_that_is_missing_or_says_nothing_changes_nothing(checks_of: Examination, tmp_path: Path) -> None:
    code, checks = await checks_of("http://127.0.0.1:9", log=tmp_path / "none.log")
    assert (code, checks["reachable"].todo) == (2, START)


async def test_a_server_that_answers_but_writes_nothing_is_not_ready(checks_of: Examination) -> None:
    async with FakeVLLM() as server:
        server.faults = [Fault(status=500, body={"error": "engine dead"}, times=None)]
        code, checks = await checks_of(server.url)
    assert code == 1
    assert checks["model served"].passed
    assert not checks["ready"].passed
    assert "engine dead" in checks["ready"].found


@pytest.mark.parametrize("server", [FakeVLLM(logprobs=False), FakeVLLM(max_logprobs=0)])
async def test_a_server_without_logprobs_is_told_how_to_give_some(checks_of: Examination, server: FakeVLLM) -> None:
    async with server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert checks["ready"].passed
    assert not checks["logprobs"].passed
    assert "--max-logprobs" in checks["logprobs"].todo


async def test_a_server_that_answers_with_logits_is_told_which_flag_mends_it(checks_of: Examination) -> None:
    async with FakeVLLM(logits=20.0) as server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert "--logprobs-mode raw_logprobs" in checks["logprobs"].todo


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
    assert "tree saves" not in checks


SAVED = re.compile(r"the tree saves ([\d,]+) of ([\d,]+) prompt tokens \(possible: ([\d,]+), ")


def saved(check: Check) -> list[int]:
    """Tokens saved, asked, and possible to save."""
    told = SAVED.match(check.found)
    assert told is not None, check.found
    return [int(number.replace(",", "")) for number in told.groups()]


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("trees", [False, True])
async def test_a_good_server_saves_all_that_its_blocks_allow(checks_of: Examination, block: int, trees: bool) -> None:
    async with FakeVLLM(block=block, trees=trees) as server:
        code, checks = await checks_of(server.url)
    assert code == 0
    tokens, asked, possible = saved(checks["tree saves"])
    assert tokens == possible > 0.5 * asked
    assert f"blocks of {block})" in checks["tree saves"].found


async def test_a_server_that_loses_the_trees_branches_is_told_which_flag_keeps_them(checks_of: Examination) -> None:
    async with FakeVLLM(keeps="window") as server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert checks["prefix caching"].passed, "the same prompt is found again"
    tokens, _, possible = saved(checks["tree saves"])
    assert tokens < 0.9 * possible
    assert not checks["tree saves"].passed
    assert "--disable-hybrid-kv-cache-manager" in checks["tree saves"].todo
    assert checks["tree saves"].todo in checks["tree saves"].line()


async def test_a_server_without_prefix_caching_is_told_how_to_switch_it_on(checks_of: Examination) -> None:
    async with FakeVLLM(keeps="nothing") as server:
        code, checks = await checks_of(server.url)
    assert code == 1
    assert saved(checks["tree saves"])[0] == 0
    for name in ("prefix caching", "tree saves"):
        assert not checks[name].passed
        assert "--enable-prefix-caching" in checks[name].todo
        assert "hybrid" not in checks[name].todo


async def test_a_server_with_large_blocks_is_told_that_only_whole_ones_are_saved(checks_of: Examination) -> None:
    async with FakeVLLM(block=528) as server:
        code, checks = await checks_of(server.url)
    assert code == 0
    tokens, asked, possible = saved(checks["tree saves"])
    assert tokens == possible < 0.6 * asked
    assert "blocks of 528); only whole blocks are saved" in checks["tree saves"].found


def test_large_blocks_that_are_lost_as_well_are_not_blamed_on_a_flag_that_their_model_cannot_take() -> None:
    check = tree_saves(Saving(asked=20_720, saved=528, possible=11_616, at_best=14_080, block=528), cached=True)
    assert not check.passed
    assert "one with layers that keep a state cannot" in check.todo
    untold = tree_saves(Saving(asked=20_720, saved=14_080, possible=14_080, at_best=14_080, block=None), cached=True)
    assert untold.passed
    assert "does not tell" in untold.found


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
    assert [check["passed"] for check in json.loads(done.stdout)] == [True] * 8


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
        queries = two(true, false).queries([Prompt((Segment(text, tokens),))])
        [answer] = (await client.score(queries)).logprobs
        assert -8 < answer.values[1] < 0, "a label is a likely continuation here"
    finally:
        await client.aclose()
