"""The command line against a fake server in another process: whole runs, resuming after kills, bad input."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from fakes.vllm_server import BOS, FALSE, TRUE, FakeVLLM, Fault
from tests.core.fake_endpoint import FakeEndpoint
from tests.experiments.program import Program

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


class Command(Program):
    """ICM.py in a process of its own, against one server and one folder of runs."""

    def __init__(self, url: str, data: Path, runs: Path) -> None:
        self.runs = runs
        arguments = [
            *(sys.executable, str(SCRIPT), "--data", str(data), "--model", "fake-8b", "--runs_dir", str(runs)),
            *("--quiet", "--num_seed", "4", "--batch_size", "16", "--max_tail", "4"),
        ]
        super().__init__(arguments, url)

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


@pytest.mark.parametrize("there", [False, True])
async def test_a_run_that_nobody_answers_leaves_nothing(
    server: FakeVLLM, data: Path, tmp_path: Path, there: bool
) -> None:
    runs = tmp_path / "new" / "runs"
    if there:
        runs.mkdir(parents=True)
    icm = Command(server.url, data, runs)
    icm.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    code, _, err = await icm("--run", "a")
    assert code == 2, err
    assert runs.exists() is there
    assert (tmp_path / "new").exists() is there
    assert not there or not list(runs.iterdir())
    icm.environment["VLLM_BASE_URL"] = server.url
    code, _, err = await icm("--run", "a")
    assert code == 0, err
    assert (runs / "responses.sqlite").exists()


async def test_a_finished_run_is_shown_without_a_server(icm: Command, server: FakeVLLM) -> None:
    assert (await icm("--run", "a", "--is_complete"))[0] == 1
    assert (await icm("--run", "a"))[0] == 0
    asked = len(server.requests)
    icm.environment["VLLM_BASE_URL"] = "http://127.0.0.1:9"
    code, out, err = await icm("--run", "a", "--is_complete")
    assert code == 0
    assert "agreement" in out
    assert len(server.requests) == asked
    document = json.loads((icm.runs / "a/run.json").read_text())
    assert err.startswith(f"finished {document['finished']}; shown again, nothing was computed\n")


async def test_a_run_says_first_what_it_will_ask_and_keeps_one_whole_prompt(icm: Command, server: FakeVLLM) -> None:
    code, out, err = await icm("--run", "quiet")
    assert code == 0
    assert "  | " not in err
    icm.arguments.remove("--quiet")
    code, out, err = await icm("--run", "a")
    assert code == 0
    lines = err.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["data", "groups", "model", "labels", "prompt"]
    prompt = icm.runs / "a" / "prompt.txt"
    assert lines[4].endswith(f"whole in {prompt}")
    assert "  | [... 13 more demonstrations ...]" in lines
    assert "  | I think this claim is[ True| False]" in lines
    assert "data  " not in out
    text = prompt.read_text()
    assert text.count("I think this claim is") == 16
    assert text.endswith("I think this claim is")
    kept = prompt.read_bytes()
    document = json.loads((icm.runs / "a/run.json").read_text())
    del document["result"]
    (icm.runs / "a/run.json").write_text(json.dumps(document))
    _, _, again = await icm("--run", "a")  # goes on, and says so again
    assert "".join(again.splitlines()[:5]) == "".join(lines[:5])
    assert prompt.read_bytes() == kept


async def test_the_check_shows_a_whole_prompt(icm: Command) -> None:
    code, out, err = await icm("--run", "a", "--check")
    assert code == 0
    assert err.count("  | I think this claim is") == 16
    assert err.count("  | I think this claim is[ True| False]") == 1
    assert "I think" not in out


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
    assert (await icm("--run", "b"))[0] == 0
    del icm.arguments[-2:]  # --max_tail 4: upstream's order has no tail
    assert (await icm("--run", "a", "--layout", "upstream"))[0] == 0
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
    again = shlex.split(err.decode().splitlines()[-1])
    assert again == [*icm.arguments, "--run", "a"]
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


def unfinished(icm: Command, run: str, lines: int | None = None) -> None:
    """The run as if it had been stopped, after so many lines of its journal."""
    folder = icm.runs / run
    document = json.loads((folder / "run.json").read_text())
    del document["result"]
    (folder / "run.json").write_text(json.dumps(document))
    (folder / "labels.jsonl").unlink()
    log = folder / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:lines]))


async def test_a_run_goes_on_with_its_model_in_another_place_and_under_another_name(
    icm: Command, server: FakeVLLM
) -> None:
    assert (await icm("--run", "a"))[0] == 0
    labels = icm.labels("a")
    unfinished(icm, "a", 9)
    asked = len(server.completions)
    server.root, server.model = "/moved/here", "my-name"
    code, _, err = await icm("--run", "a", "--model", "my-name")
    assert code == 0, err
    assert "the run goes on: the model answers as before (model 'fake-8b', now 'my-name', root" in err
    assert icm.labels("a") == labels
    assert len(server.completions) - asked <= 2  # the canary and the probe: all else is in the cache
    assert (await icm("--run", "a", "--model", "fake-8b"))[0] == 0  # finished, it keeps the name that it began with
    code, _, err = await icm("--run", "a", "--model", "my-name")
    assert code == 2
    assert "--model fake-8b, now my-name" in err


@pytest.mark.parametrize("change", ["root", "name"])
async def test_a_run_does_not_go_on_with_another_model_in_another_place(
    icm: Command, server: FakeVLLM, change: str
) -> None:
    assert (await icm("--run", "a", "--K", "5"))[0] == 0
    unfinished(icm, "a")
    server.salt = "other weights"
    if change == "root":
        server.root = "/moved/here"
    else:
        server.model = "my-name"
    code, _, err = await icm("--run", "a", "--K", "5", "--model", server.model)
    assert code == 2
    told = "root '/models/fake', now '/moved/here'" if change == "root" else "model 'fake-8b', now 'my-name'"
    assert f"was started on another engine ({told})" in err


async def test_a_run_does_not_go_on_with_another_configuration_of_its_model(data: Path, tmp_path: Path) -> None:
    async with FakeVLLM(trees=True, config="a" * 64) as server:
        icm = Command(server.url, data, tmp_path / "runs")
        assert (await icm("--run", "a", "--K", "5"))[0] == 0
        unfinished(icm, "a")
        server.config = "b" * 64
        code, _, err = await icm("--run", "a", "--K", "5")
        assert code == 2
        assert "was started on another engine (config 'aaaaaaaaaaaa', now 'bbbbbbbbbbbb')" in err


async def test_a_run_folder_goes_on_where_it_was_copied_to(icm: Command, server: FakeVLLM, tmp_path: Path) -> None:
    assert (await icm("--run", "a"))[0] == 0
    labels = icm.labels("a")
    unfinished(icm, "a", 9)
    elsewhere = tmp_path / "another machine"
    shutil.copytree(icm.runs / "a", elsewhere / "runs" / "a")
    (tmp_path / "claims.jsonl").rename(elsewhere / "claims.jsonl")
    shutil.rmtree(icm.runs)
    async with FakeVLLM(log_odds=signed_by_words, root="/its/own/path") as other:
        there = Command(other.url, elsewhere / "claims.jsonl", elsewhere / "runs")
        code, _, err = await there("--run", "a")
        assert code == 0, err
        assert there.labels("a") == labels
    assert not icm.runs.exists()


def grow(data: Path, *, new: int, without: Sequence[int] = ()) -> Path:
    """The file without some rows, with groups of two claims more."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [row for number, row in enumerate(rows) if number not in without]
    rows += [
        {"question": f"Is {n} odd?", "choice": answer, "label": int((n % 2 == 1) == (answer == "yes")),
         "consistency_id": f"odd {n}"}
        for n in range(new) for answer in ("yes", "no")
    ]  # fmt: skip
    grown = data.with_name("grown.jsonl")
    grown.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return grown


