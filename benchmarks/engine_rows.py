"""Rows of a table: for each cell of a file a server is started, checked, measured and stopped, several GPUs at once.

    python benchmarks/engine_rows.py benchmarks/cells/architectures.yaml --out rows --gpus 0 1 2 3 --limit 900
    python benchmarks/engine_rows.py benchmarks/cells/tiny.yaml --out rows-cpu --cpu
    python benchmarks/engine_rows.py CELLS.yaml --out rows --list              # what there is, what is measured
    python benchmarks/engine_rows.py CELLS.yaml --out rows --table             # markdown of what was measured

Shapes are made where they are missing (benchmarks/make_shape.py). Everything is written to OUT/rows.json after every
cell; the same command again measures what is missing there, and cells whose definition has changed. Servers' logs and
the checks' outputs lie beside it, named as the cell. docs/benchmarks.md says what the columns mean. Exit code 0: every
cell was measured; 1: some were not, and each row says why; 2: wrong arguments; 130: interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from core.packages import OF_FILES, need_packages

    need_packages(OF_FILES)

from benchmarks.engine_cells import BadCells, Cell, read_cells
from benchmarks.engine_row import DONE, FAILED, OVER, Row, without_paths
from benchmarks.engine_table import table
from core.files import write_atomically
from core.flags import FlagParser

HERE: Final = Path(__file__).resolve().parent
GRACE: Final = 25.0
"""Seconds for a cell to stop its server."""
MADE: Final = "made.json"
"""In a shape's folder: what was made, or null until it is, so that half of one is made again."""


@dataclass
class Running:
    """A cell that is being measured, or whose shape is being made (`row` is None then)."""

    cell: Cell
    gpus: list[str]
    process: subprocess.Popen[bytes]
    begun: float
    folder: str
    row: Path | None = None
    told: float | None = None
    shape_seconds: float | None = None

    def tell(self) -> None:
        """SIGTERM once, then SIGKILL after GRACE."""
        if self.told is None:
            self.told = time.monotonic()
            self.process.terminate()
        elif time.monotonic() - self.told > GRACE:
            self.process.kill()


