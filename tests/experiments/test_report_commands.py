"""icm diagnose, report, compare, watch and export, as they are called, and called wrongly."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.experiments.commands import main
from tests.run_examples import write_run

HALF = [n % 2 == 0 for n in range(40)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "a", labels=HALF, gold=HALF, zero_shot=[1.0 if h else -1.0 for h in HALF])


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "b", labels=[True] * 40, gold=HALF, settings={"seed": 2})


def test_diagnose_says_what_is_wrong_and_fails(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run)]) == 0
    assert "PROBLEM" not in capsys.readouterr().out
    assert main(["diagnose", str(run), str(other)]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM  Collapse to one label: 40 of 40 labels are True." in told
    assert "-> Subtract the model's lean to one" in told
    assert "arXiv 2309.17249" in " ".join(told.split())
    assert "across runs" in told
    assert "20 of 40 claims" in told


def test_terminal_output_holds_no_escape_of_a_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = [{"question": "\x1b]0;owned\x07", "choice": "\x1b[2J"}] * 40
    first = write_run(tmp_path / "a", labels=HALF, claims=evil, settings={"model": "\x1b[31m"})
    second = write_run(tmp_path / "b", labels=[not label for label in HALF], claims=evil)
    main(["diagnose", str(first), str(second)])
    main(["compare", str(first), str(second)])
    main(["watch", str(first), "--once"])
    assert "\x1b" not in capsys.readouterr().out


def test_report_writes_one_file(run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    prices = tmp_path / "prices.yaml"
    prices.write_text("{currency: EUR, date: 2026-11-21, models: {other: {}}}")
    page = tmp_path / "deep" / "both.html"
    assert main(["report", str(run), str(other), "-o", str(page), "--prices", str(prices)]) == 0
    told = capsys.readouterr()
    assert f"{page}: 2 runs, 80 claims" in told.out
    assert "has no price for fake-8b" in told.err
    assert page.exists()


def test_compare_prints_and_writes(run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(run), str(other), "-o", str(tmp_path / "c.html")]) == 0
    told = capsys.readouterr().out
    assert "0.500 (20 of 40)" in told
    assert "1.000 (0.912 to 1.000) 40/40" in told
    assert "</html>" in (tmp_path / "c.html").read_text()
    assert main(["compare", str(run)]) == 2
    assert "two runs at least" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "lines"), [("jsonl", 40), ("csv", 41), ("dpo", 20), ("sft", 40), ("axolotl", 40)])
def test_export_every_format(run: Path, form: str, lines: int, tmp_path: Path) -> None:
    assert main(["export", str(run), "--format", form, "-o", str(tmp_path / "x")]) == 0
    assert len((tmp_path / "x").read_text().splitlines()) == lines


def test_export_a_dataset_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "datasets"]) == 0
    assert (run / "dataset" / "README.md").exists()
    assert "40 claims" in capsys.readouterr().out


def test_export_has_nothing_to_write(run: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--least", "9"]) == 2
    assert "no label is left" in capsys.readouterr().err
    assert main(["export", str(other), "--format", "dpo"]) == 2
    assert "no pair to write" in capsys.readouterr().err
    assert not (run / "export.jsonl").exists()


def withhold(run: Path) -> None:
    """As where no label is sure enough to be handed over."""
    rows = [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]
    rows = [row | {"label": None, "by": "abstained", "abstained_label": row["label"]} for row in rows]
    (run / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_three_labels_are_refused_as_such_where_all_are_withheld(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((run / "run.json").read_text())
    document["settings"]["labels"] = ["red", "green", "blue"]
    (run / "run.json").write_text(json.dumps(document))
    withhold(run)
    assert main(["export", str(run), "--format", "dpo"]) == 2
    assert "made of True and False; the labels of this run are red, green, blue" in capsys.readouterr().err


def test_compare_counts_the_labels_handed_over_where_none_can_be_compared(
    run: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    withhold(other)
    assert main(["compare", str(run), str(other)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  handed over ")]
    assert line.split() == ["handed", "over", "–", "0", "of", "40", "labels"]


def test_export_writes_over_no_file_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "run.json").read_bytes()
    assert main(["export", str(run), "--format", "csv", "-o", str(run / "run.json")]) == 2
    assert "is a file of the run itself" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before
    assert main(["export", str(run), "-o", str(run / "mine.jsonl")]) == 0
    assert main(["export", str(run), "-o", str(run / "mine.jsonl")]) == 0  # its own it does write over


def test_export_does_not_write_over_the_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("the file that the run read")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    run = write_run(tmp_path / "run", labels=HALF, gold=HALF, settings={"data_sha256": digest})
    assert main(["export", str(run), "-o", str(data)]) == 2
    assert "holds the claims that the run labelled" in capsys.readouterr().err
    assert data.read_text() == "the file that the run read"


@pytest.mark.parametrize("command", ["diagnose", "report", "compare", "export"])
def test_what_is_no_run_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "none"), *([str(tmp_path)] if command == "compare" else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none: no such folder" in error


@pytest.mark.parametrize("command", ["report", "compare", "export"])
def test_an_output_that_cannot_be_written(
    command: str, run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    runs = [str(run), *([] if command == "export" else [str(other)])]
    assert main([command, *runs, "-o", str(tmp_path / "file" / "x")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main([command, *runs, "-o", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["watch", "report", "ask", "diagnose", "export"])
def test_of_a_sweep_a_cell_is_to_be_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep"
    for cell in ("alpha-50", "alpha-10"):
        write_run(sweep / cell, labels=HALF)
    (sweep / "experiment.json").write_text("{}")
    (sweep / "table.json").write_text("{}")
    assert main([command, str(sweep), *(["--wait", "0.1"] if command == "watch" else [])]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == (
        "",
        f"error: {sweep}: is a sweep; name one of its cells, as in {sweep / 'alpha-10'}\n",
    )


def test_watch_a_finished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run)]) == 0
    told = capsys.readouterr().out
    assert "finished" in told
    assert "40 of 40" in told
    assert "agreement with gold 1.00" in told


def watching(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "src.experiments.commands", "watch", str(folder), "--interval", "0.05"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored where the tests run in the background, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def line_of(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if wanted in line:
            return line
    raise AssertionError(f"{wanted!r} never came: {process.stderr.read() if process.stderr else ''}")


def test_watch_follows_a_run_from_before_its_start_to_its_end(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "runs" / "new"
    new.mkdir()
    with watching(new) as process:
        line_of(process, "new: waiting for a run to begin in it: no run.json yet")
        document = json.loads((run / "run.json").read_text())
        unfinished = {key: value for key, value in document.items() if key not in ("result", "finished")}
        (new / "run.json").write_text(json.dumps(unfinished))
        (new / "claims.jsonl").write_bytes((run / "claims.jsonl").read_bytes())
        lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
        (new / "log.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
        line_of(process, "8 of 40")
        (new / "log.jsonl").write_bytes(b"".join(lines[:9]))
        line_of(process, "12 of 40")
        (new / "log.jsonl").rename(new / "log.old")
        (new / "log.jsonl").write_bytes(b"".join(lines))
        line_of(process, "40 of 40")
        (new / "run.json").write_text(json.dumps(document))
        line_of(process, "finished")
        assert process.wait(10) == 0


def test_watch_waits_for_a_run_to_begin_only_so_long(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "never").mkdir()
    assert main(["watch", str(tmp_path / "never"), "--interval", "0.05", "--wait", "0.2"]) == 2
    told = capsys.readouterr()
    assert told.out == "never: waiting for a run to begin in it: no run.json yet\n"
    assert told.err.startswith(f"error: {tmp_path / 'never'}: no run has begun in it for ")
    assert len(told.err.splitlines()) == 1
    # One that has begun may take its time.
    begun = tmp_path / "begun"
    begun.mkdir()
    document = json.loads((run / "run.json").read_text())
    (begun / "run.json").write_text(json.dumps({"settings": document["settings"], "flags": {}}))
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "src.experiments.commands", "watch", str(begun)),
            "--interval",
            "0.05",
            "--wait",
            "0.1",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line_of(process, "begun: waiting for its first step")
        time.sleep(0.5)
        assert process.poll() is None
        process.kill()


def test_ctrl_c_ends_watching_without_a_traceback(tmp_path: Path) -> None:
    never = tmp_path / "never"
    never.mkdir()
    with watching(never) as process:
        line_of(process, "waiting")
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=10)
        assert process.returncode == 130
        assert error == ""


def test_watch_refuses_a_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run / "run.json")]) == 2
    assert "is not a run's folder" in capsys.readouterr().err


def test_watch_refuses_a_folder_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nosuch")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'nosuch'}: there is no such folder; a run makes its own when it starts"
    ]


def test_watching_the_parts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "p" / "batch-000", labels=HALF, gold=HALF)
    write_run(tmp_path / "p" / "batch-001", labels=HALF, gold=HALF, finished=False)
    (tmp_path / "p" / "run.json").write_text(json.dumps({"parts": ["batch-000", "batch-001", "batch-002"]}))
    assert main(["watch", str(tmp_path / "p"), "--once"]) == 0
    told = capsys.readouterr().out
    assert "1 of 3 searches finished" in told
    assert told.index("batch-001") < told.index("batch-000")  # those in progress first
