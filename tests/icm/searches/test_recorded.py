"""Answers that a journal holds are not asked again, and are held against what is asked."""

from __future__ import annotations

import tracemalloc

import pytest

from src.icm.problem import Candidate
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import JournalMismatch
from tests.icm.searches.answers import Lines, Model, Stopped, make_problem

SIZE = 6


def labelings(count: int) -> list[Candidate]:
    problem = make_problem(SIZE)
    layout = problem.new_layout(range(SIZE))
    return [Candidate(tuple(bool(number >> claim & 1) for claim in range(SIZE)), layout) for number in range(count)]


@pytest.mark.parametrize("num_labels", [2, 3])
async def test_every_kind_of_question_is_answered_from_the_journal(num_labels: int) -> None:
    problem = make_problem(SIZE, num_labels)
    some = Candidate((1, 0, None, None, None, None), problem.new_layout([0, 1]))
    if num_labels == 2:
        some = Candidate((True, False, None, None, None, None), problem.new_layout([0, 1]))

    async def ask(asked: RecordedAsk) -> list[object]:
        return [await asked.zero_shot(), await asked.predict([3, 2], some), await asked.evaluate([some])]

    journal = Lines()
    answers = await ask(RecordedAsk(problem, Model(problem), journal))
    assert [record["event"] for record in journal.written] == ["questions", "questions", "evaluation"]
    for kept in range(4):
        model, again = Model(problem), Lines(journal.written[:kept])
        assert await ask(RecordedAsk(problem, model, again)) == answers
        assert again.whole == journal.whole
        assert bool(model.asked) == (kept < 3)


async def test_a_batch_that_was_half_journaled_is_asked_for_its_other_half() -> None:
    problem, wanted = make_problem(SIZE), labelings(5)
    killed = Lines(stop_after=2)
    with pytest.raises(Stopped):
        await RecordedAsk(problem, Model(problem), killed).evaluate(wanted)
    model = Model(problem)
    found = await RecordedAsk(problem, model, Lines(killed.written)).evaluate(wanted)
    assert found == await Model(problem).evaluate(wanted)
    before = Model(problem)
    await before.evaluate(wanted[:2])
    assert len(model.asked) == len(set(model.asked))
    assert set(model.asked).isdisjoint(before.asked)
    everything = Model(problem)
    await everything.evaluate(wanted)
    assert set(model.asked) == set(everything.asked) - set(before.asked)


async def test_it_stands_at_the_best_labeling_of_most_claims() -> None:
    problem, journal = make_problem(SIZE), Lines()
    asked = RecordedAsk(problem, Model(problem), journal)
    assert (asked.standing.labelled, asked.standing.iteration) == ((), 0)
    few = Candidate((True, False, None, None, None, None), problem.new_layout([0, 1]))
    await asked.evaluate([few])
    assert asked.standing.labelled == (0, 1)
    worth = await asked.evaluate(labelings(8))
    best = max(range(8), key=lambda at: worth[at].utility)
    assert asked.standing.labels == labelings(8)[best].labels
    assert asked.standing.evaluation == worth[best]
    assert asked.standing.iteration == 9
    await asked.evaluate([few])
    assert asked.standing.labels == labelings(8)[best].labels
    accepted = [record["accepted"] for record in journal.written]
    assert accepted[:2] == [True, True]
    assert not accepted[-1]
    assert asked.standing.accepted == sum(accepted) - 1


async def test_answers_to_other_questions_are_refused() -> None:
    problem, journal = make_problem(SIZE), Lines()
    one, other = labelings(2)
    await RecordedAsk(problem, Model(problem), journal).evaluate([one])
    backwards = Candidate(one.labels, problem.new_layout(range(SIZE), 1))
    assert backwards.layout.questions != one.layout.questions
    for wanted in (other, backwards):
        with pytest.raises(JournalMismatch, match="line 1"):
            await RecordedAsk(problem, Model(problem), Lines(journal.written)).evaluate([wanted])
    with pytest.raises(JournalMismatch, match="line 1"):
        await RecordedAsk(problem, Model(problem), Lines(journal.written)).zero_shot()
    questions = Lines()
    await RecordedAsk(problem, Model(problem), questions).predict([1, 2], one)
    for claims, candidate in (([2, 1], one), ([1, 2], other)):
        with pytest.raises(JournalMismatch, match="line 1"):
            await RecordedAsk(problem, Model(problem), Lines(questions.written)).predict(claims, candidate)


async def test_a_question_that_shows_the_same_labels_is_the_same_question() -> None:
    """With a cap most labels are in no prompt, and may change."""
    problem = make_problem(32, context_cap=4)
    labels = (True, False) * 16
    layout = problem.new_layout(range(32), labels=labels)
    hidden = next(claim for claim in range(32) if claim not in layout.demonstrations)
    model = Model(problem)
    asked = RecordedAsk(problem, model, Lines())
    await asked.evaluate([Candidate(labels, layout)])
    turned = tuple(not label if claim == hidden else label for claim, label in enumerate(labels))
    await asked.evaluate([Candidate(turned, layout)])
    assert len(model.asked) == len(set(model.asked)) == asked.questions == 32


def test_what_is_remembered_grows_with_the_questions_not_their_square() -> None:
    def bytes_of(size: int) -> int:
        problem = make_problem(size)
        layout = problem.new_layout(range(size))
        asked = RecordedAsk(problem, Model(problem), Lines())
        log_odds = dict.fromkeys(layout.questions, 1.0)
        tracemalloc.start()
        asked._keep(Candidate((True,) * size, layout), log_odds)
        found, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    assert bytes_of(800) < 8 * bytes_of(200)  # a square would be 16 times
