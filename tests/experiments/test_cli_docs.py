"""docs/cli.md shows the command line's real help. To renew it: UPDATE_DOCS=1 make test-fast ARGS="-k cli_docs"."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from src.experiments.ICM import build_parser

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_the_documented_help_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = build_parser().format_help().replace(str(DOCUMENT.parents[1]), ".")
    expected = f"# ICM.py\n\nWhat `python ICM.py --help` prints.\n\n```\n{shown}```\n"
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(expected)
    assert expected.split() == DOCUMENT.read_text().split()
