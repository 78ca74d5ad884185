"""icm baselines against a fake server: the table, growing it, resuming it, and what it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from fakes.vllm_server import FakeVLLM, encode, hashed_log_odds
from src.icm.objective import wilson_interval
from tests.experiments.program import Program

YES = encode(" yes")[0]


def knows_a_little(tokens: Sequence[int]) -> float:
    """Leans to True; with demonstrations it also hears the claim's own answer."""
    own = 2.0 if YES in tokens[-16:] else -2.0
    return 1.5 + 0.3 * hashed_log_odds(tokens) + (own if len(tokens) > 40 else 0.2 * own)


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=knows_a_little) as fake:
        yield fake


def write_claims(path: Path, numbers: range) -> Path:
    rows = [
        {"question": f"Is {n} a number?", "choice": answer, "label": int(answer == "yes"), "consistency_id": n}
        for n in numbers
        for answer in ("yes", "no")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Table(Program):
    """`icm baselines` in a process of its own."""

    def __init__(self, url: str, data: Path, runs: Path) -> None:
        self.runs = runs
        arguments = [
            *(sys.executable, "-m", "src.experiments.commands", "baselines", "--data", str(data)),
            *("--model", "fake-8b", "--runs_dir", str(runs), "--quiet", "--num_seed", "4", "--batch_size", "12"),
            *("--calibrate", "mean", "--run", "t"),
        ]
        super().__init__(arguments, url, PYTHONPATH=os.getcwd())

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.runs / "t" / "baselines.json").read_text())
        return document

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.document["rows"] if row["row"] == name)


@pytest.fixture
def table(server: FakeVLLM, tmp_path: Path) -> Table:
    return Table(server.url, write_claims(tmp_path / "claims.jsonl", range(16)), tmp_path / "runs")


async def test_the_table_has_every_row_with_intervals_and_comparisons(table: Table) -> None:
    code, out, err = await table("--seeds", "1", "2")
    assert code == 0, err
    names = [row["row"] for row in table.document["rows"]]
    assert names == [
        *("zero-shot", "zero-shot-calibrated", "many-shot-random", "many-shot-flipped", "many-shot-gold"),
        *("bootstrap", "bootstrap-consistent", "icm"),
    ]
    assert table.document["complete"]
    gold = table.row("many-shot-gold")
    assert [seed["compared"] for seed in gold["test"]["seeds"]] == [20, 20]  # 32 claims, 12 in the pool
    first = gold["test"]["seeds"][0]
    assert first["interval"] == pytest.approx(wilson_interval(first["agreeing"], 20))
    assert gold["test"]["mean"] > table.row("zero-shot")["test"]["mean"]
    versus = gold["test"]["versus"]["zero-shot"]
    assert versus["difference"] == pytest.approx(gold["test"]["mean"] - table.row("zero-shot")["test"]["mean"])
    assert versus["interval"][0] <= versus["difference"] <= versus["interval"][1]
    assert "many-shot-gold" not in gold["test"]["versus"]
    assert {"U", "cost"} <= gold.keys()
    assert "U" not in table.row("zero-shot")
    assert gold["cost"]["asked"] == 2 * 12  # two seeds; questions about held-out claims are not counted
    assert table.row("bootstrap")["cost"]["asked"] == 2 * 4 * 12
    assert "bootstrapping, consistent" in out
    for row in table.document["rows"]:
        answers = json.loads((table.runs / "t" / "seed-1" / "rows" / f"{row['row']}.json").read_text())
        assert len(answers["pool"]) == 12
        assert sum(a["label"] == a["gold"] for a in answers["test"]) == row["test"]["seeds"][0]["agreeing"]
        assert not {a["claim"] for a in answers["pool"]} & {a["claim"] for a in answers["test"]}
        # What held-out claims are calibrated by comes from the pool alone.
        if row["row"] in ("zero-shot-calibrated", "many-shot-gold"):
            mean = sum(a["log_odds"] for a in answers["pool"]) / len(answers["pool"])
            assert all(a["offset"] == pytest.approx(mean) for a in answers["test"])
    assert (table.runs / "t" / "seed-2" / "labels.jsonl").exists()  # an ordinary run


