"""--prior auto against a fake server: estimated once, recorded, used like --prior P, or refused in words."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM, encode, hashed_log_odds
from src.results.run_reader import read_run

YES = encode(" yes")[0]
TRUES, SIZE = 26, 32


def knows(tokens: Sequence[int]) -> float:
    """Leans to True, and tells claims that say yes from others."""
    return 3.0 + 0.4 * hashed_log_odds(tokens) + (2.5 if YES in tokens[-16:] else -2.5)


def knows_nothing(tokens: Sequence[int]) -> float:
    """Answers in one cluster, the same whatever else stands before the claim's own words."""
    return 3.0 + hashed_log_odds(tokens[-16:])


class Icm:
    """`icm COMMAND` on skewed claims, in a process of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.runs, self.data = url, folder / "runs", folder / "claims.jsonl"
        rows = [
            {"question": f"Is {n} a number?", "choice": "yes" if n % SIZE < TRUES else "no", "label": n % SIZE < TRUES}
            for n in range(SIZE)
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def __call__(self, command: str, *flags: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "src.experiments.commands", command, "--data", str(self.data)),
            *("--model", "fake-8b", "--runs_dir", str(self.runs), "--batch_size", str(SIZE), "--calibrate", "mean"),
            *flags,
            env={**os.environ, "VLLM_BASE_URL": self.url, "ICM_SECRETS": os.devnull, "PYTHONPATH": os.getcwd()},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    def document(self, run: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.runs / run / "run.json").read_text())
        return document

    def labels(self, run: str) -> bytes:
        return (self.runs / run / "labels.jsonl").read_bytes()


@pytest.fixture
async def icm(tmp_path: Path) -> AsyncIterator[Icm]:
    async with FakeVLLM(log_odds=knows) as server:
        yield Icm(server.url, tmp_path)


async def test_it_is_estimated_once_recorded_and_used_like_a_known_share(icm: Icm) -> None:
    search = ("--search", "bootstrapping")
    code, out, err = await icm("label", "--prior", "auto", "--run", "a", *search)
    assert code == 0, err
    assert "estimating the share of True claims: 64 questions" in err
    found = icm.document("a")["prior_estimate"]
    assert found["share"] == pytest.approx(TRUES / SIZE, abs=0.02)
    assert found["prior"] == found["share"]
    assert found["interval"][0] < TRUES / SIZE < found["interval"][1]
    assert icm.document("a")["settings"]["prior"] == "auto"
    assert "(calibration: mean, prior auto; search: bootstrapping)" in out
    assert f"{found['share']:.2f} (95% interval" in out
    assert "balanced accuracy 1.00" in out

    code, _, err = await icm("label", "--prior", repr(found["share"]), "--run", "known", *search)
    assert code == 0, err
    assert icm.labels("known") == icm.labels("a")

    before = icm.labels("a")
    document = icm.document("a")
    del document["result"]
    (icm.runs / "a" / "run.json").write_text(json.dumps(document))
    code, _, err = await icm("label", "--prior", "auto", "--run", "a", *search)
    assert code == 0, err
    assert "estimating" not in err
    assert icm.labels("a") == before
    assert icm.document("a")["prior_estimate"] == found

    code, _, err = await icm("label", "--run", "a", *search)
    assert code == 2
    assert "was started with --prior auto, now without" in err


async def test_answers_in_one_cluster_fall_back_to_the_mean_in_words(tmp_path: Path) -> None:
    async with FakeVLLM(log_odds=knows_nothing) as server:
        icm = Icm(server.url, tmp_path)
        search = ("--search", "bootstrapping")
        code, out, err = await icm("label", "--prior", "auto", "--run", "a", *search)
        assert code == 0, err
        assert (await icm("label", "--run", "mean", *search))[0] == 0
    assert icm.document("a")["prior_estimate"]["prior"] is None
    assert "not used, because the model's answers do not fall into two clusters: calibrated to the mean" in out
    assert icm.labels("a") == icm.labels("mean")


async def test_check_and_baselines_estimate_it_too(icm: Icm) -> None:
    code, out, err = await icm("label", "--prior", "auto", "--check")
    assert code == 0, err
    assert "used as --prior" in err
    assert "(calibration: mean, prior auto)" in out
    flags = ("--seeds", "1", "--rows", "zero-shot-calibrated", "icm", "--search", "bootstrapping", "--run", "t")
    code, out, err = await icm("baselines", "--prior", "auto", *flags, "--batch_size", "24")
    assert code == 0, err
    table = json.loads((icm.runs / "t" / "baselines.json").read_text())
    own = json.loads((icm.runs / "t" / "seed-1" / "run.json").read_text())
    assert table["prior_estimates"] == {"1": own["prior_estimate"]}
    assert all(row["pool"]["balanced_accuracy"]["value"] == 1 for row in table["rows"])
    assert "pool: balanced accuracy" in out


async def test_each_part_estimates_its_own(icm: Icm) -> None:
    flags = ("--num_batches", "2", "--batch_size", "16", "--search", "bootstrapping", "--run", "a")
    code, out, err = await icm("label", "--prior", "auto", *flags)
    assert code == 0, err
    parts = [json.loads(path.read_text())["prior_estimate"] for path in sorted(icm.runs.glob("a/*/run.json"))]
    assert [part["claims"] for part in parts] == [16, 16]
    used = sum(part["prior"] is not None for part in parts)
    assert f"estimated without labels in 2 searches: {min(part['share'] for part in parts):.2f} to " in out
    assert f"used as --prior in {used}, the others" in out
    run = read_run(icm.runs / "a")
    assert run.offset == pytest.approx(sum(part.shift for part in run.parts) / 2)
    assert used == 2
    assert all(
        margins[claim.label] > 0 for claim in run.pool if (margins := run.margins(claim)) and claim.label is not None
    )


def begun_by_an_earlier_version(run: Path) -> None:
    """Makes a run of --start_share half, at `run`/run.json, one of a version without that flag."""
    document = json.loads(run.read_text())
    assert "start_share" not in document["settings"]
    del document["flags"]["start_share"]
    run.write_text(json.dumps(document))


async def test_a_run_that_began_with_halves_goes_on_so(icm: Icm) -> None:
    flags = ("--prior", "0.8", "--search", "bootstrapping")
    assert (await icm("label", *flags, "--start_share", "half"))[0] == 0
    [old] = icm.runs.glob("*/run.json")
    code, _, err = await icm("label", *flags)
    assert code == 0, err
    assert "shown again" not in err, "halves that were asked for by the flag are another run"
    [new] = [path for path in icm.runs.glob("*/run.json") if path != old]
    assert json.loads(new.read_text())["settings"]["start_share"] == "prior"
    new.rename(new.with_name("gone"))
    begun_by_an_earlier_version(old)
    code, _, err = await icm("label", *flags)
    assert code == 0, err
    assert "goes on so (--start_share half)" in err
    assert "shown again" in err


async def test_a_table_with_halves_is_another_one(icm: Icm) -> None:
    flags = ("--seeds", "1", "--rows", "icm", "--search", "bootstrapping", "--prior", "0.8", "--batch_size", "24")
    assert (await icm("baselines", *flags, "--start_share", "half"))[0] == 0
    code, _, err = await icm("baselines", *flags)
    assert code == 0, err
    assert "goes on so" not in err
    assert len(list(icm.runs.glob("*/baselines.json"))) == 2


async def test_an_earlier_run_that_went_on_from_another_and_had_a_share_goes_on(icm: Icm) -> None:
    """Two settings are new since then, and both are taken as they were."""
    assert (await icm("label", "--run", "first", "--search", "bootstrapping"))[0] == 0
    flags = ("--prior", "0.8", "--search", "ascent", "--continue_from", "first", "--run", "second")
    assert (await icm("label", *flags, "--start_share", "half"))[0] == 0
    run = icm.runs / "second" / "run.json"
    begun_by_an_earlier_version(run)
    document = json.loads(run.read_text())
    del document["settings"]["continued"]
    run.write_text(json.dumps(document))
    code, _, err = await icm("label", *flags)
    assert code == 0, err
    assert "goes on so (--start_share half)" in err
    assert "shown again" in err


async def test_a_landscape_refuses_it_in_one_line(icm: Icm) -> None:
    code, _, err = await icm("landscape", "--prior", "auto")
    assert code == 2
    assert err == "error: --prior auto is estimated for a search; for a landscape, --prior P gives a share\n"
