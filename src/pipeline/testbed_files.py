"""Testbeds that are a user's files: YAML, or Python for what YAML cannot say."""

from __future__ import annotations

import hashlib
import re
import runpy
from dataclasses import replace
from pathlib import Path
from traceback import extract_tb
from typing import Final

from src.icm.testbeds import BadInput, Testbed
from src.icm.testbeds.definition import parse_testbed

SUFFIXES: Final = (".yaml", ".yml", ".py")


def testbed_path(name: str) -> Path | None:
    """The file that `name` is the path of; None where it is a testbed's name."""
    return Path(name) if name.endswith(SUFFIXES) else None


def read_testbed(path: Path) -> Testbed:
    """The testbed of a file, named after it. Raises BadInput in one line that names the file and the key.

    A .py file is RUN: it can do anything that a program can. It defines TESTBED, a Testbed, which can have new rules.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    name = re.sub(r"[^\w.-]+", "-", path.stem)
    if path.suffix == ".py":
        digest = hashlib.sha256(content).hexdigest()
        testbed = _run(path)
        # The default of grouped_by depends on the data, as in YAML.
        group_by = None if testbed.grouped_by == "consistency_id" else testbed.grouped_by
        reading = replace(testbed.reading, group_by=testbed.reading.group_by or group_by, in_file=True)
        return replace(testbed, name=name, digest=digest, reading=reading)
    try:
        return parse_testbed(text, name)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _run(path: Path) -> Testbed:
    try:
        testbed = runpy.run_path(str(path)).get("TESTBED")
    except SyntaxError as error:
        raise BadInput(f"{path}:{error.lineno}: is not Python ({error.msg})") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001  (whatever a user's code raises)
        frames = reversed(extract_tb(error.__traceback__))
        line = next((frame.lineno for frame in frames if frame.filename == str(path)), 0)
        raise BadInput(f"{path}:{line}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(testbed, Testbed):
        raise BadInput(f"{path}: defines no TESTBED = Testbed(...); from src.icm.testbeds import Testbed")
    return testbed
