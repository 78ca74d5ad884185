"""--known, --gold_seeds and --columns known=... on the command line: kept, counted apart, gone on with."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.experiments import baselines, compare, diagnose, export, report, watch
from src.experiments.ICM import build_parser
from src.experiments.loading import pool_of
from src.experiments.request import RunRequest
from src.experiments.run_settings import as_begun, settings_of
from src.icm.testbeds import BadInput
from src.results.run_reader import read_run

Rows = list[dict[str, Any]]


@pytest.fixture
async def server() -> AsyncIterator[FakeVLLM]:
    async with FakeVLLM(log_odds=hashed_log_odds) as fake:
        yield fake


class Icm:
    """icm in processes of its own, on 16 built-in claims."""

    def __init__(self, server: FakeVLLM, folder: Path) -> None:
        self.runs, self._model = folder / "runs", server.model
        self._environment = {**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull}

    async def __call__(self, command: str, *more: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "src.experiments.commands", command, "--testbed", "builtin", "--quiet"),
            *("--batch_size", "16", "--calibrate", "mean", "--model", self._model, "--runs_dir", str(self.runs), *more),
            env=self._environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    async def label(self, run: str, *more: str) -> tuple[str, str]:
        code, out, err = await self("label", "--seed", "3", "--run", run, *more)
        assert code == 0, err
        return out, err

    def rows(self, run: str) -> Rows:
        return [json.loads(line) for line in (self.runs / run / "labels.jsonl").read_text().splitlines()]

    def document(self, run: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.runs / run / "run.json").read_text())
        return document


@pytest.fixture
def icm(server: FakeVLLM, tmp_path: Path) -> Icm:
    return Icm(server, tmp_path)


def write_answers(path: Path, rows: Iterable[Mapping[str, Any]], labels: Mapping[int, object]) -> Path:
    """A CSV as `icm ask` writes it. labels: by row."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "label", "question", "choice", "reason"])
        for row in rows:
            writer.writerow([row["row"], labels.get(row["row"], ""), row["question"], row["choice"], "unsure of it"])
    return path


@pytest.mark.parametrize("search", ["annealing", "ascent", "bootstrapping"])
async def test_known_labels_are_kept_counted_apart_and_read_by_every_command(
    icm: Icm, tmp_path: Path, capsys: pytest.CaptureFixture[str], search: str
) -> None:
    await icm.label("before", "--search", search)
    before = icm.rows("before")
    turned = {row["row"]: not row["label"] for row in before[:4:2]}  # one of each pair, as the search would not have it
    answers = write_answers(tmp_path / "answers.csv", before, turned | {before[5]["row"]: "unsure"})
    out, err = await icm.label("after", "--search", search, "--known", str(answers))
    assert "known   2 labels" in err
    assert "from answers.csv, kept" in err
    assert "  known labels         2, kept (from answers.csv); the others are compared with gold" in out
    rows = icm.rows("after")
    assert {row["row"]: row["label"] for row in rows if row["by"] == "known"} == turned
    document = icm.document("after")
    result = document["result"]
    others = [row for row in rows if row["by"] == "icm"]
    assert (result["known"], result["labelled"]) == (2, len(others))
    assert result["icm"] == [sum(row["label"] == row["gold"] for row in others), len(others)]
    assert result["zero_shot"][1] == 14
    assert document["known_labels"] == {"labels": 2, "from": ["answers.csv"]}
    assert document["settings"]["num_seed"] == 0
    run = read_run(icm.runs / "after")
    assert run.skipped == 0
    assert [claim.is_known for claim in run.claims] == [row["by"] == "known" for row in rows]
    (icm.runs / "after" / "labels.jsonl").rename(tmp_path / "away")  # as a run in progress
    assert [claim.row for claim in read_run(icm.runs / "after").claims if claim.is_known] == list(turned)
    (tmp_path / "away").rename(icm.runs / "after" / "labels.jsonl")
    folder = str(icm.runs / "after")
    for command, arguments in (
        (report, [folder]),
        (diagnose, [folder]),
        (compare, [folder, str(icm.runs / "before")]),
        (export, [folder, "--format", "csv"]),
        (watch, [folder, "--once"]),
    ):
        found = command.main(arguments)  # type: ignore[attr-defined]
        assert found == 0 or command is diagnose, command
    assert ", 2 known" in capsys.readouterr().out


