"""benchmarks/upstream_report.py: what it compares, its processes, its tables; and the page that shows its results."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import upstream_report
from benchmarks.upstream_report import PARTS, Backend, Cache, Heads, Record, Row, Runner, cell, merged, spans, tables

torch = pytest.importorskip("torch")

REPO_ROOT = Path(__file__).resolve().parents[2]
SCRIPT = REPO_ROOT / "benchmarks" / "upstream_report.py"
PAGE = REPO_ROOT / "docs" / "upstream-report.md"
RESULTS = REPO_ROOT / "benchmarks" / "results" / "upstream-report-h100.json"
NEW = {"vllm": "0.33.0", "torch": "2.14.0", "mode": "on", "device": "NVIDIA H200"}
OLD = {"vllm": "0.26.0", "torch": "2.11.0", "mode": "on", "device": "NVIDIA H200"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO_ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


# What is compared


def test_rows_that_depend_on_how_many_there_are_are_counted() -> None:
    x = torch.arange(40.0).reshape(20, 2)

    def by_count(rows: slice) -> Any:
        part = x[rows]
        return part + (0.5 if len(part) in (3, 4) else 0.0)

    [row] = upstream_report.rows_alone("r", by_count, 20, (1, 3, 4))
    assert row == Row("r", 16, 14, 0.5, "rows", "3 of 3, 3 of 3, 4 of 4, 4 of 4 rows alone")
    [row] = upstream_report.rows_alone("r", lambda rows: x[rows], 20, (1, 3, 4))
    assert row == Row("r", 16, 0, 0.0, "rows", "")


def attention(small: Callable[[int], bool]) -> upstream_report.Attend:
    """Attention by the definition, one query at a time; in steps that are `small` by their longest query it is off."""

    def attend(
        queries: Any,
        keys: Any,
        values: Any,
        starts: Any,
        used: Any,
        tables: Any,
        longest: int,
        furthest: int,
        window: int,
    ) -> Any:
        out = torch.empty_like(queries, dtype=torch.float32)
        group = queries.shape[1] // keys.shape[2]
        assert furthest >= int(used.max())
        for number, length in enumerate(used.tolist()):
            k = keys[tables[number]].flatten(0, 1)[:length].repeat_interleave(group, dim=1).float()
            v = values[tables[number]].flatten(0, 1)[:length].repeat_interleave(group, dim=1).float()
            first, last = int(starts[number]), int(starts[number + 1])
            for row in range(first, last):
                end = length - (last - row) + 1
                begin = max(0, end - window) if window else 0
                scores = torch.einsum("hd,thd->ht", queries[row].float(), k[begin:end]) / math.sqrt(k.shape[-1])
                out[row] = torch.einsum("ht,thd->hd", scores.softmax(dim=-1), v[begin:end])
        return out + (0.25 if small(longest) else 0.0)

    return attend


@pytest.mark.parametrize("window", [0, 16])
def test_tails_behind_a_cache_are_compared_with_the_whole_sequence(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_report, "LENGTH", 41)
    monkeypatch.setattr(upstream_report, "ASKED", 12)
    monkeypatch.setattr(upstream_report, "NEIGHBOUR", (20, 16))
    heads = Heads(16, 8, 1, window)
    assert heads.raised == 9
    cache = Cache(heads)
    exact = attention(lambda _: False)
    assert [row.differ for row in upstream_report.tails(cache, exact, False)] == [0, 0]
    # As FlashAttention 3 does: another tile for at most 64 query rows of a key head.
    tiled = attention(lambda longest: longest * 8 <= 64)
    alone, beside = upstream_report.tails(cache, tiled, False)
    assert (alone.differ, alone.compared, alone.detail) == (8, 12, "n = 1 to 8")
    assert alone.largest == pytest.approx(0.25)
    assert beside.differ == 0
    assert [row.differ for row in upstream_report.tails(cache, tiled, True)] == [0, 0]


@pytest.mark.parametrize(
    ("queries", "keys", "least"), [(32, 8, 17), (14, 2, 10), (64, 8, 9), (16, 16, 65), (128, 1, 2)]
)
def test_the_raised_query_no_longer_fits_the_small_tile(queries: int, keys: int, least: int) -> None:
    """Of 14/2 heads 9 tokens do and 10 do not, as vllm-project/vllm issue 51902 found on an H100."""
    assert Heads(64, queries, keys).raised == least


def test_prompts_leave_every_remainder_of_a_block() -> None:
    options = argparse.Namespace(tokens=640, prompts=64)
    prompts = upstream_report.prompts_of(options, 50_000)
    assert {len(ids) % 16 for ids in prompts} == set(range(16))
    assert min(map(len, prompts)) >= 480
    assert max(map(len, prompts)) < 800
    assert len({tuple(ids[:16]) for ids in prompts}) == 64


def test_scores_are_compared_bit_by_bit() -> None:
    expected = [[-1.0, -2.0], [-3.0, -4.0]]
    row = upstream_report.compare_scores("w", expected, [([-1.0, -2.0], 16), ([-3.0, math.nextafter(-4.0, 0)], 32)])
    assert (row.compared, row.differ, row.detail) == (2, 1, "24 tokens a prompt cached")
    assert 0 < row.largest < 1e-15


def test_a_backend_is_named_to_vllm() -> None:
    assert Backend().arguments() == {}
    assert Backend("TRITON_ATTN").arguments() == {"attention_config": {"backend": "TRITON_ATTN"}}
    both = {"backend": "FLASH_ATTN", "flash_attn_version": 3}
    assert Backend("FLASH_ATTN", 3).arguments() == {"attention_config": both}


# Tables and files


def test_numbers_are_written_as_spans() -> None:
    assert spans([]) == ""
    assert spans([3, 1, 2, 9, 7, 8, 20]) == "1 to 3, 7 to 9, 20"


def test_a_table_has_a_column_for_each_environment() -> None:
    rows = [Row("wholly cached", 64, 12, 0.0213, "prompts", "600 tokens a prompt cached"), Row("again", 64, 0)]
    records = [
        Record("scores-fa3", "m", OLD, rows=rows),
        Record("scores-fa3", "m", NEW, rows=[Row("wholly cached", 64, 0, 0.0, "prompts")], failures=["stopped"]),
        Record("norms", "", NEW, rows=[Row("fused", 4096, 4, 0.5, "rows")]),
        Record("experts", "", failures=["not begun: out of time"]),
    ]
    assert tables(records).splitlines() == [
        "#### Norms: rows alone and among 4,096",
        "",
        "| rows that differ | vLLM 0.33.0, torch 2.14.0, NVIDIA H200 |",
        "| --- | --- |",
        "| fused | 4 of 4,096, up to 0.5 |",
        "",
        "#### Scores, FLASH_ATTN version 3: m",
        "",
        "- vLLM 0.33.0, torch 2.14.0, NVIDIA H200: stopped",
        "",
        "| prompts that differ | vLLM 0.26.0, torch 2.11.0, NVIDIA H200 | vLLM 0.33.0, torch 2.14.0, NVIDIA H200 |",
        "| --- | --- | --- |",
        "| wholly cached | 12 of 64, up to 0.021 nat; 600 tokens a prompt cached | 0 of 64 |",
        "| again | 0 of 64 |  |",
        "",
        "#### Experts: rows alone and among 2,048",
        "",
        "- not begun: not begun: out of time",
    ]


def test_a_later_record_replaces_an_earlier_one_of_its_kind() -> None:
    old, new = Record("norms", "", OLD), Record("norms", "", NEW)
    again = Record("norms", "", NEW, seconds=2.0)
    unbegun = Record("norms", failures=["not begun: out of time"])
    assert merged([old, new], again) == [old, again]
    assert merged([old], unbegun) == [old]
    assert merged([], unbegun) == [unbegun]
    assert merged([unbegun], new) == [new]


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [Record("norms", "", NEW, 1.5, ["n"], ["f"], [Row("a", 2, 1, 0.5, "rows", "d")])]
    upstream_report.write_records(tmp_path / "new" / "r.json", records)
    assert upstream_report.read_records(tmp_path / "new" / "r.json") == records
    done = run("--table", "--json", str(tmp_path / "new" / "r.json"))
    assert (done.returncode, done.stdout) == (0, tables(records))


# Processes

PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks import upstream_report as u
u.environment = lambda: {{"vllm": "1", "torch": "2", "device": "D", "mode": os.environ["VLLM_BATCH_INVARIANT"],
                          "plugins": os.environ["VLLM_PLUGINS"]}}
def measure(options, record):
    record.add(u.Row("one", 3, 1, 0.5, "rows"))
    print("a line of the log", file=sys.stderr)
    kind = os.environ["KIND"]
    if kind == "hangs":
        time.sleep(600)
    if kind == "crashes":
        os.abort()
    if kind == "fails":
        raise RuntimeError("no such\\nkernel in /a/b-1/site/k.so, 1/2 there")
    record.add(u.Row("two", 3, 0, 0.0, "rows"))
u.PARTS["norms"] = u.Part("Norms", measure)
raise SystemExit(u.main())
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(REPO_ROOT)))
    return [sys.executable, str(tmp_path / "program.py")]


def options(*arguments: str) -> argparse.Namespace:
    return upstream_report.build_parser().parse_args(arguments)


@pytest.mark.parametrize(
    ("kind", "rows", "failure"),
    [
        ("measures", 2, None),
        ("fails", 1, "RuntimeError: no such kernel in k.so, 1/2 there"),
        ("crashes", 1, f"ended with code {-signal.SIGABRT}: a line of the log"),
        ("hangs", 1, "stopped after "),
    ],
)
def test_what_a_part_measured_is_kept_however_it_ends(
    kind: str, rows: int, failure: str | None, program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIND", kind)
    seconds = "6" if kind == "hangs" else "60"
    record = Runner(options("--part_seconds", seconds), tmp_path, program).run("norms")
    assert len(record.rows) == rows
    assert record.environment == {"vllm": "1", "torch": "2", "device": "D", "mode": "1", "plugins": ""}
    if failure is None:
        assert record.failures == []
    else:
        [told] = record.failures
        assert told.startswith(failure)


def test_no_part_begins_after_the_time_is_over(program: list[str], tmp_path: Path) -> None:
    record = Runner(options("--seconds", "0"), tmp_path, program).run("norms")
    assert record.failures == ["not begun: out of time"]
    assert record.environment == {}


def test_parts_share_the_gpus_that_are_named(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KIND", "measures")
    monkeypatch.setattr(upstream_report, "refusal", lambda _: "")
    monkeypatch.setattr(
        upstream_report, "Runner", lambda options, logs: Runner(options, logs, [*program[:1], program[1]])
    )
    path = tmp_path / "r.json"
    # The same part twice: each on a GPU of its own, the second replaces the first in the file.
    assert upstream_report.main(["--parts", "norms", "norms", "--gpus", "0", "1", "--json", str(path)]) == 0
    told = capsys.readouterr()
    assert sorted(line for line in told.err.splitlines() if "begins" in line) == [
        "norms: begins on GPU 0",
        "norms: begins on GPU 1",
    ]
    assert "| one | 1 of 3, up to 0.5 |" in told.out
    assert len(json.loads(path.read_text())["records"]) == 1


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_part_and_says_what_is_left(
    ending: signal.Signals, program: list[str], tmp_path: Path
) -> None:
    starter = tmp_path / "starter.py"
    starter.write_text(
        f"import sys\nsys.path.insert(0, {str(REPO_ROOT)!r})\n"
        "from benchmarks import upstream_report as u\nimport functools\n"
        f"u.Runner = functools.partial(u.Runner, program={program!r})\nu.refusal = lambda _: ''\n"
        "raise SystemExit(u.main())\n"
    )
    command = [sys.executable, str(starter), "--parts", "norms", "products"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "KIND": "hangs"}, start_new_session=True
    )
    assert process.stderr is not None
    while "one" not in process.stderr.readline():
        time.sleep(0.05)
    process.send_signal(ending)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "stopped; for the rest: --parts norms products"


# Command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "nothing"], "argument --parts: invalid choice: 'nothing'"),
        (["--prompts", "1"], "argument --prompts: must be a whole number of at least 2, not '1'"),
        (["--tokens", "many"], "argument --tokens: must be a whole number of at least 64, not 'many'"),
        (["--table"], "--table needs --json FILE with results"),
        (["--table", "--json", "no-such-file.json"], "--table needs --json FILE with results"),
        (["--cpu", "--parts", "norms"], "--cpu: only scores-default runs on a CPU"),
        (["--json", "README.md"], "README.md is not a results file of this program"),
        ([], "needs an NVIDIA GPU, and there is none here"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_it_needs_nothing_of_this_project(tmp_path: Path) -> None:
    """The file is made to be copied."""
    copied = tmp_path / "report.py"
    copied.write_text(SCRIPT.read_text())
    done = subprocess.run(
        [sys.executable, "-P", str(copied), "--help"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0
    assert "--part_seconds" in done.stdout
    for package in ("icm_vllm", "icm", "core", "src", "fakes", "contrib", "scripts", "benchmarks"):
        assert f"import {package}" not in copied.read_text()
        assert f"from {package}" not in copied.read_text()


# The page


def test_the_page_names_every_part_and_shows_the_results() -> None:
    """UPDATE_DOCS=1 writes the tables into the page."""
    text = PAGE.read_text()
    assert [name for name in PARTS if f"`{name}`" not in text] == []
    before, rest = text.split("<!-- tables of benchmarks/upstream_report.py -->\n")
    _, after = rest.split("<!-- end of the tables -->\n")
    shown = "Not measured yet.\n"
    if RESULTS.exists():
        link = f"All numbers: [file](../{RESULTS.relative_to(REPO_ROOT)})."
        shown = f"{link}\n\n{tables(upstream_report.read_records(RESULTS))}"
    expected = (
        f"{before}<!-- tables of benchmarks/upstream_report.py -->\n\n{shown}\n<!-- end of the tables -->\n{after}"
    )
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected)
    assert PAGE.read_text() == expected


def test_a_cell_says_how_many_and_how_far() -> None:
    assert cell(Row("w", 1200, 0)) == "0 of 1,200"
    assert cell(Row("w", 64, 3, 0.0123456, "prompts", "d")) == "3 of 64, up to 0.012 nat; d"
