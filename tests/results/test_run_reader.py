"""Reading runs in every state, and whatever became of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from src.icm.consistency import Relation
from src.icm.testbeds import BadInput
from src.pipeline.datafiles import load_data_file
from src.results.rows import pool_rows
from src.results.run_reader import read_all, read_run
from tests.run_examples import write_run

LABELS = [True, False] * 6


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", labels=LABELS, gold=LABELS, constraints={0: [(1, "exactly one is true")]}))
    assert (run.name, run.model, len(run.pool), run.finished is not None) == ("a", "fake-8b", 12, True)
    assert [claim.label for claim in run.claims] == LABELS
    assert run.constraints is not None
    assert [(c.claims, c.relation) for c in run.constraints] == [((0, 1), Relation.EXACTLY_ONE)]
    assert run.cost["seconds"] == 60.0


def test_a_constraint_between_more_than_two_claims_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [{"question": "q", "choice": ["a", "b", "c"]}, {"question": "r", "choice": ["d", "e"]}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    testbed, claims, _ = load_data_file(tmp_path / "d.json")
    consistency = testbed.consistency(claims, "gold-free")
    written = pool_rows(claims, consistency)
    assert [row["constraints"] for row in written] == [
        [[1, 2, "exactly one is true"]], [], [], [[4, "exactly one is true"]], []
    ]  # fmt: skip
    folder = write_run(tmp_path / "a", labels=[True, False, False, True, False], claims=written)
    (folder / "claims.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    assert read_run(folder).constraints == consistency.constraints


@pytest.mark.parametrize("damaged", [[1], ["agree"], [0, "agree"], [1, 1, "agree"], [2, 1, "agree"], [99, "agree"],
                                     [True, "agree"], [1, "so"], [1.5, "agree"], "agree", None])  # fmt: skip
def test_a_damaged_constraint_is_left_out(tmp_path: Path, damaged: object) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    rows = [json.loads(line) for line in (folder / "claims.jsonl").read_text().splitlines()]
    rows[0]["constraints"] = [damaged, [1, "agree"]]
    (folder / "claims.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    constraints = read_run(folder).constraints
    assert constraints is not None
    assert [c.claims for c in constraints] == [(0, 1)]


def test_a_run_in_progress_has_its_journals_labels(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS, gold=LABELS, finished=False)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:3]) + '{"event": "step", "tor')
    run = read_run(folder)
    assert [claim.label for claim in run.claims] == [*LABELS[:6], *[None] * 6]
    assert [claim.log_odds for claim in run.claims[:2]] == [2.0, -2.0]
    assert run.skipped == 0  # a torn last line is one still being written
    assert run.cost["seconds"] == 1.0


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"torn')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    read_run(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    (folder / "labels.jsonl").write_bytes(b"not json\n[1]\n" + (folder / "labels.jsonl").read_bytes() + b"\xff\n")
    run = read_run(folder)
    assert (len(run.claims), run.skipped) == (12, 3)


def test_half_characters_and_odd_values_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS[:2], seeds=2)
    (folder / "labels.jsonl").write_text('{"row": "x", "choice": "a\\ud800", "label": "True", "log_odds": NaN}\n')
    [claim] = read_run(folder).claims
    assert (claim.row, claim.choice, claim.label) == (-1, "a\ud800", None)


@pytest.mark.parametrize(
    "line",
    [
        {"event": "step", "iteration": 1, "U": 1.0},  # not whether it was accepted
        {"event": "step", "iteration": "one", "accepted": True, "U": 1.0},
        {"event": "step", "iteration": 1, "accepted": True, "U": 1.0, "changes": {"-1": True}},
        {"event": "mirror", "iteration": 1, "accepted": True, "U": 1.0, "U_proposed": None},
        {"event": "step", "iteration": 1, "accepted": True, "U": 1e308},
        {"event": "start", "U": 1.0, "labels": [1]},
        {"event": "start", "labels": {}},
    ],
)
def test_lines_of_the_journal_that_make_no_sense_are_counted_and_left_out(tmp_path: Path, line: object) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    whole = read_run(folder)
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    assert read_run(folder).journal == whole.journal
    assert read_run(folder).skipped == 1


@pytest.mark.parametrize("cost", [-5000, None, "much", 1e300])
def test_what_a_step_cost_is_no_reason_to_leave_it_out(tmp_path: Path, cost: object) -> None:
    """A server that is started anew counts its tokens from 0 again."""
    folder = write_run(tmp_path / "a", labels=LABELS)
    whole = read_run(folder)
    step = {"event": "step", "iteration": 99, "accepted": True, "U": 1.0, "changes": {"0": True}, "tokens_cached": cost}
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(step) + "\n")
    run = read_run(folder)
    assert (len(run.journal), run.skipped) == (len(whole.journal) + 1, 0)
    assert (run.journal[-1]["changes"], run.journal[-1]["tokens_cached"]) == ({0: True}, None)


@pytest.mark.parametrize("field", ["settings", "engine", "environment", "cost", "model_api", "result"])
def test_null_is_nothing(tmp_path: Path, field: str) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    document = json.loads((folder / "run.json").read_text()) | {field: None}
    (folder / "run.json").write_text(json.dumps(document))
    assert len(read_run(folder).claims) == len(LABELS)


@pytest.mark.parametrize(
    ("field", "value"), [("settings", []), ("left_out", "x"), ("cost", {"seconds": "long"}), ("parts", 3)]
)
def test_a_damaged_field_of_run_json_is_named(tmp_path: Path, field: str, value: object) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    document = json.loads((folder / "run.json").read_text()) | {field: value}
    (folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match=rf"run.json: is damaged \({field}"):
        read_run(folder)


def test_what_was_not_counted_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    document = json.loads((folder / "run.json").read_text()) | {"cost": {"seconds": 2.5, "tokens_cached": None}}
    (folder / "run.json").write_text(json.dumps(document))
    assert read_run(folder).cost == {"seconds": 2.5}


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "b/../../a", "a\0b"])
def test_a_part_is_a_folder_right_below(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    for other in (tmp_path, folder / "b", tmp_path / "b"):  # where the names lead
        write_run(other, labels=LABELS)
    document = json.loads((folder / "run.json").read_text()) | {"parts": [name, "b", "x" * 300]}
    (folder / "run.json").write_text(json.dumps(document))
    assert [part.name for part in read_run(folder).parts] == ["a/b"]


@pytest.mark.parametrize(("content", "complaint"), [(None, "holds no run"), ("{", "is damaged"), ("[]", "is damaged")])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None, complaint: str) -> None:
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "a" / "run.json").write_text(content)
    with pytest.raises(BadInput, match=complaint):
        read_run(tmp_path / "a")
    with pytest.raises(BadInput, match="no such folder"):
        read_run(tmp_path / "b")


def test_a_run_of_several_parts(tmp_path: Path) -> None:
    for part in ("batch-000", "batch-001"):
        write_run(tmp_path / "a" / part, labels=LABELS, gold=LABELS)
    document = {"format": 2, "kind": "parts", "settings": {"testbed": "x"}, "parts": ["batch-000", "batch-001", "../b"]}
    (tmp_path / "a" / "run.json").write_text(json.dumps(document))
    run = read_run(tmp_path / "a")
    assert [part.name for part in run.parts] == ["a/batch-000", "a/batch-001"]
    assert (len(run.claims), run.cost["seconds"]) == (24, 120.0)


def test_a_table_of_baselines_and_its_searches(tmp_path: Path) -> None:
    for seed in (2, 10):
        write_run(tmp_path / "t" / f"seed-{seed}", labels=LABELS)
    against = {"difference": 0.25, "interval": [0.1, 0.4], "p": 0.02}
    side = {"seeds": [{"seed": 2, "agreeing": 9, "compared": 12}], "mean": 0.75, "sd": None, "claims": 12,
            "interval": [0.47, 0.91], "versus": {"zero-shot": against}}  # fmt: skip
    row = {"row": "icm", "title": "ICM", "pool": side, "later": "keys are ignored"}
    (tmp_path / "t" / "baselines.json").write_text(json.dumps({"format": 1, "kind": "baselines", "rows": [row]}))
    [table], runs = read_all([tmp_path / "t"])
    assert table.rows[0].pool is not None
    assert (table.name, table.rows[0].pool.versus["zero-shot"].p) == ("t", 0.02)
    assert [run.name for run in runs] == ["t/seed-2", "t/seed-10"]
    (tmp_path / "t" / "baselines.json").write_text('{"rows": [{"row": 1}]}')
    with pytest.raises(BadInput, match=r"rows\.0"):
        read_all([tmp_path / "t"])
