"""The search where none is named: by the flags that are given, and as a run was begun."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes.vllm_server import FakeVLLM
from src.experiments import ICM, baselines
from src.experiments.request import RunRequest
from src.icm import searches
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from tests.experiments.test_icm_cli import signed_by_words

ROWS = [
    {"question": f"Is {n} even?", "choice": choice, "label": int((n % 2 == 0) == (choice == "yes"))}
    for n in range(8)
    for choice in ("yes", "no")
]


class InProcess:
    """`icm label` and `icm baselines` in this process, whose default can be changed, against a fake server."""

    def __init__(self, data: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runs = runs
        self._flags = ["--data", str(data), "--model", "fake-8b", "--runs_dir", str(runs), "--quiet"]
        self._capsys = capsys

    async def __call__(self, *more: str) -> tuple[str, str]:
        """What `icm label` printed on standard output and on standard error."""
        parser = ICM.build_parser()
        arguments = parser.parse_args([*self._flags, "--batch_size", "16", *more])
        assert await ICM._run(RunRequest.of(arguments, parser.contradiction)) == 0
        found = self._capsys.readouterr()
        return found.out, found.err

    async def table(self, *more: str) -> tuple[str, str]:
        """The same of `icm baselines`."""
        parser = baselines.build_parser()
        arguments = parser.parse_args([*self._flags, "--batch_size", "12", "--calibrate", "mean", "--run", "t", *more])
        assert await baselines.run_comparison(baselines.ComparisonRequest.of(arguments, parser.contradiction)) == 0
        found = self._capsys.readouterr()
        return found.out, found.err

    def document(self, run: str, file: str = "run.json") -> dict[str, Any]:
        """A file of a run."""
        found: dict[str, Any] = json.loads((self.runs / run / file).read_text())
        return found

    def labels(self, run: str) -> bytes:
        """Its labels.jsonl."""
        return (self.runs / run / "labels.jsonl").read_bytes()


@pytest.fixture
async def icm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[InProcess]:
    path = tmp_path / "claims.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("ICM_SECRETS", os.devnull)
    async with FakeVLLM(log_odds=signed_by_words) as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        yield InProcess(path, tmp_path / "runs", capsys)


@pytest.fixture(params=["annealing", "ascent"])
def default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each search as the default in turn."""
    monkeypatch.setattr(searches, "DEFAULT", request.param)
    return str(request.param)


OF_ANNEALING = [
    *("--num_seed 4", "--K 50", "--consistency_fix_K 5", "--decay 0.9", "--initial_T 5", "--final_T 0.1"),
    *("--scheduler exp", "--stop K", "--patience 10", "--max_tail 8", "--best_of 4", "--local_gain", "--lookahead 4"),
    "--num_seed 8",  # its default, but given
]
OF_BOTH = ["", "--no-mirror", "--continue_from other", "--alpha 50 --calibrate mean --seed 3", "--layout upstream"]


@pytest.mark.parametrize("command", [ICM, baselines])
@pytest.mark.parametrize("flags", OF_ANNEALING)
def test_a_setting_of_annealing_means_annealing(command: Any, flags: str, default: str) -> None:
    parser = command.build_parser()
    args = parser.parse_args(flags.split())
    assert (args.search, args.search_by_default, parser.contradiction) == ("annealing", True, None)


@pytest.mark.parametrize("flags", OF_BOTH)
def test_all_else_means_the_default(flags: str, default: str) -> None:
    parser = ICM.build_parser()
    request = RunRequest.of(parser.parse_args(flags.split()), parser.contradiction)
    assert (request.search.search, request.search_by_default, request.contradiction) == (default, True, None)
    assert request.flags["search"] == default
    assert "search_by_default" not in request.flags
    for name in searches.SEARCHES:
        named = RunRequest.of(ICM.build_parser().parse_args(["--search", name]))
        assert (named.search.search, named.search_by_default) == (name, False)


