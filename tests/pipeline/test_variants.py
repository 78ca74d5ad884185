"""The cheaper searches: what they ask, that they resume, and that the exact search is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.icm.annealing import choose, proposals, propose
from src.icm.journal import replay
from src.icm.speculation import Pace
from src.results.messages import changes_objective
from tests.pipeline.test_lookahead import Stopped, decisions, make_problem, run

VARIANTS: dict[str, dict[str, Any]] = {
    "context_cap": {"context_cap": 6},
    "best_of": {"best_of": 4},
    "local_gain": {"local_gain": True},
    "all of them": {"context_cap": 6, "best_of": 3, "local_gain": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_stopped_search_goes_on_as_if_it_had_not(variant: str, tmp_path: Path) -> None:
    problem = make_problem(**VARIANTS[variant])
    whole, records, _ = await run(problem, tmp_path / "whole", Pace(0))
    assert whole.changes_since_asked == 0
    for stop in (1, 3, len(records) // 2, len(records) - 1):
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stopped):
            await run(problem, folder, Pace(0), stop_after=stop)
        state, again, _ = await run(problem, folder, Pace(0))
        assert state.labels == whole.labels
        assert decisions(again) == decisions(records)
    replayed = replay(problem, records)
    assert replayed is not None
    assert replayed.evaluation.utility == whole.evaluation.utility


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_journal_tells_what_was_pieced_together(variant: str, tmp_path: Path) -> None:
    problem = make_problem(**VARIANTS[variant])
    _, records, engine = await run(problem, tmp_path / "run", Pace(0))
    assert any(state.changes_since_asked for state in engine.states) == ("local_gain" in VARIANTS[variant])
    for count, state in enumerate(engine.states, start=1):
        assert replay(problem, records[:count]) == state


@pytest.mark.parametrize("variant", VARIANTS)
async def test_what_is_asked_ahead_decides_nothing(variant: str, tmp_path: Path) -> None:
    problem = make_problem(**VARIANTS[variant])
    without, _, _ = await run(problem, tmp_path / "without", Pace(0))
    ahead, _, _ = await run(problem, tmp_path / "ahead", Pace(4))
    assert ahead.labels == without.labels


@pytest.mark.parametrize("variant", ["context_cap", "local_gain", "all of them"])
async def test_a_variant_sends_fewer_tokens(variant: str, tmp_path: Path) -> None:
    exact_problem = make_problem(size=40, relation=None)
    _, exact, _ = await run(exact_problem, tmp_path / "exact", Pace(0))
    cheap_problem = make_problem(size=40, relation=None, **VARIANTS[variant])
    _, cheap, _ = await run(cheap_problem, tmp_path / "cheap", Pace(0))

    def tokens_an_iteration(records: list[dict[str, Any]]) -> float:
        steps = sum(record["event"] == "step" for record in records)
        return sum(record["tokens_sent"] for record in records) / steps

    assert tokens_an_iteration(cheap) < 0.75 * tokens_an_iteration(exact)


async def test_no_prompt_has_more_demonstrations_than_the_cap(tmp_path: Path) -> None:
    problem = make_problem(size=24, context_cap=5)
    state, records, _ = await run(problem, tmp_path / "run", Pace(0))
    assert max(len(state.layout.context(claim)) for claim in state.labelled) <= 5
    assert any(record["event"] == "rebuild" for record in records)


async def test_a_search_by_local_gain_ends_on_scores_that_were_all_asked(tmp_path: Path) -> None:
    problem = make_problem(local_gain=True, mirror=False)
    state, records, _ = await run(problem, tmp_path / "run", Pace(0))
    steps = [record for record in records if record["event"] == "step"]
    taken_in = [step for step in steps if step["accepted"] and step["current"] is None]
    assert sum(step["tried"] == 0 for step in taken_in) > len(taken_in) / 2
    # A label is changed on a comparison of evaluations of the whole pool, never on an estimate.
    assert all(step["tried"] for step in steps if step["accepted"] and step["current"] is not None)
    last_change = max(i for i, record in enumerate(records) if record.get("accepted"))
    ended_on = [i for i, record in enumerate(records) if record["event"] == "rebuild" or record.get("tried")]
    assert max(ended_on) >= last_change
    assert len(state.evaluation.log_odds) == len(state.labelled)


async def test_best_of_takes_the_surest_change(tmp_path: Path) -> None:
    problem = make_problem(best_of=4)
    state, records, _ = await run(problem, tmp_path / "run", Pace(0), stop_after=None)
    assert len(set(proposals(problem, state))) == 4
    assert propose(problem, state) == proposals(problem, state)[0]
    claims = proposals(problem, state)
    same = {claim: (5.0 if state.labels[claim] else -5.0) for claim in claims}
    assert choose(problem, state, same) == claims[0]
    flipped = same | {claims[2]: -same[claims[2]] * 0.5, claims[3]: -same[claims[3]]}
    assert choose(problem, state, flipped) == claims[3]
    at_once = [len(record["changes"]) for record in records if record["event"] == "step" and record["accepted"]]
    assert at_once


def test_a_variant_that_changes_the_objective_says_so() -> None:
    assert changes_objective(make_problem().settings) == []
    assert changes_objective(make_problem(best_of=4).settings) == []
    assert "--context_cap" in changes_objective(make_problem(context_cap=6).settings)[0]
    assert "--local_gain" in changes_objective(make_problem(local_gain=True).settings)[0]
