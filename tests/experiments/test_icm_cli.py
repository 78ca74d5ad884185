"""The command line against a fake server in another process: whole runs, resuming after kills, bad input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.core.fake_server import FakeVLLM, Fault

SCRIPT = Path(__file__).resolve().parents[2] / "src" / "experiments" / "ICM.py"


def signed_by_words(tokens: Sequence[int]) -> float:
    """A model whose answer depends on every token of the prompt, more on the last ones."""
    total = sum(((token * 2654435761) % 1000 - 499.5) / 500 * (3 if i > len(tokens) - 12 else 0.2)
                for i, token in enumerate(tokens))  # fmt: skip
    return max(-8.0, min(8.0, total))


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=signed_by_words) as fake:
        yield fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "claims.jsonl"
    rows = [
        {"question": f"Is {n} even?", "choice": answer, "label": int((n % 2 == 0) == (answer == "yes")),
         "consistency_id": n}
        for n in range(12) for answer in ("yes", "no")
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Command:
    """ICM.py in a process of its own, against one server and one folder of runs."""

    def __init__(self, url: str, data: Path, runs: Path) -> None:
        self.runs = runs
        self.arguments = [
            *(sys.executable, str(SCRIPT), "--data", str(data), "--model", "fake-8b", "--runs_dir", str(runs)),
            *("--quiet", "--num_seed", "4", "--batch_size", "16", "--max_tail", "4"),
        ]
        self.environment = {**os.environ, "VLLM_BASE_URL": url, "ICM_SECRETS": os.devnull}

    async def start(self, *more: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.arguments,
            *more,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Ignored where the tests run in the background, and a child would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    async def __call__(self, *more: str) -> tuple[int, str, str]:
        process = await self.start(*more)
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def labels(self, run: str) -> bytes:
        return (self.runs / run / "labels.jsonl").read_bytes()

    def log(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.runs / run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def icm(server: FakeVLLM, data: Path, tmp_path: Path) -> Command:
    return Command(server.url, data, tmp_path / "runs")


async def test_a_run_writes_its_labels_curves_and_journal(icm: Command) -> None:
    code, out, err = await icm("--run", "a", "--label_rest")
    assert code == 0, err
    folder = icm.runs / "a"
    rows = [json.loads(line) for line in icm.labels("a").splitlines()]
    assert len(rows) == 24
    assert sum(row["by"] != "many-shot" for row in rows) == 16
    assert all(isinstance(row["label"], bool) and isinstance(row["log_odds"], float) for row in rows)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "labels.jsonl") in out
    assert "agreement with gold" in out
    steps = [record for record in icm.log("a") if record["event"] == "step"]
    assert [step["iteration"] for step in steps] == list(range(len(steps)))
    assert {"claim", "accepted", "U", "T", "labelled", "tokens_sent", "seconds"} <= steps[0].keys()
    assert any("tokens_cached" in step for step in steps)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["alpha"] == 30
    assert run["engine"]["fingerprint"]


async def test_a_finished_run_is_shown_without_a_server(icm: Command, server: FakeVLLM) -> None:
    assert (await icm("--run", "a", "--is_complete"))[0] == 1
    assert (await icm("--run", "a"))[0] == 0
    asked = len(server.requests)
    icm.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    code, out, _ = await icm("--run", "a", "--is_complete")
    assert code == 0
    assert "agreement" in out
    assert len(server.requests) == asked


async def test_what_is_asked_after_the_search_is_told(icm: Command) -> None:
    icm.arguments.remove("--quiet")
    code, _, err = await icm("--run", "a", "--label_rest")
    assert code == 0
    [line] = [line for line in err.splitlines() if line.startswith("search finished")]
    left = 8 + sum(json.loads(row)["by"] == "predicted" for row in icm.labels("a").splitlines())
    assert f"asking the pool's 16 claims zero-shot and labelling {left} other claims from the pool (about" in line
    _, _, err = await icm("--run", "b", "--label_rest")  # answered by the cache of responses
    [line] = [line for line in err.splitlines() if line.startswith("search finished")]
    assert "about" not in line


async def test_a_run_does_not_go_on_in_another_type(data: Path, tmp_path: Path) -> None:
    async with FakeVLLM(trees=True, dtype="bfloat16") as server:
        icm = Command(server.url, data, tmp_path / "runs")
        assert (await icm("--run", "a"))[0] == 0
        document = json.loads((icm.runs / "a/run.json").read_text())
        assert document["engine"]["dtype"] == "bfloat16"
        del document["result"]
        (icm.runs / "a/run.json").write_text(json.dumps(document))
        server.dtype = "float32"
        code, _, err = await icm("--run", "a")
        assert code == 2
        assert "was started on another engine (dtype 'bfloat16', now 'float32')" in err
        server.dtype = ""  # without our extension a server does not say
        assert (await icm("--run", "a"))[0] == 0


async def test_the_same_seed_gives_the_same_labels_and_asks_nothing_twice(icm: Command, server: FakeVLLM) -> None:
    await icm("--run", "a")
    asked = len(server.pools)
    await icm("--run", "b")
    assert icm.labels("a") == icm.labels("b")
    assert len(server.pools) == asked  # every score came from the cache
    await icm("--run", "c", "--seed", "1")
    assert icm.labels("c") != icm.labels("a")


async def test_a_server_with_our_extension_gives_the_same_labels(icm: Command, server: FakeVLLM) -> None:
    assert (await icm("--run", "plain", "--lookahead", "0"))[0] == 0
    (icm.runs / "responses.sqlite").unlink()
    async with FakeVLLM(log_odds=signed_by_words, trees=True) as extended:
        icm.environment["VLLM_BASE_URL"] = extended.url
        code, _, err = await icm("--run", "tree", "--lookahead", "0")
        assert code == 0, err
        # The answers say what was cached: the counters are read at the start alone.
        assert extended.requests.count("/metrics") <= 3
    assert icm.labels("tree") == icm.labels("plain")
    log = icm.log("tree")
    assert all(r["tokens_cached"] + r["tokens_computed"] == r["tokens_sent"] for r in log if r["tokens_sent"])
    keys = ("tokens_sent", "tokens_cached", "tokens_computed")
    assert [[r.get(key) for key in keys] for r in log] == [[r.get(key) for key in keys] for r in icm.log("plain")]


async def test_a_layout_changes_prompts_not_the_pool(icm: Command) -> None:
    assert (await icm("--run", "a", "--layout", "upstream"))[0] == 0
    assert (await icm("--run", "b"))[0] == 0
    rows = [[json.loads(line)["row"] for line in icm.labels(run).splitlines()] for run in "ab"]
    assert rows[0] == rows[1]


async def test_killed_at_any_moment_it_ends_with_the_same_labels(icm: Command, server: FakeVLLM) -> None:
    await icm("--run", "whole", "--read_timeout", "60")
    (icm.runs / "responses.sqlite").unlink()
    server.latency = 0.06
    kills = 0
    for attempt in range(30):
        process = await icm.start("--run", "killed")
        try:
            async with asyncio.timeout(0.9 + 0.11 * attempt):
                await process.communicate()
        except TimeoutError:
            process.send_signal(signal.SIGKILL)
            await process.communicate()
            kills += 1
        if (icm.runs / "killed" / "labels.jsonl").exists():
            break
    assert kills >= 3
    assert (await icm("--run", "killed"))[0] == 0
    assert icm.labels("killed") == icm.labels("whole")

    def decisions(run: str) -> list[tuple[Any, ...]]:
        return [(r["event"], r.get("claim"), r.get("accepted"), r["U"]) for r in icm.log(run)]

    assert decisions("killed") == decisions("whole")


@pytest.mark.parametrize("dies", [0, 1])
async def test_a_run_on_two_servers_of_which_one_dies_ends_with_the_labels_of_one(
    icm: Command, server: FakeVLLM, data: Path, tmp_path: Path, dies: int
) -> None:
    assert (await icm("--run", "a", "--label_rest"))[0] == 0
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeVLLM(log_odds=signed_by_words)) for _ in range(2)]
        both = Command(",".join(server.url for server in servers), data, tmp_path / "other runs")
        process = await both.start("--run", "a", "--label_rest")
        asking = asyncio.create_task(process.communicate())
        while len(servers[dies].pools) < 6 and not asking.done():
            await asyncio.sleep(0.005)
        servers[dies].faults = [Fault(disconnect=True, times=None)]  # its requests in flight die with it
        await servers[dies].__aexit__()
        _, err = await asking
        assert process.returncode == 0, err.decode()
    assert err.decode().count("dropped out") == 1
    assert both.labels("a") == icm.labels("a")
    scores = [[(r["event"], r.get("claim"), r["U"]) for r in command.log("a")] for command in (icm, both)]
    assert scores[0] == scores[1]
    assert all(record.get("tokens_computed", 0) >= 0 for record in both.log("a"))
    assert all(len(server.pools) >= 6 for server in servers)
    both.environment = icm.environment
    asked = len(server.pools)
    assert (await both("--run", "b", "--label_rest"))[0] == 0
    assert len(server.pools) == asked  # cached scores count, however many servers gave them


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_says_how_to_go_on(icm: Command, server: FakeVLLM, number: int) -> None:
    server.latency = 0.05
    process = await icm.start("--run", "a")
    while not (icm.runs / "a" / "log.jsonl").exists():
        await asyncio.sleep(0.02)
    process.send_signal(number)
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 130
    assert "Nothing is lost" in err.decode()
    assert "--run a" in err.decode()
    assert "Traceback" not in err.decode()
    assert (await icm("--run", "a"))[0] == 0


async def test_other_flags_on_the_same_run_are_refused(icm: Command) -> None:
    await icm("--run", "a")
    code, _, err = await icm("--run", "a", "--alpha", "7")
    assert code == 2
    assert "--alpha 30.0, now 7.0" in err


async def test_lookahead_changes_costs_and_nothing_else_and_may_change_in_a_run(icm: Command, server: FakeVLLM) -> None:
    costs = {"asked", "from_cache", "asked_ahead", "ahead_used", "floored", "seconds"}

    def decisions(run: str) -> list[dict[str, Any]]:
        kept = [{k: v for k, v in r.items() if k not in costs and not k.startswith("tokens")} for r in icm.log(run)]
        return [{k: v for k, v in record.items() if k != "T"} for record in kept]

    batches = {}
    for lookahead in ("0", "4", "auto"):
        before = len(server.completions)
        code, out, err = await icm("--run", f"a{lookahead}", "--lookahead", lookahead)
        assert code == 0, err
        assert ("asked ahead" in out) == (lookahead != "0")
        batches[lookahead] = len(server.completions) - before
        (icm.runs / "responses.sqlite").unlink()
        assert icm.labels(f"a{lookahead}") == icm.labels("a0")
        assert decisions(f"a{lookahead}") == decisions("a0")
    assert max(batches["4"], batches["auto"]) < batches["0"]
    document = json.loads((icm.runs / "a4" / "run.json").read_text())
    assert document["cost"]["asked_ahead"] >= document["cost"]["ahead_used"] > 0
    del document["result"]
    (icm.runs / "a4" / "run.json").write_text(json.dumps(document))
    log = icm.runs / "a4" / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:9]))
    code, _, err = await icm("--run", "a4", "--lookahead", "0")
    assert code == 0, err
    assert icm.labels("a4") == icm.labels("a0")


async def test_an_unfinished_run_of_an_earlier_version_is_refused_and_a_finished_one_shown(icm: Command) -> None:
    await icm("--run", "a")
    run = icm.runs / "a" / "run.json"
    document = json.loads(run.read_text()) | {"format": 1}
    run.write_text(json.dumps(document))
    code, out, _ = await icm("--run", "a")
    assert code == 0
    assert "agreement" in out
    del document["result"]
    run.write_text(json.dumps(document))
    code, _, err = await icm("--run", "a")
    assert code == 2
    assert "begun by an earlier version" in err


async def test_a_server_with_another_version_is_refused_mid_run(icm: Command, server: FakeVLLM) -> None:
    await icm("--run", "a")
    run = icm.runs / "a" / "run.json"
    document = json.loads(run.read_text())
    del document["result"]
    document["engine"]["version"] = "0.0.1"
    run.write_text(json.dumps(document))
    code, _, err = await icm("--run", "a")
    assert code == 2
    assert "0.0.1" in err


async def test_check_measures_the_precondition_and_stops(icm: Command) -> None:
    code, out, err = await icm("--run", "a", "--check", "--calibrate", "mean")
    assert code == 0, err
    for labeling in ("gold", "all True", "all False", "flipped gold", "random"):
        assert labeling in out
    assert "calibration: mean" in out
    assert not (icm.runs / "a" / "labels.jsonl").exists()


async def test_data_without_gold_reports_no_accuracy(icm: Command, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    code, out, err = await icm("--run", "a")
    assert code == 0, err
    assert "unknown (no labels to compare)" in out


async def test_an_external_api_is_asked_in_text_and_gives_labels(icm: Command, server: FakeVLLM) -> None:
    icm.environment |= {"LLAMA_API_BASE": server.url + "/v1", "API_KEY": "sk-external"}
    server.api_key = "sk-external"
    code, _, err = await icm("--run", "a", "--no-use_vllm", "--batch_size", "8")
    assert code == 0, err
    assert len(icm.labels("a").splitlines()) == 8
    prompt = server.completions[-1]["prompt"]
    [text] = [prompt] if isinstance(prompt, str) else prompt
    assert text.endswith("I think this claim is")
    run = json.loads((icm.runs / "a" / "run.json").read_text())
    assert run["engine"]["kind"] == "openai-compatible"
    assert run["kv_capacity"] is None
    assert run["cost"]["asked_ahead"] == 0  # every question is paid for


async def test_a_missing_label_stops_or_is_floored_and_counted(icm: Command, server: FakeVLLM) -> None:
    server.exact_labels = "ignored"
    server.drop = {7983}  # ' False'
    code, _, err = await icm("--run", "a")
    assert code == 1
    assert "claim" in err
    for run in ("b", "c"):  # the second time every answer comes from the cache
        code, out, err = await icm("--run", run, "--missing_label", "floor")
        assert code == 0, err
        assert "were floored" in out


async def test_leaking_keys_are_announced_and_left_out_claims_counted(icm: Command) -> None:
    code, out, err = await icm("--run", "a", "--consistency", "upstream", "--K", "3")
    assert code == 0, err
    assert "makes its keys from gold labels" in err
    assert "8 claims of the file are outside the pool" in out


BAD = [
    (["--data", "none.jsonl"], "none.jsonl: not found"),
    (["--model", "other"], "fake-8b"),
    (["--batch_size", "1"], "must be at least 2"),
    (["--testbed", "nope"], "nope"),
    (["--alhpa", "3"], "unrecognized arguments"),
    (["--run", "../x"], "not a path"),
    (["--initial_T", "0"], "must be above 0"),
    (["--lookahead", "-1"], "must be auto"),
    (["--alpha", "nan"], "must be a finite number"),
    (["--seed", "99999999999999999999"], "below 2^63"),
]


@pytest.mark.parametrize(("flags", "complaint"), BAD)
async def test_bad_input_is_one_clear_line_and_exit_code_2(icm: Command, flags: list[str], complaint: str) -> None:
    code, _, err = await icm(*flags)
    assert code == 2
    assert complaint in err
    assert len(err.strip().splitlines()) == 1


async def test_a_server_that_is_not_up_is_named_with_the_command_that_starts_one(icm: Command) -> None:
    icm.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    started = time.monotonic()
    code, _, err = await icm()
    assert code == 2
    assert "http://127.0.0.1:9" in err
    assert "launch_vllm_server.sh" in err
    assert time.monotonic() - started < 30


async def test_claims_that_do_not_fit_the_context_are_counted(icm: Command, server: FakeVLLM) -> None:
    server.max_model_len = 150
    code, _, err = await icm()
    assert code == 2
    assert "16 claims need prompts of up to" in err
    assert "of them fit" in err
    assert not server.pools


async def test_malformed_secrets_name_the_line_not_the_content(icm: Command, tmp_path: Path) -> None:
    secrets = tmp_path / "SECRETS"
    secrets.write_text("API_KEY=abc\nthis is sk-hidden\n")
    icm.environment["ICM_SECRETS"] = str(secrets)
    code, _, err = await icm()
    assert code == 2
    assert "2" in err
    assert "sk-hidden" not in err


async def test_no_key_is_written_anywhere(icm: Command, server: FakeVLLM) -> None:
    server.api_key = "sk-planted-key"
    icm.environment["VLLM_API_KEY"] = "sk-planted-key"
    code, out, err = await icm("--run", "a")
    assert code == 0, err
    assert "sk-planted-key" not in out + err
    for path in icm.runs.rglob("*"):
        if path.is_file():
            assert b"sk-planted-key" not in path.read_bytes(), path
    icm.environment["VLLM_API_KEY"] = "sk-wrong-key"
    code, out, err = await icm("--run", "b")
    assert code != 0
    assert "sk-wrong-key" not in out + err


def test_help_describes_every_flag() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    for flag in ("--alpha", "--decay", "--layout", "--calibrate", "--check", "--consistency_fix_K"):
        assert flag in done.stdout
