"""What logs a run to a lab's tool: what it is told, what it has to offer, and which tools there are."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol, cast

from src.icm.testbeds import BadInput
from src.results.curves import CurvesSoFar
from src.results.run_record import RunRecord
from src.results.tables import results_of

Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Point:
    """One journal line. step: its place among those that are drawn, from 0. time: Unix seconds, as the run's begin and
    the seconds of its lines give it, so that a line has the same time whenever it is sent."""

    step: int
    time: float
    values: Values


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run at first. key: the same whenever this run is opened, of letters and digits.
    settings: what decides its labels, its model and engine. started: Unix seconds. folder: the run's."""

    name: str
    key: str
    settings: Mapping[str, str | int | float | bool]
    started: float
    folder: Path

    @classmethod
    def of(cls, run: RunRecord, folder: Path) -> TrackedRun:
        engine = {f"engine_{name}": value for name, value in run.engine.items() if name not in ("model", "root")}
        known = {**run.settings, "model": run.model, **engine, "code": run.environment.get("git")}
        return cls(
            name=run.name,
            key=hashlib.sha256(f"{run.name}\n{run.started}".encode()).hexdigest()[:16],
            settings={name: _plain(value) for name, value in known.items() if value not in (None, "")},
            started=_unix(run.started),
            folder=folder,
        )


class Tracker(Protocol):
    """One run in one tool. Its methods are called in one thread, and may raise what they like."""

    where: str
    """Where to look at it, in one line."""
    held: int
    """How many steps it has from an earlier time: these are not sent again."""

    def log(self, point: Point) -> None:
        """Take in one journal line."""

    def finish(self, results: Values, curves: Path) -> None:
        """Take in the results of a finished run, and the picture of its curves where there is one."""

    def close(self, *, finished: bool) -> None:
        """Leave the run; it may be opened again."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A kind of tracker. package: that it needs, extra: of this project's that brings it; module: with `open_run`."""

    title: str
    package: str
    extra: str
    module: str

    def open(self, run: TrackedRun, place: Path | None) -> Tracker:
        """place: where to keep it, None where the tool keeps things by itself or as this project does."""
        return cast(Tracker, importlib.import_module(self.module).open_run(run, place))


TOOLS: Final = {
    "wandb": Tool("Weights & Biases", "wandb", "wandb", "contrib.tracking.wandb_run"),
    "mlflow": Tool("MLflow", "mlflow", "mlflow", "contrib.tracking.mlflow_run"),
    "tensorboard": Tool("TensorBoard", "tensorboardX", "tensorboard", "contrib.tracking.tensorboard_run"),
}
"""By the name that --log_to and --format have for each."""


def check_installed(names: Iterable[str]) -> None:
    """Raises BadInput where a tool's package is missing."""
    for name in names:
        tool = TOOLS[name]
        if importlib.util.find_spec(tool.package) is None:
            raise BadInput(f"{tool.title} needs the package {tool.package}, which is not installed: pip install "
                           f"'.[{tool.extra}]' in this project's folder")  # fmt: skip


class Points:
    """A journal's lines as points. run: for what is known of it when it begins."""

    def __init__(self, run: RunRecord) -> None:
        self._drawing = CurvesSoFar(run.gold)
        self._balance = "true_share" if run.says_true else "largest_share"
        self._started = _unix(run.started)
        self._seconds = self._computed = 0.0
        self._step = 0

    def of(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
        """The points of further lines; a line without U has none."""
        for record in records:
            seconds, computed = record.get("seconds") or 0.0, record.get("tokens_computed") or 0
            self._seconds += seconds
            self._computed += computed
            if not self._drawing.add(record):
                continue
            curves = self._drawing.curves
            known = {
                "U": curves.utility[-1],
                "labelled": curves.labelled[-1],
                "agreement": curves.accuracy[-1],
                self._balance: curves.balance[-1],
                "acceptance": curves.acceptance[-1],
                "temperature": curves.temperature[-1],
                "inconsistent": curves.inconsistent[-1],
                "seconds": seconds,
                "total_seconds": self._seconds,
                "tokens_computed": computed,
                "total_tokens_computed": self._computed,
                "iteration": curves.iteration[-1],
            }
            values = {name: float(value) for name, value in known.items() if value is not None}
            yield Point(self._step, self._started + self._seconds, values)
            self._step += 1


def results_as_values(run: RunRecord) -> Values:
    """What a finished run came to: agreement with gold of each labeling, U, counts and costs."""
    rows = {f"agreement {row.title}": row.share for row in results_of(run) if row.share is not None}
    names = ("U", "predictability", "inconsistent", "iterations", "accepted", "labelled")
    result = {name: value for name in names if isinstance(value := (run.result or {}).get(name), int | float)}
    costs = {
        name: run.cost[name] for name in ("asked", "tokens_sent", "tokens_computed", "seconds") if name in run.cost
    }
    return {f"final/{_named(name)}": float(value) for name, value in {**rows, **result, **costs}.items()}


def _named(name: str) -> str:
    """A name that every tool takes."""
    return "_".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else str(value)


def _unix(moment: str | None) -> float:
    try:
        return 0.0 if moment is None else datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def searches_of(run: RunRecord, folder: Path) -> Sequence[tuple[RunRecord, Path]]:
    """The runs with a journal and their folders: its parts', or its own."""
    return [(part, folder / part.name.rpartition("/")[2]) for part in run.parts] or [(run, folder)]