async def test_a_grown_file_goes_on_from_what_is_labelled(icm: Command, data: Path) -> None:
    assert (await icm("--run", "a"))[0] == 0
    before = {(r["question"], r["choice"]): r for r in map(json.loads, icm.labels("a").splitlines())}
    labelled = {at: row["label"] for at, row in before.items() if row["by"] == "icm"}
    removed = before["Is 3 even?", "yes"] if ("Is 3 even?", "yes") in before else next(iter(before.values()))
    grown = grow(data, new=3, without=[removed["row"]])
    there = Command(icm.environment["VLLM_BASE_URL"], grown, icm.runs)
    code, _, err = await there("--run", "a")
    assert code == 2
    assert "a: was started with --data claims.jsonl, now grown.jsonl. Use the same flags" in err
    code, _, err = await there("--run", "b", "--continue_from", "a", "--batch_size", "20", "--K", "0")
    assert code == 0, err
    kept = {at: label for at, label in labelled.items() if at != (removed["question"], removed["choice"])}
    assert f"starts with {len(kept)} labels of a ({sum(kept.values())} True) in place of random ones" in err
    assert f"1 claim of a not in grown.jsonl, removed or edited: row {removed['row']} (" in err
    assert "claims of grown.jsonl: --batch_size 29 takes in all" in err
    [start] = [record for record in icm.log("b") if record["event"] == "start"]
    pool = [json.loads(line) for line in (icm.runs / "b" / "claims.jsonl").read_text().splitlines()]
    assert len(start["labels"]) == len(kept)
    assert {(pool[int(at)]["question"], pool[int(at)]["choice"]) for at in start["labels"]} == kept.keys()
    document = json.loads((icm.runs / "b" / "run.json").read_text())
    assert document["continued_from"]["labels"] == len(kept)
    assert len(document["settings"]["continue_from"]) == 64


