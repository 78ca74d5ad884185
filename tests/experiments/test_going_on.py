"""More data, and runs that moved: an added row costs what one append costs, and a moved run asks nothing anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from tests.experiments.test_icm_cli import Command, data, icm, server  # noqa: F401  fixtures

ANNEALING = ("--num_seed", "4", "--max_tail", "4")
NEW = {"question": "Is 99 even?", "choice": "no", "label": 1, "consistency_id": 99}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(icm: Command, data: Path, *flags: str, runs: Path | None = None) -> Command:  # noqa: F811
    """The same command on another file, with these flags in place of annealing's."""
    other = Command(icm.environment["VLLM_BASE_URL"], data, runs or icm.runs)
    other.arguments = [word for word in other.arguments if word not in ANNEALING] + ["--batch_size", "30", *flags]
    return other


@pytest.mark.parametrize(
    "flags",
    [("--num_seed", "4"), ("--search", "ascent"), ("--num_seed", "4", "--layout", "upstream")],
    ids=["annealing", "ascent", "upstream's order"],
)
async def test_an_added_row_asks_at_most_what_one_append_asks(icm: Command, data: Path, flags: tuple[str, ...]) -> None:  # noqa: F811
    """Its own prediction, and one evaluation of N + 1 claims."""
    before = command(icm, data, *flags)
    assert (await before("--run", "first"))[0] == 0
    size = len(rows_of(data))
    grown = command(icm, written(data.parent / "grown" / data.name, [*rows_of(data), NEW]), *flags)
    code, _, err = await grown("--run", "second", "--continue_from", "first")
    assert code == 0, err
    assert f"{size} answers of its search are taken over, in their order: they are not asked again" in err
    asked = sum(line["asked"] for line in grown.log("second"))
    assert 0 < asked <= 1 + size + 1
    found = {row["question"] + row["choice"]: row for row in rows_of(grown.runs / "second" / "labels.jsonl")}
    assert len(found) == size + 1
    kept = [found[row["question"] + row["choice"]]["label"] == row["label"]
            for row in rows_of(grown.runs / "first" / "labels.jsonl")]  # fmt: skip
    assert all(kept)
    # Another row after that one, and then none: from the end of a search that went on itself.
    third = command(
        icm, written(data.parent / "more" / data.name, [*rows_of(data), NEW, NEW | {"choice": "yes"}]), *flags
    )
    assert (await third("--run", "third", "--continue_from", "second"))[0] == 0
    assert 0 < sum(line["asked"] for line in third.log("third")) <= 1 + size + 2
    assert (await third("--run", "fourth", "--continue_from", "third"))[0] == 0
    assert not sum(line["asked"] - line["from_cache"] for line in third.log("fourth"))
    labels = [[row["label"] for row in rows_of(third.runs / run / "labels.jsonl")] for run in ("third", "fourth")]
    assert labels[0] == labels[1]


async def test_what_is_gone_is_listed_and_only_what_is_left_keeps_its_place(icm: Command, data: Path) -> None:  # noqa: F811
    assert (await command(icm, data, "--num_seed", "4")("--run", "first"))[0] == 0
    rows = rows_of(data)
    left = [row | {"choice": "certainly"} if at == 1 else row for at, row in enumerate(rows) if at not in (4, 9, 10)]
    edited = command(icm, written(data.parent / "edited" / data.name, left), "--num_seed", "4")
    code, _, err = await edited("--run", "second", "--continue_from", "first", "--batch_size", "4")
    assert code == 0, err
    assert "4 claims of first not in claims.jsonl, removed or edited: row" in err
    assert f"and 1 more (all in {edited.runs}/second/gone.jsonl)" in err
    assert "whatever --batch_size 4" in err
    assert "its answers are asked again, without the claims that are gone" in err
    gone = rows_of(edited.runs / "second" / "gone.jsonl")
    assert sorted(row["row"] for row in gone) == [1, 4, 9, 10]
    assert all(isinstance(row["label"], bool) for row in gone)


async def test_another_engine_is_asked_again(icm: Command, data: Path) -> None:  # noqa: F811
    assert (await command(icm, data, "--num_seed", "4")("--run", "first"))[0] == 0
    async with FakeVLLM(log_odds=lambda tokens: (len(tokens) * 7919 % 1000 - 499.5) / 250) as other:
        moved = Command(other.url, data, icm.runs)
        code, _, err = await moved("--run", "second", "--continue_from", "first", "--batch_size", "30")
    assert code == 0, err
    assert "its answers are asked again: another engine" in err
    assert moved.log("second")[0]["asked"] == len(rows_of(data))


@pytest.mark.parametrize(
    "flags", [("--num_seed", "4", "--lookahead", "0"), ("--search", "ascent")], ids=["annealing", "ascent"]
)
async def test_a_moved_run_asks_nothing_that_its_journal_holds(
    icm: Command,  # noqa: F811
    data: Path,  # noqa: F811
    server: FakeVLLM,  # noqa: F811
    tmp_path: Path,
    flags: tuple[str, ...],
) -> None:
    here = command(icm, data, *flags)
    assert (await here("--run", "a"))[0] == 0
    there = command(
        icm,
        Path(shutil.copy(data, written(tmp_path / "disk" / data.name, []))),
        *flags,
        runs=tmp_path / "disk" / "runs",
    )
    shutil.copytree(icm.runs / "a", there.runs / "a")
    before = server.queries
    code, _, err = await there("--run", "a")
    assert code == 0, err
    assert "shown again, nothing was computed" in err
    assert server.queries == before
    # Stopped in its middle, and moved without its response cache.
    shutil.copytree(icm.runs / "a", there.runs / "b")
    lines = here.log("a")
    half = len(lines) // 2
    written(there.runs / "b" / "log.jsonl", lines[:half])
    (there.runs / "b" / "labels.jsonl").unlink()
    document = json.loads((there.runs / "b" / "run.json").read_text())
    unfinished = {name: value for name, value in document.items() if name not in ("result", "finished", "cost")}
    (there.runs / "b" / "run.json").write_text(json.dumps(unfinished))
    code, _, err = await there("--run", "b")
    assert code == 0, err
    now = there.log("b")
    assert [line["asked"] for line in now[:half]] == [line["asked"] for line in lines[:half]]
    new, old = (sum(line["asked"] for line in log[half:]) for log in (now, lines))
    assert new == old
    assert (there.runs / "b" / "labels.jsonl").read_bytes() == icm.labels("a")
