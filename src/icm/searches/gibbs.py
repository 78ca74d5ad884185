"""Gibbs sampling: the labels of one group after another, drawn from the model's answers given all others' labels.

Self-improvement without labels has been described as a search for behaviour that is jointly predictable, with ICM and
bootstrapping as special cases and Gibbs sampling as the process (Qiu, Ismail, He and Feng 2026, "Self-Improvement as
Coherence Optimization: A Theoretical Account", arXiv 2601.13566). What follows is this project's own definition for
labels of a pool; of that paper only abstract and introduction were at hand.

1. *Start.* The model's own labels, as in ascent, evaluated: N questions without demonstrations and N with.
2. *A sweep* goes through all groups of the pool. The claims of a group are asked with the current labels of all other
   groups as demonstrations, and get new labels at once, drawn together: of all assignments that break no constraint
   (of a group whose labels cannot be kept consistent: that break the fewest), each with a probability proportional to
   the product over its claims of exp((z - b) / T) for the label that it gives. z is the label's log-odds, b the
   offset of the last evaluation (0 without calibration) and T the temperature. At T = 1 without calibration these are
   the model's own probabilities; at T = 0 the likeliest assignment is taken. The next group sees the new labels.
3. *After each sweep* the labels are evaluated as every search's are, each claim after all others. The labels with the
   highest U of all evaluations are what is found, the first ones included. The temperature is multiplied by
   `gibbs_cooling`. A sweep that changes nothing is the last one.

So a sweep costs N questions and its evaluation N more. Given the other groups, labels of one group are taken to depend
on each other by their constraints alone: its claims do not see each other's labels, which would hold the current ones
in place. The conditionals of a language model need not be those of any joint distribution, and what is sampled then is
that of the sweep itself (an ordered pseudo-Gibbs sampler: Heckerman et al. 2000, "Dependency Networks").

Groups are visited depth first in a tree (src/icm/group_layout.py), in an order that is drawn once for the search. A
sweep then computes each edge once, in as many requests as there are groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Final

import numpy as np

from src.icm.consistency import MOST_ASSIGNMENTS, Constraint, Labels, all_labels
from src.icm.group_layout import OtherGroups, tree_of_groups
from src.icm.objective import Evaluation, LogOdds
from src.icm.problem import Candidate, Problem, Stream, generator
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import Ask, Found, Journal
from src.icm.searches.starts import own_labels

SETTINGS: Final = ("gibbs_sweeps", "gibbs_temperature", "gibbs_cooling", "continue_from")


async def run(problem: Problem, ask: Ask, journal: Journal) -> Found:
    """Label the whole pool. Raises JournalMismatch where the journal is not one of this search."""
    settings = problem.settings
    asked = RecordedAsk(problem, ask, journal)
    labels = await own_labels(problem, asked)
    whole = problem.new_layout(range(problem.size), labels=labels)
    sampler = Sampler(problem, asked, labels)
    [evaluation] = await asked.evaluate([Candidate(labels, whole)])
    known: dict[Labels, Evaluation] = {labels: evaluation}
    temperature = settings.gibbs_temperature
    for number in range(settings.gibbs_sweeps):
        swept = await sampler.sweep(labels, evaluation.offset, temperature, number)
        if swept == labels:
            break
        labels = swept
        if labels not in known:
            [known[labels]] = await asked.evaluate([Candidate(labels, whole)])
        evaluation = known[labels]
        temperature *= settings.gibbs_cooling
    return asked.standing


class Sampler:
    """Sweeps of one search, all in one order. labels: a sample of demonstrations is balanced by them, where there is a
    cap."""

    def __init__(self, problem: Problem, asked: RecordedAsk, labels: Labels) -> None:
        self.problem = problem
        self._asked = asked
        self._known = problem.known or (None,) * problem.size
        settings = problem.settings
        if settings.layout == "tree" and settings.context_cap is None:
            rng = generator(settings.seed, Stream.LAYOUT, 1)
            self.layout = OtherGroups(tree_of_groups(problem.groups, rng, anchors=settings.anchors), problem.groups)
        else:
            self.layout = OtherGroups(problem.new_layout(range(problem.size), 1, labels=labels), problem.groups)

    async def sweep(self, labels: Labels, offset: LogOdds, temperature: float, number: int) -> Labels:
        """Every group's labels drawn anew, one group after another. number: of the sweep, which decides the draws."""
        rng = generator(self.problem.settings.seed, Stream.STEP, number)
        constraints = self.problem.consistency.constraints
        for claims in self.layout.in_turn:
            answers = await self._asked.predict(claims, Candidate(labels, self.layout))
            gains = {claim: gains_of(value, offset) for claim, value in zip(claims, answers, strict=True)}
            held = [c for c in constraints if c.claims[0] in gains]
            known = {claim: label for claim in claims if (label := self._known[claim]) is not None}
            drawn = draw(gains, held, temperature, rng, known)
            labels = tuple(drawn.get(claim, label) for claim, label in enumerate(labels))
        return labels


