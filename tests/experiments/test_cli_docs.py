"""docs/cli.md shows the command lines' real help. To renew it: UPDATE_DOCS=1 make test-fast ARGS="-k cli_docs"."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from src.experiments.commands import COMMANDS
from src.experiments.ICM import build_parser

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def helps() -> dict[str, str]:
    """Command -> its help: of ICM.py, which is `icm label` too, and of every other `icm` command."""
    found = {"ICM.py": build_parser().format_help()}
    for name, (module, _) in COMMANDS.items():
        if name != "label":
            found[f"icm {name}"] = import_module(module).build_parser().format_help()
    return {name: text.replace(str(DOCUMENT.parents[1]), ".") for name, text in found.items()}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse words its help differently in other versions")
def test_the_documented_help_is_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "118")
    monkeypatch.setenv("NO_COLOR", "1")
    called = {"ICM.py": "python ICM.py"}
    expected = "\n".join(
        f"# {name}\n\nWhat `{called.get(name, name)} --help` prints.\n\n```\n{text}```\n"
        for name, text in helps().items()
    )
    if os.environ.get("UPDATE_DOCS"):
        DOCUMENT.write_text(expected)
    assert expected.split() == DOCUMENT.read_text().split()
