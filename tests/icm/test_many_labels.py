"""More than two labels: every formula against one written out, every choice against all that could be made."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.annealing import (
    SearchState,
    choose,
    finished,
    mirror,
    mirrored_labels,
    mirrors,
    predicted_label,
    wants_mirror,
)
from src.icm.capped_layout import balanced_sample
from src.icm.consistency import Consistency, Constraint, Labels, Relation
from src.icm.journal import mirror_record, replay, start_record
from src.icm.objective import (
    Evaluation,
    LogOdds,
    Objective,
    all_margins,
    calibration_offset,
    label_of,
    margins_of,
    sureness,
)
from src.icm.problem import Candidate, Problem, SearchSettings, balanced_labels
from src.icm.searches.seam import JournalMismatch

NONE = Consistency([])
ANY = [Relation.AGREE, Relation.DIFFERENT]
odds = st.floats(-40, 40)


@st.composite
def pools(draw: st.DrawFn, counts: Sequence[int] = (3, 4)) -> tuple[int, list[int | None], dict[int, LogOdds]]:
    """(K, labels, log-odds of the labelled claims)."""
    num_labels = draw(st.sampled_from(counts))
    labels = draw(st.lists(st.none() | st.integers(0, num_labels - 1), min_size=1, max_size=8))
    z = st.tuples(*[odds] * (num_labels - 1))
    return num_labels, labels, {claim: draw(z) for claim, label in enumerate(labels) if label is not None}


def margin(z: Sequence[float], label: int) -> float:
    """log P(label) less the log of the others' sum, written out."""
    all_z = [0.0, *z]
    return all_z[label] - math.log(math.fsum(math.exp(value) for at, value in enumerate(all_z) if at != label))


@given(pools(), st.sampled_from(["none", "mean"]))
def test_u_is_alpha_times_the_mean_margin_less_the_broken_pairs(pool: Any, calibration: Any) -> None:
    num_labels, labels, log_odds = pool
    consistency = Consistency.of_groups(["g"] * len(labels), lambda i, j: Relation.DIFFERENT)
    found = Objective(7.0, calibration, num_labels=num_labels).evaluate(labels, log_odds, consistency)
    known = list(log_odds)
    offset = [0.0] * (num_labels - 1)
    if calibration == "mean" and known:
        offset = [math.fsum(log_odds[claim][k] for claim in known) / len(known) for k in range(num_labels - 1)]
    assert found.offset == pytest.approx(offset)
    assert found.num_labels == num_labels
    margins = [margin([z - o for z, o in zip(log_odds[c], offset, strict=True)], labels[c]) for c in known]
    mean = math.fsum(margins) / len(margins) if margins else 0.0
    broken = sum(a == b is not None for a, b in combinations(labels, 2))
    assert found.predictability == pytest.approx(mean, abs=1e-9)
    assert found.inconsistent == broken
    assert found.utility == pytest.approx(7.0 * mean - broken, abs=1e-8)


@given(st.lists(st.tuples(odds, st.booleans()), min_size=1, max_size=9))
def test_the_margins_of_two_labels_are_the_signed_log_odds_to_the_last_bit(pool: list[tuple[float, bool]]) -> None:
    scores = np.array([score for score, _ in pool])
    labels = np.array([label for _, label in pool])
    offset = calibration_offset(scores.tolist(), "mean")
    assert isinstance(offset, float)
    signed = np.where(labels, 1.0, -1.0) * (scores - offset)
    margins = all_margins((scores - offset)[:, None])
    assert margins[np.arange(len(pool)), labels.astype(int)].tolist() == signed.tolist()
    for score in scores.tolist():
        assert margins_of(score, offset) == (-(score - offset), score - offset)
        assert sureness(score, offset) == abs(score - offset)
        assert label_of(score, offset) is (score > offset)


@given(st.lists(odds, min_size=2, max_size=5))
def test_a_prediction_is_the_likeliest_label_and_its_margin_the_largest(z: list[float]) -> None:
    log_odds, offset = tuple(z), (0.0,) * len(z)
    label = label_of(log_odds, offset)
    assert [0.0, *z][label] == max(0.0, *z)
    assert sureness(log_odds, offset) == pytest.approx(margin(z, label), abs=1e-9)
    assert margins_of(log_odds, offset) == pytest.approx([margin(z, k) for k in range(len(z) + 1)], abs=1e-9)


def test_of_equal_labels_the_first_is_predicted() -> None:
    assert label_of((0.0, 0.0), (0.0, 0.0)) == 0
    assert label_of((1.0, 1.0), (0.0, 0.0)) == 1
    assert label_of((1.0, 3.0), (0.0, 2.0)) == 1


def test_a_pool_whose_lean_is_taken_away_favours_no_constant_labeling() -> None:
    scores: dict[int, LogOdds] = {0: (5.0, 3.0), 1: (5.0, 3.0), 2: (5.0, 3.0)}
    worth = [Objective(1, "mean", num_labels=3).evaluate((k,) * 3, scores, NONE).utility for k in range(3)]
    assert worth == pytest.approx([-math.log(2)] * 3)