async def test_without_known_labels_nothing_says_so(icm: Icm) -> None:
    out, err = await icm.label("a", "--search", "ascent")
    assert "known  " not in out + err
    document = icm.document("a")
    assert document["settings"]["num_seed"] == document["flags"]["num_seed"] == 8
    assert not {"known", "gold_seeds", "known_labels"} & {*document["settings"], *document}
    assert "known" not in document["result"]


async def test_no_gold_seeds_are_as_without_the_flag(icm: Icm, tmp_path: Path) -> None:
    on = ("--data_dir", str(tmp_path / "none"), "--search", "ascent")
    await icm.label("a", *on)
    _, err = await icm.label("a", *on, "--gold_seeds", "0")
    assert "finished" in err
    document = icm.document("a")
    known = write_answers(tmp_path / "k.csv", icm.rows("a"), {icm.rows("a")[0]["row"]: 1})
    await icm.label("b", *on, "--gold_seeds", "0")
    assert icm.document("b")["settings"] == document["settings"]
    assert icm.document("b")["flags"] == document["flags"] | {"run": "b"}
    await icm.label("c", *on, "--gold_seeds", "0", "--known", str(known))
    assert icm.document("c")["result"]["known"] == 1


async def test_random_seeds_beside_known_labels_where_they_are_asked_for(icm: Icm) -> None:
    await icm.label("a", "--gold_seeds", "3", "--num_seed", "4", "--K", "0")
    assert icm.document("a")["settings"]["num_seed"] == 4
    assert len([row for row in icm.rows("a") if row["by"] == "icm"]) == 4


async def test_a_run_goes_on_with_answers_and_keeps_them_from_then_on(icm: Icm, tmp_path: Path) -> None:
    await icm.label("a", "--search", "ascent")
    rows = icm.rows("a")
    answers = write_answers(tmp_path / "answers.csv", rows, {rows[0]["row"]: rows[0]["label"]})
    code, _, err = await icm("label", "--seed", "3", "--run", "a", "--search", "ascent", "--known", str(answers))
    assert code == 2
    assert "no known labels, now with some. To go on from its labels: --continue_from a --run NEW" in err
    on = ("--search", "ascent", "--continue_from")
    _, err = await icm.label("b", *on, "a", "--known", str(answers))
    assert "starts with 16 labels of a" in err
    # The answer says what the search had found: nothing that was not asked before.
    before = icm.document("a")["cost"]["asked"]
    after = icm.document("b")["cost"]
    assert after["asked"] == after["from_cache"] < before
    assert [row["label"] for row in icm.rows("b")] == [row["label"] for row in rows]
    more = write_answers(tmp_path / "more.csv", rows, {rows[4]["row"]: int(not rows[4]["label"])})
    _, err = await icm.label("c", *on, "b", "--known", str(more))
    assert "from the known ones of b and more.csv, kept" in err
    known = {row["row"]: row["label"] for row in icm.rows("c") if row["by"] == "known"}
    assert known == {rows[0]["row"]: rows[0]["label"], rows[4]["row"]: not rows[4]["label"]}
    corrected = write_answers(tmp_path / "corrected.csv", rows, {rows[0]["row"]: int(not rows[0]["label"])})
    await icm.label("d", *on, "b", "--known", str(corrected))
    assert {row["row"]: row["label"] for row in icm.rows("d") if row["by"] == "known"} == {
        rows[0]["row"]: not rows[0]["label"]
    }


