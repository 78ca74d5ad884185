"""A run as TensorBoard's event files, by tensorboardX: RUN/tensorboard/, written anew when a run goes on."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter

from contrib.tracking.tracker import Point, TrackedRun, Values


class TensorBoardRun:
    """A Tracker."""

    held = 0  # files are cheap to write anew, and cannot be appended to without reading them

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        self.where = f"tensorboard --logdir {folder}"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is looking on drops what it has read of the old files.
        self._writer = SummaryWriter(str(folder), purge_step=0)
        rows = "".join(f"| {_cell(name)} | {_cell(value)} |\n" for name, value in run.settings.items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", walltime=run.started)
        self._last = Point(0, run.started, {})

    def log(self, point: Point) -> None:
        self._scalars(point.values, point)
        self._writer.flush()
        self._last = point

    def finish(self, results: Values, curves: Path) -> None:
        self._scalars(results, self._last)
        if curves.is_file():
            from matplotlib import image

            picture = image.imread(curves)[..., :3]
            self._writer.add_image("curves", picture, self._last.step, self._last.time, dataformats="HWC")

    def close(self, *, finished: bool) -> None:
        self._writer.close()

    def _scalars(self, values: Values, point: Point) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, point.step, walltime=point.time)


def open_run(run: TrackedRun, place: Path | None) -> TensorBoardRun:
    """place: a folder with one folder a run."""
    return TensorBoardRun(run, run.folder / "tensorboard" if place is None else place / run.name)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
