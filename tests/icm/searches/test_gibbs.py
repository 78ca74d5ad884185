"""Gibbs: the draws have the distribution that they should, sweeps cost what is told, and a stopped one asks nothing
twice."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from src.icm.consistency import Consistency, Constraint, Labels, Relation
from src.icm.group_layout import OtherGroups, tree_of_groups
from src.icm.objective import LogOdds
from src.icm.problem import Candidate
from src.icm.searches.gibbs import Sampler, draw, gains_of, linked, run
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import JournalMismatch
from tests.icm.searches.answers import Lines, Model, check_stops_anywhere, make_problem

CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "calibrated": {"calibration": "mean"},
    "one sweep": {"gibbs_sweeps": 1},
    "the model's own probabilities": {"gibbs_cooling": 1.0},
    "the likeliest labels": {"gibbs_temperature": 0.0, "gibbs_sweeps": 8},
    "upstream's order": {"layout": "upstream"},
    "anchors": {"anchors": 4},
    "capped": {"context_cap": 4},
    "three labels": {"num_labels": 3},
    "many claims": {"size": 32},
}
DRAWS = 4000


@pytest.mark.parametrize("case", CASES)
async def test_it_ends_with_the_best_of_what_it_evaluated(case: str) -> None:
    problem, journal = make_problem(**CASES[case]), Lines()
    found = await run(problem, Model(problem), journal)
    evaluated = [record for record in journal.written if record["event"] == "evaluation"]
    assert found.labelled == tuple(range(problem.size))
    assert found.evaluation.utility == max(record["U_proposed"] for record in evaluated)
    assert found.evaluation.inconsistent == 0
    [exact] = await Model(problem).evaluate([Candidate(found.labels, found.layout)])
    assert exact.utility == pytest.approx(found.evaluation.utility, abs=1e-12)


@pytest.mark.parametrize("case", CASES)
async def test_a_stopped_search_ends_the_same_and_asks_nothing_twice(case: str) -> None:
    problem = make_problem(**CASES[case])
    await check_stops_anywhere(run, problem, every=1 if problem.size < 32 else 7)


async def test_it_costs_two_questions_a_claim_and_sweep() -> None:
    for sweeps in (1, 3):
        problem = make_problem(32, gibbs_sweeps=sweeps, gibbs_cooling=1.0)
        model = Model(problem)
        await run(problem, model, Lines())
        assert len(model.asked) == 32 * (2 + 2 * sweeps)


async def test_a_sweep_that_changes_nothing_is_the_last_one() -> None:
    problem = make_problem(gibbs_temperature=0.0, gibbs_sweeps=30)
    journal = Lines()
    await run(problem, Sure(problem), journal)
    sweeps = (len(journal.written) - 2) / (problem.size // 2)
    assert [record["event"] for record in journal.written[:2]] == ["questions", "evaluation"]
    assert sweeps == 1
    assert "evaluation" not in [record["event"] for record in journal.written[2:]]


async def test_labels_that_were_evaluated_are_not_evaluated_again() -> None:
    problem, journal = make_problem(4, gibbs_sweeps=40, gibbs_cooling=1.0, gibbs_temperature=4.0), Lines()
    await run(problem, Model(problem), journal)
    evaluated = [tuple(record["labels"].values()) for record in journal.written if record["event"] == "evaluation"]
    swept = sum(record["event"] == "questions" for record in journal.written)
    assert len(evaluated) == len(set(evaluated)) <= 4
    assert swept > 10


async def test_each_group_sees_what_the_ones_before_it_became_and_nothing_of_its_own() -> None:
    problem, journal = make_problem(16), Lines()
    labels: Labels = (True, False) * 8
    sampler = Sampler(problem, RecordedAsk(problem, Model(problem), journal), labels)
    after = await sampler.sweep(labels, 0.0, 1.0, 0)
    now = list(labels)
    assert len(journal.written) == 8
    for record in journal.written:
        assert record["shown"] == {str(claim): label for claim, label in enumerate(now)}
        for claim in record["claims"]:
            assert problem.groups[claim] not in {problem.groups[o] for o in sampler.layout.context(claim)}
            now[claim] = after[claim]
    assert after == tuple(now) != labels
    assert problem.consistency.count(after) == 0
    assert await sampler.sweep(labels, 0.0, 1.0, 1) != after, "every sweep has draws of its own"


def test_a_claim_alone_is_drawn_with_the_models_probability() -> None:
    for odds, temperature in ((1.0, 1.0), (1.0, 0.5), (-2.0, 4.0)):
        rng = np.random.default_rng(0)
        trues = sum(draw({3: gains_of(odds, 0.5)}, [], temperature, rng)[3] for _ in range(DRAWS))
        expected = 1 / (1 + math.exp(-(odds - 0.5) / temperature))
        assert trues / DRAWS == pytest.approx(expected, abs=3.5 * math.sqrt(expected * (1 - expected) / DRAWS))


@pytest.mark.parametrize(
    ("relations", "num_labels", "allowed"),
    [
        ([], 2, 8),
        ([Constraint((0, 1, 2), Relation.EXACTLY_ONE)], 2, 3),
        ([Constraint((0, 1, 2), Relation.AT_MOST_ONE)], 2, 4),
        ([Constraint((0, 1), Relation.AGREE), Constraint((1, 2), Relation.DIFFERENT)], 2, 2),
        ([Constraint((0, 2), Relation.DIFFERENT)], 3, 18),
        # Three claims of two labels cannot all differ: two of the three pairs can.
        ([Constraint((0, 1), Relation.DIFFERENT), Constraint((1, 2), Relation.DIFFERENT),
          Constraint((0, 2), Relation.DIFFERENT)], 2, 6),
    ],
)  # fmt: skip
def test_claims_that_constrain_each_other_are_drawn_together(
    relations: list[Constraint], num_labels: int, allowed: int
) -> None:
    answers: list[LogOdds] = [0.7, -0.4, 1.1] if num_labels == 2 else [(0.7, -0.2), (-0.4, 0.3), (1.1, 0.6)]
    gains = {claim: gains_of(each, 0.0 if num_labels == 2 else (0.0, 0.0)) for claim, each in enumerate(answers)}
    values = (False, True) if num_labels == 2 else range(num_labels)
    worth = {}
    for each in product(values, repeat=3):
        broken = sum(relation.inconsistencies(each) for relation in relations)
        worth[each] = broken, math.exp(sum(gains[claim][label] for claim, label in enumerate(each)) / 2.0)
    fewest = min(broken for broken, _ in worth.values())
    weights = {each: weight for each, (broken, weight) in worth.items() if broken == fewest}
    assert len(weights) == allowed
    rng = np.random.default_rng(1)
    drawn = (draw(gains, relations, 2.0, rng) for _ in range(DRAWS))
    seen = Counter(tuple(each[claim] for claim in range(3)) for each in drawn)
    assert set(seen) <= set(weights)
    chi = sum(
        (seen[each] - DRAWS * weight / sum(weights.values())) ** 2 / (DRAWS * weight / sum(weights.values()))
        for each, weight in weights.items()
    )
    assert chi < 4 * allowed + 8  # far above its mean of allowed - 1
    best = max(weights, key=weights.__getitem__)
    assert tuple(draw(gains, relations, 0.0, rng)[claim] for claim in range(3)) == best


def test_a_set_with_too_many_assignments_is_drawn_one_after_another() -> None:
    gains = {claim: gains_of(3.0, 0.0) for claim in range(14)}
    relations = [Constraint(tuple(range(14)), Relation.EXACTLY_ONE)]
    first: Counter[int] = Counter()
    for seed in range(60):
        drawn = draw(gains, relations, 1.0, np.random.default_rng(seed))
        assert sum(drawn.values()) == 1
        first[next(claim for claim, label in drawn.items() if label)] += 1
    assert len(first) > 5


def test_linked_claims_are_found_across_constraints() -> None:
    pairs = [Constraint(each, Relation.AGREE) for each in ((0, 1), (3, 4), (1, 4), (5, 6))]
    assert sorted(linked(range(8), pairs)) == [[0, 1, 3, 4], [2], [5, 6], [7]]
    assert linked([2, 1], []) == [[2], [1]]


@pytest.mark.parametrize("size_of_group", [1, 2, 3, 5])
@pytest.mark.parametrize("anchors", [0, 4])
def test_in_a_tree_of_groups_all_claims_are_asked_after_all_others_groups(size_of_group: int, anchors: int) -> None:
    groups = tuple(str(claim // size_of_group) for claim in range(24))
    layout = OtherGroups(tree_of_groups(groups, np.random.default_rng(3), anchors=anchors), groups)
    assert sorted(layout.questions) == list(range(24))
    for turn in layout.in_turn:
        assert len({groups[claim] for claim in turn}) == 1
        [context] = {layout.context(claim) for claim in turn}
        assert sorted([*context, *turn]) == list(range(24))
    assert [claim for turn in layout.in_turn for claim in turn] == list(layout.questions)
    assert layout.anchors == len(layout.tail) == (anchors // size_of_group) * size_of_group
    places = [layout.place(claim) for claim in layout.questions if claim not in layout.tail]
    assert places == sorted(set(places)), "several servers get whole subtrees"


@pytest.mark.parametrize("size_of_group", [1, 2, 4])
def test_a_sweep_computes_each_edge_of_its_tree_once(size_of_group: int) -> None:
    """Labels change on the way, and a prefix cache still computes no more than for one evaluation in this layout."""
    groups = tuple(str(claim // size_of_group) for claim in range(64))
    layout = OtherGroups(tree_of_groups(groups, np.random.default_rng(3)), groups)
    labels = [False] * 64
    still = cached_prefixes(layout, [labels] * 64)
    shown = []
    for turn in layout.in_turn:
        shown += [list(labels)] * len(turn)
        for claim in turn:
            labels[claim] = True
    moving = cached_prefixes(layout, shown)
    assert moving == still
    assert still <= 64 * 6


def cached_prefixes(layout: OtherGroups, shown: list[list[bool]]) -> int:
    """Demonstrations that a prefix cache computes. shown: the labels at each of the layout's questions."""
    seen: set[tuple[tuple[int, bool], ...]] = set()
    for claim, labels in zip(layout.questions, shown, strict=True):
        context = tuple((other, labels[other]) for other in layout.context(claim))
        seen |= {context[:end] for end in range(1, len(context) + 1)}
    return len(seen)


