"""docs/cli.md shows every command's real help. To renew it: UPDATE_DOCS=1 make test-fast ARGS="-k cli_docs"."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from src.experiments.commands import COMMANDS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_the_documented_help_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("NO_COLOR", "1")
    parts = [
        "# Command lines\n\nWhat `icm COMMAND --help` prints. `python src/experiments/ICM.py` is `icm label`. CHECKOUT "
        "is this project's folder, wherever a command is run.\n"
    ]
    for name, (module, purpose) in COMMANDS.items():
        shown = import_module(module).build_parser().format_help().replace(str(DOCUMENT.parents[1]), "CHECKOUT")
        parts.append(f"## icm {name}: {purpose}\n\n```\n{shown}```\n")
    expected = "\n".join(parts)
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(expected)
    assert expected.split() == DOCUMENT.read_text().split()
