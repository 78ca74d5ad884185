"""Known labels are never changed, whatever a model answers, by any search; nothing changes where there are none."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.icm.annealing import mirrors, mirrors_of
from src.icm.consistency import Consistency, Constraint, Labels, Relation
from src.icm.objective import LogOdds, Objective
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.searches import SEARCHES, search_named
from src.icm.searches.seam import Found
from src.results.run_record import labels_over_time
from tests.icm.searches.answers import Lines, Model, check_stops_anywhere, make_problem

FIRST = 2000
"""Searches begin with this seed; the seeds of one case of hypothesis follow each other."""


class AnyModel(Model):
    """Answers at random, but for a share of claims that follow the labels shown, so that whole pools can turn over."""

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(problem)
        self._seed = seed
        self._scale = float(np.random.default_rng([seed, 1]).choice([0.1, 1.0, 8.0]))

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        shown = [(other, candidate.labels[other]) for other in candidate.layout.context(claim)]
        digest = hashlib.sha256(repr((self._seed, claim, shown)).encode()).digest()
        values = tuple(self._scale * (byte / 128 - 1) for byte in digest[: self.problem.num_labels - 1])
        return values[0] if len(values) == 1 else values


def random_problem(seed: int, search: str) -> Problem:
    """4 to 12 claims in groups of up to 4 with random constraints, some labels known that break none of them."""
    rng = np.random.default_rng([seed, 0])
    num_labels = int(rng.choice([2, 3]))
    size = int(rng.integers(4, 13))
    groups = tuple(sorted(str(each) for each in rng.integers(0, max(2, size // 2), size=size).tolist()))
    truth: Labels = tuple(
        bool(each) if num_labels == 2 else int(each) for each in rng.integers(num_labels, size=size).tolist()
    )
    constraints = []
    for group in dict.fromkeys(groups):
        members = [claim for claim, other in enumerate(groups) if other == group][:4]
        if len(members) < 2:
            continue
        allowed = [Relation.AGREE, Relation.DIFFERENT]
        if num_labels == 2:
            allowed += [Relation.AT_MOST_ONE, Relation.EXACTLY_ONE]
        pair = tuple(members[:2])
        whole = tuple(members)
        for claims in {pair, whole}:
            # Those that hold for one labeling of the pool, so that the constraints can be kept to.
            holding = [one for one in allowed if not one.inconsistencies([truth[claim] for claim in claims])]
            if holding and rng.random() < 0.8:
                constraints.append(Constraint(claims, holding[int(rng.integers(len(holding)))]))
    share = float(rng.choice([0.1, 0.4, 0.8, 1.0]))
    known = tuple(label if rng.random() < share else None for label in truth)
    if all(label is None for label in known):
        known = (truth[0], *known[1:])
    calibration = "mean" if rng.random() < 0.5 else "none"
    start = None
    if search in ("annealing", "ascent") and rng.random() < 0.3:
        every = rng.integers(num_labels, size=size).tolist()
        start = tuple(None if rng.random() < 0.2 else bool(each) if num_labels == 2 else int(each) for each in every)
    return Problem(
        groups,
        Consistency(constraints),
        Objective(30.0, calibration, num_labels=num_labels),
        SearchSettings(
            search=search,
            seed=seed,
            num_seed=int(rng.choice([0, 0, 3, 8])),
            K=60,
            patience=int(rng.choice([2, 10])),
            best_of=int(rng.choice([1, 1, 3])),
            local_gain=search == "annealing" and bool(rng.random() < 0.2),
            bootstrap_start="zero-shot" if rng.random() < 0.5 else "random",
            ascent_error=0.2,
        ),
        start_labels=start,
        known=known,
    )


def kept(labels: Sequence[int | None], known: Labels) -> bool:
    return all(label is None or labels[claim] == label for claim, label in enumerate(known))


async def check_keeps(problem: Problem, seed: int) -> Found:
    """Known labels after every line of the journal, and in every question."""
    assert problem.known is not None

    class Watching(AnyModel):
        def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
            shown = [(other, candidate.labels[other]) for other in candidate.layout.context(claim)]
            assert problem.known is not None
            assert all(problem.known[other] in (None, label) for other, label in shown)
            return super()._answer(claim, candidate)

    lines = Lines()
    found = await search_named(problem.settings.search).run(problem, Watching(problem, seed), lines)
    for standing in lines.standings:
        if len(standing.labelled) > 0:
            assert kept(standing.labels, problem.known)
    for labels in labels_over_time(lines.written):
        assert all(label is None or labels.get(claim, label) == label for claim, label in enumerate(problem.known))
    assert kept(found.labels, problem.known)
    among = [c for c in problem.consistency.constraints if all(problem.is_known(claim) for claim in c.claims)]
    assert not any(constraint.inconsistencies(found.labels) for constraint in among)
    assert math.isfinite(found.evaluation.utility)
    again = await search_named(problem.settings.search).run(problem, AnyModel(problem, seed), Lines(lines.written))
    assert again == found
    return found


@pytest.mark.parametrize("search", list(SEARCHES))
async def test_no_search_of_hundreds_changes_a_known_label(search: str) -> None:
    """At least 1,000 searches over all of them."""
    changed = 0
    for seed in range(FIRST, FIRST + -(-1000 // len(SEARCHES))):
        problem = random_problem(seed, search)
        await check_keeps(problem, seed)
        if seed % 5 == 0:
            free = replace(problem, known=None)
            without = await search_named(search).run(free, AnyModel(free, seed), Lines())
            assert problem.known is not None
            changed += not kept(without.labels, problem.known)
    assert changed > 20  # without being known, they would have been changed


@given(st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_the_likeliest_labels_keep_the_known_ones_and_break_nothing_that_they_leave_whole(seed: int) -> None:
    problem = random_problem(seed, "ascent")
    rng = np.random.default_rng([seed, 9])
    margins = [tuple(each) for each in rng.standard_normal((problem.size, problem.num_labels)).tolist()]
    labels = problem.likeliest(margins)
    assert problem.known is not None
    assert kept(labels, problem.known)
    assert problem.consistency.count(labels) == 0  # they are part of one labeling that breaks none
    assert problem.consistency.nearest(margins) == replace(problem, known=None).likeliest(margins)


async def test_a_search_that_begins_with_no_label_at_all_goes_on() -> None:
    """It has no layout that could double."""
    for variant in ({"local_gain": True}, {"context_cap": 4}):
        problem = make_problem(num_seed=0, K=40, **variant)
        found = await search_named("annealing").run(problem, Model(problem), Lines())
        assert found.labelled


async def test_claims_of_a_known_label_are_never_proposed() -> None:
    problem = make_problem(known=(True, False, *(None,) * 10), K=40, patience=40, stop="K", num_seed=0)
    lines = Lines()
    await search_named("annealing").run(problem, Model(problem), lines)
    steps = [line for line in lines.written if line["event"] == "step"]
    assert len(steps) == 40
    assert {line["claim"] for line in steps} == set(range(2, 12))


@pytest.mark.parametrize("search", list(SEARCHES))
async def test_a_pool_of_known_labels_only_ends_with_them(search: str) -> None:
    known = (True, False) * 6
    problem = make_problem(known=known, search=search)
    found = await search_named(search).run(problem, Model(problem), Lines())
    assert found.labels == known


@pytest.mark.parametrize("search", list(SEARCHES))
async def test_a_search_with_known_labels_stops_anywhere_and_goes_on(search: str) -> None:
    problem = make_problem(known=(True, False, *(None,) * 6, False, None, None, None), search=search, num_seed=2, K=25)
    # A stop between two lines of one request asks again for what the second would have held (see test_ascent.py).
    again = 12 * problem.settings.ascent_starts if search == "ascent" else 0
    await check_stops_anywhere(search_named(search).run, problem, every=3, again=again)


def test_mirrors_swap_the_others_and_stay_consistent() -> None:
    problem = make_problem(size=6, known=(True, None, None, None, None, None))
    labels = (True, False, True, False, False, True)
    assert mirrors_of(problem, labels) == ((True, False, False, True, True, False),)
    assert mirrors_of(replace(problem, known=None), labels) == mirrors(labels, 2)
    assert mirrors_of(replace(problem, known=labels), labels) == ()


def test_random_seeds_are_beside_the_known_labels() -> None:
    known = (None, True, *(None,) * 10)
    problem = make_problem(known=known, num_seed=4)
    seeds = problem.seed_labels()
    assert seeds[1] is True
    assert sum(label is not None for label in seeds) == 5
    assert make_problem(known=known, num_seed=0).seed_labels() == known
    assert make_problem(known=(True, False) * 6, num_seed=8).seed_labels() == (True, False) * 6


async def test_ascent_goes_on_with_answers_that_change_nothing_without_a_new_question() -> None:
    for seed in range(8):
        problem = make_problem(size=12, search="ascent", calibration="mean", seed=seed)
        before, after = Model(problem), Model(problem)
        first = await search_named("ascent").run(problem, before, Lines())
        answered = tuple(label if claim < 2 else None for claim, label in enumerate(first.labels))
        on = replace(problem, start_labels=first.labels, known=answered)
        found = await search_named("ascent").run(on, after, Lines())
        assert found.labels == first.labels
        assert set(after.asked) <= set(before.asked)


async def test_ascent_goes_on_with_an_answer_that_changes_labels_for_a_few_questions() -> None:
    costs = []
    for seed in range(8):
        problem = make_problem(size=16, search="ascent", calibration="mean", seed=seed)
        first = await search_named("ascent").run(problem, Model(problem), Lines())
        answered = (not first.labels[0], *(None,) * 15)
        on = replace(problem, start_labels=first.labels, known=answered)
        continued, anew = Model(on), Model(on)
        found = await search_named("ascent").run(on, continued, Lines())
        await search_named("ascent").run(replace(on, start_labels=None), anew, Lines())
        assert kept(found.labels, answered)
        costs.append((len(set(continued.asked)), len(set(anew.asked))))
    assert sum(one for one, _ in costs) < sum(other for _, other in costs) / 2
