"""icm label --abstain and icm export --abstain: which labels are kept, that nothing is asked for it, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from src.experiments.commands import main
from src.results.run_folder import RunFolder
from tests.experiments.test_icm_cli import Command, data, icm, server  # noqa: F401  fixtures
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]
ODDS = [(1 if label else -1) * (0.5 + at / 10) for at, label in enumerate(HALF)]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Its surest labels are right, and some of the others wrong."""
    gold = [label if at >= 10 else not label for at, label in enumerate(HALF)]
    return write_run(tmp_path / "runs" / "a", labels=HALF, gold=gold, log_odds=ODDS)


@pytest.mark.parametrize(("form", "without", "lines"), [("jsonl", True, 40), ("csv", True, 41), ("sft", False, 30)])
def test_an_export_leaves_doubtful_labels_out_or_empty(
    run: Path, form: str, without: bool, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert main(["export", str(run), "--format", form, "-o", str(tmp_path / "x"), "--abstain_below", "1.5"]) == 0
    told = capsys.readouterr()
    assert "doubt: 30 of 40 claims in the pool keep their label, with a margin of at least 1.5 nat" in told.err
    assert ("40 claims, 10 of them without a label" if without else "30 claims, 10 left out") in told.out
    assert len((tmp_path / "x").read_text().splitlines()) == lines
    assert {path: path.read_bytes() for path in run.iterdir()} == before, "an export changed the run"


def test_an_export_keeps_what_the_labels_of_other_claims_allow(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "-o", str(tmp_path / "x"), "--abstain", "0.1", "--abstain_on", "gold"]) == 0
    told = capsys.readouterr().err
    assert (
        "at most 0.1 are expected to be wrong, if the 20 claims whose label is checked (gold) are a random draw" in told
    )
    kept = [row["row"] for row in rows_of(tmp_path / "x") if row["label"] is not None]
    assert kept == list(range(40 - len(kept), 40))
    assert len(kept) >= 25


def test_what_cannot_be_promised_is_said_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "x")
    assert main(["export", str(run), "-o", out, "--abstain", "0.1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["export", str(run), "-o", out, "--abstain", "0.01", "--abstain_on", "gold"]) == 0
    assert (
        "no label in the pool is kept: 20 claims whose label is checked (gold) cannot promise less than 0.048 of the "
        "labels wrong, and 0.01 needs at least 99 of them" in capsys.readouterr().err
    )
    assert all(row["label"] is None for row in rows_of(tmp_path / "x"))
    assert main(["export", str(run), "--format", "sft", "-o", out, "--abstain", "0.01", "--abstain_on", "gold"]) == 2
    assert "no label is left to write" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), "--abstain", "1.5"])


async def test_doubt_is_of_what_is_written_and_asks_nothing(icm: Command, server: Any) -> None:  # noqa: F811
    assert (await icm("--run", "plain"))[0] == 0
    plain, asked = icm.labels("plain"), server.queries
    code, out, err = await icm("--run", "plain", "--abstain", "0.6", "--abstain_on", "gold")
    assert code == 0, err
    doubted = rows_of(icm.runs / "plain" / "labels.jsonl")
    document = json.loads((icm.runs / "plain" / "run.json").read_text())
    without = [row for row in doubted if row["label"] is None]
    assert len(doubted) - len(without) == document["doubt"]["kept"]
    assert {row["by"] for row in without} <= {"abstained"}
    assert "handed over" in out
    assert document["doubt"]["abstain"] == 0.6
    assert 0 <= document["doubt"]["area"] <= 1
    assert "abstain" not in document["settings"]
    code, out, err = await icm("--run", "plain")
    assert code == 0
    assert "every label is handed over again" in err or not without
    assert icm.labels("plain") == plain
    assert "doubt" not in json.loads((icm.runs / "plain" / "run.json").read_text())
    assert server.queries == asked, "doubt asked the model"
    assert (await icm("--run", "doubted", "--abstain", "0.6", "--abstain_on", "gold"))[0] == 0
    assert rows_of(icm.runs / "doubted" / "labels.jsonl") == doubted


async def test_batches_have_doubt_too(icm: Command) -> None:  # noqa: F811
    flags = ("--run", "b", "--batch_size", "8", "--num_batches", "all", "--abstain_below", "1")
    code, out, err = await icm(*flags)
    assert code == 0, err
    rows = rows_of(icm.runs / "b" / "labels.jsonl")
    assert len(rows) == 24
    assert f"handed over          {sum(row['label'] is not None for row in rows)} of 24 labels" in out
    assert "doubt: " in err


async def test_what_could_never_be_kept_is_said_before_the_model_is_asked(icm: Command, server: Any) -> None:  # noqa: F811
    code, _, err = await icm("--run", "a", "--abstain", "0.1")
    assert code == 2
    assert "no label is known to the search, and nothing can be promised" in err
    assert not server.queries
    code, _, err = await icm("--run", "a", "--abstain", "0.05", "--abstain_on", "gold", "--abstain_labels", "6")
    assert code == 0
    assert (
        "warning: --abstain 0.05 keeps labels only where those of at least 19 claims are checked, and here are 6" in err
    )
    assert all(row["label"] is None for row in rows_of(icm.runs / "a" / "labels.jsonl"))
    assert (await icm("--run", "a", "--is_complete"))[0] == 0
    assert all(row["label"] is None for row in rows_of(icm.runs / "a" / "labels.jsonl")), "a question changed a run"


@pytest.mark.parametrize("basis", ["gold", "known"])
async def test_more_checked_labels_than_there_are_is_one_line(
    basis: str,
    icm: Command,  # noqa: F811
    server: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    known = tmp_path / "known.csv"
    known.write_text("row,label\n0,true\n2,false\n4,true\n")
    flags = ("--known", str(known)) if basis == "known" else ()
    doubt = ("--abstain", "0.3", "--abstain_on", basis, "--abstain_labels", "99")
    code, _, err = await icm("--run", "a", *flags, *doubt)
    assert code == 2
    assert re.search(rf"error: --abstain_labels 99: only \d+ claims have a {basis} label to check; ask for at", err)
    assert not server.queries
    assert (await icm("--run", "a", *flags))[0] == 0
    before = icm.labels("a")
    assert (await icm("--run", "a", *flags, *doubt))[0] == 2
    assert icm.labels("a") == before


def test_an_export_refuses_more_checked_labels_than_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--abstain", "0.3", "--abstain_on", "gold", "--abstain_labels"]
    assert main(["export", str(run), *flags, "41"]) == 2
    assert capsys.readouterr().err.endswith(
        ": --abstain_labels 41: only 40 claims have a gold label to check; ask for at most so many\n"
    )
    assert main(["export", str(run), *flags, "40"]) == 0


async def test_labels_of_a_finished_run_are_not_withheld_under_another_process(icm: Command) -> None:  # noqa: F811
    assert (await icm("--run", "a"))[0] == 0
    before = icm.labels("a")
    with RunFolder(icm.runs / "a"):
        code, _, _ = await icm("--run", "a")
        assert code == 0, "to be shown it needs no lock"
        code, _, err = await icm("--run", "a", "--abstain_below", "9")
        assert code == 2
        assert "another process is working on this run" in err
        assert icm.labels("a") == before
    assert (await icm("--run", "a", "--abstain_below", "9"))[0] == 0
    assert icm.labels("a") != before
