"""`import icm`: the command's runs from a program, with its settings, its folders and its errors."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import icm
from fakes.vllm_server import FakeVLLM, Fault
from icm.settings import names
from src.experiments.ICM import build_parser, main

REPOSITORY = Path(__file__).resolve().parents[2]
CLAIMS = [
    {"question": f"Is {n} even?", "choice": answer, "label": int((n % 2 == 0) == (answer == "yes")),
     "consistency_id": n, "source": f"page {n}"}
    for n in range(12) for answer in ("yes", "no")
]  # fmt: skip
SMALL = {"model": "fake-8b", "batch_size": 16, "num_seed": 4, "K": 40, "quiet": True}


class Elsewhere:
    """A fake server in a thread of its own, for functions that wait."""

    def __init__(self) -> None:
        self.server = FakeVLLM()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeVLLM:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self._loop).result()
        return self.server

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.server.__aexit__(None, None, None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeVLLM]:
    """A server that the environment names; the current folder is a new one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    with Elsewhere() as fake:
        monkeypatch.setenv("VLLM_BASE_URL", fake.url)
        yield fake


def test_a_list_of_dicts_gets_labels_and_probabilities(server: FakeVLLM) -> None:
    result = icm.label(CLAIMS, **SMALL, alpha=50, calibrate="mean")
    assert len(result) == len(result.labels) == len(result.probabilities) == 24
    assert set(result.labels) == {True, False}
    for given, row in zip(CLAIMS, result, strict=True):
        assert (row["question"], row["choice"], row["source"]) == (given["question"], given["choice"], given["source"])
        assert row["gold"] == bool(given["label"])
        assert row["given_label"] == given["label"]
    lines = [json.loads(line) for line in (result.run_folder / "labels.jsonl").read_text().splitlines()]
    assert {line["row"]: line["label"] for line in lines} == dict(enumerate(result.labels))
    document = json.loads((result.run_folder / "run.json").read_text())
    assert document["result"]["U"] == result.U
    agreeing, compared = document["result"]["icm"]
    assert result.agreement == agreeing / compared
    offset = result.record.shift
    for row, probability in zip(result, result.probabilities, strict=True):
        assert probability == pytest.approx(1 / (1 + math.exp(offset - row["log_odds"])))
    assert offset != 0
    assert result.run_folder.parent == Path("runs")
    assert "even?\nClaim: " in result.prompt


def test_the_same_call_again_asks_nothing_and_other_claims_are_another_run(server: FakeVLLM) -> None:
    first = icm.label(CLAIMS, **SMALL)
    before = len(server.requests)
    again = icm.label([dict(row) for row in CLAIMS], **SMALL)
    assert len(server.requests) == before
    assert (again.run_folder, again.rows) == (first.run_folder, first.rows)
    other = icm.label([CLAIMS[0] | {"choice": "maybe"}, *CLAIMS[1:]], **SMALL)
    assert other.run_folder != first.run_folder


