"""A run in MLflow: at MLFLOW_TRACKING_URI, else in a store of files beside the runs, RUNS/mlruns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from mlflow.entities import Metric, Param, RunStatus
from mlflow.tracking import MlflowClient

from contrib.tracking.tracker import Point, TrackedRun, Values

EXPERIMENT: Final = "icm"
KEY: Final = "icm_key"
"""The tag by which a run is found again."""
LAST: Final = "iteration"
"""The value of a point that is sent last: a step that has it is whole."""
LONGEST: Final = 6000
"""Characters of a parameter that MLflow takes."""


class MLflowRun:
    """A Tracker. A run that is there already goes on after the last step that it has."""

    def __init__(self, run: TrackedRun, uri: str) -> None:
        self._client = MlflowClient(uri)
        experiment = self._experiment()
        known = self._client.search_runs([experiment], f"tags.{KEY} = '{run.key}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, RunStatus.to_string(RunStatus.RUNNING))
        else:
            begun = self._client.create_run(experiment, int(run.started * 1000), {KEY: run.key}, run.name)
            self._id = begun.info.run_id
            params = [Param(name, str(value)[:LONGEST]) for name, value in run.settings.items()]
            self._client.log_batch(self._id, params=params)
        self.held = 1 + max((metric.step for metric in self._client.get_metric_history(self._id, LAST)), default=-1)
        local = uri.startswith("file:")
        self.where = f"mlflow ui --backend-store-uri {uri}" if local else f"{uri}, run {self._id}"
        self._last = Point(self.held, run.started, {})

    def log(self, point: Point) -> None:
        self._send(point.values, point)
        self._last = point

    def finish(self, results: Values, curves: Path) -> None:
        for name, value in results.items():
            if name not in self._client.get_run(self._id).data.metrics:
                self._send({name: value}, self._last)
        if curves.is_file():
            self._client.log_artifact(self._id, str(curves))

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _experiment(self) -> str:
        known = self._client.get_experiment_by_name(EXPERIMENT)
        return str(self._client.create_experiment(EXPERIMENT) if known is None else known.experiment_id)

    def _send(self, values: Values, point: Point) -> None:
        moment = int(point.time * 1000)
        self._client.log_batch(self._id, [Metric(name, value, moment, point.step) for name, value in values.items()])


def open_run(run: TrackedRun, place: Path | None) -> MLflowRun:
    """place: the folder of a store of files."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if place is not None or not uri:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions must be told that files are meant
        runs_dir = run.folder.absolute().parents[run.name.count("/")]
        uri = (place or runs_dir / "mlruns").absolute().as_uri()
    return MLflowRun(run, uri)
