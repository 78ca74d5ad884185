"""Answers before they are needed: a memo in front of a ModelAPI that fills batches with what will be asked next.

A search that asks with an intent is answered from the memo where that is possible, and where a batch must be sent the
questions of the likeliest futures are added to it (src/icm/speculation.py). On an engine whose answers do not depend on
what else is asked, no decision changes: only the number of batches does. Without an intent the model is asked directly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from core.errors import ConfigurationError, MissingLabel, RequestRejected
from core.llm_api.labels import SpelledLabels
from core.llm_api.llm import ModelAPI
from core.llm_api.types import PoolScores, Prompt
from src.icm.annealing import SearchState, cost
from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds
from src.icm.planner import evaluations_that_fit, relaid_tokens
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate
from src.icm.prompts import in_shared_order
from src.icm.searches.seam import Questions, Record
from src.icm.speculation import (
    LOOK,
    Evaluating,
    Intent,
    Pace,
    Predicting,
    Rebuilding,
    accepted,
    next_evaluations,
    next_questions,
    unchanged,
)
from src.pipeline.scoring import PoolScorer

Expected = tuple[list[Prompt], float]  # prompts to add to a batch, and about how many tokens they cost


class Lookahead:
    """An Ask: the answers of one search state, and what to ask along with the next batch.

    scorer: what asks `api`. asked, used: prompts asked ahead so far, and how many of them the search then needed.
    """

    def __init__(
        self, api: ModelAPI, scorer: PoolScorer, pace: Pace, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.asked = self.used = 0
        self._scorer = scorer
        self._from_memo = replace(scorer, api=self)
        self._api = api
        self._problem = scorer.problem
        self._make_prompt = scorer.prompt
        self._pace = pace
        self._clock = clock
        self._at: tuple[Labels, Layout] | None = None
        self._memo: dict[str, list[float]] = {}  # log P of each label, by the prompt's digest
        self._unused: set[str] = set()
        self._evaluated: set[Labels] = set()  # labelings whose first batch is in the memo, or about to be
        self._next: dict[Labels, list[str]] = {}  # digests that will still be of use once these are the labels
        self._wanted: float | None = None  # tokens of the next batch without what is asked ahead
        self._future: Callable[[], Expected] = _nothing

    async def score(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> PoolScores:
        """As ModelAPI.score. What must be sent goes in one batch with the expected questions."""
        started = self._clock()
        missing = {prompt.digest: prompt for prompt in prompts if prompt.digest not in self._memo}
        prompt_tokens = 0
        if missing:
            wanted = list(missing.values())
            tokens = (self._wanted or 0.0) * len(missing) / len(prompts)
            known = self._wanted is not None
            ahead: list[Prompt] = []
            # Speculation alone sends no batch, so that a repeated run asks nothing new.
            if not await self._api.are_cached(wanted, labels):
                ahead, more = self._future()
                tokens += more
                self._future = _nothing
            self._wanted = None
            early = {p.digest: p for p in ahead if p.digest not in self._memo and p.digest not in missing}
            batch = in_shared_order([*wanted, *early.values()])
            try:
                scores = await self._api.score(batch, labels)
            except (MissingLabel, RequestRejected, ConfigurationError):
                if not early:
                    raise
                # A question that the search may never ask must not stop it: only what is needed now may.
                early, batch, known = {}, in_shared_order(wanted), False
                scores = await self._api.score(batch, labels)
            prompt_tokens = scores.prompt_tokens
            self._memo.update(zip((prompt.digest for prompt in batch), scores.logprobs.tolist(), strict=True))
            self._unused.update(early)
            self.asked += len(early)
            if prompt_tokens and known:
                self._pace.measure(tokens, self._clock() - started)
        digests = [prompt.digest for prompt in prompts]
        needed = self._unused.intersection(digests)
        self.used += len(needed)
        self._unused -= needed
        logprobs = np.array([self._memo[digest] for digest in digests], np.float64).reshape(-1, len(labels))
        return PoolScores(logprobs, prompt_tokens)

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        """See Ask."""
        return await self._scorer_for(intent, candidates).evaluate(candidates)

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        """See Ask."""
        return await self._scorer_for(intent, [candidate]).predict(claims, candidate)

    async def predict_many(self, questions: Sequence[Questions]) -> list[list[LogOdds]]:
        """See Ask."""
        return await self._scorer.predict_many(questions)

    async def zero_shot(self) -> list[LogOdds]:
        """See Ask."""
        return await self._scorer.zero_shot()

    def learn(self, record: Record) -> None:
        """Count a decision that was journaled."""
        if record["event"] == "step":
            self._pace.learn(record["accepted"], record.get("U_proposed") is not None)

    def _scorer_for(self, intent: object, candidates: Sequence[Candidate]) -> PoolScorer:
        """What answers questions about `candidates`: the model, or with an intent this memo, which asks ahead."""
        if not isinstance(intent, Intent):
            return self._scorer
        self._wanted, self._future = None, _nothing
        if intent.state is not None:
            self._move_to(intent.state)
        match intent:
            case Predicting(state):
                self._wanted = self._problem.costs.mean
                self._future = lambda: self._predictions(state, self._pace.predictions)
            case Rebuilding(_, after):
                self._wanted = relaid_tokens(self._problem.costs, after.layout, after.layout.questions)
                self._future = lambda: self._predictions_after(after, self._pace.predictions)
            case Evaluating(state, claim, start):
                self._evaluated.add(start.labels)
                self._wanted = cost(self._problem, state, [candidate.labels for candidate in candidates])
                self._future = lambda: self._around(state, claim, start)
        return self._from_memo

    def _move_to(self, state: SearchState) -> None:
        """Forget the answers for other labels or another layout, except those asked ahead for this change."""
        here = state.labels, state.layout
        if self._at is not None and self._at[0] == here[0] and self._at[1] is here[1]:
            return
        kept = self._next.get(state.labels, [])
        self._memo = {digest: self._memo[digest] for digest in kept if digest in self._memo}
        self._unused.intersection_update(self._memo)
        self._evaluated.clear()
        self._next.clear()
        self._at = here

    def _around(self, state: SearchState, claim: int, start: Candidate) -> Expected:
        """What comes after an evaluation: predictions if it is accepted, predictions and evaluations if refused."""
        count = self._pace.predictions
        if not count:
            return _nothing()
        refused = unchanged(self._problem, state, claim)
        prompts, tokens = self._predictions(refused, count)
        parts = [self._evaluations(refused)]
        # After a flip, the first prediction computes the context of claims outside the tree anew.
        flip = state.labels[claim] is not None
        fresh = self._problem.costs.of_demonstrations(state.labelled) if flip else 0
        if self._pace.is_worth(fresh + self._problem.costs.mean):
            parts.append(self._predictions_after(accepted(self._problem, state, claim, start), count))
            tokens += fresh
        for more, cost_of_it in parts:
            prompts += more
            tokens += cost_of_it
        return prompts, tokens

    def _predictions(self, state: SearchState, count: int) -> Expected:
        candidate = Candidate(state.labels, state.layout)
        prompts = [self._make_prompt(claim, candidate) for claim in next_questions(self._problem, state, count)]
        return prompts, len(prompts) * self._problem.costs.mean

    def _predictions_after(self, state: SearchState, count: int) -> Expected:
        """Predictions in a state that the search is not in yet."""
        prompts, tokens = self._predictions(state, count)
        self._next[state.labels] = [prompt.digest for prompt in prompts]
        return prompts, tokens

    def _evaluations(self, state: SearchState) -> Expected:
        """The next evaluations not yet made, as many as pay, each with the first prediction after its acceptance."""
        most = int(min(self._pace.most_evaluations, evaluations_that_fit(self._problem.costs, state.layout) - 1))
        coming: list[tuple[SearchState, int, list[Candidate]]] = []
        here = Candidate(state.labels, state.layout)

        def predicted(claim: int) -> LogOdds | None:
            answer = self._memo.get(self._make_prompt(claim, here).digest)
            if answer is None:
                return None
            first, *others = answer
            return others[0] - first if len(others) == 1 else tuple(other - first for other in others)

        for later, claim, batch in next_evaluations(self._problem, state, predicted, LOOK * most):
            if len(coming) >= most:
                break
            if batch[0].labels not in self._evaluated:
                coming.append((later, claim, batch))
        costs = [cost(self._problem, state, [each.labels for each in batch]) for _, _, batch in coming]
        count = self._pace.evaluations(self._wanted or 0.0, costs)
        prompts: list[Prompt] = []
        tokens = sum(costs[:count])
        for later, claim, batch in coming[:count]:
            self._evaluated.add(batch[0].labels)
            prompts += [self._make_prompt(asked, each) for each in batch for asked in each.layout.questions]
            after, more = self._predictions_after(accepted(self._problem, later, claim, batch[0]), 1)
            prompts += after
            tokens += more
        return prompts, tokens


def _nothing() -> Expected:
    return [], 0.0
