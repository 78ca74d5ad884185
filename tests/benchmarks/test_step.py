"""benchmarks/step.py: its pure parts, and all of it against a fake server."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from benchmarks import step
from benchmarks.step_machine import without_folders
from benchmarks.step_measure import Budget, texts
from benchmarks.step_report import (
    CaseResult,
    Repetition,
    Report,
    RunResult,
    RunSample,
    exponent,
    fixed_rebuilds,
    growth,
    interpolate,
    middle,
    per_unit,
    planned_rebuilds,
    read_json,
    run_total,
    token_checks,
    write_json,
)
from benchmarks.step_table import tables
from core.llm_api.http import transport
from core.llm_api.tokens import CANARY_TEXT
from fakes.vllm_server import BOS, FakeVLLM, Fault, encode
from src.icm.planner import TokenCosts
from tests.conftest import stand_in_platform
from tests.core.engines.test_direct import FakeLLM


def repetition(seconds: float = 1.0, computed: int | None = 100, prompts: int = 10) -> Repetition:
    return Repetition(seconds, seconds / 10, prompts, 1000, computed, 1, 0, 5000, 70_000_000)


def entry(case: str, size: int, computed: int, *, prompts: int | None = None, seconds: float = 1.0) -> CaseResult:
    made = CaseResult(case, size, [repetition(seconds, computed, prompts or size)], "")
    made.demonstration_tokens = made.demonstration_max = 42
    made.question_tokens = made.question_max = 40
    return made


def quadratic_report() -> Report:
    """Upstream's cost grows with N squared, the tree's with N."""
    report = Report(title="a $ title", engine={"model": "m", "kind": "vllm", "version": "1"}, date="2026-01-01")
    for size in (16, 32, 64):
        report.cases += [
            entry("b", size, size**2 * 21, seconds=size**2 / 1000),
            entry("c", size, int(size * math.log2(size) * 42), seconds=size / 100),
            entry("d", size, size * 90, seconds=size / 200),
            entry("e", size, size * 3, seconds=size / 400),
        ]
    report.cases.append(CaseResult("a", 64, not_measured="budget: needs some 100 s, 3 s left"))
    report.block_tokens = 16
    return report


def sample(layout: str, size: int, cost: float) -> RunSample:
    return RunSample(layout, size, size - 2, repetition(10.0, 1000), [size - 1, size, size + 1], [repetition(cost)] * 3)


def test_the_exponent_of_a_power_law() -> None:
    assert exponent([32, 64, 128], [3 * n**1.7 for n in (32, 64, 128)]) == pytest.approx(1.7)
    assert exponent([32], [1.0]) is None
    assert exponent([32, 64], [0.0, 1.0]) is None
    assert growth(quadratic_report(), "b", lambda r: r.seconds) == pytest.approx(2.0)
    assert growth(quadratic_report(), "a", lambda r: r.seconds) is None


def test_medians_need_every_number() -> None:
    made = CaseResult("c", 8, [repetition(3.0), repetition(1.0), repetition(2.0, computed=None)])
    assert middle(made, lambda r: r.seconds) == 2.0
    assert middle(made, lambda r: r.computed_tokens) is None
    assert per_unit(entry("d", 16, 16 * 82)) == pytest.approx(1.0)


def test_interpolation_is_exact_for_power_laws_and_goes_on_beyond_its_ends() -> None:
    assert interpolate([8, 32, 128], [n**2 for n in (8, 32, 128)], [4, 20, 256]) == pytest.approx([16, 400, 65536])
    assert interpolate([8], [5.0], [4, 20]) == pytest.approx([5.0, 5.0])
    assert interpolate([8, 8, 32], [1.0, 3.0, 2.0], [8, 16]) == pytest.approx([2.0, 2.0])
    assert interpolate([8, 32], [0.0, 0.0], [16]) == [0.0]
    assert interpolate([8, 32], [1.0, 2.0], []) == []


def test_rebuilds_come_every_so_many_labels_and_none_at_the_end() -> None:
    assert fixed_rebuilds(8, 64, 16) == [24, 40, 56]
    assert fixed_rebuilds(8, 56, 16) == [24, 40]
    assert fixed_rebuilds(8, 20, 16) == []


def test_the_planner_rebuilds_where_the_kv_cache_is_full() -> None:
    def planned(capacity: int | None) -> list[int]:
        return planned_rebuilds(8, 64, TokenCosts((42,) * 64, (40,) * 64, capacity))

    assert planned(None) == []
    few, many = planned(100_000), planned(40_000)
    assert 0 < len(few) < len(many)
    assert many == sorted(set(many))
    assert all(8 < size < 64 for size in many)


def test_a_whole_run_is_its_steps_its_start_and_its_rebuilds() -> None:
    run = RunResult(
        8, 64, [24, 40, 56], [sample(layout, size, 2.0) for size in (8, 64) for layout in ("tree", "upstream")]
    )
    tree, upstream = run_total(run, "tree"), run_total(run, "upstream")
    assert tree is not None
    assert upstream is not None
    assert upstream.seconds == pytest.approx(56 * 2.0 + 10.0)
    assert tree.seconds == pytest.approx(56 * 2.0 + 4 * 10.0)
    assert (tree.rebuilds, tree.rebuild_seconds) == (3, pytest.approx(30.0))
    assert tree.computed_tokens == pytest.approx(56 * 100 + 4 * 1000)
    assert run_total(RunResult(8, 64, [24, 40, 56]), "tree") is None
    linear = RunResult(8, 64, [24, 40, 56], [sample("upstream", size, float(size)) for size in (8, 16, 32, 64)])
    total = run_total(linear, "upstream")
    assert total is not None
    assert total.seconds == pytest.approx(sum(range(9, 65)) + 10.0)


def test_json_and_back(tmp_path: Path) -> None:
    report = quadratic_report()
    report.run = RunResult(8, 64, [24, 40, 56], [sample("tree", 8, 2.0)], {"upstream": "budget"})
    report.checks = token_checks(report)
    write_json(report, tmp_path / "step.json")
    assert read_json(tmp_path / "step.json") == report
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json is not a result of step\.py"):
        read_json(tmp_path / "other.json")


def test_the_table_fits_and_says_what_was_not_measured() -> None:
    report = quadratic_report()
    report.run = RunResult(
        8, 128, [24], [sample("tree", size, 2.0) for size in (8, 64)], {"upstream": "budget: no time"}
    )
    report.checks = token_checks(report)
    text = tables(report)
    assert max(map(len, text.splitlines())) <= 120
    assert "not measured: budget: needs some 100 s, 3 s left" in text
    assert "upstream's order, batched         not measured budget: no time" in text
    assert "tree: EXTRAPOLATED above 65 labels" in text


def test_checks_find_a_tree_that_computes_too_much() -> None:
    report = quadratic_report()
    assert all(check.holds for check in token_checks(report))
    report.case("c", 64).repetitions[0] = repetition(computed=64 * 64 * 42, prompts=64)
    report.case("d", 32).repetitions[0] = repetition(computed=32 * 400, prompts=32)
    report.case("e", 16).repetitions[0] = repetition(computed=None, prompts=16)
    broken = [check.name for check in token_checks(report) if not check.holds]
    assert [name.partition(":")[0] for name in broken] == ["N = 16", "N = 32", "N = 64", "N = 64"]


def test_a_budget_refuses_what_would_not_fit() -> None:
    budget = Budget(100.0)
    assert budget.refuses("a", 32, 2.0) == ""  # nothing is known of it
    budget.took("a", 32, 20.0)
    assert budget.refuses("a", 64, 2.0) == ""
    assert budget.refuses("a", 128, 2.0) == "budget: needs some 320 s, 100 s left"
    assert Budget(None).refuses("a", 10**6, 2.0) == ""


def test_claims_vary_in_length_around_what_was_asked() -> None:
    drawn = texts(400, 40, lengths=np.random.default_rng(0), words=np.random.default_rng(1))
    sizes = [len(text.split()) for text in drawn]
    assert (min(sizes), max(sizes)) == (32, 48)
    assert len(set(drawn)) == 400


def test_options_lose_their_folders() -> None:
    assert without_folders(["--model", "/home/me/m", "--a=/x/y", "--b=c/d", "e"]) == [
        "--model",
        "m",
        "--a=y",
        "--b=c/d",
        "e",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--server", "http://x"], "--server needs --model"),
        (["--server", "http://x", "--model", "m", "--", "--port", "1"], "that --start starts"),
        (["--direct", "m", "--sizes", "2"], "--sizes must be at least 4"),
        (["--direct", "m", "--run", "8"], "--run starts from 8 labels"),
        (["--direct", "m", "--engine", "{"], "--engine is not JSON"),
        (["--direct", "m", "--engine", "[]"], "--engine must be a JSON object"),
        (["--plot_only", "missing.json"], "there is no file missing.json"),
        (["--server", "http://127.0.0.1:9", "--model", "m"], "no server answers"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    assert step.main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("idle", [transport.KEEPALIVE, 0.001], ids=["connections stay", "connections are opened anew"])
async def test_a_whole_call(
    idle: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    monkeypatch.setattr(transport, "KEEPALIVE", idle)
    json_file, png = tmp_path / "step.json", tmp_path / "step.png"
    async with FakeVLLM() as server:
        arguments = ["--server", server.url, "--model", server.model, "--claim_tokens", "20", "--run", "20", "--quick"]
        code = await asyncio.to_thread(step.main, [*arguments, "--json", str(json_file), "--notes", "a note"])
        sent = [body["prompt"] for body in server.completions if isinstance(body["prompt"][0], list)]
        versions = server.requests.count("/version")
    assert code == 0
    out = capsys.readouterr().out
    assert "all 16 hold" in out
    assert "a note" in out
    report = read_json(json_file)
    found = {(e.case, e.size): e.repetitions for e in report.cases}
    assert len(found) == 14
    assert all(len(repetitions) == 1 for repetitions in found.values())
    for (case, size), [measured] in found.items():
        assert measured.requests == (size if case == "a" else 1)
        assert measured.request_bytes is not None
        assert measured.computed_tokens is not None
        if case in "abce":
            assert measured.prompts == size
    # a's 16 and 32 requests, d0 and f's questions, three questions a run sample.
    canary = [[BOS, *encode(CANARY_TEXT)]]
    asked = Counter(len(prompts) for prompts in sent if prompts != canary)
    warm_up, asks, run_asks = 4, 4, 2 * 3 * 3
    assert asked[1] == warm_up + 16 + 32 + asks + run_asks
    # Both clients ask two canaries beside the version at start, and one whenever they see if the server is still the
    # same: after a connection that was opened while no other stood, so how often depends on the machine.
    clients, canaries = 2, sent.count(canary)
    checks = versions - clients
    assert canaries == 2 * clients + checks
    assert checks > 0 or idle > 0.001
    assert found["a", 32][0].prompt_tokens == found["b", 32][0].prompt_tokens
    assert report.run is not None
    assert sorted((s.layout, s.size) for s in report.run.samples) == [
        (layout, size) for layout in ("tree", "upstream") for size in (8, 16, 20)
    ]
    assert "127.0.0.1" not in json_file.read_text()
    assert json.loads(json_file.read_text())["settings"]["server"] == "given"

    assert step.main(["--plot_only", str(json_file), "--png", str(png)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")


async def test_quick_fails_without_a_prefix_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM(metrics=False) as server:
        arguments = ["--server", server.url, "--model", server.model, "--claim_tokens", "9", "--quick", "--cases", "c"]
        assert await asyncio.to_thread(step.main, arguments) == 1
    assert "2 bounds on computed tokens are violated" in capsys.readouterr().err


async def test_prompts_that_do_not_fit_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM(max_model_len=400) as server:
        arguments = ["--server", server.url, "--model", server.model, "--sizes", "4", "16", "--repeats", "2"]
        assert await asyncio.to_thread(step.main, [*arguments, "--cases", "b", "c", "d", "e"]) == 0
    out = capsys.readouterr().out
    assert out.count("not measured: prompt") == 5
    assert out.count("\n   4  ") == 5


async def test_what_was_measured_outlives_a_lost_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    async with FakeVLLM() as server:
        server.faults = [Fault(status=403, times=None, only=lambda body: len(str(body["prompt"])) > 40_000)]
        arguments = ["--server", server.url, "--model", server.model, "--sizes", "8", "32", "--repeats", "1"]
        json_file = tmp_path / "s.json"
        assert await asyncio.to_thread(step.main, [*arguments, "--cases", "c", "b", "--json", str(json_file)]) == 2
    assert read_json(json_file).case("c", 8).repetitions
    assert not read_json(json_file).case("c", 32).repetitions
    assert capsys.readouterr().out.count("not measured: not reached") == 3


def test_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("vllm")
    FakeLLM.made, FakeLLM.failure = [], None
    module.LLM, module.SamplingParams, module.__version__ = FakeLLM, SimpleNamespace, "0.32.0"
    monkeypatch.setitem(sys.modules, "vllm", module)
    stand_in_platform(monkeypatch, cpu=True)
    engine = json.dumps({"dtype": "bfloat16", "load_format": "dummy", "tokenizer": "/models/here/other"})
    arguments = ["--direct", "/models/here/shape", "--engine", engine, "--sizes", "8", "16", "--repeats", "2"]
    assert step.main([*arguments, "--json", str(tmp_path / "s.json")]) == 0
    (llm,) = FakeLLM.made
    assert (llm.arguments["load_format"], llm.arguments["dtype"], llm.stopped) == ("dummy", "bfloat16", 1)
    text = (tmp_path / "s.json").read_text()
    assert "/models" not in text
    report = read_json(tmp_path / "s.json")
    assert report.engine["model"] == "shape"
    assert report.block_tokens == 16
    assert report.case("a", 8).not_measured.startswith("in process there are no requests")
    assert [len(report.case(case, 16).repetitions) for case in ("b", "c", "d0", "d", "e", "f")] == [2] * 6
    # d: 15 + 1 and 16 + 1 claims; f: 15 + 1 claims with either label, the new claim's own question once
    assert [r.prompts for r in report.case("d", 16).repetitions] == [16, 17]
    assert [r.prompts for r in report.case("f", 16).repetitions] == [31, 31]
    assert report.case("c", 16).repetitions[0].request_bytes is None
    assert "in process there are no requests" in capsys.readouterr().out


async def test_a_server_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_SECRETS", "/dev/null")
    started: list[dict[str, object]] = []
    async with FakeVLLM(model="shape") as server:

        def stand_in(**settings: object) -> AbstractContextManager[SimpleNamespace]:
            started.append(settings)
            return nullcontext(SimpleNamespace(url=server.url, model=settings["model"]))

        monkeypatch.setattr(step, "VLLMServer", stand_in)
        arguments = [
            "--start",
            "/tmp/shape",
            "--sizes",
            "8",
            "--repeats",
            "1",
            "--cases",
            "c",
            "--",
            "--seed",
            "1",
        ]
        assert await asyncio.to_thread(step.main, arguments) == 0
    assert started[0]["size"] == "/tmp/shape"
    assert started[0]["options"] == ("--seed", "1", "--served-model-name", "shape")
