"""A data set in batches: whole, resumable, and the same labels however many batches are searched at once."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from tests.experiments.test_icm_cli import Command, data, icm, server, unfinished  # noqa: F401 - fixtures

BATCHES = ("--num_batches", "all", "--batch_size", "8", "--num_seed", "2")


def rows(command: Command, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command.labels(run).splitlines()]


async def test_the_labels_do_not_depend_on_how_many_batches_run_at_once(icm: Command, server: FakeVLLM) -> None:  # noqa: F811
    server.latency = 0.002
    for at_once in ("1", "2", "4"):
        code, out, err = await icm("--run", f"at-{at_once}", *BATCHES, "--at_once", at_once)
        assert code == 0, err
        assert "agreement with gold" in out
        (icm.runs / "responses.sqlite").unlink()
    assert icm.labels("at-1") == icm.labels("at-2") == icm.labels("at-4")
    assert err.splitlines().count("data    claims.jsonl: all 24 claims in 3 batches") == 1
    assert err.count("labels  ") == 1
    assert (icm.runs / "at-1" / "prompt.txt").read_text().count("I think this claim is") == 8
    found = rows(icm, "at-1")
    assert sorted(row["row"] for row in found) == list(range(24))
    groups = [{row["consistency_id"] for row in found if row["batch"] == batch} for batch in range(3)]
    assert sum(map(len, groups)) == 12  # whole groups: none in two batches
    logs = [[(r["event"], r.get("claim"), r["U"]) for r in icm.log(f"at-{n}/batch-001")] for n in ("1", "4")]
    assert logs[0] == logs[1]
    result = json.loads((icm.runs / "at-1" / "run.json").read_text())["result"]
    assert result["icm"][1] + sum(n for _, n in result["predicted"].values()) == 24
    assert [part["part"] for part in result["parts"]] == ["batch-000", "batch-001", "batch-002"]


async def test_all_batches_make_progress_at_once(icm: Command, server: FakeVLLM) -> None:  # noqa: F811
    server.latency = 0.03
    process = await icm.start("--run", "fair", *BATCHES, "--at_once", "3", "--lookahead", "0")
    logs = [icm.runs / "fair" / f"batch-00{n}" / "log.jsonl" for n in range(3)]
    while not all(log.exists() and len(log.read_bytes().splitlines()) >= 4 for log in logs):
        assert process.returncode is None
        try:
            await asyncio.wait_for(process.wait(), 0.02)
        except TimeoutError:
            continue
    lengths = [len(log.read_bytes().splitlines()) for log in logs]
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert max(lengths) <= 3 * min(lengths)


async def test_batches_go_on_with_their_model_in_another_place_and_under_another_name(
    icm: Command,  # noqa: F811
    server: FakeVLLM,  # noqa: F811
) -> None:
    assert (await icm("--run", "a", *BATCHES))[0] == 0
    labels = icm.labels("a")
    unfinished(icm, "a/batch-001", 5)
    document = json.loads((icm.runs / "a" / "run.json").read_text())
    del document["result"]
    (icm.runs / "a" / "run.json").write_text(json.dumps(document))
    server.root, server.model = "/moved/here", "my-name"
    code, _, err = await icm("--run", "a", *BATCHES, "--model", "my-name")
    assert code == 0, err
    assert icm.labels("a") == labels
    (icm.runs / "a" / "run.json").write_text(json.dumps(document))
    unfinished(icm, "a/batch-001", 5)
    server.salt = "other weights"
    code, _, err = await icm("--run", "a", *BATCHES, "--model", "my-name")
    assert code == 2
    assert "was started on another engine" in err


async def test_killed_and_gone_on_with_it_ends_with_the_same_labels(icm: Command, server: FakeVLLM) -> None:  # noqa: F811
    assert (await icm("--run", "whole", *BATCHES))[0] == 0
    (icm.runs / "responses.sqlite").unlink()
    server.latency = 0.03
    process = await icm.start("--run", "killed", *BATCHES)
    log = icm.runs / "killed" / "batch-001" / "log.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < 5:
        try:
            await asyncio.wait_for(process.wait(), 0.02)
        except TimeoutError:
            continue
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert not (icm.runs / "killed" / "labels.jsonl").exists()
    assert (await icm("--run", "killed", *BATCHES, "--is_complete"))[0] == 1
    code, _, err = await icm("--run", "killed", *BATCHES, "--at_once", "1")
    assert code == 0, err
    assert icm.labels("killed") == icm.labels("whole")
    assert (await icm("--run", "killed", *BATCHES, "--is_complete"))[0] == 0


async def test_a_majority_of_passes_decides(icm: Command) -> None:  # noqa: F811
    code, _, err = await icm("--run", "votes", "--passes", "3", "--batch_size", "16")
    assert code == 0, err
    passes = [{row["row"]: row["label"] for row in rows(icm, f"votes/batch-000-pass-{n}")} for n in range(3)]
    voted = rows(icm, "votes")
    assert len(voted) == 16
    for row in voted:
        given = [labels[row["row"]] for labels in passes]
        assert row["votes_true"] == sum(given)
        assert row["label"] == (sum(given) >= 2)
    starts = [icm.log(f"votes/batch-000-pass-{n}")[0]["labels"] for n in range(3)]
    assert any(start != starts[0] for start in starts)  # other seeds, other searches


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--num_batches", "3", "--label_rest"), "--label_rest"),
        (("--num_batches", "all", "--check"), "--check"),
        (("--passes", "2"), "odd"),
        (("--num_batches", "all", "--batch_size", "1"), "batch_size"),
        (("--num_batches", "40"), "groups"),
        (("--num_batches", "some"), "num_batches"),
    ],
)
async def test_flags_that_do_not_go_together_are_named(icm: Command, flags: tuple[str, ...], told: str) -> None:  # noqa: F811
    code, _, err = await icm(*flags)
    assert code == 2
    assert told in err


async def test_other_batches_are_another_run(icm: Command, tmp_path: Path) -> None:  # noqa: F811
    assert (await icm("--run", "a", *BATCHES))[0] == 0
    code, _, err = await icm("--run", "a", "--num_batches", "2", "--batch_size", "8", "--num_seed", "2")
    assert code == 2
    assert "--num_batches 3, now 2" in err
