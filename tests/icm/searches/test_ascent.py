"""Ascent: every claim labelled, nothing it evaluated is higher, and a stopped one asks nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.icm.annealing import mirrored_labels
from src.icm.consistency import Consistency
from src.icm.objective import LogOdds
from src.icm.problem import Candidate, Problem
from src.icm.searches.ascent import LEAST_SAMPLE, Chain, Climb, random_labels, run
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import JournalMismatch
from tests.icm.searches.answers import Lines, Model, Stopped, make_problem

CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "calibrated": {"calibration": "mean"},
    "one start": {"ascent_starts": 1},
    "few questions": {"ascent_questions": 3, "ascent_starts": 2},
    "one sweep": {"ascent_sweeps": 1},
    "refusals on all answers": {"ascent_error": 0.0},
    "no mirror": {"mirror": False},
    "upstream's order": {"layout": "upstream"},
    "capped": {"context_cap": 4},
    "three labels": {"num_labels": 3},
    "many claims": {"size": 32, "ascent_starts": 3},
}


class Coherent(Model):
    """A model that follows its demonstrations: it says the label that the shown ones of the same truth have.

    truth: of each claim. A consistent labeling predicts itself; inverted labels do so less well.
    """

    def __init__(self, problem: Problem, truth: Sequence[bool], alone: float = 1.0) -> None:
        super().__init__(problem)
        self.truth = truth
        self.alone = alone

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        super()._answer(claim, candidate)
        shown = candidate.layout.context(claim)
        right = sum(candidate.labels[other] == self.truth[other] for other in shown)
        follows = 4.0 * (2 * right - len(shown)) / max(1, len(shown))
        toward_truth = self.alone + follows if follows > 0 or not shown else 0.5 * follows
        return toward_truth if self.truth[claim] else -toward_truth


@pytest.mark.parametrize("case", CASES)
async def test_it_ends_with_the_best_of_what_it_evaluated(case: str) -> None:
    problem, journal = make_problem(**CASES[case]), Lines()
    model = Model(problem)
    found = await run(problem, model, journal)
    evaluated = [record for record in journal.written if record["event"] == "evaluation"]
    assert found.labelled == tuple(range(problem.size))
    assert found.evaluation.utility == max(record["U_proposed"] for record in evaluated)
    assert (await Model(problem).evaluate([Candidate(found.labels, found.layout)]))[0].utility == pytest.approx(
        found.evaluation.utility, abs=1e-12
    )
    assert len(model.asked) == len(set(model.asked)), "it asked a question twice"


@pytest.mark.parametrize("case", CASES)
async def test_a_stopped_search_ends_the_same_and_asks_nothing_twice(case: str) -> None:
    problem = make_problem(**CASES[case])
    whole, model = Lines(), Model(problem)
    found = await run(problem, model, whole)
    for stop_after in range(1, len(whole.written), 1 if problem.size < 32 else 5):
        killed, before = Lines(stop_after=stop_after), Model(problem)
        with pytest.raises(Stopped):
            await run(problem, before, killed)
        resumed, after = Lines(killed.written), Model(problem)
        assert await run(problem, after, resumed) == found
        assert resumed.whole == whole.whole
        assert before.asked + after.asked == model.asked
    replayed, silent = Lines(whole.written), Model(problem)
    assert await run(problem, silent, replayed) == found
    assert (silent.asked, replayed.written) == ([], [])


@pytest.mark.parametrize("starts", [1, 2, 4])
@pytest.mark.parametrize("questions", [2, 5, 12])
async def test_it_begins_nothing_beyond_its_questions(starts: int, questions: int) -> None:
    problem = make_problem(32, ascent_questions=questions, ascent_starts=starts)
    model = Model(problem)
    await run(problem, model, Lines())
    # Zero-shot, the sweeps, and an evaluation are asked in any case; then what was begun is finished, and the mirror.
    sweeps = {1: 3, 2: 4, 4: 7}[starts]
    assert len(model.asked) <= max(questions, 1 + sweeps + 1) * 32 + 2 * 32


async def test_labels_that_predict_each_other_are_found_and_cost_little() -> None:
    problem = free(make_problem(32))
    truth = [claim % 3 == 0 for claim in range(32)]
    model = Coherent(problem, truth)
    found = await run(problem, model, Lines())
    assert list(found.labels) == truth
    # Without demonstrations, one sweep that changes nothing, and a part of the mirror's questions.
    assert len(model.asked) <= 3 * 32


async def test_inverted_labels_are_left_for_their_mirror() -> None:
    problem = free(make_problem(32))
    truth = tuple(claim % 3 == 0 for claim in range(32))
    inverted = replace(problem, start_labels=mirrored_labels(truth))
    assert (await run(inverted, Coherent(inverted, truth), Lines())).labels == truth
    kept = replace(inverted, settings=replace(inverted.settings, mirror=False))
    assert (await run(kept, Coherent(kept, truth), Lines())).labels == mirrored_labels(truth)


async def test_a_sure_refusal_is_decided_on_a_part() -> None:
    problem = free(make_problem(32))
    truth = tuple(claim % 3 == 0 for claim in range(32))
    layout = problem.new_layout(range(32))
    for error, most in ((0.02, 16), (0.0, 32)):
        setting = replace(problem, settings=replace(problem.settings, ascent_error=error))
        model = Coherent(setting, truth)
        climb = Climb(setting, RecordedAsk(setting, model, Lines()), layout)
        [evaluation] = await Coherent(setting, truth).evaluate([Candidate(truth, layout)])
        worth = await climb.judge(mirrored_labels(truth), truth, evaluation)
        assert (worth is None) == (error > 0)
        assert LEAST_SAMPLE <= len(model.asked) <= most


async def test_a_sweep_shows_each_block_what_the_one_before_became() -> None:
    problem = free(make_problem(8))
    truth = tuple(claim % 3 == 0 for claim in range(8))
    journal = Lines()
    layout = problem.new_layout(range(8))
    climb = Climb(problem, RecordedAsk(problem, Coherent(problem, truth), journal), layout)
    wrong = (not truth[layout.questions[0]], *truth[1:]) if layout.questions[0] == 0 else truth
    swept = await climb.sweep(Chain(wrong))
    shown = [record["shown"] for record in journal.written]
    assert [record["claims"] for record in journal.written] == [
        list(layout.questions[start : start + 2]) for start in range(0, 8, 2)
    ]
    assert swept.labels == truth
    assert shown[0] == {str(claim): label for claim, label in enumerate(wrong)}
    assert shown[1] == {str(claim): label for claim, label in enumerate(truth)}


@given(number=st.integers(1, 50), num_labels=st.integers(2, 4), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_random_starts_break_no_constraint_and_are_drawn_by_the_seed(number: int, num_labels: int, seed: int) -> None:
    problem = make_problem(12, num_labels, seed=seed)
    labels = random_labels(problem, number)
    assert problem.consistency.count(labels) == 0
    assert labels == random_labels(problem, number)
    assert None not in labels


async def test_it_goes_on_from_labels_that_are_given() -> None:
    problem = make_problem(12)
    given_labels = tuple(bool(claim % 2) if claim < 6 else None for claim in range(12))
    journal = Lines()
    await run(replace(problem, start_labels=given_labels), Model(problem), journal)
    first = journal.written[1]["shown"]
    assert [first[str(claim)] for claim in range(6)] == [False, True] * 3
    assert len(first) == 12


async def test_a_journal_of_other_settings_is_none_of_this_search() -> None:
    problem, journal = make_problem(), Lines()
    await run(problem, Model(problem), journal)
    for other in (make_problem(seed=6), make_problem(num_labels=3), make_problem(14), make_problem(layout="upstream")):
        with pytest.raises(JournalMismatch):
            await run(other, Model(other), Lines(journal.written))


def free(problem: Problem) -> Problem:
    """The same without constraints."""
    return replace(problem, consistency=Consistency([]))
