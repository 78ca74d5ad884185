"""Going on from the end of another search: the layout that is kept, and what is asked for claims that are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.icm.carried import Carried, layout_record, read_layout
from src.icm.consistency import Consistency, Constraint, Relation
from src.icm.objective import Evaluation, LogOdds, Objective
from src.icm.prefix_tree import TreeLayout, UpstreamLayout
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.searches import search_named
from src.icm.searches.seam import Found, Record, Standing


class Steady:
    """A model that mostly knows what it thinks of a claim; each True before it adds a little."""

    def __init__(self, problem: Problem, own: Sequence[float]) -> None:
        self.problem, self.own, self.asked = problem, own, set[tuple[object, ...]]()

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        shown = tuple((other, candidate.labels[other]) for other in candidate.layout.context(claim))
        self.asked.add((claim, *shown))
        return self.own[claim] + 0.002 * sum(1 if label else -1 for _, label in shown)

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        return [
            self.problem.objective.evaluate(
                each.labels, {at: self._answer(at, each) for at in each.layout.questions}, self.problem.consistency
            )
            for each in candidates
        ]

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        return [self._answer(claim, candidate) for claim in claims]

    async def predict_many(self, questions: Sequence[tuple[Sequence[int], Candidate]]) -> list[list[LogOdds]]:
        return [await self.predict(claims, candidate) for claims, candidate in questions]

    async def zero_shot(self) -> list[LogOdds]:
        return list(self.own[: self.problem.size])


class Lines:
    """A journal in memory."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self.records = list(records)

    async def write(self, record: Record, standing: Standing) -> None:
        self.records.append(orjson.loads(orjson.dumps(record)))