async def test_labels_that_contradict_each_other_are_refused_before_anything_is_asked(
    icm: Icm, tmp_path: Path, server: FakeVLLM
) -> None:
    pairs = tmp_path / "both.csv"
    pairs.write_text("row,label\n" + "".join(f"{row},1\n" for row in range(256)))
    code, _, err = await icm("label", "--known", str(pairs))
    assert code == 2
    [line] = err.strip().splitlines()
    assert "the known labels contradict each other: row " in line
    assert line.endswith("what must hold between them: exactly one is true")
    assert server.requests == []


async def test_known_labels_outside_the_pool_are_kept_too(icm: Icm, tmp_path: Path) -> None:
    everything = tmp_path / "even.csv"
    everything.write_text("row,label\n" + "".join(f"{row},{row // 2 % 2}\n" for row in range(0, 256, 8)))
    _, err = await icm.label("a", "--search", "bootstrapping", "--known", str(everything), "--label_rest")
    assert "more of claims outside the pool" in err
    rows = icm.rows("a")
    assert {row["row"]: row["label"] for row in rows if row["by"] == "known"} == dict.fromkeys(range(0, 256, 8), False)
    outside = [row for row in rows if row.get("outside")]
    assert outside
    assert icm.document("a")["result"]["predicted"]["many-shot"][1] == 240 - len(outside)
    assert len(read_run(icm.runs / "a").pool) == 16


async def test_batches_keep_the_labels_of_their_claims(icm: Icm, tmp_path: Path) -> None:
    known = tmp_path / "k.csv"
    known.write_text("row,label\n" + "".join(f"{row},{row // 2 % 2}\n" for row in range(0, 256, 8)))
    more = ("--num_batches", "4", "--passes", "3", "--search", "bootstrapping", "--known", str(known))
    out, err = await icm.label("a", *more)
    rows = icm.rows("a")
    given = [row for row in rows if row["by"] == "known"]
    assert all(row["row"] % 8 == 0 and row["label"] is False for row in given)
    assert len(given) == sum(row["row"] % 8 == 0 for row in rows) > 0
    assert icm.document("a")["result"]["known"] == len(given)
    assert f"known labels         {len(given)}, kept" in out
    assert "more of claims outside any batch" in err


def test_a_column_of_the_data_is_as_good_as_a_file(tmp_path: Path) -> None:
    data, known = tmp_path / "claims.csv", tmp_path / "known.csv"
    data.write_text("question,choice,mine\n" + "".join(f"q,{n},{['', 'true'][n % 3 == 0]}\n" for n in range(12)))
    known.write_text("choice,question,label\n" + "".join(f"{n},q,1\n" for n in range(0, 12, 3)))
    common = ["--data", str(data), "--batch_size", "12", "--group_by", "none"]
    pools, settings = [], []
    for flags in ([*common, "--columns", "known=mine"], [*common, "--known", str(known)], common):
        request = RunRequest.of(build_parser().parse_args(flags))
        pools.append(pool_of(request))
        settings.append(settings_of(request, pools[-1]))
    of_column, of_file, without = pools
    assert of_column.problem.known == of_file.problem.known
    assert [claim.row % 3 == 0 for claim in of_file.claims] == [label is True for label in of_file.problem.known or ()]
    assert settings[0]["known"] == settings[1]["known"]
    assert [each["num_seed"] for each in settings] == [0, 0, 8]
    assert without.problem.known is None
    assert "known" not in settings[2]


async def test_a_check_has_the_known_labels_in_every_labeling(icm: Icm) -> None:
    code, out, err = await icm("label", "--check", "--gold_seeds", "16")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.startswith(("gold ", "random "))]
    assert len(rows) == 2
    assert rows[0][1:] == rows[1][1:]