async def test_it_goes_on_from_labels_that_are_given() -> None:
    problem = replace(make_problem(12), start_labels=(True, False) * 6)
    journal = Lines()
    await run(problem, Model(problem), journal)
    assert journal.written[0]["event"] == "evaluation"
    assert journal.written[0]["labels"] == {str(claim): claim % 2 == 0 for claim in range(12)}


async def test_without_constraints_and_demonstrations_sweeps_sample_the_models_own_distribution() -> None:
    """A model whose answers do not depend on what it is shown: every claim is True as often as it says."""
    problem = replace(make_problem(8, gibbs_sweeps=1), consistency=Consistency([]))
    labels: Labels = (True, False) * 4
    counts = np.zeros(8)
    sweeps = 1500
    sampler = Sampler(problem, RecordedAsk(problem, Deaf(problem), Lines()), labels)
    for number in range(sweeps):
        counts += np.array(await sampler.sweep(labels, 0.0, 1.0, number), dtype=float)
    expected = np.array([1 / (1 + math.exp(-Deaf.odds(claim))) for claim in range(8)])
    assert np.abs(counts / sweeps - expected).max() < 4 * math.sqrt(0.25 / sweeps)


async def test_a_journal_of_other_settings_is_none_of_this_search() -> None:
    problem, journal = make_problem(), Lines()
    await run(problem, Model(problem), journal)
    others = (make_problem(num_labels=3), make_problem(14), make_problem(layout="upstream"))
    for other in (*others, make_problem(gibbs_temperature=0.0), make_problem(seed=6)):
        with pytest.raises(JournalMismatch):
            await run(other, Model(other), Lines(journal.written))


class Deaf(Model):
    """A model that is not moved by demonstrations."""

    @staticmethod
    def odds(claim: int) -> float:
        return claim / 2 - 1.5

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        return self.odds(claim)


class Sure(Model):
    """A model that says of every pair that its first claim is the true one."""

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        return -5.0 if claim % 2 else 5.0
