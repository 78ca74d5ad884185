"""A pool's questions asked of a model: prompts laid out, answers made into log-odds and U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.llm_api.labels import SpelledLabels
from core.llm_api.types import PoolScores, Prompt
from src.icm.objective import Evaluation, LogOdds
from src.icm.problem import Candidate, Problem
from src.icm.prompts import PromptBook
from src.icm.searches.seam import Questions


class Scores(Protocol):
    """What answers a pool's questions: a ModelAPI, or a memo in front of one."""

    async def score(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> PoolScores:
        """See ModelAPI.score."""


@dataclass(frozen=True)
class PoolScorer:
    """An Ask (src/icm/searches/seam.py) that ignores the intent: it asks what is needed now and nothing else."""

    api: Scores
    book: PromptBook
    problem: Problem

    def prompt(self, claim: int, candidate: Candidate) -> Prompt:
        """The question about `claim` given every other labelled claim."""
        layout = candidate.layout
        return self.book.prompt(claim, layout.context(claim), candidate.labels, layout.place(claim))

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        """See Ask."""
        prompts = [self.prompt(claim, candidate) for candidate in candidates for claim in candidate.layout.questions]
        answers = iter(log_odds_of(await self.api.score(prompts, self.book.labels)))
        return [
            self.problem.objective.evaluate(
                candidate.labels,
                {claim: next(answers) for claim in candidate.layout.questions},
                self.problem.consistency,
            )
            for candidate in candidates
        ]

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        """See Ask."""
        [found] = await self.predict_many([(claims, candidate)])
        return found

    async def predict_many(self, questions: Sequence[Questions]) -> list[list[LogOdds]]:
        """See Ask."""
        prompts = [self.prompt(claim, candidate) for claims, candidate in questions for claim in claims]
        answers = iter(log_odds_of(await self.api.score(prompts, self.book.labels)))
        return [[next(answers) for _ in claims] for claims, _ in questions]

    async def zero_shot(self) -> list[LogOdds]:
        """See Ask."""
        size = self.problem.size
        # All share the same prefix: every server computes it once and takes its part of the questions.
        prompts = [self.book.prompt(claim, (), (), claim / size) for claim in range(size)]
        return log_odds_of(await self.api.score(prompts, self.book.labels))


def log_odds_of(scores: PoolScores) -> list[LogOdds]:
    """The log-odds of a model's answers, nats, one entry a prompt (see objective)."""
    if scores.logprobs.shape[1] == 2:
        return list(scores.log_odds)
    return [tuple(row) for row in (scores.logprobs[:, 1:] - scores.logprobs[:, :1]).tolist()]
