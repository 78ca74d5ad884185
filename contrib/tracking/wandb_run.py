"""A run in Weights & Biases: offline unless WANDB_MODE says otherwise, in RUN/wandb/, which `wandb sync` sends.

An offline run cannot be read or appended to, so one that goes on is written anew under the same id.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

import wandb

from contrib.tracking.tracker import Point, TrackedRun, Values

PROJECT: Final = "icm"


class WandbRun:
    """A Tracker."""

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        mode = os.environ.get("WANDB_MODE") or "offline"
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / "wandb").glob(f"offline-run-*-{run.key}"):
            shutil.rmtree(old)
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.key,
            name=run.name,
            dir=str(folder),
            config=dict(run.settings),
            mode="offline" if mode == "offline" else None,  # None: as WANDB_MODE says
            resume="allow",
            reinit="create_new",
            settings=quiet,
        )
        self.held = self._run.step  # 0 offline
        offline = sorted((folder / "wandb").glob(f"offline-run-*-{run.key}"))
        self.where = f"wandb sync {offline[-1]}" if offline else str(self._run.url or folder)

    def log(self, point: Point) -> None:
        self._run.log(dict(point.values), step=point.step)

    def finish(self, results: Values, curves: Path) -> None:
        self._run.summary.update(dict(results))
        if curves.is_file():
            self._run.log({"curves": wandb.Image(str(curves))})
            picture = wandb.Artifact(f"curves-{self._run.id}", type="curves")
            picture.add_file(str(curves))
            self._run.log_artifact(picture)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def open_run(run: TrackedRun, place: Path | None) -> WandbRun:
    """place: the folder in which W&B makes its folder `wandb`."""
    return WandbRun(run, place or run.folder)
