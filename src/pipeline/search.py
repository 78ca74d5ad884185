"""ICM's search against a real model: asks what `annealing` proposes, journals every iteration, resumes.

All labelings of one repair round are asked in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from core.llm_api.labels import SpelledLabels
from core.llm_api.llm import ModelAPI
from core.llm_api.types import PoolScores, PrefixCacheCounters, Prompt
from src.icm.annealing import (
    Candidate,
    Outcome,
    Problem,
    SearchState,
    advance,
    choose,
    decide,
    decides_by_itself,
    excess,
    explore,
    finished,
    local_evaluation,
    mirror,
    mirrors,
    predicted_label,
    proposal,
    proposals,
    rebuild,
    rebuilt_layout,
    wants_mirror,
    wants_rebuild,
)
from src.icm.consistency import Labels
from src.icm.journal import (
    JournalMismatch,
    Record,
    mirror_record,
    rebuild_record,
    replay,
    start_record,
    step_record,
)
from src.icm.objective import Evaluation, LogOdds
from src.icm.prompts import PromptBook
from src.icm.speculation import Pace
from src.icm.testbeds import BadInput
from src.pipeline.lookahead import Lookahead
from src.results.run_folder import RunFolder

OnRecord = Callable[[SearchState, Record], None]


class Scores(Protocol):
    """What a pool is asked of: a ModelAPI, or what stands in front of one."""

    async def score(self, prompts: Sequence[Prompt], labels: SpelledLabels) -> PoolScores:
        """See ModelAPI.score."""
        ...


@dataclass(frozen=True)
class PoolScorer:
    """Asks a model about a pool: one leave-one-out prompt a labelled claim and labeling."""

    api: Scores
    book: PromptBook
    labels: SpelledLabels
    problem: Problem

    def prompt(self, claim: int, candidate: Candidate) -> Prompt:
        """The question about `claim` given every other labelled claim."""
        layout = candidate.layout
        return self.book.prompt(claim, layout.context(claim), candidate.labels, layout.place(claim))

    async def ask(self, claim: int, candidate: Candidate) -> LogOdds:
        """log-odds (nats) of `claim` given every other labelled claim."""
        return (await self.ask_all([claim], candidate))[0]

    async def ask_all(self, claims: Sequence[int], candidate: Candidate) -> list[LogOdds]:
        """log-odds (nats) of each claim given every other labelled claim, in one batch."""
        scores = await self.api.score([self.prompt(claim, candidate) for claim in claims], self.labels)
        return log_odds_of(scores)

    async def evaluate(self, candidates: Sequence[Candidate]) -> list[Evaluation]:
        """The worth of every labeling, all asked in one batch."""
        prompts = [self.prompt(claim, candidate) for candidate in candidates for claim in candidate.layout.questions]
        answers = iter(log_odds_of(await self.api.score(prompts, self.labels)))
        return [
            self.problem.objective.evaluate(
                candidate.labels,
                {claim: next(answers) for claim in candidate.layout.questions},
                self.problem.consistency,
            )
            for candidate in candidates
        ]


def log_odds_of(scores: PoolScores) -> list[LogOdds]:
    """What the objective takes of a model's answers, one entry a prompt (nats; see objective)."""
    if scores.logprobs.shape[1] == 2:
        return list(scores.log_odds)
    return [tuple(row) for row in (scores.logprobs[:, 1:] - scores.logprobs[:, :1]).tolist()]


class Meter:
    """What an iteration cost: seconds, tokens sent, and tokens computed and cached where the engine tells.

    Questions asked ahead count for the iteration that asked them, `ahead_used` for the one that came to need them.
    """

    def __init__(self, api: ModelAPI, lookahead: Lookahead) -> None:
        self._api = api
        self._lookahead = lookahead
        self._ahead = 0, 0
        self._stats = api.stats.as_dict()
        self._cache: PrefixCacheCounters | None = None
        self._time = time.perf_counter()

    async def start(self) -> Meter:
        self._cache = await self._api.prefix_cache()
        return self

    async def lap(self) -> Record:
        """Cost since the last lap.

        Where the engine does not say what each batch found in its cache, its counters do, which on a shared server
        include other users' tokens.
        """
        stats = self._api.stats.as_dict()
        cost: Record = {
            "asked": stats["asked"] - self._stats["asked"],
            "from_cache": stats["cache_hits"] - self._stats["cache_hits"],
            "tokens_sent": stats["prompt_tokens"] - self._stats["prompt_tokens"],
            "floored": stats["floored"] - self._stats["floored"],
            "asked_ahead": self._lookahead.asked - self._ahead[0],
            "ahead_used": self._lookahead.used - self._ahead[1],
        }
        self._ahead = self._lookahead.asked, self._lookahead.used
        if stats["untold_tokens"] == self._stats["untold_tokens"]:
            if cost["tokens_sent"]:
                cost["tokens_cached"] = stats["cached_tokens"] - self._stats["cached_tokens"]
                cost["tokens_computed"] = cost["tokens_sent"] - cost["tokens_cached"]
                self._cache = None  # the counters were not read along: stale from here on
        else:
            now_cached = await self._api.prefix_cache()
            if now_cached is not None and self._cache is not None:
                delta = now_cached - self._cache
                if delta.hits >= 0 and delta.computed >= 0:  # else the server was started anew
                    cost["tokens_cached"], cost["tokens_computed"] = delta.hits, delta.computed
            self._cache = now_cached
        now = time.perf_counter()
        cost["seconds"] = round(now - self._time, 3)
        self._stats, self._time = stats, now
        return cost