async def test_a_file_that_changed_under_its_run_is_refused_with_the_way_on(icm: Command, data: Path) -> None:
    assert (await icm("--run", "a"))[0] == 0
    assert (await icm("--run", "p", "--num_batches", "1", "--passes", "3", "--K", "0"))[0] == 0
    grow(data, new=3).replace(data)
    code, _, err = await icm("--run", "a")
    assert code == 2
    assert err.endswith(
        "a: was started with another content of claims.jsonl, which has changed since. "
        "To go on from its labels: --continue_from a --run NEW\n"
    )
    code, _, err = await icm("--run", "b", "--continue_from", "a", "--K", "0")
    assert code == 0, err
    code, _, err = await icm("--run", "a", "--alpha", "3")
    assert code == 2
    assert "another content of claims.jsonl, which has changed since, --alpha 30.0, now 3.0. Use the same flags" in err
    code, _, err = await icm("--run", "p", "--num_batches", "1", "--passes", "3", "--K", "0")
    assert code == 2
    assert "which has changed since. Use another --run" in err


async def test_a_run_that_goes_on_from_another_is_resumed_as_every_run(
    icm: Command, server: FakeVLLM, data: Path
) -> None:
    assert (await icm("--run", "a"))[0] == 0
    unfinished(icm, "a", 20)  # its last state in the journal counts
    there = Command(server.url, grow(data, new=4), icm.runs)
    flags = ("--continue_from", str(icm.runs / "a"), "--batch_size", "64", "--context_cap", "8")
    code, out, err = await there("--run", "whole", *flags)
    assert code == 0, err
    assert "claims labelled" in out
    assert "no room" not in err
    labels = icm.labels("whole")
    assert len(labels.splitlines()) == 32
    unfinished(icm, "whole", 7)
    (icm.runs / "responses.sqlite").unlink()
    code, _, err = await there("--run", "whole", *flags)
    assert code == 0, err
    assert icm.labels("whole") == labels
    assert (await there("--run", "whole", "--is_complete", *flags))[0] == 0
    code, _, err = await there("--run", "whole", *flags[2:])
    assert code == 2
    assert "was started with --continue_from, now without. Use the same flags" in err
    (icm.runs / "a" / "log.jsonl").write_bytes(
        b"".join((icm.runs / "a" / "log.jsonl").read_bytes().splitlines(True)[:3])
    )
    code, _, err = await there("--run", "whole", *flags)
    assert code == 2
    assert "was started with other labels of another run (--continue_from). Use the same flags" in err
    code, _, err = await icm("--run", "a", *flags[:2])
    assert code == 2
    assert "was started with no --continue_from. Use the same flags" in err
    code, _, err = await there(*flags, "--num_batches", "all")
    assert code == 2
    assert "leave out --num_batches" in err