@pytest.mark.parametrize("relation", ANY)
@pytest.mark.parametrize("num_labels", [2, 3, 4])
@pytest.mark.parametrize("size", [2, 3])
def test_assignments_are_exactly_those_that_break_nothing(relation: Relation, num_labels: int, size: int) -> None:
    allowed = {each for each in product(range(num_labels), repeat=size) if not relation.inconsistencies(each)}
    found = relation.assignments(size, num_labels)
    assert set(found) == allowed
    assert len(found) == len(allowed)


@given(st.lists(st.none() | st.integers(0, 3), min_size=1, max_size=7))
def test_inconsistencies_are_counted_by_the_pair(labels: list[int | None]) -> None:
    pairs = [(a, b) for a, b in combinations(labels, 2) if a is not None and b is not None]
    assert Relation.AGREE.inconsistencies(labels) == sum(a != b for a, b in pairs)
    assert Relation.DIFFERENT.inconsistencies(labels) == sum(a == b for a, b in pairs)


def test_a_repair_keeps_claims_without_a_label_out() -> None:
    constraint = Constraint((0, 2, 3), Relation.DIFFERENT)
    assert list(constraint.repairs((1, 1, None, 1), 3)) == [
        {0: a, 3: b} for a, b in [(2, 1), (2, 0), (1, 2), (1, 0), (0, 2), (0, 1)]
    ]


@pytest.mark.parametrize(
    ("size", "relation", "num_labels", "complaint"),
    [
        (2, Relation.EXACTLY_ONE, 3, "has claims of which exactly one is true, and 3 labels: more than two"),
        (2, Relation.AT_MOST_ONE, 4, "has claims of which at most one is true, and 4 labels"),
        (4, Relation.DIFFERENT, 3, "has a group of 4 claims of which no two are alike, and 3 labels"),
        (7, Relation.DIFFERENT, 8, "has a group of 7 claims of which no two are alike, and 8 labels, which is too"),
        (2, Relation.EXACTLY_ONE, 2, None),
        (9, Relation.AGREE, 5, None),
        (3, Relation.DIFFERENT, 3, None),
    ],
)  # fmt: skip
def test_relations_that_cannot_hold_are_told(
    size: int, relation: Relation, num_labels: int, complaint: str | None
) -> None:
    found = Consistency([Constraint(tuple(range(size)), relation)]).complaint(num_labels)
    if complaint is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(complaint)
        assert "\n" not in found


@given(
    st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from(ANY)), max_size=6),
)
def test_the_nearest_labels_break_least_and_then_lose_least(
    margins: list[list[float]], pairs: list[tuple[int, int, Relation]]
) -> None:
    constraints = [Constraint((min(a, b), max(a, b)), r) for a, b, r in pairs if a != b and max(a, b) < len(margins)]
    consistency = Consistency(constraints)

    def gain(labels: Labels) -> float:
        return sum(each[label] for each, label in zip(margins, labels, strict=True) if label is not None)

    found = consistency.nearest(margins)
    best = max(product(range(3), repeat=len(margins)), key=lambda labels: (-consistency.count(labels), gain(labels)))
    assert consistency.count(found) == consistency.count(best)
    assert gain(found) == pytest.approx(gain(best))


def test_many_claims_that_constrain_each_other_are_decided_by_the_surest_first() -> None:
    chain = Consistency([Constraint((i, i + 1), Relation.DIFFERENT) for i in range(19)])
    margins = [[0.1 * (i % 3), 1.0, 0.0] for i in range(20)]
    margins[4] = [-9.0, -9.0, 5.0]
    labels = chain.nearest(margins)
    assert chain.count(labels) == 0
    assert labels[4] == 2


