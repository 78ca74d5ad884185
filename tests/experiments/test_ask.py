"""icm ask, as it is called, and called wrongly."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from src.experiments.ask import TITLE
from src.experiments.commands import main
from src.experiments.ICM import build_parser
from src.results import run_reader
from tests.experiments.test_landscape import learns_from_context, write_claims
from tests.results.test_page import ATTACKS
from tests.run_examples import write_run

ROOT = Path(__file__).resolve().parents[2]
HALF = [at % 2 == 0 for at in range(20)]
ODDS = [(1 + at / 10) * (1 if label else -1) for at, label in enumerate(HALF)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "a", labels=HALF, log_odds=ODDS)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_it_writes_a_file_and_a_page_and_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(run), "-n", "4"]) == 0
    told = capsys.readouterr().out
    assert [row["row"] for row in rows(run / "answers.csv")] == ["0", "2", "4", "6"]  # one of each group
    page = (run / "answers.html").read_text()
    assert TITLE in page
    assert "Claim 4 of 4" in page
    assert "Claims to ask about, by margin (a)" in told
    assert "question 3 / choice 6" in told
    assert f"--continue_from {run} --known {run / 'answers.csv'} --run a-known" in told


def test_more_than_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(run), "-n", "50"]) == 0
    assert "only 20 claims can be asked about" in capsys.readouterr().out
    assert len(rows(run / "answers.csv")) == 20


def test_other_runs_are_heard(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [not HALF[0], *HALF[1:]]
    other = write_run(tmp_path / "runs" / "b", labels=labels)
    inverted = write_run(tmp_path / "runs" / "c", labels=[not label for label in HALF])
    file = tmp_path / "new" / "asked.csv"
    assert main(["ask", str(run), str(other), str(inverted), "--by", "disagreement", "-n", "1", "-o", str(file)]) == 0
    told = capsys.readouterr().out
    assert "c agrees on 0% of the claims only" in told
    [row] = rows(file)
    assert row["row"] == "0"
    assert "1 of 1 other run found another label" in row["reason"]
    assert file.with_suffix(".html").exists()


def test_a_stopped_run_can_be_asked_about(tmp_path: Path) -> None:
    stopped = write_run(tmp_path / "a", labels=HALF, log_odds=ODDS, finished=False)
    assert main(["ask", str(stopped), "-n", "2"]) == 0
    assert len(rows(stopped / "answers.csv")) == 2


def test_the_next_command_is_that_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, Any] = {"testbed": "gsm8k", "data": "my claims.csv", "batch_size": 64, "alpha": 50.0}
    flags |= {"calibrate": "mean", "direct": True, "mirror": False, "map": "['label=yes:true,no:false']", "run": "a"}
    flags |= {"search": "ascent", "seed": 3, "prior": None, "num_seed": 8}
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"flags": flags}))
    assert main(["ask", str(run)]) == 0
    command = capsys.readouterr().out.partition("  then  ")[2]
    assert command.startswith(
        "icm label --data 'my claims.csv' --batch_size 64 --map label=yes:true,no:false --direct --alpha 50"
    )
    for part in ("--calibrate mean", "--no-mirror", "--search ascent", "--seed 3"):
        assert part in command
    assert "--prior" not in command
    assert "--num_seed" not in command
    assert command.count("--run ") == 1


def test_the_next_command_names_a_run_that_is_not_there_yet(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for taken, free in (("", "a-known"), ("a-known", "a-known2"), ("a-known2", "a-known3")):
        if taken:
            (run.parent / taken).mkdir()
        assert main(["ask", str(run)]) == 0
        assert capsys.readouterr().out.rstrip().endswith(f"--run {free}")


@pytest.mark.parametrize("flags", [{"search": "annealing", "gold_seeds": 3}, {"gold_seeds": 0}])
def test_the_next_command_names_the_search_and_can_be_run(
    run: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a name another search may be meant; and --known stands for gold labels that the run knew, too."""
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"flags": {"testbed": "builtin", **flags}}))
    assert main(["ask", str(run)]) == 0
    command = capsys.readouterr().out.partition("  then  ")[2]
    args = build_parser().parse_args(shlex.split(command)[2:])
    assert (args.search, args.search_by_default) == ("annealing", False)
    assert args.known is not None