def gains_of(log_odds: LogOdds, offset: LogOdds) -> tuple[float, ...]:
    """Each label's log-odds against label 0 (nats, shape [K]), less the offset's."""
    z, shared = (value if isinstance(value, tuple) else (value,) for value in (log_odds, offset))
    return (0.0, *(one - other for one, other in zip(z, shared, strict=True)))


def draw(
    gains: dict[int, tuple[float, ...]],
    constraints: Sequence[Constraint],
    temperature: float,
    rng: np.random.Generator,
    known: Mapping[int, int] | None = None,
) -> dict[int, int]:
    """Labels of the claims in `gains`, drawn with probability proportional to exp(sum of their gains / temperature)
    among those that break as few of `constraints` as can be; at temperature 0 the likeliest of these.

    Claims that constrain each other, directly or through others, are drawn together. Where they have more than
    MOST_ASSIGNMENTS assignments they are drawn one after another in random order, each among the labels that break the
    fewest constraints with those before it. known: labels that are kept, by claim.
    """
    kept = known or {}
    found: dict[int, int] = {}
    for claims in linked(list(gains), constraints):
        held = [c for c in constraints if c.claims[0] in claims]
        count = len(gains[claims[0]])
        choices = [(kept[claim],) if claim in kept else all_labels(count) for claim in claims]
        if prod(map(len, choices)) <= MOST_ASSIGNMENTS:
            options = [dict(zip(claims, each, strict=True)) for each in product(*choices)]
            found |= _one_of(options, held, gains, temperature, rng)
            continue
        drawn = {claim: kept[claim] for claim in claims if claim in kept}
        free = [claim for claim in claims if claim not in kept]
        for claim in [free[at] for at in rng.permutation(len(free)).tolist()]:
            drawn = _one_of([drawn | {claim: label} for label in all_labels(count)], held, gains, temperature, rng)
        found |= drawn
    return found


def _one_of(
    options: Sequence[dict[int, int]],
    constraints: Sequence[Constraint],
    gains: dict[int, tuple[float, ...]],
    temperature: float,
    rng: np.random.Generator,
) -> dict[int, int]:
    """One of `options`, by their gains, among those that break the fewest constraints. Claims without a label break
    none."""
    broken = [sum(c.relation.inconsistencies([each.get(m) for m in c.claims]) for c in constraints) for each in options]
    allowed = [each for each, count in zip(options, broken, strict=True) if count == min(broken)]
    worth = np.array([sum(gains[claim][label] for claim, label in each.items()) for each in allowed])
    if temperature == 0:
        return allowed[int(worth.argmax())]
    weights = np.exp((worth - worth.max()) / temperature)
    return allowed[int(rng.choice(len(allowed), p=weights / weights.sum()))]


def linked(claims: Sequence[int], constraints: Sequence[Constraint]) -> list[list[int]]:
    """`claims` in sets that no constraint joins."""
    sets = [{claim} for claim in claims]
    for constraint in constraints:
        joined = [each for each in sets if each & set(constraint.claims)]
        sets = [each for each in sets if each not in joined] + [set().union(*joined)]
    return [sorted(each) for each in sets]