def pool_of(size: int, seed: int, search: str) -> Problem:
    """Pairs, of which at most one is True for ascent, which then keeps some labels against the answers."""
    pairs = [Constraint((at, at + 1), Relation.AT_MOST_ONE) for at in range(0, size - 1, 2) if search == "ascent"]
    return Problem(
        groups=tuple(str(at // 2) for at in range(size)),
        consistency=Consistency(tuple(pairs)),
        objective=Objective(50.0),
        settings=SearchSettings(search=search, seed=seed, num_seed=4, initial_T=1.0),
    )


def carried_of(found: Found, problem: Problem, size: int) -> Carried:
    record = orjson.loads(orjson.dumps(layout_record(found.layout)))
    return Carried(
        labels=(*found.labels, *[None] * (size - problem.size)),
        claims=frozenset(range(problem.size)),
        layout=read_layout(record, {at: at for at in range(problem.size)}, pool_of(size, 0, "ascent").groups),
        log_odds=found.evaluation.log_odds,
        iterations=found.iteration,
        accepted=found.accepted,
    )


@pytest.mark.parametrize("search", ["annealing", "ascent"])
@pytest.mark.parametrize("seed", range(12))
async def test_a_claim_that_is_added_asks_its_label_and_one_evaluation(search: str, seed: int) -> None:
    """Also where labels are kept against the model's answers, or claims were not taken in: these rest."""
    size, rng = 24, np.random.default_rng(seed)
    own = (rng.choice([-1, 1], size + 1) * rng.uniform(0.5, 3.0, size + 1)).tolist()
    small, large = pool_of(size, seed, search), pool_of(size + 1, seed, search)
    found = await search_named(search).run(small, Steady(small, own), Lines())
    settled = [at for at, label in enumerate(found.labels) if label is None]
    settled += [at for at, z in found.evaluation.log_odds.items() if (z > found.evaluation.offset) != found.labels[at]]
    carried = carried_of(found, small, size + 1)
    going_on = replace(large, start_labels=carried.labels, carried=carried)
    assert going_on.resting(carried.labels) == set(settled)
    model, journal = Steady(going_on, own), Lines()
    ended = await search_named(search).run(going_on, model, journal)
    assert len(model.asked) <= size + 2
    assert ended.labels[:size] == found.labels
    assert ended.labels[size] in (own[size] > 0, None)
    # Replayed from its journal it asks nothing, and ends in the same place.
    again, silent = await search_named(search).run(going_on, model2 := Steady(going_on, own), Lines(journal.records)), 0
    assert len(model2.asked) == silent
    assert (again.labels, again.layout, again.evaluation) == (ended.labels, ended.layout, ended.evaluation)
    # Nothing added: nothing asked.
    same = replace(small, start_labels=found.labels, carried=carried_of(found, small, size))
    model = Steady(same, own)
    assert (await search_named(search).run(same, model, Lines())).labels == found.labels
    assert not model.asked


def test_once_the_pool_has_doubled_everything_is_open_again() -> None:
    problem = pool_of(8, 1, "annealing")
    labels = (True, False, False, True, None, None, None, None)
    layout = TreeLayout.build(range(4), problem.groups, np.random.default_rng(0))
    log_odds = {0: -3.0, 1: -1.0, 2: -1.0, 3: 4.0}
    carried = Carried(labels, frozenset(range(5)), layout, log_odds)
    going_on = replace(problem, start_labels=labels, carried=carried, objective=Objective(50.0))
    assert going_on.resting(labels) == {0, 4}
    assert going_on.keeps_side(labels)
    turned = (False, *labels[1:])
    assert going_on.resting(turned) == {4}
    known = replace(going_on, known=(False, *[None] * 7))
    assert not known.keeps_side(labels), "what the other search had turned may be on the wrong side"
    full = (True, False, False, True, True, False, False, True)
    assert going_on.resting(full) == frozenset()
    assert not going_on.keeps_side(full)


def test_the_temperature_goes_on() -> None:
    problem = pool_of(4, 1, "annealing")
    layout = TreeLayout.build(range(2), problem.groups, np.random.default_rng(0))
    carried = Carried((True, False, None, None), frozenset({0, 1}), layout, iterations=100, accepted=7)
    going_on = replace(problem, carried=carried)
    assert going_on.temperature(3, 2) == problem.settings.temperature(103, 9) < problem.temperature(3, 2)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 20), st.integers(0, 4), st.integers(0, 3), st.data())
def test_a_layout_is_kept_but_for_claims_that_are_gone(size: int, tail: int, anchors: int, data: st.DataObject) -> None:
    groups = [str(at // 2) for at in range(size + tail)]
    layout = TreeLayout.build(range(size), groups, np.random.default_rng(size), anchors=anchors)
    for claim in range(size, size + tail):
        layout = layout.append(claim)
    record = orjson.loads(orjson.dumps(layout_record(layout)))
    assert read_layout(record, {at: at for at in range(size + tail)}, groups) == layout
    left = data.draw(st.sets(st.integers(0, size + tail - 1), min_size=1))
    places = {old: new for new, old in enumerate(sorted(left))}
    found = read_layout(record, places, [groups[old] for old in sorted(left)])
    assert found.questions == tuple(places[at] for at in layout.questions if at in left)
    assert set(found.tail) == {places[at] for at in layout.tail if at in left}
    upstream = UpstreamLayout.build(range(size))
    assert read_layout(layout_record(upstream) or {}, {at: at for at in range(size)}, groups) == upstream


@pytest.mark.parametrize(
    "record",
    [{}, {"tree": [1, [2]], "tail": [], "anchors": 0}, {"tree": [1, 1], "tail": [], "anchors": 0},
     {"tree": [1, 2], "tail": [2], "anchors": 0}, {"tree": "x", "tail": [], "anchors": 0},
     {"tree": None, "tail": ["1"], "anchors": 0}, {"upstream": [0.5]}],
)  # fmt: skip
def test_what_is_no_layout_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="it holds"):
        read_layout(record, {1: 1, 2: 2}, ["a"] * 3)
