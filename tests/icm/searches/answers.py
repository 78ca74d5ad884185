"""A model and a journal in memory, for searches that are asked nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
import pytest

from src.icm.consistency import Consistency, Labels, Relation
from src.icm.objective import Evaluation, LogOdds, Objective
from src.icm.problem import Candidate, Problem, SearchSettings
from src.icm.searches.seam import Ask, Found, Journal, Questions, Record, Standing


class Stopped(Exception):
    """The process was killed."""


class Model:
    """An Ask whose answer depends on the question alone: on the claim, and on the labels before it in their order.

    asked: every question that it was asked, by its digest, in order. batches: of predictions and evaluations. lean:
    added to every answer, nats.
    """

    def __init__(self, problem: Problem, lean: float = 0.0) -> None:
        self.problem = problem
        self.lean = lean
        self.asked: list[str] = []
        self.batches = 0

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        self.batches += 1
        return [
            self.problem.objective.evaluate(
                each.labels,
                {claim: self._answer(claim, each) for claim in each.layout.questions},
                self.problem.consistency,
            )
            for each in candidates
        ]

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        [found] = await self.predict_many([(claims, candidate)])
        return found

    async def predict_many(self, questions: Sequence[Questions]) -> list[list[LogOdds]]:
        self.batches += 1
        return [[self._answer(claim, candidate) for claim in claims] for claims, candidate in questions]

    async def zero_shot(self) -> list[LogOdds]:
        size = self.problem.size
        nothing = Candidate((None,) * size, self.problem.new_layout(()))
        return [self._answer(claim, nothing) for claim in range(size)]

    def _answer(self, claim: int, candidate: Candidate) -> LogOdds:
        shown = [(other, candidate.labels[other]) for other in candidate.layout.context(claim)]
        digest = hashlib.sha256(repr((claim, shown)).encode()).digest()
        self.asked.append(digest.hex())
        values = [byte / 64 - 2 for byte in digest[: self.problem.num_labels - 1]]
        if len(values) == 1:
            return values[0] + self.lean + (1.5 if claim % 3 else -1.5)
        return tuple(
            value + (2.0 if claim % self.problem.num_labels == at + 1 else 0.0) for at, value in enumerate(values)
        )


class Lines:
    """A Journal that is read as a file would be. stop_after: lines after which the process is killed."""

    def __init__(self, records: Sequence[Record] = (), stop_after: int | None = None) -> None:
        self.records: list[Record] = [orjson.loads(orjson.dumps(record)) for record in records]
        self.written: list[Record] = []
        self.standings: list[Standing] = []
        self._stop_after = stop_after

    async def write(self, record: Record, standing: Standing) -> None:
        self.written.append(record)
        self.standings.append(standing)
        if len(self.written) == self._stop_after:
            raise Stopped

    @property
    def whole(self) -> list[Record]:
        return [*self.records, *map(orjson.loads, map(orjson.dumps, self.written))]


def make_problem(
    size: int = 12, num_labels: int = 2, calibration: Any = "none", known: Labels | None = None, **settings: Any
) -> Problem:
    """Claims in pairs of which exactly one is true, or, of more than two labels, which are not alike."""
    groups = tuple(str(claim // 2) for claim in range(size))
    relation = Relation.EXACTLY_ONE if num_labels == 2 else Relation.DIFFERENT
    consistency = Consistency.of_groups(groups, lambda i, j: relation)
    objective = Objective(10.0, calibration, num_labels=num_labels)
    return Problem(groups, consistency, objective, SearchSettings(**({"seed": 5} | settings)), known=known)


async def check_stops_anywhere(
    run: Callable[[Problem, Ask, Journal], Awaitable[Found]], problem: Problem, every: int = 1, again: int = 0
) -> None:
    """Stopped after a line, after every `every`th one in turn: it ends the same and asks nothing twice. A finished one
    is replayed without a model. again: questions at most that are asked twice after a stop between two lines of one
    request."""
    whole, model = Lines(), Model(problem)
    found = await run(problem, model, whole)
    for stop_after in range(1, len(whole.written), every):
        killed, before = Lines(stop_after=stop_after), Model(problem)
        with pytest.raises(Stopped):
            await run(problem, before, killed)
        resumed, after = Lines(killed.written), Model(problem)
        assert await run(problem, after, resumed) == found
        assert resumed.whole == whole.whole
        twice = len(before.asked) + len(after.asked) - len(model.asked)
        assert 0 <= twice <= again
        assert before.asked + after.asked[twice:] == model.asked
        assert before.asked[len(before.asked) - twice :] == after.asked[:twice]
    replayed, silent = Lines(whole.written), Model(problem)
    assert await run(problem, silent, replayed) == found
    assert (silent.asked, replayed.written) == ([], [])