async def test_gold_seeds_say_what_they_are(icm: Icm) -> None:
    out, err = await icm.label("a", "--search", "ascent", "--gold_seeds", "5")
    assert "from gold (--gold_seeds), kept" in err
    assert "known labels         5, kept (from gold (--gold_seeds))" in out
    document = icm.document("a")
    assert document["settings"]["gold_seeds"] == 5
    assert all(row["label"] == row["gold"] for row in icm.rows("a") if row["by"] == "known")
    code, _, err = await icm("label", "--gold_seeds", "17")
    assert code == 2
    assert "--gold_seeds 17: only 16 of the pool's 16 claims have a gold label that contradicts no other" in err


async def test_a_table_leaves_known_claims_out_of_every_row(icm: Icm) -> None:
    flags = ("--seeds", "1", "2", "--test_size", "16", "--gold_seeds", "4", "--search", "ascent", "--run", "t")
    code, out, err = await icm("baselines", *flags)
    assert code == 0, err
    assert "few-shot, known labels" in out
    assert "4 gold labels of each pool are known" in out
    document = json.loads((icm.runs / "t" / "baselines.json").read_text())
    assert "few-shot-known" in [row["row"] for row in document["rows"]]
    for row in document["rows"]:
        assert [each["compared"] for each in row["pool"]["seeds"]] == [12, 12], row["row"]
        assert [each["compared"] for each in row["test"]["seeds"]] == [16, 16], row["row"]
    kept = {row["row"] for row in icm.rows("t/seed-1") if row["by"] == "known"}
    assert len(kept) == 4
    for path in (icm.runs / "t" / "seed-1" / "rows").iterdir():
        assert not kept & {answer["claim"] for answer in json.loads(path.read_text())["pool"]}, path
    code, _, err = await icm("baselines", "--seeds", "1", "--test_size", "16", "--rows", "few-shot-known")
    assert code == 2
    assert "the row few-shot-known needs known labels: --known FILE, or --gold_seeds N" in err


async def test_a_table_whose_pools_have_no_known_label_has_no_row_of_them(icm: Icm, tmp_path: Path) -> None:
    flags = ("--seeds", "1", "2", "--test_size", "16", "--search", "ascent")
    code, _, err = await icm("baselines", *flags, "--run", "t", "--rows", "icm")
    assert code == 0, err
    first, second = (
        {row["row"] for row in map(json.loads, (icm.runs / "t" / seed / "claims.jsonl").read_text().splitlines())}
        for seed in ("seed-1", "seed-2")
    )
    nowhere = min(set(range(256)) - first - second)
    file = tmp_path / "known.csv"
    file.write_text(f"row,label\n{nowhere},1\n")
    rows = ("--rows", "few-shot-known", "icm")
    code, _, err = await icm("baselines", *flags, "--known", str(file), *rows)
    assert code == 2
    why = "no claim in the pool of seeds 1, 2 has a known label"
    assert err.endswith(f"the row few-shot-known shows known labels, and {why}: use a larger --batch_size\n")
    code, out, err = await icm("baselines", *flags, "--known", str(file), "--run", "u")
    assert code == 0, err
    assert f"the row few-shot-known is left out: {why}\n" in err
    assert "few-shot, known labels" not in out
    assert "many-shot, gold labels" in out
    file.write_text(f"row,label\n{min(first - second)},1\n")
    code, out, err = await icm("baselines", *flags, "--known", str(file), *rows, "--run", "v")
    assert code == 0, err
    assert "warning: no claim in the pool of seed 2 has a known label: the row few-shot-known is zero-shot there" in err
    assert "few-shot, known labels" in out


