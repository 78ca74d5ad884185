"""Run every cell of a sweep, several at once, and put what they found into one table and one page.

A cell is an ordinary run in RUNS/NAME/CELL/. A cell that fails does not stop the others; the same command again runs
only what is missing. Cells that ask the same model of the same servers share one ModelAPI.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from core.errors import APIError, RetriesExhausted, ServerUnreachable
from core.files import write_atomically
from core.llm_api.llm import ModelAPI
from src.experiments.baselines import ComparisonRequest, run_comparison
from src.experiments.beside import Beside
from src.experiments.experiment_file import nearest, parser_of
from src.experiments.ICM import label
from src.experiments.request import PLANNED_AT_ONCE, ModelRequest, RunRequest
from src.experiments.run_settings import run_name
from src.experiments.single_run import model_api_of
from src.experiments.sweep_cells import Cell, Sweep
from src.experiments.sweep_results import is_finished, result_line, table_of
from src.icm.testbeds import BadInput
from src.pipeline.progress import SweepProgress
from src.results.page import render_sweep
from src.results.run_folder import RunFolder
from src.results.side_by_side import as_text
from src.results.sweep_table import SweepTable, as_csv, as_json, costs_as_csv, grid_of
from src.results.text import counted

FAILURES: Final = (BadInput, APIError, OSError, MemoryError)
"""What ends a cell and not the sweep."""
Engine = ModelRequest
"""What decides which ModelAPI a cell uses: equal for cells that share one."""


@dataclass(frozen=True)
class Planned:
    """A cell, what it asks for, and where it is kept. comparison: of `icm baselines`, else None."""

    cell: Cell
    folder: Path
    request: RunRequest
    comparison: ComparisonRequest | None

    @property
    def engine(self) -> Engine:
        return self.request.model


@dataclass
class Engines:
    """The ModelAPIs of a sweep, each opened when a cell first asks something.

    at_once: cells that use one together. cached: whether answers are kept on the disk.
    """

    at_once: int
    cached: bool = True
    _open: dict[Engine, ModelAPI] = field(default_factory=dict)
    _failed: dict[Engine, APIError] = field(default_factory=dict)
    _locks: dict[Engine, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    turns: dict[Engine, asyncio.Semaphore] = field(default_factory=dict)

    def turn(self, engine: Engine) -> asyncio.Semaphore:
        """Held by a cell while it runs."""
        return self.turns.setdefault(engine, asyncio.Semaphore(self.at_once))

    def check(self, engine: Engine) -> None:
        """Raises the error with which this engine failed a cell before: it would fail the others, too."""
        if engine in self._failed:
            raise self._failed[engine]

    def lost(self, engine: Engine, error: APIError) -> None:
        """A cell ended with this error: where nobody answers any more, cells that wait for their turn do not begin."""
        if isinstance(error, ServerUnreachable | RetriesExhausted):
            self._failed[engine] = error

    @asynccontextmanager
    async def opened(self, request: RunRequest) -> AsyncIterator[ModelAPI]:
        """The started ModelAPI of a request, with counts of its own. Raises an APIError."""
        engine = request.model
        async with self._locks[engine]:
            self.check(engine)
            if engine not in self._open:
                try:
                    api = model_api_of(request, {} if self.cached else {"cache_path": None})
                    await api.start()
                except APIError as error:
                    self._failed[engine] = error
                    raise
                self._open[engine] = api
        yield self._open[engine].share(exclusive=self.at_once == 1)

    async def aclose(self) -> None:
        """Close all of them."""
        apis, self._open = list(self._open.values()), {}
        for api in apis:
            await api.aclose()


def planned(sweep: Sweep, at_once: int | None = None) -> tuple[Path, list[Planned], Engines]:
    """(RUNS/NAME, every cell with its request, the engines). Raises BadInput where `servers` or --run are wrong.

    at_once: in place of the file's.
    """
    experiment, path = sweep.loaded.experiment, sweep.loaded.path
    engines = Engines(at_once or experiment.at_once or PLANNED_AT_ONCE)
    servers = {model: (urls,) if isinstance(urls, str) else tuple(urls) for model, urls in experiment.servers.items()}
    parser = parser_of(experiment.command)
    folder, cells = None, []
    for cell in sweep.cells:
        args = parser.parse_args(list(cell.arguments))
        args.run = args.run or path.stem
        comparison = ComparisonRequest.of(args, parser.contradiction) if experiment.command == "baselines" else None
        request = RunRequest.of(args, parser.contradiction) if comparison is None else comparison.run
        request = replace(
            request,
            model=replace(request.model, base_url=servers.get(request.model.model)),
            output=replace(request.output, quiet=True, told=False),
            curves=False,
        )
        comparison = comparison and replace(comparison, run=request)
        folder = folder or request.output.runs_dir / run_name(request, {})
        cells.append(Planned(cell, folder / cell.name, request, comparison))
    assert folder is not None
    models = dict.fromkeys(each.request.model.model for each in cells)
    for model in experiment.servers:
        if model not in models:
            raise BadInput(f"{path}: servers: no cell asks {model!r}{nearest(model, models)}")
    return folder, cells, engines


async def run_sweep(sweep: Sweep, *, at_once: int | None, quiet: bool) -> int:
    """Run what is missing, write the table and the page, print the table. Returns the exit code: 1 if cells failed."""
    folder, cells, engines = planned(sweep, at_once)
    failed: dict[str, str] = {}
    await _check_engines([each for each in cells if not has_result(each, sweep)])
    with RunFolder(folder):
        finished = [each for each in cells if has_result(each, sweep)]
        print(_opening(sweep, folder, len(finished), engines), file=sys.stderr, flush=True)
        try:
            with SweepProgress(len(cells), len(finished), quiet) as progress:
                for stage in stages(cells):
                    async with asyncio.TaskGroup() as group:
                        for each in stage:
                            group.create_task(
                                _attempt(each, sweep, engines, progress, failed, each in finished), name=each.cell.name
                            )
                    if len(stage) < len(cells):
                        await engines.aclose()
        finally:
            await engines.aclose()
        table = table_of(sweep, folder, failed)
        written = _write(table, folder)
    print(as_text([grid_of(table)]))
    for line in written:
        print(f"  {line}")
    return _tell_missing(table)


async def _check_engines(cells: Sequence[Planned]) -> None:
    """Raises ConfigurationError where the settings name no engine for a cell, or an address that can be none."""
    for request in {each.engine: each.request for each in cells if not each.engine.direct}.values():
        await model_api_of(request, {"cache_path": None}).aclose()


def has_result(each: Planned, sweep: Sweep) -> bool:
    """Whether the cell was finished before."""
    with suppress(BadInput):  # its own attempt says what is wrong
        return is_finished(each.folder, sweep.loaded.experiment.command)
    return False


def _opening(sweep: Sweep, folder: Path, finished: int, engines: Engines) -> str:
    done = f"; {finished} finished before" if finished else ""
    return f"{sweep.size_in_words}, {engines.at_once} at once on each engine{done}; in {folder}"


def stages(cells: Sequence[Planned]) -> list[list[Planned]]:
    """Cells that may run at the same time. Models in this process come one after the other: each takes the memory."""
    if not any(each.request.model.direct for each in cells):
        return [list(cells)]
    by_engine: dict[Engine, list[Planned]] = defaultdict(list)
    for each in cells:
        by_engine[each.engine].append(each)
    return list(by_engine.values())


async def _attempt(
    each: Planned, sweep: Sweep, engines: Engines, progress: SweepProgress, failed: dict[str, str], known: bool
) -> None:
    """Run a cell. What ends it stands in `failed` afterwards, in one line."""
    name, share = each.cell.name, min(PLANNED_AT_ONCE, len(sweep.cells))
    async with engines.turn(each.engine):
        try:
            if not known:
                engines.check(each.engine)
            await _run_cell(each, Beside(each.folder, engines.opened, progress.of(name), share))
        except FAILURES as error:
            if isinstance(error, APIError):
                engines.lost(each.engine, error)
            said = "out of memory" if isinstance(error, MemoryError) else " ".join(str(error).split())
            failed[name] = said
            progress.finish(name, None)
            return
    if not known:
        progress.finish(name, result_line(each.folder))


async def _run_cell(each: Planned, beside: Beside) -> None:
    if each.comparison is not None:
        await run_comparison(each.comparison, beside)
    else:
        await label(each.request, beside)


def _write(table: SweepTable, folder: Path) -> list[str]:
    """The table, the costs and the page; returns a line for each file."""
    files: dict[str, str | bytes] = {
        "table.txt": as_text([grid_of(table)]) + "\n",
        "table.csv": as_csv(table),
        "table.json": as_json(table),
        "costs.csv": costs_as_csv(table),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    lines = [f"table  {folder / 'table.txt'}, table.csv, table.json", f"costs  {folder / 'costs.csv'}"]
    try:
        write_atomically(folder / "index.html", render_sweep(table).encode("utf-8", "replace"))
    except BadInput as error:  # jinja2 is not installed
        print(f"warning: {error}", file=sys.stderr)
        return lines
    return [*lines, f"page   {folder / 'index.html'}"]


def _tell_missing(table: SweepTable) -> int:
    if not table.missing:
        return 0
    failed = counted(len(table.missing), "cell")
    print(f"{failed} not finished; the same command runs only them:", file=sys.stderr)
    for name, reason in table.missing.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    return 1
