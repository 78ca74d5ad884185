"""Bootstrapping: what it keeps, where it ends, and that a stopped one asks nothing twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from src.icm.objective import label_of
from src.icm.problem import Candidate
from src.icm.searches import search_named
from src.icm.searches.bootstrapping import run
from src.icm.searches.seam import JournalMismatch
from tests.icm.searches.answers import Lines, Model, check_stops_anywhere, make_problem

CASES: dict[str, dict[str, Any]] = {
    "random": {},
    "zero-shot": {"bootstrap_start": "zero-shot"},
    "calibrated": {"bootstrap_start": "zero-shot", "calibration": "mean"},
    "upstream's order": {"layout": "upstream"},
    "capped": {"context_cap": 4},
    "three labels": {"num_labels": 3},
    "three labels, zero-shot": {"num_labels": 3, "bootstrap_start": "zero-shot", "calibration": "mean"},
    "many rounds": {"bootstrap_rounds": 30},
}


@pytest.mark.parametrize("case", CASES)
async def test_it_ends_with_the_best_labels_of_all_rounds(case: str) -> None:
    problem = make_problem(**CASES[case])
    journal = Lines()
    found = await run(problem, Model(problem), journal)
    rounds = [record for record in journal.written if record["event"] == "evaluation"]
    assert found.labelled == tuple(range(problem.size))
    assert found.evaluation.utility == max(record["U_proposed"] for record in rounds)
    assert found.evaluation.utility == rounds[-1]["U"]
    assert found.iteration == len(rounds) <= problem.settings.bootstrap_rounds + 1
    # U is that of all claims, asked in one layout.
    again = await Model(problem).evaluate([Candidate(found.labels, found.layout)])
    assert again == [found.evaluation]
    assert found.layout == problem.new_layout(range(problem.size), labels=_first_labels(problem, rounds[0]))
    asked_twice = len(rounds) != len({tuple(record["labels"].values()) for record in rounds})
    assert not asked_twice
    # Every round but a random first one breaks nothing.
    for record in rounds[problem.settings.bootstrap_start == "random" :]:
        assert problem.consistency.count(_first_labels(problem, record)) == 0


def _first_labels(problem: Any, record: dict[str, Any]) -> tuple[int, ...]:
    return tuple(record["labels"][str(claim)] for claim in range(problem.size))


async def test_a_round_takes_the_likeliest_labels_of_the_round_before() -> None:
    problem = make_problem(calibration="mean")
    problem = type(problem)(problem.groups, type(problem.consistency)([]), problem.objective, problem.settings)
    journal = Lines()
    await run(problem, Model(problem, lean=5.0), journal)
    first, second = journal.written[:2]
    assert sorted(first["labels"].values()) == [False] * 6 + [True] * 6
    scores = [first["scores"][str(claim)] for claim in range(12)]
    offset = problem.objective.offset(scores)
    assert offset != 0.0
    assert [second["labels"][str(claim)] for claim in range(12)] == [label_of(score, offset) for score in scores]


@pytest.mark.parametrize("case", CASES)
async def test_a_stopped_search_ends_the_same_and_asks_nothing_twice(case: str) -> None:
    problem = make_problem(**CASES[case])
    await check_stops_anywhere(run, problem)


async def test_a_journal_of_another_search_is_none_of_this_one() -> None:
    problem = make_problem()
    journal = Lines()
    await run(problem, Model(problem), journal)
    others = {
        "seed": make_problem(seed=6),
        "start": make_problem(bootstrap_start="zero-shot"),
        "labels": make_problem(num_labels=3),
        "size": make_problem(14),
        "layout": make_problem(layout="upstream"),
    }
    for other in others.values():
        with pytest.raises(JournalMismatch):
            await run(other, Model(other), Lines(journal.written))
    for damage in ({"scores": {}}, {"labels": None}, {"scores": {"a": 1}}, {"event": "step"}):
        damaged = [journal.written[0] | damage, *journal.written[1:]]
        with pytest.raises(JournalMismatch):
            await run(problem, Model(problem), Lines(damaged))


async def test_annealing_does_not_take_its_journal() -> None:
    problem, journal = make_problem(), Lines()
    await run(problem, Model(problem), journal)
    with pytest.raises(JournalMismatch):
        await search_named("annealing").run(problem, Model(problem), Lines(journal.written))


async def test_the_first_labels_follow_the_prior_where_that_is_asked_for() -> None:
    for share, trues in (("prior", 18), ("half", 10)):
        problem = make_problem(20, calibration="mean", start_share=share)
        problem = replace(problem, objective=replace(problem.objective, prior=0.9))
        journal = Lines()
        await run(problem, Model(problem), journal)
        assert sum(journal.written[0]["labels"].values()) == trues


def test_only_labels_that_were_drawn_are_random() -> None:
    assert make_problem().starts_at_random
    assert make_problem(search="bootstrapping").starts_at_random
    assert not make_problem(search="bootstrapping", bootstrap_start="zero-shot").starts_at_random
    assert not make_problem(search="another").starts_at_random
