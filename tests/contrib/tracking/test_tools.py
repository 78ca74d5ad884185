"""What the tools themselves read of a run that was logged: each test needs its package, and is skipped without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import unpack
from typing import Any

import pytest

from contrib.tracking.tracking import Tracking, track_files
from src.experiments.commands import main
from src.results.run_reader import read_run
from tests.run_examples import write_run

LABELS = [True, False] * 4
U = [10.0, 14.0, 15.0, 16.0, 17.0]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]  # the tools' own; imports take long


@pytest.fixture(autouse=True)
def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, with curves."""
    from src.results.plots import plot_curves

    made = write_run(tmp_path / "runs" / "mine", labels=LABELS, gold=LABELS)
    plot_curves(read_run(made).journal, LABELS, made / "curves.png", "mine")
    return made


def stopped(folder: Path) -> None:
    """The run as it is after its third line."""
    log = folder / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"finished":', '"not_finished":'))


def logged_twice(name: str, folder: Path) -> None:
    """Log the run when three of its lines are there, and again when it is finished."""
    files = {path: path.read_bytes() for path in (folder / "run.json", folder / "log.jsonl")}
    stopped(folder)
    assert track_files(name, folder, read_run(folder), None)
    for path, content in files.items():
        path.write_bytes(content)
    assert main(["export", str(folder), "--format", name]) == 0


def events(folder: Path) -> Iterator[Any]:
    """The events of TensorBoard's files: records of a length, its checksum, an Event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (length,) = unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_tensorboard(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboardX")
    logged_twice("tensorboard", folder)
    assert capsys.readouterr().out == f"tensorboard --logdir {folder / 'tensorboard'}\n"
    found = [(value.tag, event) for event in events(folder / "tensorboard") for value in event.summary.value]
    steps = [(event.step, event.summary.value[0].simple_value, event.wall_time) for tag, event in found if tag == "U"]
    assert [(step, value) for step, value, _ in steps] == list(enumerate(U))
    assert [moment - 1795287600 for _, _, moment in steps] == [0.5, 0.75, 1.0, 1.25, 1.5]
    tags = {tag for tag, _ in found}
    assert {"agreement", "labelled", "seconds", "tokens_computed", "final/agreement_ICM", "curves"} <= tags
    [settings] = [event.summary.value[0] for tag, event in found if tag.startswith("settings")]
    assert b"| alpha | 50.0 |" in settings.tensor.string_val[0]


def test_tensorboard_keeps_runs_apart_in_a_folder_of_the_users(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for made in (folder, write_run(tmp_path / "runs" / "other", labels=LABELS)):
        assert main(["export", str(made), "--format", "tensorboard", "-o", str(tmp_path / "tb")]) == 0
    assert {path.parent.name for path in (tmp_path / "tb").rglob("events.*")} == {"mine", "other"}


def test_tensorboard_where_no_file_can_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboardX")
    (folder / "tensorboard").write_text("not a folder")
    assert main(["export", str(folder), "--format", "tensorboard"]) == 1
    said = capsys.readouterr().err
    assert said.count("warning: TensorBoard failed") == 1


def test_mlflow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    logged_twice("mlflow", folder)
    store = (folder.parent / "mlruns").as_uri()
    assert capsys.readouterr().out == f"mlflow ui --backend-store-uri {store}\n"
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("icm")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert (run.data.params["alpha"], run.data.params["engine_version"]) == ("50.0", "0.26.0")
    history = client.get_metric_history(run.info.run_id, "U")
    assert sorted((metric.step, metric.value) for metric in history) == list(enumerate(U))
    assert run.data.metrics["final/agreement_ICM"] == 1.0
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["curves.png"]


def test_mlflow_at_a_server_that_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking(["mlflow"], folder, "mine")
    tracking.finish()
    tracking.wait()
    assert capsys.readouterr().err.count("warning: MLflow failed") == 1


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log format behind a header of 7 bytes, in blocks of 32 KiB."""
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little room in this block for a head
            at += 32768 - at % 32768
            continue
        _, length, kind = unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    logged_twice("wandb", folder)
    [made] = (folder / "wandb").glob("offline-run-*")
    assert capsys.readouterr().out == f"wandb sync {made}\n"
    [file] = made.glob("run-*.wandb")
    records = [Record.FromString(record) for record in wandb_records(file)]
    [run] = [record.run for record in records if record.HasField("run")]
    assert (run.display_name, run.project, run.run_id) == ("mine", "icm", file.stem.removeprefix("run-"))
    assert {item.key: item.value_json for item in run.config.update}["alpha"] == "50.0"
    lines = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [float(line["U"]) for line in lines if "U" in line] == U
    assert [int(line["_step"]) for line in lines if "U" in line] == [0, 1, 2, 3, 4]
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert float(summary["final/agreement_ICM"]) == 1.0
    assert list((made / "files" / "media" / "images").glob("curves_*.png"))
