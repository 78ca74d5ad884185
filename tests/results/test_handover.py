"""Files for other tools: what they hold, and that other tools take them."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.pipeline.datafiles import load_data_file
from src.results.exports import chosen_claims, plain_rows
from src.results.handover import write_csv, write_dataset, write_jsonl
from src.results.run_reader import read_run
from tests.run_examples import write_run

LABELS = [True, False] * 4
HOSTILE = [
    {"choice": '=HYPERLINK("http://x","y")'},
    {"choice": "a;=1+1"},
    {"choice": 'two\nlines, "quoted"'},
    {"choice": "bell \x07 and \u202eturned"},
]


def example(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a", labels=LABELS, gold=[*LABELS[:4], *[None] * 4], claims=HOSTILE)


def test_jsonl_can_be_labelled_again(tmp_path: Path) -> None:
    run = read_run(example(tmp_path))
    assert write_jsonl(tmp_path / "x.jsonl", plain_rows(run, chosen_claims(run))) == 8
    _, claims, _ = load_data_file(tmp_path / "x.jsonl")
    assert [claim.choice for claim in claims] == [claim.choice for claim in run.claims]
    assert [claim.gold for claim in claims] == [claim.gold for claim in run.claims]  # not the labels that it found


def test_csv_holds_no_formula_and_no_control_character(tmp_path: Path) -> None:
    run = read_run(example(tmp_path))
    write_csv(tmp_path / "x.csv", plain_rows(run, chosen_claims(run)))
    content = (tmp_path / "x.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines(keepends=True)))
    assert [row["choice"] for row in rows[:4]] == [
        "'=HYPERLINK(\"http://x\",\"y\")", "a;'=1+1", 'two\nlines, "quoted"', "bell <U+0007> and <U+202E>turned",
    ]  # fmt: skip
    assert (rows[0]["label"], rows[0]["gold"], rows[7]["gold"], float(rows[1]["log_odds"])) == (
        "True",
        "True",
        "",
        -2.0,
    )
    load_data_file(tmp_path / "x.csv")


def test_a_dataset_folder_names_its_file_and_its_making(tmp_path: Path) -> None:
    run = read_run(example(tmp_path))
    write_dataset(tmp_path / "set", run, chosen_claims(run))
    card = (tmp_path / "set" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    [file] = head["configs"][0]["data_files"]
    rows = [json.loads(line) for line in (tmp_path / "set" / file["path"]).read_text().splitlines()]
    assert len(rows) == 8
    assert len({tuple(row) for row in rows}) == 1  # the same columns in every row
    assert "alpha | 50.0" in card
    assert "1.00 (4 of 4" in card


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="datasets is not installed (pip install datasets)"
)
def test_the_dataset_library_loads_it(tmp_path: Path) -> None:
    run = read_run(example(tmp_path))
    write_dataset(tmp_path / "set", run, chosen_claims(run))
    code = f"from datasets import load_dataset; print(load_dataset({str(tmp_path / 'set')!r})['train'][0]['choice'])"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "HYPERLINK" in done.stdout