@dataclass
class Rows:
    """OUT/rows.json: rows by name, in the order in which they were measured."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Rows:
        """Empty where there is no file. Raises BadCells for one of another kind."""
        if not path.exists():
            return cls(path)
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict) or document.get("benchmark") != "engine_rows":
                raise ValueError("another kind of file")
        except ValueError as error:
            raise BadCells(f"{path} is not a result of engine_rows.py ({error})") from None
        return cls(path, {row["name"]: row for row in document["rows"]})

    def has(self, cell: Cell, *, again: bool) -> bool:
        """Whether `cell` was measured as it is now. again: a failed one does not count."""
        row = self.rows.get(cell.name)
        done = (DONE,) if again else (DONE, FAILED)
        return row is not None and row["state"] in done and row["cell"] == cell.model_dump(mode="json")

    def add(self, row: dict[str, Any]) -> None:
        """Keep it in place of an earlier one."""
        self.rows[row["name"]] = row
        document = {"benchmark": "engine_rows", "format": 1, "rows": list(self.rows.values())}
        write_atomically(self.path, (json.dumps(document, indent=1) + "\n").encode())


class Measuring:
    """Measures cells on the GPUs given, as many at once as fit."""

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self._args = args
        self._rows = rows
        self._free: list[str] = ["cpu"] if args.cpu else list(args.gpus)
        self._running: list[Running] = []
        self._begun = time.monotonic()

    def run(self, cells: Sequence[Cell]) -> None:
        """Until all are measured or the time is up; stops everything that runs where it is interrupted."""
        waiting = list(cells)
        try:
            while waiting or self._running:
                if not self._out_of_time():
                    self._start_what_fits(waiting)
                elif waiting:
                    self._say(f"the time is up: {len(waiting)} cells not begun: {', '.join(c.name for c in waiting)}")
                    waiting.clear()
                time.sleep(0.2)
                for running in list(self._running):
                    self._look_after(running)
        finally:
            while self._running:
                for running in list(self._running):
                    running.tell()
                    if running.process.poll() is not None:
                        self._running.remove(running)
                time.sleep(0.2)

    def _out_of_time(self) -> bool:
        return self._args.limit is not None and time.monotonic() - self._begun > self._args.limit

    def _start_what_fits(self, waiting: list[Cell]) -> None:
        for cell in list(waiting):
            folder = cell.folder(self._args.shapes_dir)
            if len(self._free) < cell.gpus or any(r.row is None and r.folder == folder for r in self._running):
                continue
            waiting.remove(cell)
            gpus, self._free = self._free[: cell.gpus], self._free[cell.gpus :]
            if cell.shape is None or _is_made(cell, Path(folder)):
                self._measure(cell, gpus, folder)
            else:
                self._make(cell, gpus, Path(folder))

    def _make(self, cell: Cell, gpus: list[str], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / MADE, b"null\n")
        self._say(f"{cell.name}: making the shape {folder.name}")
        words = [str(HERE / "make_shape.py"), *_shape_words(cell), str(folder)]
        with self._file(cell, ".shape.log").open("wb") as log:
            process = self._process(words, gpus, log)
        self._running.append(Running(cell, gpus, process, time.monotonic(), str(folder)))

    def _measure(self, cell: Cell, gpus: list[str], folder: str, shape_seconds: float | None = None) -> None:
        self._say(f"{cell.name}: measuring" + ("" if self._args.cpu else f" on GPU {', '.join(gpus)}"))
        path = self._file(cell, ".json")
        for ending in (".json", ".log", ".server.log"):
            self._file(cell, ending).unlink(missing_ok=True)
        words = [str(HERE / "engine_row.py"), cell.model_dump_json(), folder, str(path)]
        process = self._process([*words, "--cpu"] if self._args.cpu else words, gpus, None)
        self._running.append(Running(cell, gpus, process, time.monotonic(), folder, path, shape_seconds=shape_seconds))

    def _process(self, words: Sequence[str], gpus: list[str], log: Any) -> subprocess.Popen[bytes]:
        """In a session of its own, so that Ctrl-C comes here first."""
        visible = {} if self._args.cpu else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            env={**os.environ, **visible},
            start_new_session=True,
        )

    def _look_after(self, running: Running) -> None:
        late = running.row is not None and time.monotonic() - running.begun > running.cell.limit
        if running.process.poll() is None:
            if late or self._out_of_time() or running.told is not None:
                running.tell()
            return
        self._running.remove(running)
        if running.row is None:
            self._shape_ended(running)
            return
        self._free = running.gpus + self._free
        row = self._read(running)
        self._rows.add(row)
        self._say(f"{running.cell.name}: {_in_words(row)}, {time.monotonic() - running.begun:.0f} s")

    def _shape_ended(self, running: Running) -> None:
        """Go on with the cell, or keep why there is no shape."""
        seconds = time.monotonic() - running.begun
        if running.process.returncode == 0 and running.told is None:
            what = json.dumps(_shape_words(running.cell)) + "\n"
            write_atomically(Path(running.folder) / MADE, what.encode())
            self._say(f"{running.cell.name}: made {Path(running.folder).name} in {seconds:.0f} s")
            self._measure(running.cell, running.gpus, running.folder, seconds)
            return
        self._free = running.gpus + self._free
        lines = self._file(running.cell, ".shape.log").read_text(errors="replace").strip().splitlines()[-3:]
        state = OVER if running.told is not None else FAILED
        row = Row(running.cell.name, running.cell.model_dump(mode="json"), state)
        row.failure = without_paths("the shape was not made: " + " / ".join(lines))
        self._rows.add(asdict(row))
        self._say(f"{running.cell.name}: {row.failure}")

    def _read(self, running: Running) -> dict[str, Any]:
        assert running.row is not None
        row: dict[str, Any]
        try:
            row = json.loads(running.row.read_bytes())
        except (OSError, ValueError):
            row = asdict(Row(running.cell.name, running.cell.model_dump(mode="json")))
        if row["state"] not in (DONE, FAILED, OVER):
            row["state"] = OVER if running.told is not None else FAILED
            row["failure"] = row["failure"] or f"its process ended with exit code {running.process.returncode}"
        if running.shape_seconds is not None:
            row["seconds"] = {"shape": round(running.shape_seconds, 1), **row["seconds"]}
        return row

    def _file(self, cell: Cell, ending: str) -> Path:
        return Path(self._args.out) / (re.sub(r"[^\w.]+", "-", cell.name) + ending)

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._begun:5.0f} s  {line}", flush=True)


def _shape_words(cell: Cell) -> list[str]:
    assert cell.shape is not None
    layers = [] if cell.layers is None else ["--layers", str(cell.layers)]
    return [cell.shape, *layers, *(["--tiny"] if cell.tiny else []), "--weights", *(["--adapter"] * cell.adapter)]


def _is_made(cell: Cell, folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MADE).read_bytes()) == _shape_words(cell))
    except (OSError, ValueError):
        return False


def _is_of_others(folder: Path) -> bool:
    """Whether something lies there that this command did not make."""
    return folder.exists() and not (folder / MADE).is_file() and (not folder.is_dir() or any(folder.iterdir()))


def _in_words(row: dict[str, Any]) -> str:
    words = [row["state"]]
    if row["failure"]:
        words.append(row["failure"].splitlines()[0][:150])
    if row["determinism"]:
        words.append(f"{row['determinism']['differing']} of {row['determinism']['rows']} rows differ")
    if row["smoke"] and row["smoke"]["failed"]:
        words.append(f"smoke check: {', '.join(row['smoke']['failed'])}")
    return "; ".join(words)


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose name is one of `only`, or begins with one that ends in *. Raises BadCells for one of none."""
    if not only:
        return list(cells)
    found: list[Cell] = []
    for wanted in only:
        matching = [c for c in cells if c.name == wanted or (wanted[-1:] == "*" and c.name.startswith(wanted[:-1]))]
        if not matching:
            raise BadCells(f"there is no cell {wanted!r}: {', '.join(repr(cell.name) for cell in cells)}")
        found += [cell for cell in matching if cell not in found]
    return found