def test_settings_of_two_searches_still_contradict_each_other(default: str) -> None:
    for flags, said in (("--K 5 --ascent_starts 2", "--ascent_starts 2"), ("--bootstrap_rounds 2", "--bootstrap_ro")):
        parser = ICM.build_parser()
        parser.parse_args(flags.split())
        assert said in (parser.contradiction or "")


def test_runs_without_a_named_search_keep_their_names() -> None:
    """Whatever is the default, what run.json leaves out is annealing."""
    assert SearchSettings().search == "annealing"


async def test_a_new_run_says_which_search_it_was(icm: InProcess, default: str) -> None:
    out, _ = await icm("--run", "a")
    assert f"; search: {default})" in out.splitlines()[0]
    assert icm.document("a")["settings"].get("search", "annealing") == default
    shown, err = await icm("--run", "a")
    assert shown == out
    assert "shown again" in err
    assert "goes on so" not in err


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
async def test_a_run_begun_by_annealing_goes_on_so(
    icm: InProcess, named: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searches, "DEFAULT", "annealing")
    flags = ("--run", "a") if named else ()
    groups = () if grouped else ("--group_by", "none")
    await icm("--run", "whole", *groups)
    await icm(*flags, *groups)
    [run] = [path.name for path in icm.runs.iterdir() if path.is_dir() and path.name not in ("whole", "determinism")]
    begun = icm.document(run)
    assert "search" not in begun["settings"]
    del begun["result"], begun["flags"]
    (icm.runs / run / "run.json").write_text(json.dumps(begun))
    log = icm.runs / run / "log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:9]))
    (icm.runs / run / "labels.jsonl").unlink()
    monkeypatch.setattr(searches, "DEFAULT", "ascent")
    out, err = await icm(*flags)
    assert "begun by annealing, which was the search where none is named, and goes on so (--search annealing)" in err
    assert ("goes on so (--group_by none)" in err) is not grouped
    assert "; search: annealing)" in out
    assert icm.labels(run) == icm.labels("whole")
    out, err = await icm("--search", "ascent", "--run", "new")
    assert "; search: ascent)" in out
    assert "begun by annealing" not in err


async def test_a_run_of_the_default_is_shown_although_annealing_has_one_too(
    icm: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await icm("--search", "annealing")
    await icm("--search", "ascent")
    monkeypatch.setattr(searches, "DEFAULT", "ascent")
    out, err = await icm()
    assert "; search: ascent)" in out
    assert "begun by annealing" not in err


async def test_a_run_of_annealing_that_was_asked_for_is_not_the_defaults(
    icm: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await icm("--search", "annealing")
    monkeypatch.setattr(searches, "DEFAULT", "ascent")
    out, err = await icm()
    assert "; search: ascent)" in out
    assert "begun by annealing" not in err


async def test_other_settings_are_refused_and_name_both_searches(
    icm: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    await icm("--run", "a", "--K", "3")
    monkeypatch.setattr(searches, "DEFAULT", "ascent")
    with pytest.raises(BadInput) as refused:
        await icm("--run", "a")
    assert "--search annealing, now ascent" in str(refused.value)
    assert "--K 3, now 3000" in str(refused.value)


async def test_batches_and_tables_go_on_as_they_were_begun(icm: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "DEFAULT", "annealing")
    batches = ("--run", "parts", "--num_batches", "all", "--batch_size", "8")
    await icm(*batches)
    await icm.table("--seeds", "1", "--rows", "zero-shot")
    monkeypatch.setattr(searches, "DEFAULT", "ascent")
    out, err = await icm(*batches)
    assert "goes on so (--search annealing)" in err
    assert "; search: annealing)" in out
    out, err = await icm.table("--seeds", "1", "--rows", "many-shot-gold")
    assert "goes on so (--search annealing)" in err
    assert ", search: annealing" in out.splitlines()[0]
    assert [row["row"] for row in icm.document("t", "baselines.json")["rows"]] == ["zero-shot", "many-shot-gold"]