async def test_check_measures_the_precondition_and_stops(icm: Command) -> None:
    code, out, err = await icm("--run", "a", "--check", "--calibrate", "mean")
    assert code == 0, err
    for labeling in ("gold", "all True", "all False", "flipped gold", "random"):
        assert labeling in out
    assert "calibration: mean" in out
    assert {path.name.partition("-")[0] for path in icm.runs.iterdir()} == {"responses.sqlite"}, "scores, and no run"


async def test_check_changes_nothing_in_the_folder_of_a_run(icm: Command) -> None:
    await icm("--run", "a")
    before = {path: path.read_bytes() for path in (icm.runs / "a").iterdir()}
    code, out, err = await icm("--run", "a", "--check")
    assert code == 0, err
    assert "flipped gold" in out
    assert {path: path.read_bytes() for path in (icm.runs / "a").iterdir()} == before


async def test_settings_that_contradict_each_other_are_refused_of_a_run_that_begins(
    icm: Command, server: FakeVLLM
) -> None:
    flags = ("--run", "a", "--layout", "upstream")
    code, _, err = await icm(*flags)
    assert code == 2
    assert err == "error: --max_tail 4 and --layout upstream contradict each other: upstream's order has no tail\n"
    code, _, err = await icm(*flags, "--num_batches", "2", "--batch_size", "8")
    assert code == 2
    assert "--max_tail 4 and --layout upstream" in err
    assert not icm.runs.exists()
    assert not server.requests


async def test_a_run_that_began_with_settings_that_contradict_each_other_goes_on(icm: Command) -> None:
    *begun, flag, value = icm.arguments
    icm.arguments = begun
    flags = ("--run", "a", "--layout", "upstream")
    assert (await icm(*flags))[0] == 0
    labels, journal = icm.labels("a"), icm.log("a")
    path = icm.runs / "a" / "run.json"
    document = json.loads(path.read_text())
    document["settings"]["max_tail"] = int(value)  # as a version without this check wrote it
    del document["result"]
    path.write_text(json.dumps(document))
    (icm.runs / "a" / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal[:5]))
    code, _, err = await icm(*flags, flag, value)
    assert code == 0, err
    assert icm.labels("a") == labels


async def test_a_run_that_began_with_an_alpha_of_zero_goes_on(icm: Command) -> None:
    assert (await icm("--run", "a", "--alpha", "1"))[0] == 0
    path = icm.runs / "a" / "run.json"
    document = json.loads(path.read_text())
    document["settings"]["alpha"] = 0.0  # as a version without this check wrote it
    path.write_text(json.dumps(document))
    code, _, err = await icm("--run", "a", "--alpha", "0")
    assert code == 0, err


async def test_a_known_share_of_true_claims_is_a_setting_of_its_own(icm: Command) -> None:
    assert (await icm("--calibrate", "mean"))[0] == 0
    code, out, err = await icm("--calibrate", "mean", "--prior", "0.75")
    assert code == 0, err
    assert "(calibration: mean, prior 0.75; search: " in out
    runs = {json.loads(path.read_text())["settings"].get("prior"): path.parent for path in icm.runs.glob("*/run.json")}
    assert runs.keys() == {None, 0.75}
    assert "prior" not in json.loads((runs[None] / "run.json").read_text())["settings"]
    rows = [json.loads(line) for line in (runs[0.75] / "labels.jsonl").read_text().splitlines()]
    searched = [row["log_odds"] for row in rows if row["by"] == "icm"]
    offset = float(np.quantile(searched, 0.25))
    predicted = [row for row in rows if row["by"] == "predicted"]
    assert all(row["label"] == (row["log_odds"] > offset) for row in predicted)
    document = json.loads((runs[0.75] / "run.json").read_text())
    alone = [row["zero_shot"] for row in rows]
    right = sum((row["zero_shot"] > np.quantile(alone, 0.25)) == row["gold"] for row in rows)
    assert document["result"]["zero_shot_calibrated"] == [right, 16]
    del document["result"]
    (runs[0.75] / "run.json").write_text(json.dumps(document))
    labels = (runs[0.75] / "labels.jsonl").read_bytes()
    assert (await icm("--calibrate", "mean", "--prior", "0.75"))[0] == 0  # replayed from its journal
    assert (runs[0.75] / "labels.jsonl").read_bytes() == labels


