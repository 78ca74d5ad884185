"""Data files of other people on the command line: what is refused, left out, mapped, grouped, and how runs go on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from src.experiments.ICM import build_parser
from src.experiments.loading import pool_of, warn_once
from src.experiments.request import DataRequest, RunRequest
from src.icm.values import BadInput
from tests.experiments.test_baselines import Table
from tests.experiments.test_icm_cli import Command, signed_by_words

Rows = list[dict[str, Any]]
Start = Callable[[Rows], Command]


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=signed_by_words) as fake:
        yield fake


@pytest.fixture
def on(server: FakeVLLM, tmp_path: Path) -> Start:
    def command(rows: Rows) -> Command:
        path = tmp_path / "claims.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Command(server.url, path, tmp_path / "runs")

    return command


def questions(count: int = 12, **more: Any) -> Rows:
    return [{"question": f"Is {n} even?", "choice": choice, **more} for n in range(count) for choice in ("yes", "no")]


def settings(icm: Command, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((icm.runs / run / "run.json").read_text())["settings"]
    return found


def pool(icm: Command, run: str) -> Rows:
    return [json.loads(line) for line in (icm.runs / run / "claims.jsonl").read_text().splitlines()]


async def test_rows_that_cannot_be_used_are_refused_or_left_out_and_counted(on: Start) -> None:
    rows = questions()
    rows[3]["choice"] = float("nan")
    rows[7]["question"] = None
    icm = on(rows)
    code, _, err = await icm("--run", "a")
    assert code == 2
    [line] = err.strip().splitlines()
    assert "claims.jsonl:4: row 3 has nothing in choice (2 rows cannot be used)" in line
    assert "--skip_bad_rows" in line
    code, out, err = await icm("--run", "a", "--skip_bad_rows", "--label_rest")
    assert code == 0, err
    assert "2 rows are left out (--skip_bad_rows): line 4: row 3 has nothing in choice; 8: row 7 has nothing" in err
    assert "2 rows of the file were left out (--skip_bad_rows), the first: " in out
    bad = json.loads((icm.runs / "a" / "run.json").read_text())["bad_rows"]
    assert bad["count"] == 2
    assert [text.rpartition(": ")[2] for text in bad["first"]] == [
        "row 3 has nothing in choice",
        "row 7 has nothing in question",
    ]
    labelled = {json.loads(line)["row"] for line in icm.labels("a").splitlines()}
    assert labelled == set(range(24)) - {3, 7}


async def test_columns_and_values_are_read_as_the_flags_say_and_are_part_of_the_run(on: Start) -> None:
    rows = [
        {"prompt": row["question"], "answer": row["choice"], "ok": "right" if n % 4 in (0, 3) else "wrong"}
        for n, row in enumerate(questions())
    ]
    icm = on(rows)
    columns = ("--columns", "question=prompt,choice=answer,label=ok")
    code, _, err = await icm("--run", "a", *columns)
    assert code == 2
    [line] = err.strip().splitlines()
    flag = line.partition("as by --map ")[2].partition(" ")[0].rstrip(".")
    assert flag.startswith("label=right:true,wrong:false")
    code, out, err = await icm("--run", "a", *columns, "--map", "label=right:true,wrong:false")
    assert code == 0, err
    assert "of 16, 95% interval" in out or "agreement with gold" in out
    assert all(row["gold"] == ((row["row"] % 4) in (0, 3)) for row in map(json.loads, icm.labels("a").splitlines()))
    assert settings(icm, "a")["columns"] == "choice=answer,label=ok,question=prompt"
    assert settings(icm, "a")["map"] == "label=right:true,wrong:false"
    code, _, err = await icm("--run", "a", *columns, "--map", "label=right:false,wrong:true")
    assert code == 2
    assert "was started with --map label=right:true,wrong:false, now label=right:false,wrong:true" in err


async def test_a_file_that_was_always_read_so_has_the_settings_that_it_always_had(on: Start) -> None:
    icm = on([row | {"consistency_id": n // 2} for n, row in enumerate(questions())])
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    assert not {"columns", "map", "group_by", "skip_bad_rows"} & settings(icm, "a").keys()


async def test_a_multiple_choice_file_is_searched_with_exactly_one_true_option(on: Start) -> None:
    rows = [{"question": f"Which of {n}?", "choice": ["one", "two", "three", "four"], "label": n % 4} for n in range(6)]
    icm = on(rows)
    code, _, err = await icm("--run", "a", "--alpha", "0.1", "--initial_T", "0.1")  # consistency is what counts
    assert code == 0, err
    claims = pool(icm, "a")
    assert len(claims) == 16
    assert [c["constraints"] for c in claims[:2]] == [[[1, 2, 3, "exactly one is true"]], []]
    assert {(c["row"], c["of_row"], c["option"]) for c in claims} <= {
        (4 * n + at, n, at) for n in range(6) for at in range(4)
    }
    assert all(c["gold"] == (c["option"] == c["of_row"] % 4) for c in claims)
    result = json.loads((icm.runs / "a" / "run.json").read_text())["result"]
    assert result["inconsistent"] == 0
    labels = {row["row"]: row["label"] for row in map(json.loads, icm.labels("a").splitlines()) if row["by"] == "icm"}
    for first in range(0, 24, 4):
        options = [labels.get(first + at) for at in range(4)]
        assert options.count(True) <= 1
        assert options.count(False) < 4


async def test_rows_with_one_question_stay_together_and_the_run_says_so(on: Start) -> None:
    icm = on(questions())
    assert (await icm("--run", "a", "--K", "2"))[0] == 0
    assert settings(icm, "a")["group_by"] == "question"
    claims = pool(icm, "a")
    assert all(first["question"] == second["question"] for first, second in zip(claims[::2], claims[1::2], strict=True))
    code, _, err = await icm("--run", "a", "--K", "2", "--group_by", "none")
    assert code == 2
    assert "was started with --group_by question, now without" in err


@pytest.mark.parametrize("named", [True, False])
async def test_a_run_that_was_begun_when_every_row_was_a_group_goes_on_so(on: Start, named: bool) -> None:
    icm = on(questions())
    flags = ("--run", "a") if named else ()
    assert (await icm("--run", "whole", "--group_by", "none"))[0] == 0
    assert (await icm(*flags, "--group_by", "none"))[0] == 0
    [run] = [path.name for path in icm.runs.iterdir() if path.is_dir() and path.name not in ("whole", "determinism")]
    # As an earlier version left it behind: half done, without a word of groups.
    document = json.loads((icm.runs / run / "run.json").read_text())
    assert "group_by" not in document["settings"]
    del document["result"], document["flags"]
    (icm.runs / run / "run.json").write_text(json.dumps(document))
    log = icm.runs / run / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:9]))
    (icm.runs / run / "labels.jsonl").unlink()
    code, _, err = await icm(*flags)
    assert code == 0, err
    assert "begun with every row as a group by itself, and goes on so (--group_by none)" in err
    assert icm.labels(run) == icm.labels("whole")
    assert (await icm("--run", "new"))[0] == 0
    assert settings(icm, "new")["group_by"] == "question"


def test_flags_that_are_given_twice_add_up() -> None:
    flags = ["--data", "d.csv", "--columns", "question=prompt", "--columns", "choice=answer"]
    flags += ["--map", "label=yes:true", "--map", "label=no:false", "answer=a:b"]
    reading = DataRequest.of(build_parser().parse_args(flags)).reading()
    assert reading.columns == {"question": "prompt", "choice": "answer"}
    assert reading.values == {"label": {"yes": "true", "no": "false"}, "answer": {"a": "b"}}
    twice = DataRequest.of(build_parser().parse_args([*flags, "--columns", "question=stem"]))
    with pytest.raises(BadInput, match="names 'question' twice"):
        twice.reading()


BAD = [
    (["--columns", "question=promt"], "claims.jsonl: --columns question=promt: there is no column 'promt'"),
    (["--columns", "prompt"], "is not OURS=THEIRS"),
    (["--map", "lable=a:true"], "no column 'lable' is read; did you mean 'label'?"),
    (["--group_by", "consistency_id"], "has no column consistency_id to --group_by"),
    (["--group_by", "colour"], "invalid choice: 'colour'"),
    (["--batch_size", "2", "--group_by", "question", "--columns", "question=choice,choice=question"],
     "--batch_size 2 is smaller than the smallest group of claims (12); rows with the same question are one group"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "complaint"), BAD)
async def test_flags_that_cannot_be_meant_are_one_line(on: Start, flags: list[str], complaint: str) -> None:
    code, _, err = await on(questions())(*flags)
    assert code == 2
    assert complaint in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("flags", [["--columns", "question=q"], ["--map", "label=a:true"], ["--group_by", "question"]])
async def test_flags_of_a_file_are_refused_for_a_testbed(on: Start, flags: list[str]) -> None:
    icm = on(questions())
    at = icm.arguments.index("--data")
    icm.arguments[at : at + 2] = ["--testbed", "builtin"]
    code, _, err = await icm(*flags)
    assert code == 2
    assert f"{flags[0]} says how a --data file is read; a testbed's files are known" in err


async def test_one_claim_is_refused(on: Start, server: FakeVLLM) -> None:
    code, _, err = await on(questions()[:1])("--run", "a")
    assert code == 2
    assert "claims.jsonl: holds one claim" in err
    assert not server.completions


async def test_batches_and_tables_go_on_with_the_groups_that_they_began_with(on: Start, server: FakeVLLM) -> None:
    icm = on([row | {"label": n % 2} for n, row in enumerate(questions())])
    batches = ("--num_batches", "all", "--batch_size", "8", "--num_seed", "2", "--K", "3")
    assert (await icm("--run", "parts", *batches, "--group_by", "none"))[0] == 0
    code, out, err = await icm("--run", "parts", *batches)
    assert code == 0
    assert "goes on so (--group_by none)" in err
    assert "3 searches" in out
    table = Table(server.url, icm.runs.parent / "claims.jsonl", icm.runs)
    assert (await table("--seeds", "1", "--rows", "zero-shot", "--group_by", "none"))[0] == 0
    code, _, err = await table("--seeds", "1", "--rows", "many-shot-gold")
    assert code == 0, err
    assert "goes on so (--group_by none)" in err
    assert [row["row"] for row in table.document["rows"]] == ["zero-shot", "many-shot-gold"]


async def test_a_test_file_of_a_table_is_read_as_its_data_is(on: Start, server: FakeVLLM) -> None:
    rows = [
        {"prompt": row["question"], "choice": row["choice"], "ok": "ny"[n % 2]} for n, row in enumerate(questions())
    ]
    data = on(rows).runs.parent / "claims.jsonl"
    table = Table(server.url, data, data.parent / "runs")
    test = data.parent / "test.jsonl"
    others = [row | {"prompt": f"Now: {row['prompt']}"} for row in rows]
    test.write_text("".join(json.dumps(row) + "\n" for row in [*others, {"ok": "y"}]))
    flags = ("--seeds", "1", "--rows", "zero-shot", "--columns", "question=prompt,label=ok", "--map", "label=y:1,n:0")
    code, _, err = await table(*flags, "--test_data", str(test))
    assert code == 2
    assert "test.jsonl:25: row 24 lacks the columns question, choice" in err
    code, _, err = await table(*flags, "--test_data", str(test), "--skip_bad_rows")
    assert code == 0, err
    assert "test.jsonl: 1 row is left out (--skip_bad_rows): line 25: row 24 lacks" in err
    assert table.row("zero-shot")["test"]["claims"] == 24


@pytest.mark.parametrize(
    ("relation", "single", "flags", "said"),
    [
        (
            "exactly one",
            0,
            ("--prior", "0.3"),
            "--prior 0.3: what must hold in each group keeps the share of True among ",
        ),
        ("exactly one", 0, ("--prior", "0.3"), "the pool's claims at 0.50, whatever --prior says; --consistency none"),
        ("exactly one", 0, ("--prior", "auto"), "--prior auto: what must hold in each group keeps"),
        ("exactly one", 0, ("--prior", "0.5"), None),
        ("exactly one", 0, ("--prior", "0.3", "--consistency", "none"), None),
        ("exactly one", 0, (), None),
        ("at most one", 0, ("--prior", "0.7"), "the pool's claims between 0.00 and 0.50, whatever"),
        ("at most one", 0, ("--prior", "0.3"), None),
        ("none", 0, ("--prior", "0.3"), None),
        ("exactly one", 24, ("--prior", "0.3"), None),  # the others may all be False
        ("exactly one", 24, ("--prior", "0.1"), "the pool's claims between 0.25 and 0.75, whatever"),
        ("exactly one", 24, ("--prior", "auto"), None),
    ],
)
def test_a_share_of_true_that_the_groups_do_not_allow_is_told(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    relation: str,
    single: int,
    flags: tuple[str, ...],
    said: str | None,
) -> None:
    rows = [{**row, "consistency_id": row["question"]} for row in questions(consistency_relation=relation)]
    rows += [{"question": f"Is {n} odd?", "choice": "yes", "consistency_id": f"by itself {n}"} for n in range(single)]
    path = tmp_path / "claims.jsonl"
    path.write_text("".join(json.dumps({"consistency_relation": "", **row}) + "\n" for row in rows))
    warn_once.cache_clear()
    pool_of(RunRequest.of(build_parser().parse_args(["--data", str(path), "--calibrate", "mean", *flags])))
    told = [message for message in caplog.messages if "the share of True" in message]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