def test_it_is_the_run_of_the_command_line(server: FakeVLLM, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("claims.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in CLAIMS))
    flags = "--data claims.jsonl --model fake-8b --batch_size 16 --num_seed 4 --K 40 --alpha 50 --runs_dir runs --quiet"
    assert main([*shlex.split(flags), "--label_rest", "--run", "mine"]) == 0
    before = len(server.requests)
    capsys.readouterr()
    result = icm.label(path, **SMALL, alpha=50, run="mine")
    assert len(server.requests) == before
    assert capsys.readouterr() == ("", "")  # what the command prints is given back
    lines = [json.loads(line) for line in Path("runs/mine/labels.jsonl").read_text().splitlines()]
    by_row = {line["row"]: line["label"] for line in lines}
    assert result.labels == [by_row[row] for row in range(24)]
    assert result.rows[0]["source"] == "page 0"
    elsewhere = icm.label(CLAIMS, **SMALL, alpha=50)  # the same claims, not from that file
    assert elsewhere.labels == result.labels
    cost = json.loads((elsewhere.run_folder / "run.json").read_text())["cost"]
    assert cost["asked"] == cost["from_cache"] + cost.get("asked_ahead", 0)  # the response cache is the same one


def test_plain_texts_a_template_and_labels_of_ones_own(server: FakeVLLM) -> None:
    texts = [f"{n} is a prime number." for n in range(16)]
    result = icm.label(texts, **SMALL)
    assert [row["choice"] for row in result] == texts
    assert "Claim: 3 is a prime number.\nI think this claim is" in result.prompt
    result = icm.label(
        [{"review": text, "label": "good" if n % 2 else "bad"} for n, text in enumerate(texts)],
        **SMALL,
        columns={"choice": "review"},
        template="Review: {choice}\nIt is",
        labels=["bad", "fair", "good"],
    )
    assert set(result.labels) <= {"bad", "fair", "good"}
    assert {row["review"] for row in result} == set(texts)
    row = result.rows[1]
    chosen = {name: row[f"logprob_{name}"] for name in ("bad", "fair", "good")}
    assert row["probability"] == pytest.approx(math.exp(chosen[row["label"]]))
    assert row["gold"] == row["given_label"] == "good"


def test_claims_outside_the_pool_have_a_label_unless_that_is_turned_off(server: FakeVLLM) -> None:
    result = icm.label(CLAIMS, **SMALL)
    assert None not in result.labels
    assert "many-shot" in {row["by"] for row in result}
    result = icm.label(CLAIMS, **SMALL, label_rest=False)
    assert result.labels.count(None) == 8
    assert "8 claims without a label" in repr(result)
    batches = icm.label(CLAIMS, **SMALL, num_batches="all")
    assert None not in batches.labels
    with pytest.raises(icm.BadInput, match="is 2 runs"):
        batches.plot()


def test_options_in_one_row_are_claims_of_their_own(server: FakeVLLM) -> None:
    rows = [{"question": f"Is {n} even?", "choice": ["yes", "no"], "label": n % 2, "n": n} for n in range(8)]
    result = icm.label(rows, **SMALL)
    assert [(row["n"], row["choice"]) for row in result] == [(n, answer) for n in range(8) for answer in ("yes", "no")]
    assert [row["gold"] for row in result] == [(n % 2 == 0) == (a == "yes") for n in range(8) for a in ("yes", "no")]


def test_bad_rows_are_named_and_can_be_left_out(server: FakeVLLM) -> None:
    rows = [*CLAIMS[:6], {"question": "What?", "choice": None}, *CLAIMS[6:]]
    with pytest.raises(icm.BadInput, match="row 6 has nothing in choice"):
        icm.label(rows, **SMALL)
    result = icm.label(rows, **SMALL, skip_bad_rows=True)
    assert result.labels[6] is None
    assert result.labels.count(None) == 1
    assert [row["question"] for row in result] == [row["question"] for row in rows]


@pytest.mark.parametrize(
    ("claims", "keywords", "said"),
    [
        ([*CLAIMS[:6], {"question": "What?", "choice": None}], {}, "claims: row 6 has nothing in choice"),
        ([CLAIMS[0] | {"label": "maybe"}, CLAIMS[1]], {}, "claims: row 0 has the label 'maybe'"),
        ([{"text": "a"}, {"text": "b"}], {}, "claims: "),
        (CLAIMS, {"columns": {"choice": "answr"}}, "claims: --columns choice=answr: there is no column 'answr'"),
        (CLAIMS, {"testbed": "builtin"}, "--testbed builtin and claims contradict each other"),
        (CLAIMS, {"known": {99: True}}, "known, row 0: names row 99, and claims has no claim of that row"),
        (CLAIMS, {"known": [{"row": 1, "label": "x"}]}, "known, row 0: has the label 'x'"),
        (CLAIMS, {"known": {0: True}, "gold_seeds": 2}, "--gold_seeds 2 and known contradict each other"),
        (CLAIMS, {"template": "{chioce}"}, "template: "),
        (CLAIMS, {"labels": ["yes", "yes"]}, "labels: "),
        (CLAIMS, {"testbed": {"template": "{choice}:", "groops": 1}}, "testbed: there is no key 'groops'"),
    ],
)
def test_errors_name_the_argument_and_no_file_that_was_made_of_it(
    claims: Any, keywords: dict[str, Any], said: str, server: FakeVLLM
) -> None:
    for function in (icm.label, icm.landscape):
        settings = {"model": "fake-8b", "quiet": True, "batch_size": 16} | keywords
        with pytest.raises(icm.BadInput) as refused:
            function(claims, **settings)
        assert str(refused.value).startswith(said)
        assert not re.search(r"\.jsonl|\.yaml|/data", str(refused.value))


def test_values_that_no_file_holds_are_given_back(server: FakeVLLM) -> None:
    there = object()
    day = datetime.date(2026, 11, 27)
    rows = [row | {"thing": there, "day": day, "by": "me", "gap": math.nan} for row in CLAIMS]
    result = icm.label(rows, **SMALL)
    assert all(row["thing"] is there and row["day"] == day and row["given_by"] == "me" for row in result)
    read = icm.load(result.run_folder)
    assert "thing" not in read.rows[0]
    assert (read.rows[0]["day"], read.rows[0]["gap"]) == ("2026-11-27", None)
    assert read.labels == result.labels
    (result.run_folder.parent / "data").rename("gone")
    assert icm.load(result.run_folder).labels == result.labels


def test_pandas_and_polars(server: FakeVLLM) -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    plain = icm.label(CLAIMS, **SMALL)
    frame = pandas.DataFrame(CLAIMS, index=[f"c{n}" for n in range(24)])
    found = icm.label(frame, **SMALL)
    assert found.run_folder == plain.run_folder
    table = found.to_pandas()
    assert list(table.index) == list(frame.index)
    assert list(table["label"]) == plain.labels
    assert icm.label(polars.DataFrame(CLAIMS), **SMALL).run_folder == plain.run_folder
    frame["label"] = frame["label"].astype("Int64").mask(frame["label"] == 1)
    assert {row["gold"] for row in icm.label(frame, **SMALL)} == {None, False}


@pytest.mark.parametrize(
    ("keywords", "error", "said"),
    [
        ({"alhpa": 3}, TypeError, "no setting 'alhpa'; did you mean 'alpha'?"),
        ({"data": "x.jsonl"}, TypeError, "no setting 'data'"),
        ({"check": True}, TypeError, "no setting 'check'"),
        ({"K": "40"}, TypeError, "K is a number, not the text '40'"),
        ({"K": "x"}, TypeError, "K is a number, not the text 'x'"),
        ({"alpha": "x"}, TypeError, "alpha is a number, not the text 'x'"),
        ({"num_batches": "x"}, icm.BadInput, "--num_batches: must be all, or a whole number"),
        ({"prior": "0.3", "calibrate": "mean"}, TypeError, "prior is a number, not the text '0.3'"),
        ({"K": 2.5}, icm.BadInput, "--K: must be a whole number"),
        ({"K": True}, TypeError, "K cannot be True"),
        ({"alpha": math.nan}, icm.BadInput, "--alpha: must be a finite number"),
        ({"label_rest": 1}, TypeError, "label_rest is True or False, not 1"),
        ({"calibrate": "men"}, icm.BadInput, "invalid choice: 'men'"),
        ({"prior": 0.3}, icm.BadInput, "--prior 0.3 and --calibrate none contradict each other"),
        ({"alpha": -1.0}, icm.BadInput, "--alpha -1 must be above 0"),
        ({"testbed": "builtin"}, icm.BadInput, "--testbed builtin and claims contradict each other"),
        ({"testbed": "builtin", "template": "{choice}"}, icm.BadInput, "has a template and labels of its own"),
        ({"template": "{chioce}"}, icm.BadInput, "shows neither"),
        ({"columns": {"choice": "answr"}}, icm.BadInput, "no column 'answr'"),
        ({"base_url": "http://127.0.0.1:9", "direct": True}, icm.BadInput, "no server"),
        ({"run": "a/b"}, icm.BadInput, "--run 'a/b': a name"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_what_cannot_be_used_is_an_exception(
    keywords: dict[str, Any], error: type[Exception], said: str, server: FakeVLLM
) -> None:
    with pytest.raises(error, match=said):
        icm.label(CLAIMS, **{"model": "fake-8b", "quiet": True} | keywords)
    assert not server.completions


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ([], "there are none"),
        (None, "there are no claims"),
        ({"question": "?"}, "give a list of dicts"),
        (7, "are of type int"),
        (["a", {"choice": "b"}], "row 1 is"),
        ([{"choice": "b"}, 5], "row 1 is 5"),
        ([{1: "b"}], "which is no text"),
        ("missing.jsonl", "missing.jsonl: not found"),
    ],
)
def test_claims_that_are_none(claims: Any, said: str, server: FakeVLLM) -> None:
    with pytest.raises(icm.BadInput, match=said):
        icm.label(claims, model="fake-8b")


def test_every_flag_is_a_keyword() -> None:
    flags = {action.dest for action in build_parser()._actions}
    assert flags - set(names(build_parser())) == {"help", "data", "check", "is_complete"}


def test_a_landscape(server: FakeVLLM, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    asked = {"model": "fake-8b", "batch_size": 16, "quiet": True, "alpha": 50, "labelings": 30}
    result = icm.label(CLAIMS, **SMALL, alpha=50)
    found = icm.landscape(CLAIMS, **asked, found=[result])
    rows = {row["name"]: row for row in found.rows}
    assert rows["gold"]["agreement"] == 1
    searched = rows[f"run {result.run_folder.name}"]
    pool = result.record.pool
    assert searched["agreement"] == pytest.approx(sum(claim.label == claim.gold for claim in pool) / len(pool))
    assert len(searched["labels"]) == 16
    assert found.plot()._repr_png_().startswith(b"\x89PNG")
    assert found.verdict in repr(found)
    assert (found.run_folder / "landscape.html").exists()
    before = len(server.requests)
    assert icm.landscape(CLAIMS, **asked, found=[result]).rows == found.rows
    assert len(server.requests) == before
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match=r"icm\.landscape\(\) has no setting 'labelling'; did you mean 'labelings'"):
        icm.landscape(CLAIMS, **asked, labelling=3)


def test_no_server_is_an_exception_and_leaves_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    with pytest.raises(icm.ServerUnreachable, match=r"127\.0\.0\.1:9"):
        icm.label(CLAIMS, **SMALL, base_url="http://127.0.0.1:9")
    assert [path.name for path in Path("runs").iterdir() if (path / "run.json").exists()] == []


async def test_in_a_running_loop_a_thread_does_it(server: FakeVLLM) -> None:
    """As in a notebook, whose cells run in an event loop."""
    result = icm.label(CLAIMS, **SMALL)
    again = await icm.alabel(CLAIMS, **SMALL)
    assert result.labels == again.labels


async def test_several_at_once_share_the_cache(server: FakeVLLM) -> None:
    calls = [icm.alabel(CLAIMS, **SMALL, seed=seed) for seed in (1, 2, 3)]
    results = await asyncio.gather(*calls)
    assert len({result.run_folder for result in results}) == 3
    assert all(result.finished for result in results)


async def test_a_cancelled_call_goes_on(server: FakeVLLM) -> None:
    undisturbed = await icm.alabel(CLAIMS, **SMALL, runs_dir="whole")
    server.faults.append(Fault(delay=0.02, times=None))
    call = asyncio.ensure_future(icm.alabel(CLAIMS, **SMALL, run="cut"))
    log = Path("runs/cut/log.jsonl")
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    part = icm.load("runs/cut")
    assert not part.finished
    assert part.U is None
    assert 0 < len([label for label in part.labels if label is not None]) < 24
    server.faults.clear()
    assert (await icm.alabel(CLAIMS, **SMALL, run="cut")).labels == undisturbed.labels


INTERRUPTED = """
import asyncio, sys
import icm

claims = [{"question": f"Is {n} even?", "choice": answer} for n in range(12) for answer in ("yes", "no")]


def call():
    return icm.label(claims, model="fake-8b", run="cut", num_seed=4, K=40, quiet=True)


async def cell():
    call()


try:
    asyncio.run(cell()) if sys.argv[1] == "loop" else call()
except KeyboardInterrupt as stop:
    print(stop.__notes__[0] if hasattr(stop, "__notes__") else stop.__context__)
    sys.exit(130)
"""


@pytest.mark.parametrize("where", ["loop", "no loop"])
def test_ctrl_c_stops_resumably(where: str, server: FakeVLLM, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(INTERRUPTED)
    server.faults.append(Fault(delay=0.05, times=None))
    process = subprocess.Popen(
        [sys.executable, "program.py", where],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "runs" / "cut" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    lines = log.read_bytes()
    assert lines.endswith(b"\n")
    server.faults.clear()
    claims = [{"question": f"Is {n} even?", "choice": answer} for n in range(12) for answer in ("yes", "no")]
    assert icm.label(claims, model="fake-8b", run="cut", num_seed=4, K=40, quiet=True).finished
    assert log.read_bytes().startswith(lines)


def test_a_result_shows_itself_in_text_and_html(server: FakeVLLM) -> None:
    hostile = [row | {"question": f"<script>alert({n})</script>\u202e"} for n, row in enumerate(CLAIMS)]
    result = icm.label(hostile, **SMALL)
    page = result._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(0)" in page
    assert page.count("<tr>") == 11
    assert "14 more rows" in page
    assert str(result.run_folder) in repr(result)
    figure = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert len(figure.axes) == 4


def test_a_collapse_is_a_warning(server: FakeVLLM) -> None:
    server.log_odds = lambda tokens: 3.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = icm.label(["yes " * (1 + n) for n in range(20)], model="fake-8b", quiet=True, num_seed=1)
    assert result.warning
    assert "collapsing to one label" in result.warning
    said = [each for each in caught if each.category is UserWarning]
    assert [(str(each.message), each.filename) for each in said] == [(result.warning, __file__)]


@pytest.mark.parametrize("how", ["awaited", "run", "task"])
def test_a_warning_of_a_coroutine_names_the_callers_line(how: str, server: FakeVLLM) -> None:
    server.log_odds = lambda tokens: 3.0
    claims = ["yes " * (1 + n) for n in range(20)]

    async def awaited() -> icm.Result:
        return await icm.alabel(claims, model="fake-8b", quiet=True, num_seed=1)

    async def task() -> icm.Result:
        return await asyncio.create_task(icm.alabel(claims, model="fake-8b", quiet=True, num_seed=1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        job = icm.alabel(claims, model="fake-8b", quiet=True, num_seed=1) if how == "run" else None
        asyncio.run(job or (awaited() if how == "awaited" else task()))
    assert [each.filename for each in caught if each.category is UserWarning] == [__file__]


def test_warnings_about_the_claims_name_rows_and_no_file_that_was_made_of_them(
    server: FakeVLLM, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*CLAIMS, CLAIMS[0] | {"label": 1}, CLAIMS[0] | {"label": 0}, {"question": "", "choice": None}, {}]
    result = icm.label(rows, **SMALL, skip_bad_rows=True)
    assert (result.run_folder.parent / "data").is_dir()
    said = [record.getMessage() for record in caplog.records]
    first, second = len(CLAIMS) + 2, len(CLAIMS) + 3
    assert any(each.startswith(f"claims: 2 rows are left out (--skip_bad_rows): row {first}: ") for each in said), said
    assert any(f"; row {second}: " in each for each in said)
    assert any(each.startswith("claims, row ") and ": is the same claim as row " in each for each in said), said
    assert not [each for each in said if ".jsonl" in each or "line" in each]
    logging.getLogger("src.pipeline.datafiles").warning("%s/claims.jsonl:3: later", result.run_folder)
    assert caplog.records[-1].getMessage().endswith("claims.jsonl:3: later")


def test_known_labels_are_kept(server: FakeVLLM) -> None:
    asked = {name: value for name, value in SMALL.items() if name != "num_seed"} | {"batch_size": 24}
    known = [None] * 24
    known[0], known[3] = False, True
    result = icm.label(CLAIMS, **asked, known=known)
    assert [row["label"] for row in result if row["by"] == "known"] == [False, True]
    assert result.labels[0] is False
    folders = {
        icm.label(CLAIMS, **asked, known=same).run_folder
        for same in ({0: 0, 3: 1}, [{"row": 3, "label": "true"}, {"row": 0, "label": "false"}])
    }
    assert folders == {result.run_folder}
    unknown = icm.label(CLAIMS, **asked, known=[None] * 24)
    assert unknown.run_folder == icm.label(CLAIMS, **asked).run_folder
    with pytest.raises(icm.BadInput, match="has 2 labels, and there are 24 claims"):
        icm.label(CLAIMS, **asked, known=[True, None])
    with pytest.raises(icm.BadInput, match="label"):
        icm.label(CLAIMS, **asked, known={0: "perhaps"})


def test_labels_that_are_withheld_are_none(server: FakeVLLM) -> None:
    whole = icm.label(CLAIMS, **SMALL, run="mine")
    result = icm.label(CLAIMS, **SMALL, run="mine", abstain_below=1.0)
    withheld = [number for number, row in enumerate(result) if row["by"] == "abstained"]
    assert withheld
    assert [label for number, label in enumerate(result.labels) if number in withheld] == [None] * len(withheld)
    assert [result.rows[number]["abstained_label"] for number in withheld] == [whole.labels[at] for at in withheld]
    assert f"{len(withheld)} claims without a label" in repr(result)
    assert result.probabilities == whole.probabilities
