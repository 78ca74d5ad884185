"""Stops a script in one line where the Python that runs it lacks this project's packages.

Scripts ask for it before they import anything else of the project. It needs the standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

OF_FILES: Final = ("numpy", "orjson", "pydantic", "yaml")
"""What reading files needs, by the names that are imported."""
OF_SERVERS: Final = (*OF_FILES, "aiohttp", "tenacity", "tqdm")
"""What asking servers needs."""


def need_packages(names: Sequence[str] = OF_SERVERS) -> None:
    """Exit with code 2 and what to do where one of them is missing."""
    missing = next((name for name in names if find_spec(name) is None), None)
    if missing is None:
        return
    root = Path(__file__).resolve().parents[1]
    first = "" if (root / ".venv/bin/python").exists() else "make setup, then "
    print(f"error: {sys.executable} has no package {missing}: {first}source {root}/.venv/bin/activate", file=sys.stderr)
    raise SystemExit(2)
