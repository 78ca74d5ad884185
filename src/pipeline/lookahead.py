"""Answers before they are needed: a memo in front of a ModelAPI that fills batches with what will be asked next.

The search asks as if it were alone; `Lookahead.score` answers from the memo where it can, and where a batch must be
sent adds the questions of the likeliest futures to it (src/icm/speculation.py). On an engine whose answers do not
depend on what else is asked, no decision changes: only the number of batches does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from core.llm_api.llm import ModelAPI
from core.llm_api.types import LabelLogprobs, LabelTokens, PoolScores, Prompt
from src.icm.annealing import Candidate, Outcome, Problem, SearchState
from src.icm.consistency import Labels
from src.icm.planner import evaluations_that_fit
from src.icm.prefix_tree import Layout
from src.icm.prompts import in_shared_order
from src.icm.speculation import LOOK, Pace, accepted, next_evaluations, next_questions, unchanged

MakePrompt = Callable[[int, Candidate], Prompt]


class Lookahead:
    """The answers of one search state, and what to ask along with the next batch.

    make_prompt: the prompt of a claim in a labeling and layout. asked, used: prompts asked ahead so far, and how many
    of them the search came to need.
    """

    def __init__(
        self,
        api: ModelAPI,
        problem: Problem,
        make_prompt: MakePrompt,
        pace: Pace,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.asked = self.used = 0
        self._api = api
        self._problem = problem
        self._make_prompt = make_prompt
        self._pace = pace
        self._clock = clock
        self._at: tuple[Labels, Layout] | None = None
        self._memo: dict[str, LabelLogprobs] = {}
        self._unused: set[str] = set()
        self._evaluated: set[Labels] = set()  # labelings whose first batch is in the memo, or about to be
        self._next: dict[Labels, list[str]] = {}  # digests that will still be of use once these are the labels
        self._future: Callable[[], Iterable[Prompt]] = tuple

    async def score(self, prompts: Sequence[Prompt], labels: LabelTokens) -> PoolScores:
        """As ModelAPI.score. What must be sent goes in one batch with the expected questions."""
        started = self._clock()
        missing = {prompt.digest: prompt for prompt in prompts if prompt.digest not in self._memo}
        prompt_tokens = 0
        if missing:
            wanted = list(missing.values())
            ahead: dict[str, Prompt] = {}
            # Nothing is sent for the sake of speculation alone, so a run that is repeated asks nothing new.
            if not self._api.are_cached(wanted, labels):
                ahead = {prompt.digest: prompt for prompt in self._future()}
                ahead = {key: prompt for key, prompt in ahead.items() if key not in self._memo and key not in missing}
                self._future = tuple
            batch = in_shared_order([*wanted, *ahead.values()])
            scores = await self._api.score(batch, labels)
            prompt_tokens = scores.prompt_tokens
            self._memo.update(zip((prompt.digest for prompt in batch), scores.logprobs, strict=True))
            self._unused.update(ahead)
            self.asked += len(ahead)
            if prompt_tokens:
                self._pace.measure(len(batch), self._clock() - started)
        digests = [prompt.digest for prompt in prompts]
        came_to_need = self._unused.intersection(digests)
        self.used += len(came_to_need)
        self._unused -= came_to_need
        return PoolScores(tuple(self._memo[digest] for digest in digests), prompt_tokens)

    def stand_at(self, state: SearchState) -> None:
        """Forget what was about other labels or another layout, but for what was asked ahead of this very change."""
        here = state.labels, state.layout
        self._future = tuple
        if self._at is not None and self._at[0] == here[0] and self._at[1] is here[1]:
            return
        kept = self._next.get(state.labels, [])
        self._memo = {digest: self._memo[digest] for digest in kept if digest in self._memo}
        self._unused.intersection_update(self._memo)
        self._evaluated.clear()
        self._next.clear()
        self._at = here

    def before_prediction(self, state: SearchState) -> None:
        """The search is about to predict a label in `state`."""
        self._future = lambda: self._predictions(state, self._pace.predictions)

    def before_rebuild(self, after: SearchState) -> None:
        """The search is about to score the layout of `after`."""
        self._future = lambda: self._predictions_after(after, self._pace.predictions)

    def before_evaluation(self, state: SearchState, claim: int, start: Candidate) -> None:
        """The search is about to evaluate `start`, its proposal of `claim` in `state`."""
        self._evaluated.add(start.labels)
        self._future = lambda: self._around(state, claim, start)

    def learn(self, outcome: Outcome) -> None:
        """Count a decision."""
        self._pace.learn(outcome)

    def _around(self, state: SearchState, claim: int, start: Candidate) -> list[Prompt]:
        """What comes after an evaluation: the predictions if it is accepted and if it is refused, then evaluations."""
        count = self._pace.predictions
        if not count:
            return []
        refused = unchanged(self._problem, state, claim)
        prompts = self._predictions(refused, count)
        prompts += self._predictions_after(accepted(self._problem, state, claim, start), count)
        room = evaluations_that_fit(self._problem.costs, state.layout) - 1
        count = self._pace.evaluations(len(start.layout.questions), room)
        return prompts + self._evaluations(refused, count)

    def _predictions(self, state: SearchState, count: int) -> list[Prompt]:
        candidate = Candidate(state.labels, state.layout)
        return [self._make_prompt(claim, candidate) for claim in next_questions(self._problem, state, count)]

    def _predictions_after(self, state: SearchState, count: int) -> list[Prompt]:
        """Predictions in a state that the search is not in yet."""
        prompts = self._predictions(state, count)
        self._next[state.labels] = [prompt.digest for prompt in prompts]
        return prompts

    def _evaluations(self, state: SearchState, count: int) -> list[Prompt]:
        """The next `count` evaluations not yet made, each with the first prediction after its acceptance."""
        prompts: list[Prompt] = []
        if not count:
            return prompts
        here = Candidate(state.labels, state.layout)

        def predicted(claim: int) -> float | None:
            answer = self._memo.get(self._make_prompt(claim, here).digest)
            return None if answer is None else answer.log_odds

        last = state.iteration + LOOK * count
        for later, claim, batch in next_evaluations(self._problem, state, predicted):
            if not count or later.iteration >= last:
                break
            start = batch[0]
            if start.labels in self._evaluated:
                continue
            self._evaluated.add(start.labels)
            count -= 1
            prompts += [self._make_prompt(asked, each) for each in batch for asked in each.layout.questions]
            prompts += self._predictions_after(accepted(self._problem, later, claim, start), 1)
        return prompts