async def test_a_table_grows_by_seeds_and_rows_and_asks_for_nothing_twice(table: Table, server: FakeVLLM) -> None:
    assert (await table("--seeds", "1", "--rows", "zero-shot", "many-shot-gold"))[0] == 0
    asked = len(server.completions)
    assert (await table("--seeds", "1", "--rows", "zero-shot"))[0] == 0
    assert len(server.completions) == asked  # not even a server is needed
    assert (await table("--seeds", "3", "--rows", "bootstrap"))[0] == 0
    assert table.document["seeds"] == [1, 3]
    assert [row["row"] for row in table.document["rows"]] == ["zero-shot", "many-shot-gold", "bootstrap"]


async def test_stopped_and_gone_on_with_it_is_the_same_table(table: Table, server: FakeVLLM, tmp_path: Path) -> None:
    assert (await table("--seeds", "1"))[0] == 0
    whole = table.document["rows"]
    server.latency = 0.01
    other = Table(server.url, tmp_path / "claims.jsonl", tmp_path / "other")
    process = await other.start("--seeds", "1")
    waiting = asyncio.create_task(process.wait())
    while not (other.runs / "t" / "seed-1" / "log.jsonl").exists():
        assert not waiting.done()
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert other.document["rows"] == []
    code, _, err = await other("--seeds", "1")
    assert code == 0, err

    def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: row.get(key) for key in ("row", "pool", "test", "U")} for row in rows]

    assert numbers(other.document["rows"]) == numbers(whole)


async def test_a_test_file_is_the_same_for_every_seed(table: Table, tmp_path: Path) -> None:
    test = write_claims(tmp_path / "test.jsonl", range(50, 58))
    code, _, err = await table("--seeds", "1", "2", "--test_data", str(test), "--rows", "zero-shot", "many-shot-gold")
    assert code == 0, err
    assert "warning" not in err
    assert table.row("zero-shot")["test"]["claims"] == 16
    assert table.document["settings"]["test_data"] == "test.jsonl"
    own = write_claims(tmp_path / "own.jsonl", range(4, 8))
    _, _, err = await table("--seeds", "1", "--test_data", str(own), "--rows", "zero-shot", "--run", "own")
    assert "8 claims" in err


async def test_held_out_claims_are_in_no_pool(table: Table) -> None:
    code, _, err = await table("--seeds", "1", "2", "--test_size", "10", "--rows", "many-shot-gold")
    assert code == 0, err
    assert err.count("labels  ' True'") == 1  # what is asked is said once, of the first seed's pool
    assert (table.runs / "t" / "prompt.txt").read_text().count("I think this claim is") == 12
    answers = [
        json.loads((table.runs / "t" / f"seed-{seed}" / "rows" / "many-shot-gold.json").read_text()) for seed in (1, 2)
    ]
    tested = [{a["claim"] for a in each["test"]} for each in answers]
    assert tested[0] == tested[1]
    assert not tested[0] & {a["claim"] for each in answers for a in each["pool"]}


async def test_a_chat_model_is_asked_in_its_template(table: Table, server: FakeVLLM) -> None:
    async with FakeVLLM(model="chatty", chat_template="<user>{}<assistant>", log_odds=hashed_log_odds) as chat:
        flags = ("--chat_model", "chatty", "--chat_url", chat.url, "--rows", "zero-shot", "zero-shot-chat")
        code, _, err = await table("--seeds", "1", *flags)
        assert code == 0, err
        assert table.document["chat"]["template"] is True
        prompts = [tokens for body in chat.completions[-1:] for tokens in body["prompt"]]
        assert all(tokens[-len(encode("<assistant>")) :] == encode("<assistant>") for tokens in prompts)
    assert table.row("zero-shot-chat")["test"]["seeds"][0]["compared"] == 20