def test_answers_are_not_written_over(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "answers.csv"
    assert main(["ask", str(run), "-n", "3"]) == 0
    assert main(["ask", str(run), "-n", "4"]) == 0  # nothing was answered
    answered = file.read_text(encoding="utf-8-sig").replace('0,""', '0,"unsure"', 1)
    file.write_text(answered, encoding="utf-8-sig")
    capsys.readouterr()
    assert main(["ask", str(run), "-n", "3"]) == 2
    assert f"{file}: holds 1 answer already; name another file with -o" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8-sig") == answered
    assert main(["ask", str(run), "-n", "3", "-o", str(run / "more.csv")]) == 0


def test_terminal_output_holds_no_escape_of_a_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = [{"question": "\x1b]0;owned\x07", "choice": "\x1b[2J"}, *({"choice": text} for text in ATTACKS)]
    run = write_run(tmp_path / "a", labels=HALF, claims=evil, settings={"model": "\x1b[31m"})
    assert main(["ask", str(run), "-n", "20"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_run_that_is_named_without_its_folder_is_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "a", labels=HALF)
    monkeypatch.chdir(tmp_path)
    assert main(["ask", "a"]) == 2
    assert capsys.readouterr().err == "error: a: no such folder; did you mean runs/a?\n"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(run_reader, "RUNS", tmp_path / "runs")  # the project's, whatever the folder
    assert main(["ask", "runs/a"]) == 2
    assert capsys.readouterr().err == f"error: runs/a: no such folder; did you mean {tmp_path / 'runs' / 'a'}?\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "nowhere: no such folder; name a run's folder, as in runs/NAME"),
        (["a", "-o", "answers.txt"], "answers.txt: name a file that ends in .csv; the page has its name, with .html"),
        (["a", "a"], "a: is the run itself; OTHER are other runs of the same claims"),
        (["a", "other"], "other: labels other data than a, or other labels"),
        (["a", "elsewhere"], "elsewhere: labelled no claim of a"),
        (["table"], "table: is a table of baselines; name one of its runs, as in table/seed-1"),
        (["none"], "none: there is nothing to ask: it has no labels yet"),
        (["a", "-o", "a.csv"], "a.csv: is a folder; name a file"),
        (["a", "-o", "/proc/no/answers.csv"], "/proc/no/answers.csv: cannot be written"),
    ],
)
def test_bad_input_gets_one_line(
    tmp_path: Path, arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("a"), labels=HALF)
    write_run(Path("other"), labels=HALF, data="e" * 64)
    write_run(Path("elsewhere"), labels=HALF, claims=[{"row": 100 + at} for at in range(20)])
    write_run(Path("none"), labels=HALF, finished=False)
    Path("none/log.jsonl").write_text("")
    Path("table").mkdir()
    Path("table/baselines.json").write_text("{}")
    Path("a.csv").mkdir()
    assert main(["ask", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {complaint}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flags", [["-n", "0"], ["-n", "x"], ["--by", "luck"]])
def test_bad_flags_get_one_line(run: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["ask", str(run), *flags])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.timeout(400)  # two processes, on a machine that may be busy
async def test_the_printed_command_goes_on_with_the_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Label, ask, answer, go on with the command that was printed, ask again: what is known stays known."""
    data = write_claims(tmp_path / "claims.jsonl")
    flags = ["--model", "fake-8b", "--batch_size", "16", "--alpha", "50", "--calibrate", "mean", "--search", "ascent"]
    async with FakeVLLM(log_odds=learns_from_context) as server:

        async def icm(*words: str) -> str:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "src.experiments.commands", *words),
                cwd=ROOT,
                env={**os.environ, "VLLM_BASE_URL": server.url, "ICM_SECRETS": os.devnull},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert process.returncode == 0, err.decode()
            return out.decode()

        runs = ["--runs_dir", str(tmp_path / "runs"), "--quiet"]
        await icm("label", "--data", str(data), *flags, *runs, "--run", "first")
        first = tmp_path / "runs" / "first"
        assert main(["ask", str(first), "-n", "3"]) == 0
        then = shlex.split(capsys.readouterr().out.partition("  then  ")[2])
        file = first / "answers.csv"
        asked = [row["row"] for row in rows(file)]
        answers = dict(zip(asked, ["True", "unsure", "False"], strict=True))
        text = file.read_text(encoding="utf-8-sig")
        for row, label in answers.items():
            text = text.replace(f'\n{row},""', f'\n{row},"{label}"')
        file.write_text(text, encoding="utf-8-sig")
        assert then[:2] == ["icm", "label"]
        told = await icm(*then[1:])
    assert "known labels         2, kept (from answers.csv" in told
    second = tmp_path / "runs" / "first-known"
    found = {str(row["row"]): row for row in map(json.loads, (second / "labels.jsonl").read_text().splitlines())}
    known = {row: found[row]["label"] for row in found if found[row]["by"] == "known"}
    assert known == {asked[0]: True, asked[2]: False}
    assert main(["ask", str(second), "-n", "16"]) == 0
    again = {row["row"]: row["label"] for row in rows(second / "answers.csv")}
    assert {row: label for row, label in again.items() if label} == {asked[0]: "True", asked[2]: "False"}
    assert set(list(again)[-2:]) == set(known)
    told = capsys.readouterr().out
    assert "2 known labels not asked for; they stand at the end of the file" in told
    assert told.rstrip().endswith("--run first-known2")


@pytest.mark.parametrize("command", ["ask", "report"])
def test_claims_and_files_of_the_run_are_not_written_over(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = tmp_path / "claims.csv"
    claims.write_text("question,choice\nq,a\n")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data_sha256"] = hashlib.sha256(claims.read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(record))
    before = (run / "log.jsonl").read_bytes()
    assert main([command, str(run), "-o", str(claims)]) == 2
    assert "holds the claims that the run labelled" in capsys.readouterr().err
    assert claims.read_text() == "question,choice\nq,a\n"
    if command == "report":
        assert main([command, str(run), "-o", str(run / "log.jsonl")]) == 2
        assert "is a file of the run itself" in capsys.readouterr().err
    assert (run / "log.jsonl").read_bytes() == before