def test_a_table_tells_once_what_is_wrong_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")  # nobody answers: files are read before that is found
    data, known = tmp_path / "claims.jsonl", tmp_path / "known.csv"
    rows = [{"question": "q", "choice": f"claim {at % 11}", "label": at % 2} for at in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known.write_text("row,label\n0,0\n")
    files = ("--data", str(data), "--known", str(known), "--runs_dir", str(tmp_path / "runs"))
    assert baselines.main([*files, "--model", "m", "--batch_size", "8", "--seeds", "1", "2", "3"]) == 2
    assert caplog.text.count("with the other gold label") == 1


def test_gold_seeds_and_labels_that_are_known_already_are_refused(tmp_path: Path) -> None:
    rows = [{"question": f"Is {n} even?", "choice": "yes", "label": 1 - n % 2, "checked": 1} for n in range(8)]
    data, testbed = tmp_path / "claims.jsonl", tmp_path / "mine.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    testbed.write_text('template: "{question} {choice}:"\ncolumns: {known: checked}\n')
    args = build_parser().parse_args(["--testbed", str(testbed), "--data", str(data), "--gold_seeds", "2"])
    with pytest.raises(BadInput) as refused:
        pool_of(RunRequest.of(args))
    assert str(refused.value) == (
        "--gold_seeds 2 and known labels (the column checked of claims.jsonl) contradict each other: gold labels take "
        "the place of labels that are given"
    )


@pytest.mark.parametrize("rest", [True, False])
async def test_known_labels_outside_the_pool_go_on_with_the_run(icm: Icm, tmp_path: Path, rest: bool) -> None:
    """Through a run that labels nothing outside its pool, too."""
    known = {row: row // 2 % 2 == 1 for row in range(0, 256, 8)}
    file = tmp_path / "known.csv"
    file.write_text("row,label\n" + "".join(f"{row},{int(label)}\n" for row, label in known.items()))
    await icm.label("a", "--search", "ascent", "--known", str(file), *(["--label_rest"] if rest else []))
    inside = {row["row"] for row in icm.rows("a") if row["by"] == "known" and not row.get("outside")}
    assert 0 < len(inside) < len(known)
    on = ("--search", "ascent", "--batch_size", "24", "--continue_from")
    _, err = await icm.label("b", *on, "a")
    assert "from the known ones of a, kept; " in err
    settings = icm.document("b")["settings"]
    assert settings["known"] != settings["known_outside"]
    _, err = await icm.label("c", "--search", "ascent", "--batch_size", "48", "--continue_from", "b", "--label_rest")
    given = {row["row"]: row["label"] for row in icm.rows("c") if row["by"] == "known"}
    assert given == known
    new = {row["row"] for row in icm.rows("c") if row["by"] == "known" and not row.get("outside")} - inside
    assert new, "no known claim came into the pool"
    _, err = await icm.label("d", *on, "a", "--known", str(file))
    assert "known_outside" not in icm.document("d")["settings"], "what is named anew is no other run than before"


async def test_known_labels_of_a_version_without_a_file_of_them_and_a_run_that_it_began(
    icm: Icm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "known.csv"
    file.write_text("row,label\n" + "".join(f"{row},{row // 2 % 2}\n" for row in range(0, 256, 8)))
    await icm.label("a", "--search", "ascent", "--known", str(file), "--label_rest")
    (icm.runs / "a" / "known.jsonl").unlink()
    line = [
        "--testbed",
        "builtin",
        "--search",
        "ascent",
        "--batch_size",
        "16",
        "--model",
        "fake",
        "--calibrate",
        "mean",
    ]
    line += ["--seed", "3", "--runs_dir", str(icm.runs), "--run", "b", "--continue_from", "a"]
    request = RunRequest.of(build_parser().parse_args(line))
    pool = pool_of(request)
    settings = settings_of(request, pool)
    assert pool.known is not None
    assert sorted(pool.known.labels) == list(range(0, 256, 8))
    before = {name: value for name, value in settings.items() if name != "known_outside"}
    same = as_begun(request, settings, lambda known: {"settings": before, "flags": {"start_share": None}})
    assert same.continue_without_outside
    assert settings_of(same, pool_of(same)) == before
    assert as_begun(request, settings, lambda known: {"settings": settings}) is request
    (icm.runs / "a" / "known.jsonl").write_text("torn\n")
    with pytest.raises(BadInput, match=r"known\.jsonl: 1 lines are damaged"):
        pool_of(request)
