"""Every write of a run to the disk fails, or is the last thing its process does, one after the other.

    python -m tests.faults.store --json store.json

Counts what a run does to its files (open, write, fsync, rename, truncate, every statement of the response cache), then
repeats the run once for each of them and each way to fail: "kill" (SIGKILL in the middle: half of a write is done),
"full" (no space left, half of a write is done), "broken" (the operation fails with EIO). Afterwards the same command
must end with the labels of the undisturbed run, with no score wrong in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.experiments.ICM import main as icm
from tests.faults.world import World, labels_of

MODES = ("kill", "full", "broken")
FLAGS = ("--seed", "0", "--K", "8", "--lookahead", "0")
forks = multiprocessing.get_context("forkserver")


class Disk:
    """Counts operations, and fails the one whose number (from 1) is `at`."""

    def __init__(self, at: int, mode: str) -> None:
        self.at, self.mode = at, mode
        self.done: list[str] = []

    def touch(self, what: str, half: Callable[[], object] = lambda: None) -> None:
        """Before an operation. half: does a part of it."""
        self.done.append(what)
        if len(self.done) != self.at:
            return
        if self.mode in ("kill", "full"):
            half()
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.ENOSPC if self.mode == "full" else errno.EIO
        if what.startswith("sqlite"):
            told = "database or disk is full" if self.mode == "full" else "disk I/O error"
            raise sqlite3.OperationalError(told)
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def on(disk: Disk) -> Iterator[None]:
    """Everything that the product does to its files goes past `disk`."""
    fsync, replace, truncate = os.fsync, os.replace, os.truncate
    path_open, fdopen, connect = Path.open, os.fdopen, sqlite3.connect
    path_mkdir, path_rename = Path.mkdir, Path.replace

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            disk.touch("write", lambda: super(File, self).write(bytes(data)[: len(data) // 2]))
            return super().write(data)

    class Cache(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            disk.touch(f"sqlite {arguments[0].split()[0]}")
            return super().execute(*arguments)

        def executemany(self, *arguments: Any) -> sqlite3.Cursor:
            disk.touch("sqlite many")
            return super().executemany(*arguments)

    def named(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            disk.touch(what)
            return function(*arguments, **more)

        return call

    def open_path(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "w" not in mode and "a" not in mode:
            return path_open(self, mode, *arguments, **more)
        disk.touch("open")
        return File(str(self), mode.replace("b", ""))

    def open_descriptor(descriptor: int, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        return File(descriptor, "w") if "w" in mode else fdopen(descriptor, mode, *arguments, **more)

    os.fsync, os.truncate = named("fsync", fsync), named("truncate", truncate)
    Path.open, os.fdopen = open_path, open_descriptor  # type: ignore[method-assign, assignment]
    Path.mkdir, Path.replace = named("mkdir", path_mkdir), named("rename", path_rename)  # type: ignore[method-assign]
    sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Cache)  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync, os.replace, os.truncate = fsync, replace, truncate
        Path.open, os.fdopen, sqlite3.connect = path_open, fdopen, connect  # type: ignore[method-assign]
        Path.mkdir, Path.replace = path_mkdir, path_rename  # type: ignore[method-assign]


def _child(arguments: list[str], environment: dict[str, str], at: int, mode: str, told: Path) -> None:
    """One run in a process of its own; writes its exit code, what it said and what it did to `told`."""
    os.environ.update(environment)
    disk = Disk(at, mode)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with on(disk):
                code = icm(arguments)
        except Exception as crash:  # noqa: BLE001 - that is what is looked for
            code, crashed = -1, f"Traceback: {crash!r}"
            err.write(crashed)
    told.write_text(json.dumps({"code": code, "err": err.getvalue(), "done": disk.done}))


@dataclass
class StoreReport:
    """operations: of one run. failures: what went wrong, one line each."""

    operations: int = 0
    cases: int = 0
    killed: int = 0
    stopped: int = 0
    went_on: int = 0
    hangs: int = 0
    failures: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "failed": len(self.failures)}


class StoreTrial:
    """Cases against one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.whole = world.undisturbed(*FLAGS)
        self.report = StoreReport()
        self.operations = self._play(world.home / "counted", 0, "")["done"]
        self.report.operations = len(self.operations)

    def _play(self, runs: Path, at: int, mode: str) -> dict[str, Any]:
        told = self.world.home / "told.json"
        told.unlink(missing_ok=True)
        arguments = (self.world.arguments(runs, *FLAGS), self.world.environment(), at, mode, told)
        process = forks.Process(target=_child, args=arguments)
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
            process.join()
            return {"code": None, "err": "hung", "done": []}
        if process.exitcode == -signal.SIGKILL:
            return {"code": -9, "err": "", "done": []}
        return dict(json.loads(told.read_text()))

    def case(self, at: int, mode: str) -> None:
        """Operation number `at` fails in this way; then the run is resumed."""
        runs = self.world.home / "faulted"
        shutil.rmtree(runs, ignore_errors=True)
        self.world.proxy.renew([])
        ended = self._play(runs, at, mode)
        name = f"{mode} at operation {at} ({self.operations[at - 1]})"
        self.report.cases += 1
        wrong = []
        if ended["code"] is None:
            self.report.hangs += 1
            wrong.append("hung")
        elif ended["code"] == -9:
            self.report.killed += 1
        elif ended["code"] == 0:
            self.report.went_on += 1
        else:
            self.report.stopped += 1
            if "Traceback" in ended["err"] or "error: " not in ended["err"]:
                wrong.append(f"stopped without a reason: {ended['err'][-300:]}")
        again = self.world.run(runs, *FLAGS)
        if again.code:
            wrong.append(f"cannot be resumed: {again.err[-300:]}")
        else:
            if labels_of(runs) != self.whole:
                wrong.append("other labels")
            if bad := self.world.wrong_in_cache(runs):
                wrong.append(f"{bad} wrong scores in the cache")
            if left := [
                path.name
                for path in (runs / "a").iterdir()
                if path.suffix in (".json", ".jsonl") and not path.stat().st_size
            ]:
                wrong.append(f"empty files: {left}")
        if wrong:
            self.report.failures.append(f"{name}: {'; '.join(wrong)}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every so manyth operation")
    parser.add_argument("--json", type=Path, default=None, help="write the result there")
    args = parser.parse_args(arguments)
    forks.set_forkserver_preload(["__main__"])  # imported once, not in every child
    started = time.perf_counter()
    with World() as world:
        trial = StoreTrial(world)
        for mode in MODES:
            for at in range(1, trial.report.operations + 1, args.every):
                trial.case(at, mode)
    result = {"store": trial.report.as_dict(), "seconds": round(time.perf_counter() - started, 1)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    return int(bool(trial.report.failures))


if __name__ == "__main__":
    sys.exit(main())