@given(st.integers(0, 40), st.integers(2, 6), st.integers(0, 99))
def test_seeds_are_as_many_of_each_label_as_can_be(count: int, num_labels: int, seed: int) -> None:
    drawn = balanced_labels(count, num_labels, np.random.default_rng(seed))
    counts = Counter(drawn)
    assert len(drawn) == count
    assert all(counts[label] in (count // num_labels, -(-count // num_labels)) for label in range(num_labels))
    assert all(type(label) is (bool if num_labels == 2 else int) for label in drawn)


def test_a_sample_of_demonstrations_has_as_many_of_each_label() -> None:
    labels: Labels = (0,) * 20 + (1,) * 5 + (2,) * 2
    sample = balanced_sample(range(27), labels, 9, np.random.default_rng(1))
    assert Counter(labels[claim] for claim in sample) == {0: 4, 1: 3, 2: 2}


@given(pools((2, 3, 4)))
def test_the_mirrors_are_every_swap_of_two_labels(pool: Any) -> None:
    num_labels, labels, _ = pool
    found = mirrors(tuple(labels), num_labels)
    assert len(found) == num_labels * (num_labels - 1) // 2
    if num_labels == 2:
        assert found == (mirrored_labels(tuple(labels)),)
    for turned in found:
        assert [label is None for label in turned] == [label is None for label in labels]
        one_to_one = {(a, b) for a, b in zip(labels, turned, strict=True) if a is not None}
        assert len({a for a, _ in one_to_one}) == len(one_to_one) == len({b for _, b in one_to_one})
        for relation in ANY:
            assert relation.inconsistencies(turned) == relation.inconsistencies(labels)


def three(size: int = 6, **settings: Any) -> Problem:
    defaults: dict[str, Any] = {"seed": 2, "num_seed": size, "K": 0}
    return Problem(
        tuple(map(str, range(size))), NONE, Objective(1.0, num_labels=3), SearchSettings(**(defaults | settings))
    )


def worth(problem: Problem, labels: Labels, right: Labels) -> Evaluation:
    """Every claim leans to its right label by 2 nats, whatever the others have."""
    z = {0: (-2.0, -2.0), 1: (2.0, 0.0), 2: (0.0, 2.0)}
    log_odds: dict[int, LogOdds] = {claim: z[label] for claim, label in enumerate(right) if label is not None}
    return problem.objective.evaluate(labels, log_odds, NONE)


def test_the_surest_change_is_chosen_of_several() -> None:
    problem = three(3)
    evaluation = Evaluation({}, (0.0, 0.0), 0.0, 0, 0.0)
    state = SearchState(0, (1, 2, 0), problem.new_layout([0, 1, 2]), evaluation)
    assert predicted_label(problem, state, (0.5, 3.0)) == 2
    assert choose(problem, state, {0: (9.0, 0.0), 1: (4.0, 3.0), 2: (3.0, 0.0)}) == 2  # 0 would stay as it is
    assert choose(problem, state, {0: (9.0, 0.0), 1: (0.0, 1.0)}) == 0


def test_swaps_are_tried_until_none_is_better_and_replay() -> None:
    problem = three()
    right: Labels = (0, 0, 1, 1, 2, 2)
    labels: Labels = (1, 1, 2, 2, 0, 0)  # two swaps away
    layout = problem.new_layout(range(6))
    state = SearchState(0, labels, layout, worth(problem, labels, right))
    records, states = [start_record(state)], [state]
    while not finished(problem, state):
        assert wants_mirror(problem, state)
        turned = mirrors(state.labels, 3)
        utilities = [worth(problem, each, right) for each in turned]
        at = max(range(3), key=lambda number: utilities[number].utility)
        accepted = utilities[at].utility > state.evaluation.utility
        state = mirror(state, utilities[at], turned[at]) if accepted else mirror(state, None)
        records.append(mirror_record(state, accepted, utilities[at].utility))
        states.append(state)
    assert state.labels == right
    assert [record.get("accepted") for record in records] == [None, True, True, False]
    written = [json.loads(json.dumps(record)) for record in records]
    assert (written[0]["format"], written[0]["num_labels"]) == (3, 3)
    assert written[0]["labels"] == {"0": 1, "1": 1, "2": 2, "3": 2, "4": 0, "5": 0}
    assert written[0]["scores"]["2"] == [2.0, 0.0]
    for count in range(1, len(written) + 1):
        replayed = replay(problem, written[:count])
        assert replayed is not None
        assert (replayed.labels, replayed.evaluation) == (states[count - 1].labels, states[count - 1].evaluation)
        assert replayed.mirror_tried == states[count - 1].mirror_tried
    written[1]["changes"]["0"] = written[1]["changes"]["0"] ^ 1 if written[1]["changes"]["0"] < 2 else 0
    with pytest.raises(JournalMismatch, match="does not swap two labels"):
        replay(problem, written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 4}, "other labels"),
        ({"format": 4}, "format"),
        ({"labels": {"0": 3}}, "none of the 3"),
        ({"labels": {"0": True}}, "none of the 3"),
    ],
)
def test_a_journal_of_other_labels_is_refused(change: dict[str, Any], message: str) -> None:
    problem = three()
    labels: Labels = (0, 0, 1, 1, 2, 2)
    state = SearchState(0, labels, problem.new_layout(range(6)), worth(problem, labels, labels))
    record = json.loads(json.dumps(start_record(state)))
    assert replay(problem, [record]) is not None
    with pytest.raises(JournalMismatch, match=message):
        replay(problem, [record | change])
    without = {key: value for key, value in record.items() if key not in ("format", "num_labels")}
    with pytest.raises(JournalMismatch, match="other labels"):
        replay(problem, [without])
    two = Problem(problem.groups, NONE, Objective(1.0), problem.settings)
    with pytest.raises(JournalMismatch, match="other labels"):
        replay(two, [record])


def test_candidates_of_three_labels_are_laid_out_in_a_balanced_sample() -> None:
    problem = three(12, context_cap=3)
    seeds = problem.seed_labels()
    assert Counter(seeds) == {0: 4, 1: 4, 2: 4}
    layout = problem.new_layout(range(12), labels=seeds)
    shown = Candidate(seeds, layout).layout.demonstrations
    assert sorted(seeds[claim] or 0 for claim in shown) == [0, 1, 2]
