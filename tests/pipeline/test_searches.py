"""A search is one file: what it takes to add one, and that any of them is stopped, and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.icm import searches
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.searches.seam import Found, Record, Standing
from src.icm.testbeds import BadInput
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, prepare_batches
from src.results.run_folder import RunFolder

OPPOSITE = '''
"""A whole search in one file: zero-shot labels, or their opposites where those predict each other better."""

from src.icm.problem import Candidate
from src.icm.searches.recorded import RecordedAsk

SETTINGS = ()


async def run(problem, ask, journal):
    asked = RecordedAsk(problem, ask, journal)
    first = tuple(value > 0 for value in await asked.zero_shot())
    layout = problem.new_layout(range(problem.size))
    await asked.evaluate([Candidate(tuple(label != turned for label in first), layout) for turned in (False, True)])
    return asked.standing
'''


class Stopped(Exception):
    pass


async def label(folder: Path, server: FakeVLLM, stop_after: int | None = None, **settings: Any) -> Found:
    """Labels of 16 built-in claims. stop_after: lines of the journal after which it is killed."""
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        claims[:16],
        path,
        batch_size=16,
        consistency="gold-free",
        objective=Objective(30.0, "mean"),
        settings=SearchSettings(seed=1, **settings),
    )
    count = 0

    def on_record(standing: Standing, record: Record) -> None:
        nonlocal count
        count += 1
        if count == stop_after:
            raise Stopped

    async with ModelAPI(VLLMClient(server.url, server.model)) as api:
        labelling = await Labelling.open(pool, api)
        with RunFolder(folder) as run:
            return await labelling.search(run, on_record)


@pytest.fixture
def another_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file in a folder of its own, and its line in SEARCHES."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "opposite.py").write_text(OPPOSITE)
    monkeypatch.setattr(searches, "__path__", [*searches.__path__, str(tmp_path / "more")])
    monkeypatch.setattr(searches, "SEARCHES", {**searches.SEARCHES, "opposite": "zero-shot labels, or their opposites"})
    return "opposite"


async def test_a_search_is_added_as_one_file(another_search: str, tmp_path: Path) -> None:
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        found = await label(tmp_path / "run", server, search=another_search)
        kept = (tmp_path / "run" / "log.jsonl").read_bytes()
        assert len(found.labelled) == 16
        events = [record["event"] for record in _journal(tmp_path / "run")]
        assert events == ["questions", "evaluation", "evaluation"]
        assert await label(tmp_path / "run", server, search=another_search) == found
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == kept
        for stop_after in (1, 2):
            with pytest.raises(Stopped):
                await label(tmp_path / f"{stop_after}", server, stop_after, search=another_search)
            assert await label(tmp_path / f"{stop_after}", server, search=another_search) == found


@pytest.mark.parametrize("start", ["random", "zero-shot"])
async def test_bootstrapping_goes_on_where_it_was_stopped(start: str, tmp_path: Path) -> None:
    settings = {"search": "bootstrapping", "bootstrap_start": start, "bootstrap_rounds": 5}
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        found = await label(tmp_path / "whole", server, **settings)
        whole = _journal(tmp_path / "whole")
        assert len(found.labelled) == len(found.evaluation.log_odds) == 16
        for stop_after in range(1, len(whole)):
            folder = tmp_path / str(stop_after)
            with pytest.raises(Stopped):
                await label(folder, server, stop_after, **settings)
            assert await label(folder, server, **settings) == found
            # No question of a line that was there is asked again: every line tells its own 16, and no more.
            again = _journal(folder)
            assert [_decided(record) for record in again] == [_decided(record) for record in whole]
            assert all(record["asked"] == 16 for record in again)


async def test_gibbs_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    settings = {"search": "gibbs", "gibbs_sweeps": 2, "gibbs_cooling": 1.0}
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        found = await label(tmp_path / "whole", server, **settings)
        whole = _journal(tmp_path / "whole")
        assert len(found.labelled) == len(found.evaluation.log_odds) == 16
        # 8 pairs a sweep, one request each.
        assert [record["asked"] for record in whole] == [16, 16, *[2] * 8, 16, *[2] * 8, 16]
        for stop_after in (1, 2, 5, 11, len(whole) - 1):
            folder = tmp_path / str(stop_after)
            with pytest.raises(Stopped):
                await label(folder, server, stop_after, **settings)
            assert await label(folder, server, **settings) == found
            assert [_decided(record) for record in _journal(folder)] == [_decided(record) for record in whole]


async def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        await label(tmp_path / "run", server, search="bootstrapping")
        with pytest.raises(BadInput, match="is not a journal of this search"):
            await label(tmp_path / "run", server, search="annealing")


def test_a_search_that_there_is_not_is_named() -> None:
    with pytest.raises(KeyError, match="no search 'nothing', only annealing, ascent, bootstrapping, gibbs"):
        searches.search_named("nothing")


def test_every_search_says_which_settings_it_uses() -> None:
    names = {*SearchSettings.__slots__, "lookahead", "continue_from"}
    for name, told in searches.SEARCHES.items():
        assert set(searches.search_named(name).SETTINGS) <= names
        assert told


def _journal(folder: Path) -> list[Record]:
    return [orjson.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]


def _decided(record: Record) -> Record:
    costs = ("asked", "from_cache", "tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds")
    return {key: value for key, value in record.items() if key not in costs}