async def test_labels_that_are_only_the_random_start_are_told(icm: Command) -> None:
    code, _, err = await icm("--run", "a", "--batch_size", "4", "--K", "0")
    assert code == 0, err
    assert "all 4 claims of the pool begin with a random label (--num_seed 4)" in err
    told = "warning: all 4 labels of the search are random"
    assert told in err
    assert told in (await icm("--run", "a", "--batch_size", "4", "--K", "0"))[2], "shown again"
    code, _, err = await icm("--run", "b", "--batch_size", "4", "--K", "0", "--num_batches", "2")
    assert code == 0, err
    assert "warning: all 8 labels of the search are random" in err
    code, _, err = await icm("--run", "c")
    assert code == 0, err
    assert "begin with a random label" not in err
    assert "are random" not in err
    code, _, err = await icm("--run", "d", "--continue_from", "a", "--batch_size", "4", "--K", "0")
    assert code == 0, err
    assert "begin with a random label" not in err
    assert "are random" not in err


async def test_data_without_gold_reports_no_accuracy(icm: Command, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    code, out, err = await icm("--run", "a")
    assert code == 0, err
    assert out.count("unknown (no labels to compare)") == 1
    assert "zero-shot" not in out


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


async def test_a_llama_server_gives_labels_and_says_what_it_had_cached(icm: Command) -> None:
    async with FakeEndpoint(style="llama", model="fake-8b", log_odds=signed_by_words) as llama:
        llama.cached = 5
        icm.environment |= {"LLAMA_API_BASE": llama.url + "/v1", "VLLM_BASE_URL": ""}
        code, _, err = await icm("--run", "a", "--batch_size", "8")
        assert code == 0, err
        assert len(icm.labels("a").splitlines()) == 8
        assert json.loads((icm.runs / "a" / "run.json").read_text())["engine"]["fingerprint"]
        sent = [step for step in icm.log("a") if step["event"] == "step" and step["tokens_sent"]]
        assert sent
        assert all(step["tokens_cached"] == 5 * (step["asked"] - step["from_cache"]) for step in sent)


async def test_an_endpoint_that_cannot_score_is_refused_in_one_line_before_anything_is_asked(icm: Command) -> None:
    wrapped = FakeEndpoint(template="<|user|>{}<|assistant|>", counts_on="Sure! What next?")
    alone = FakeEndpoint(at_most=1)
    for endpoint, told in ((wrapped, "does not continue texts as they are"), (alone, "those of all labels")):
        async with endpoint as server:
            icm.environment |= {"LLAMA_API_BASE": server.url + "/v1", "VLLM_BASE_URL": ""}
            code, _, err = await icm("--run", "a")
            assert code == 2, err
            assert told in err
            assert len(err.splitlines()) == 1
            assert len(server.completions) <= 2


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
    (["--continue_from", "nobody"], "no run of that name"),
    (["--alpha", "nan"], "must be a finite number"),
    (["--label_rest", "--num_batches", "2"], "leave out --num_batches and --passes, or --label_rest"),
    (["--alpha", "-5"], "--alpha -5 must be above 0"),
    (["--alpha", "0"], "--alpha 0 must be above 0"),
    (["--alpha", "0", "--num_batches", "2"], "--alpha 0 must be above 0"),
    (["--alpha", "0", "--check"], "--alpha 0 must be above 0"),
    (["--seed", "99999999999999999999"], "below 2^63"),
    (["--prior", "0"], "--prior: must be a share above 0 and below 1, not 0"),
    (["--prior", "1.5", "--calibrate", "mean"], "--prior: must be a share"),
    (["--prior", "nan", "--calibrate", "mean"], "--prior: must be a share"),
    (["--prior", "97%"], "--prior"),
    (["--prior", "0.97"], "--prior 0.97 and --calibrate none contradict each other"),
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


@pytest.mark.parametrize("flags", [(), ("--num_batches", "2", "--batch_size", "8")])
async def test_a_port_of_something_else_is_refused_and_nothing_is_left_of_the_run(
    icm: Command, flags: tuple[str, ...]
) -> None:
    async with web_server() as url:
        icm.environment["VLLM_BASE_URL"] = url
        code, _, err = await icm("--run", "a", *flags)
    assert code == 2
    assert f"HTTP 404 from {url}/v1/models" in err
    assert "go on with" not in err
    assert not (icm.runs / "a").exists()


@contextlib.asynccontextmanager
async def web_server() -> AsyncIterator[str]:
    """One that serves none of vLLM's paths."""
    runner = web.AppRunner(web.Application())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_claims_that_do_not_fit_the_context_are_counted(icm: Command, server: FakeVLLM) -> None:
    server.max_model_len = 150
    code, _, err = await icm()
    assert code == 2
    assert "16 claims need prompts of up to" in err
    assert "of them fit" in err
    assert not server.pools


async def test_a_capped_context_is_checked_for_what_is_asked(icm: Command, server: FakeVLLM) -> None:
    server.max_model_len = 150  # too short for 15 demonstrations
    code, _, err = await icm("--context_cap", "3", "--run", "a", "--label_rest")
    assert code == 0, err
    asked = [len(prompt) for body in server.completions for prompt in body["prompt"] if isinstance(prompt, list)]
    assert max(asked) < 150
    server.max_model_len = 60
    code, _, err = await icm("--context_cap", "3", "--run", "b")
    assert code == 2
    assert "3 demonstrations need prompts of up to" in err
    assert "2 of the longest fit. Use a smaller --context_cap" in err


async def test_a_capped_run_asks_both_servers_and_ends_as_on_one(
    icm: Command, server: FakeVLLM, data: Path, tmp_path: Path
) -> None:
    flags = ("--run", "a", "--context_cap", "3")
    assert (await icm(*flags))[0] == 0
    async with FakeVLLM(log_odds=signed_by_words) as first, FakeVLLM(log_odds=signed_by_words) as second:
        both = Command(f"{first.url},{second.url}", data, tmp_path / "other runs")
        code, _, err = await both(*flags)
        assert code == 0, err
        counts = [sum(len(body["prompt"]) for body in each.completions) for each in (first, second)]
    assert min(counts) > sum(counts) / 4
    assert both.labels("a") == icm.labels("a")
    scores = [[(r["event"], r.get("claim"), r["U"]) for r in command.log("a")] for command in (icm, both)]
    assert scores[0] == scores[1]


async def test_the_tokens_of_a_demonstration_are_shown_and_kept(icm: Command, server: FakeVLLM) -> None:
    _, out, _ = await icm("--run", "a", "--check")
    assert f"' True' {TRUE}" in out
    assert f"prefix        '<bos>' {BOS}" in out
    assert (await icm("--run", "b"))[0] == 0
    tokens = json.loads((icm.runs / "b" / "run.json").read_text())["tokens"]
    assert tokens["prefix"] == [[BOS, "<bos>"]]
    assert tokens["labels"] == {" True": TRUE, " False": FALSE}
    text = "".join(piece for _, piece in tokens["demonstration"])
    assert text.startswith("Question: Is ")
    assert text.endswith("I think this claim is True\n\n")
    assert [TRUE, " True"] in tokens["demonstration"]
    server.detokenizes = False  # a gateway that passes fewer paths
    _, out, _ = await icm("--run", "a", "--check")
    assert f"  {TRUE}  " in out


async def test_a_run_goes_on_with_the_tokens_that_it_began_with(icm: Command, server: FakeVLLM) -> None:
    server.latency = 0.05
    process = await icm.start("--run", "a")
    while not (icm.runs / "a" / "log.jsonl").exists():
        await asyncio.sleep(0.02)
    process.send_signal(signal.SIGINT)
    await process.communicate()
    server.latency = 0.0
    server.split_labels = True  # the same server with another tokenizer
    code, _, err = await icm("--run", "a")
    assert code == 2
    assert "was started with other tokens for its demonstration and labels" in err
    server.split_labels = False
    path = icm.runs / "a" / "run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "tokens"}))
    code, _, err = await icm("--run", "a")  # begun by a version that kept no record of them, which were the same
    assert code == 0, err


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
