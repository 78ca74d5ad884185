"""`icm export --format inspect`: inspect_ai's own readers open it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from src.experiments.commands import main
from tests.run_examples import write_run

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]  # its own; its import takes long
LABELS = [True, False] * 4


def exported(folder: Path, *flags: str, file: str = "log.eval") -> Any:
    pytest.importorskip("inspect_ai")
    from inspect_ai.log import read_eval_log

    path = folder / file
    assert main(["export", str(folder), "--format", "inspect", "-o", str(path), *flags]) == 0
    return read_eval_log(str(path))


@pytest.mark.parametrize("file", ["log.eval", "log.json"])
def test_every_claim_is_a_sample_with_its_score(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS, gold=[*LABELS[:6], not LABELS[6], None])
    log = exported(folder, file=file)
    assert (log.status, log.eval.model, log.eval.solver) == ("success", "fake-8b", "annealing")
    assert log.eval.task_args["alpha"] == 50.0
    assert log.eval.metadata["by"] == {"icm": 8}
    assert (log.stats.started_at, log.stats.completed_at) == ("2026-11-21T19:00:00+00:00", "2026-11-21T19:10:00+00:00")
    usage = log.stats.model_usage["fake-8b"]
    assert (usage.input_tokens, usage.input_tokens_cache_read, usage.total_tokens) == (10_000, 90_000, 100_000)
    [score] = log.results.scores
    assert (score.scored_samples, score.unscored_samples) == (7, 1)
    assert score.metrics["accuracy"].value == pytest.approx(6 / 7)
    assert score.metrics["stderr"].value == pytest.approx(math.sqrt(6 / 7 * 1 / 7 / 6))
    assert [sample.scores["icm"].value for sample in log.samples] == [*"CCCCCC", "I", "N"]
    first, second = log.samples[:2]
    assert first.input == "Question: question 0\nClaim: choice 0\nI think this claim is"
    assert (first.target, first.output.completion, first.output.model) == ("True", "True", "fake-8b")
    assert second.scores["icm"].answer == "False"
    assert second.scores["icm"].metadata["probability"] == pytest.approx(0.8808, abs=1e-4)
    assert (second.metadata["row"], second.metadata["log_odds"], second.choices) == (1, -2.0, ["False", "True"])
    assert first.completed_at == "2026-11-21T19:10:00+00:00"


def test_more_labels_have_their_names(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=[True] * 4, settings={"labels": ["no", "perhaps", "yes"]})
    rows = [
        {"row": at, "question": f"q{at}", "choice": "c", "consistency_id": str(at), "label": name, "gold": "yes",
         "logprobs": {"no": -3.0, "perhaps": -2.0, "yes": -0.2}, "by": "icm"}
        for at, name in enumerate(["yes", "perhaps", "yes", "no"])
    ]  # fmt: skip
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = exported(folder)
    assert [sample.scores["icm"].answer for sample in log.samples] == ["yes", "perhaps", "yes", "no"]
    assert [sample.scores["icm"].value for sample in log.samples] == [*"CICI"]
    assert log.samples[0].choices == ["no", "perhaps", "yes"]
    odds = log.samples[0].metadata["logprobs"]
    assert odds["yes"] - odds["no"] == pytest.approx(2.8)


def test_withheld_and_known_labels_are_not_scored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS, gold=LABELS, log_odds=[2.0, -2.0, 0.1, -2.0, *[2.0, -2.0] * 2])
    rows = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    rows[3]["by"] = "known"
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = exported(folder, "--abstain_below", "1")
    values = [sample.scores["icm"].value for sample in log.samples]
    assert values == [*"CCNNCCCC"]
    assert log.samples[2].output.completion == ""
    assert log.eval.metadata["by"] == {"icm": 6, "abstained": 1, "known": 1}


def test_another_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", labels=LABELS)
    assert main(["export", str(folder), "--format", "inspect", "-o", str(tmp_path / "x.log")]) == 2
    assert "FILE.eval or FILE.json" in capsys.readouterr().err