def parser() -> FlagParser:
    """Every flag."""
    made = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("cells", type=Path, nargs="+", help="files of cells, YAML or JSON")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="rows.json, logs")
    made.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="these cells, in this order; NAME*: all that begin so"
    )
    made.add_argument("--gpus", nargs="+", default=["0"], metavar="N", help="GPUs to use at once (default: 0)")
    made.add_argument("--cpu", action="store_true", help="servers for a CPU, one at a time")
    made.add_argument("--limit", type=float, metavar="SECONDS", help="for all: then what runs is stopped")
    made.add_argument("--again", action="store_true", help="measure failed cells once more")
    made.add_argument(
        "--shapes_dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "icm-shapes",
        metavar="FOLDER",
        help="where shapes are made, some GB each, and stay (default: %(default)s)",
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="only say which cells there are, and how they stand")
    what.add_argument("--table", action="store_true", help="only print what was measured, as markdown")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = parser().parse_args(arguments)
    try:
        cells = [cell for path in args.cells for cell in read_cells(path)]
        names = [cell.name for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BadCells(f"two cells are called {twice[0]!r}")
        cells = chosen(cells, args.only)
        rows = Rows.read(args.out / "rows.json")
        if args.limit is not None and args.limit <= 0:
            raise BadCells("--limit must be above 0")
        if len(set(args.gpus)) < len(args.gpus):
            raise BadCells("--gpus names one twice")
    except FileNotFoundError as error:
        print(f"error: {error.filename}: not found", file=sys.stderr)
        return 2
    except (BadCells, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.table:
        if not any(cell.name in rows.rows for cell in cells):
            print(f"error: {args.out / 'rows.json'} has none of these cells: nothing was measured", file=sys.stderr)
            return 2
        print(table([rows.rows[cell.name] for cell in cells if cell.name in rows.rows]))
        return 0
    if args.list:
        for cell in cells:
            state = rows.rows[cell.name]["state"] if cell.name in rows.rows else "not measured"
            print(f"{cell.name:<44} {cell.shape or cell.model:<20} {state}")
        return 0
    return _measure(args, cells, rows)


def _measure(args: argparse.Namespace, cells: Sequence[Cell], rows: Rows) -> int:
    fitting = [cell for cell in cells if cell.gpus <= (1 if args.cpu else len(args.gpus))]
    for cell in cells:
        if cell not in fitting:
            print(f"{cell.name}: needs {cell.gpus} GPUs, left out", file=sys.stderr)
    missing = [cell for cell in fitting if not rows.has(cell, again=args.again)]
    if len(missing) < len(fitting):
        print(f"{len(fitting) - len(missing)} of {len(fitting)} cells were measured before", flush=True)
    for folder in {Path(cell.folder(args.shapes_dir)) for cell in missing if cell.shape is not None}:
        if _is_of_others(folder):
            print(
                f"error: {folder} would be made anew, and is no shape of this command: --shapes_dir FOLDER",
                file=sys.stderr,
            )
            return 2
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --out {args.out}: {error.strerror}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        Measuring(args, rows).run(missing)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    done = [cell for cell in cells if rows.has(cell, again=True)]
    print(f"{len(done)} of {len(cells)} cells measured: {args.out / 'rows.json'}")
    return 0 if len(done) == len(cells) else 1


def _leave(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
