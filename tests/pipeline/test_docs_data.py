"""The files in docs/data.md are read as they are printed, with the flags that stand at them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from src.experiments.ICM import build_parser
from src.experiments.request import DataRequest
from src.icm.columns import OURS
from src.pipeline.datafiles import load_data_file
from src.pipeline.file_kinds import NOT_READ

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(csv|json)(.*?)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_every_file_that_is_shown_is_read(tmp_path: Path) -> None:
    found = []
    for number, (kind, flags, text) in enumerate(BLOCKS):
        path = tmp_path / f"{number}.{kind}"
        path.write_text(text)
        request = DataRequest.of(build_parser().parse_args(["--data", str(path), *shlex.split(flags)]))
        testbed, claims, _ = load_data_file(path, request.reading())
        counts = testbed.consistency(claims, "gold-free").counts_by_relation()
        found.append((len(claims), sum(c.gold is True for c in claims), testbed.grouped_by, counts))
    assert found == [
        (3, 1, "question", {}),
        (2, 1, "question", {}),
        (10, 5, "question", {"exactly one is true": 3}),
        (5, 0, "consistency_id", {"exactly one is true": 1}),
    ]


def test_every_column_that_is_read_is_explained() -> None:
    table = PAGE.partition("## Columns")[2].partition("\n## ")[0]
    assert all(f"`{column}`" in table for column in OURS)


def test_kinds_that_are_refused_are_not_promised() -> None:
    table = PAGE.partition("## Files")[2].partition("\n## ")[0]
    assert not any(f"`{suffix}`" in table for suffix in NOT_READ)
