"""Baselines are files that are found by their row's name, imported when it is asked for."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.pipeline.baselines import BASELINES
from src.pipeline.baselines.trial import Trial

REPOSITORY = Path(__file__).resolve().parents[3]
LONGEST = '''
"""The longest answer of each group is True, the others are False."""

from src.pipeline.predictions import Prediction


async def run(trial):
    spending = trial.spending()
    asked = await trial.zero_shot(trial.pool_claims)
    claims = trial.labelling.pool.claims
    longest = {claim.group: max(len(other.text) for other in claims if other.group == claim.group) for claim in claims}
    labels = {at: len(claim.text) == longest[claim.group] for at, claim in enumerate(claims)}
    cost = spending.cost()
    pool = Prediction(asked.log_odds, given=labels)
    return trial.result(pool, await trial.held_out_after(trial.in_order(labels)), cost)
'''
ADD_IT = """
import sys
from src.pipeline.baselines import BASELINES, Baseline
BASELINES["longest"] = Baseline("longest_answer", "the longest answer")
from src.experiments.baselines import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("row", BASELINES)
def test_every_row_has_a_file_that_runs_a_trial(row: str) -> None:
    run = importlib.import_module(BASELINES[row].module).run
    assert inspect.iscoroutinefunction(run)
    [parameter] = inspect.signature(run).parameters.values()
    assert parameter.annotation == Trial.__name__


def test_only_what_is_asked_for_is_imported() -> None:
    program = (
        "import sys; import src.experiments.baselines; from src.pipeline.baselines import BASELINES; "
        "print([row for row, baseline in BASELINES.items() if baseline.module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_file_and_its_line_are_a_baseline_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "longest_answer.py").write_text(LONGEST)
    rows = [
        {"question": f"Is {n} a number?", "choice": answer, "label": int(answer == "yes, it is"), "consistency_id": n}
        for n in range(10)
        for answer in ("yes, it is", "no")
    ]
    data = tmp_path / "claims.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", ADD_IT, "--data", str(data), "--model", server.model, "--batch_size", "8"),
            *("--seeds", "1", "--rows", "longest", "zero-shot", "--runs_dir", str(tmp_path), "--run", "t", "--quiet"),
            env={
                **os.environ,
                "VLLM_BASE_URL": server.url,
                "ICM_SECRETS": os.devnull,
                "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    assert "the longest answer" in out.decode()
    table = json.loads((tmp_path / "t" / "baselines.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["zero-shot", "longest"]
    longest = table["rows"][1]
    assert longest["pool"]["mean"] == 1.0
    assert longest["cost"]["asked"] == 8
    assert longest["test"]["claims"] == 12
    assert "U" in longest
    kept = json.loads((tmp_path / "t" / "seed-1" / "rows" / "longest.json").read_text())
    assert all(answer["label"] == answer["gold"] for answer in kept["pool"])