async def search(
    api: ModelAPI, scorer: PoolScorer, folder: RunFolder, on_record: OnRecord, pace: Pace | None = None
) -> SearchState:
    """Label the pool. Goes on where `folder`'s journal ends; every iteration is journaled before the next begins.

    pace: how far to ask ahead, by default adapting. It changes costs, never decisions.
    """
    problem = scorer.problem
    state = resumed_state(problem, folder)
    ahead = Lookahead(api, problem, scorer.prompt, pace or Pace())
    scorer = replace(scorer, api=ahead)
    meter = await Meter(api, ahead).start()

    async def journal(record: Record, at: SearchState) -> None:
        record |= await meter.lap()
        folder.append_log(record)
        on_record(at, record)

    if state is None:
        state = await _start(scorer)
        await journal(start_record(state), state)
    while not finished(problem, state):
        ahead.stand_at(state)
        if wants_mirror(problem, state):
            turned = mirrors(state.labels, problem.num_labels)
            worth = await scorer.evaluate([Candidate(labels, state.layout) for labels in turned])
            labels, evaluation = max(zip(turned, worth, strict=True), key=lambda each: each[1].utility)
            accepted = evaluation.utility > state.evaluation.utility
            state = mirror(state, evaluation, labels) if accepted else mirror(state, None)
            await journal(mirror_record(state, accepted, evaluation.utility), state)
            continue
        outcome = None if wants_rebuild(problem, state) else await _step(scorer, ahead, state)
        if outcome is None:
            layout = rebuilt_layout(problem, state)
            ahead.before_rebuild(rebuild(state, layout, state.evaluation))
            [evaluation] = await scorer.evaluate([Candidate(state.labels, layout)])
            state = rebuild(state, layout, evaluation)
            await journal(rebuild_record(state), state)
            continue
        ahead.learn(outcome)
        after = advance(problem, state, outcome)
        await journal(step_record(state, outcome, after), after)
        state = after
    return state


def resumed_state(problem: Problem, folder: RunFolder) -> SearchState | None:
    """Where the journal in `folder` left the search; None for a new run."""
    try:
        return replay(problem, folder.read_log())
    except JournalMismatch as error:
        raise BadInput(
            f"{folder.log_path}: is not a journal of this search: {error}. "
            f"Move {folder.path} away, or choose another --run"
        ) from None


async def _start(scorer: PoolScorer) -> SearchState:
    """Evaluate the labels that it starts with and repair their inconsistencies."""
    problem = scorer.problem
    labels = problem.seed_labels()
    layout = problem.new_layout([i for i, label in enumerate(labels) if label is not None], labels=labels)
    best, evaluation, _ = await _explore(problem, scorer.evaluate, Candidate(labels, layout), 0, {})
    return SearchState(0, best.labels, layout, evaluation)


async def _step(scorer: PoolScorer, ahead: Lookahead, state: SearchState) -> Outcome | None:
    """One iteration; None where it must compare evaluations, and the state's is pieced together."""
    problem = scorer.problem
    answers = await _predictions(scorer, ahead, state)
    claim = choose(problem, state, answers)
    log_odds = answers[claim]
    predicted = predicted_label(problem, state, log_odds)
    temperature = problem.settings.temperature(state.iteration, state.accepted)
    if predicted == state.labels[claim]:
        return Outcome(claim, log_odds, predicted, temperature)
    start = proposal(state, claim, predicted)

    async def evaluate(batch: list[Candidate]) -> list[Evaluation]:
        ahead.before_evaluation(state, claim, start, batch)
        return await scorer.evaluate(batch)

    tried: list[Labels] = []
    alone = decides_by_itself(problem, state, claim, start.labels)
    if alone:
        best, evaluation = start, local_evaluation(problem, state, start.labels, {claim: log_odds})
    elif state.stale:
        return None
    else:
        known = {state.labels: state.evaluation}
        best, evaluation, tried = await _explore(problem, evaluate, start, state.iteration, known)
    accepted, probability, temperature = decide(problem, state, evaluation.utility)
    changed = accepted and best.labels != state.labels
    return Outcome(
        claim=claim,
        log_odds=log_odds,
        predicted=predicted,
        temperature=temperature,
        tried=len(tried),
        excess=excess(problem, state, tried),
        proposed_utility=evaluation.utility,
        probability=probability,
        labels=best.labels if changed else None,
        evaluation=evaluation if changed else None,
        pieced_together=changed and alone,
    )


async def _predictions(scorer: PoolScorer, ahead: Lookahead, state: SearchState) -> dict[int, LogOdds]:
    """log-odds (nats) of the claims that this iteration proposes, in the order proposed."""
    claims = proposals(scorer.problem, state)
    # A labelled claim's question is part of the current evaluation, unless that was pieced together.
    known = {} if state.stale else state.evaluation.log_odds
    asked = [claim for claim in claims if claim not in known]
    answers: dict[int, LogOdds] = {}
    if asked:
        ahead.before_prediction(state)
        answers = dict(zip(asked, await scorer.ask_all(asked, Candidate(state.labels, state.layout)), strict=True))
    return {claim: known[claim] if claim in known else answers[claim] for claim in claims}


async def _explore(
    problem: Problem,
    evaluate: Callable[[list[Candidate]], Awaitable[list[Evaluation]]],
    start: Candidate,
    iteration: int,
    known: dict[Labels, Evaluation],
) -> tuple[Candidate, Evaluation, list[Labels]]:
    """Drive `annealing.explore`: evaluate what it yields until it names the best labeling. Also: what was evaluated."""
    exploration = explore(problem, start, iteration, known)
    tried: list[Labels] = []
    try:
        wanted = next(exploration)
        while True:
            tried += [candidate.labels for candidate in wanted]
            wanted = exploration.send(await evaluate(wanted))
    except StopIteration as stop:
        best, evaluation, _ = stop.value
        return best, evaluation, tried
