"""What a search will probably ask next, and how far ahead it pays to ask. No model, no file.

The chain is sequential, but its random numbers depend on (seed, n) only. So from any state the next proposals are known
for as long as nothing changes, and for the change that is being evaluated also those after it. Asking early changes no
decision: the search later finds its questions answered, or never asks them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    explore,
    predicted_label,
    proposal,
    propose,
    settled,
    wants_rebuild,
)
from src.icm.objective import LogOdds
from src.icm.problem import Candidate, Problem

MOST = 16  # questions or evaluations ahead, unless a number was given
LOOK = 8  # proposals to look at for each question or evaluation wanted: many proposals need none
WEIGHT = 0.1  # of the latest proposal in the running rates
BATCHES = 32  # how many of the latest batches are fitted
ENOUGH = 6  # batches before the fit is used


@dataclass(frozen=True, slots=True)
class Intent:
    """The state in which annealing asks, None until its first labels are repaired. This class alone, without one of
    the kinds below, means that nothing is known of what comes next."""

    state: SearchState | None


@dataclass(frozen=True, slots=True)
class Predicting(Intent):
    """It predicts labels in `state`."""

    state: SearchState


@dataclass(frozen=True, slots=True)
class Rebuilding(Intent):
    """It evaluates the labels of `state` in another layout, that of `after`."""

    state: SearchState
    after: SearchState


@dataclass(frozen=True, slots=True)
class Evaluating(Intent):
    """It evaluates what follows from `start`, its proposal of `claim` in `state`."""

    state: SearchState
    claim: int
    start: Candidate


def if_nothing_changes(problem: Problem, state: SearchState) -> Iterator[tuple[SearchState, int]]:
    """The states from here on and the claim each proposes, while no proposal changes a label.

    Ends where the search would end, try the mirror, or rebuild its tree.
    """
    while not settled(problem, state) and not wants_rebuild(problem, state):
        claim = propose(problem, state)
        yield state, claim
        state = unchanged(problem, state, claim)


def unchanged(problem: Problem, state: SearchState, claim: int) -> SearchState:
    """The state after a proposal of `claim` that was refused, or predicted as it is."""
    return advance(problem, state, Outcome(claim, 0.0, False, 0.0))


def accepted(problem: Problem, state: SearchState, claim: int, start: Candidate) -> SearchState:
    """The state after `start`, a proposal of `claim`, is accepted without a repair, with the evaluation before it."""
    outcome = Outcome(claim, 0.0, False, 0.0, labels=start.labels, evaluation=state.evaluation)
    return advance(problem, state, outcome)


def next_questions(problem: Problem, state: SearchState, count: int) -> list[int]:
    """Up to `count` unlabelled claims in the order in which their labels will be predicted if nothing changes."""
    found: dict[int, None] = {}
    for _, claim in islice(if_nothing_changes(problem, state), LOOK * count):
        if state.labels[claim] is None:
            found[claim] = None
            if len(found) == count:
                break
    return list(found)


def next_evaluations(
    problem: Problem, state: SearchState, log_odds: Callable[[int], LogOdds | None], iterations: int
) -> Iterator[tuple[SearchState, int, list[Candidate]]]:
    """The evaluations of the next `iterations` if nothing changes: the state that will ask, its claim, its first batch.

    log_odds: those predicted of a claim, nats, None where they are not known; the first such claim ends the list.
    """
    for later, claim in islice(if_nothing_changes(problem, state), max(0, iterations)):
        known = state.evaluation.log_odds.get(claim)
        if known is None:
            known = log_odds(claim)
        if known is None:
            return
        predicted = predicted_label(problem, state, known)
        if predicted == state.labels[claim]:
            continue
        start = proposal(state, claim, predicted)
        batch = next(explore(problem, start, later.iteration, {state.labels: state.evaluation}), None)
        if batch is not None:
            yield later, claim, batch


class Pace:
    """How far to look ahead, learned from the search's own decisions and batches.

    limit: None adapts up to MOST; a number fixes how many predictions are asked ahead and bounds the evaluations.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.change_rate = 1.0  # of proposals, a running average
        self.refusal_rate = 0.0  # of evaluated proposals
        self._batches: deque[tuple[float, float]] = deque(maxlen=BATCHES)

    def learn(self, accepted: bool, evaluated: bool) -> None:
        """Count one proposal: whether it changed a label, and whether that was decided by an evaluation."""
        self.change_rate += WEIGHT * (accepted - self.change_rate)
        if evaluated:
            self.refusal_rate += WEIGHT * ((not accepted) - self.refusal_rate)

    def measure(self, tokens: float, seconds: float) -> None:
        """Count one batch: the tokens it was expected to make the engine compute, and the seconds it took."""
        self._batches.append((tokens, seconds))

    @property
    def predictions(self) -> int:
        """How many predictions to ask at once: as many proposals as pass between two changes, 1 / change rate."""
        if self.limit is not None:
            return self.limit
        return min(MOST, math.ceil(1 / max(self.change_rate, 1 / MOST)))

    @property
    def most_evaluations(self) -> int:
        return MOST if self.limit is None else self.limit

    def evaluations(self, tokens: float, ahead: Sequence[float]) -> int:
        """How many of the next evaluations, `ahead` tokens each, to add to a batch of `tokens` that must be sent.

        The first evaluation is used, and each next one if all before it were refused: with the refusal rate r, n of
        them bring 1 + r + ... + r^(n-1) = (1 - r^n) / (1 - r) decisions for L + s * (tokens + ahead[:n-1]) seconds.
        Returns the n with most decisions a second, less the first evaluation. 0 until L and s are known.
        """
        fit = self._seconds()
        if fit is None:
            return 0
        overhead, each = fit
        seconds, used = overhead + each * tokens, 1.0
        best, chosen = used / seconds, 0
        for count, cost in enumerate(ahead[: self.most_evaluations], start=1):
            seconds += each * cost
            used += self.refusal_rate**count
            if used / seconds > best:
                best, chosen = used / seconds, count
        return chosen

    def is_worth(self, tokens: float) -> bool:
        """Whether `tokens` that save a batch if the evaluated change is accepted cost less than they save.

        (1 - r) * L >= s * tokens. True until L and s are known.
        """
        fit = self._seconds()
        return fit is None or (1 - self.refusal_rate) * fit[0] >= fit[1] * tokens

    def _seconds(self) -> tuple[float, float] | None:
        """(L, s) of the least-squares fit seconds = L + s * tokens; None for too few batches, or no such line."""
        if len(self._batches) < ENOUGH:
            return None
        tokens, seconds = np.array(self._batches, dtype=np.float64).T
        spread = tokens - tokens.mean()
        variance = float((spread**2).sum())
        slope = float((spread * (seconds - seconds.mean())).sum()) / variance if variance else 0.0
        if slope <= 0:
            return None
        return max(0.0, float(seconds.mean() - slope * tokens.mean())), slope