async def test_a_chat_model_without_a_template_is_asked_in_plain_text_and_says_so(table: Table) -> None:
    async with FakeVLLM(model="plain") as chat:
        flags = ("--chat_model", "plain", "--chat_url", chat.url, "--rows", "zero-shot-chat")
        code, _, err = await table("--seeds", "1", *flags)
        assert code == 0, err
        assert "no chat template" in err
        assert table.document["chat"]["template"] is False


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--rows", "zero-shot-chat"), "--chat_model"),
        (("--test_data", "nowhere.json"), "nowhere.json"),
        (("--batch_size", "32"), "held-out"),
        (("--rows", "icn"), "icn"),
        (("--seeds", "x"), "seeds"),
    ],
)
async def test_bad_input_is_one_line(table: Table, flags: tuple[str, ...], told: str) -> None:
    code, _, err = await table(*flags)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


async def test_other_settings_are_another_table(table: Table) -> None:
    assert (await table("--seeds", "1", "--rows", "zero-shot"))[0] == 0
    code, _, err = await table("--seeds", "1", "--rows", "zero-shot", "--rounds", "7")
    assert code == 2
    assert "--rounds 4, now 7" in err


async def test_the_best_of_several_starts_is_a_row_only_where_it_is_named(table: Table) -> None:
    """What a whole table has without it, the first test of this file says."""
    best = ("--rows", "zero-shot", "bootstrap-best", "--rounds", "1")
    code, out, err = await table("--seeds", "1", *best, "--restarts", "2")
    assert code == 0, err
    assert table.row("bootstrap-best")["cost"]["asked"] == 2 * (1 + 1) * 12
    assert table.document["settings"]["restarts"] == 2
    head, *rows = [line for line in out.splitlines() if line.startswith(("   ", "zero-shot", "bootstrapping"))]
    assert {line.index(share) for line, share in zip(rows, map(shares, rows), strict=True)} == {head.index("pool")}
    code, _, err = await table("--seeds", "1", *best)
    assert code == 2
    assert "--restarts 2, now 8" in err
    code, _, err = await table("--seeds", "2", "--rows", "bootstrap-best", "--rounds", "1", "--restarts", "2")
    assert code == 0, err
    assert table.row("bootstrap-best")["seeds"] == [1, 2]


def shares(line: str) -> str:
    """The first figure of a row of the table."""
    return line.split("  ", 1)[1].split()[0]


async def test_other_restarts_are_another_table_and_tables_from_before_there_were_any_go_on(table: Table) -> None:
    assert (await table("--seeds", "1", "--rows", "zero-shot"))[0] == 0
    assert "restarts" not in table.document["settings"]
    code, _, err = await table("--seeds", "1", "--rows", "bootstrap-best", "--restarts", "2")
    assert code == 2
    assert "--restarts 8, now 2" in err


@pytest.mark.parametrize("named", [True, False])
async def test_bootstrapping_follows_the_prior_but_in_tables_that_began_from_halves(table: Table, named: bool) -> None:
    """What an earlier version left is the same table without a setting."""
    flags = ("--prior", "0.75", "--rows", "bootstrap", "--rounds", "1")
    if not named:
        table.arguments = table.arguments[:-2]  # --run t
    code, _, err = await table("--seeds", "1", *flags)
    assert code == 0, err
    [folder] = table.runs.glob("*/baselines.json")
    document = json.loads(folder.read_text())
    assert document["settings"].pop("bootstrap_share") == "prior"
    folder.write_text(json.dumps(document))
    if not named:
        digest = hashlib.sha256(orjson.dumps(document["settings"], option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
        folder.parent.rename(folder.parent.with_name(folder.parent.name[:-8] + digest))
    code, _, err = await table("--seeds", "2", *flags)
    assert code == 0, err
    assert "begun with half of the labels that bootstrapping starts with True, and goes on so" in err
    [folder] = table.runs.glob("*/baselines.json")
    document = json.loads(folder.read_text())
    assert document["seeds"] == [1, 2]
    assert "bootstrap_share" not in document["settings"]
    code, _, err = await table("--seeds", "2", *flags[2:])
    assert (code, "started with --prior 0.75, now without" in err) == ((2, True) if named else (0, False))
    assert "bootstrap_share" not in err


async def test_claims_without_gold_cannot_be_compared(table: Table, tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "label"}) + "\n" for row in rows))
    code, _, err = await table("--seeds", "1")
    assert code == 2
    assert "gold" in err
