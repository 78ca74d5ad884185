"""U of the whole pool for many labelings, asked of a model in batches: what `icm landscape` draws.

All are evaluated in one layout, problem.new_layout(range(N)), so that their U can be compared. First come zero-shot
answers, then all labelings that depend on no answer, then the rounds of bootstrapping (all chains at once), then
mirrors, of which some are of the chains' last labels. The same labels are never asked about twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from src.icm.consistency import Labels
from src.icm.labelings import (
    DEGREES,
    ROUNDS,
    Evaluated,
    Labeling,
    Odds,
    Plan,
    by_turns,
    constant_labelings,
    corrupted_gold,
    mirrored,
    random_labelings,
    whole,
)
from src.icm.problem import Candidate, Problem, Stream, generator
from src.icm.searches.bootstrapping import likeliest_consistent
from src.icm.searches.starts import zero_shot_labels
from src.pipeline.labelling import Labelling

SECONDS_A_BATCH: Final = 5.0
QUESTIONS_A_BATCH: Final = 1024


@dataclass
class Answers:
    """What the model has said so far: zero-shot, and by labels the leave-one-out log-odds."""

    zero_shot: Odds | None = None
    of: dict[Labels, Odds] = field(default_factory=dict)


OnBatch = Callable[[Sequence[Labeling]], None]
"""Called after a batch with all labelings so far whose answers are known, once these include all that were known at the
start."""


async def survey(
    labelling: Labelling, plan: Plan, found: Mapping[str, Labels], answers: Answers, on_batch: OnBatch
) -> list[Evaluated]:
    """Every labeling of the plan with its U. answers: those known from before; new ones are added to it.

    found: labelings of searches, by name. Gold is one of the labelings where all of it is known. All but those of
    searches have the labels that the problem says are known.
    """
    problem, names = labelling.pool.problem, labelling.pool.names
    size, num_labels = problem.size, problem.num_labels
    asking = _Asking(labelling, answers, on_batch)
    if answers.zero_shot is None:
        prediction = await labelling.zero_shot()
        answers.zero_shot = tuple(prediction.log_odds[claim] for claim in range(size))
    gold = whole(labelling.pool.gold)
    golds = [] if gold is None else [Labeling("gold", "gold", problem.with_known(gold))]
    searched = [Labeling(name, "found", labels) for name, labels in found.items()]
    free = [claim for claim in range(size) if not problem.is_known(claim)]
    constants = _keeping(problem, constant_labelings(size, names))
    zero_shot = Labeling("zero-shot, calibrated", "zero-shot", zero_shot_labels(problem, answers.zero_shot))
    randoms = _keeping(problem, random_labelings(size, plan, num_labels, _generator(problem, 0)))
    changed = [] if gold is None else corrupted_gold(gold, plan, num_labels, _generator(problem, 1), free)
    changed = _keeping(problem, changed)
    await asking.ask([*golds, *searched, *constants, zero_shot, *randoms, *changed])
    ends = await _bootstrap(asking, problem, [zero_shot, *randoms[: plan.chains - 1]])
    by_degree = [changed[at : at + plan.draws] for at in range(0, len(DEGREES) * plan.draws, plan.draws or 1)]
    originals = [*golds, *searched, *ends, zero_shot, *by_turns(by_degree), *randoms]
    await asking.ask(_keeping(problem, mirrored(originals, plan.mirrors, names, _generator(problem, 2))))
    return evaluated(problem, asking.labelings, answers)


def _keeping(problem: Problem, labelings: Sequence[Labeling]) -> list[Labeling]:
    """The labelings with the known labels in place of theirs."""
    return [replace(each, labels=problem.with_known(each.labels)) for each in labelings]


def evaluated(problem: Problem, labelings: Iterable[Labeling], answers: Answers) -> list[Evaluated]:
    """Those labelings whose answers are known, with their U."""
    return [
        Evaluated(labeling, problem.objective.evaluate(labeling.labels, dict(enumerate(odds)), problem.consistency))
        for labeling in labelings
        if (odds := answers.of.get(labeling.labels)) is not None
    ]


async def _bootstrap(asking: _Asking, problem: Problem, starts: Sequence[Labeling]) -> list[Labeling]:
    """ROUNDS rounds from each of `starts`, all chains at once, as in the search by that name. A chain ends where its
    labels come again. Returns each chain's last labels."""
    ends = list(starts)
    seen = [{start.labels} for start in starts]
    going = list(range(len(starts)))
    for number in range(1, ROUNDS + 1):
        new = []
        for chain in list(going):
            labels = likeliest_consistent(problem, asking.answers.of[ends[chain].labels])
            if labels in seen[chain]:
                going.remove(chain)
                continue
            seen[chain].add(labels)
            ends[chain] = Labeling(f"bootstrapped from {starts[chain].name}, round {number}", "bootstrapped", labels)
            new.append(ends[chain])
        await asking.ask(new)
    return [end for end, start in zip(ends, starts, strict=True) if end is not start]


class _Asking:
    """Evaluates labelings, several in one call: as many as take about SECONDS_A_BATCH, so that little is lost when it
    is stopped, and at most QUESTIONS_A_BATCH questions, which keep a GPU busy."""

    def __init__(self, labelling: Labelling, answers: Answers, on_batch: OnBatch) -> None:
        problem = labelling.pool.problem
        self.answers = answers
        self.labelings: list[Labeling] = []
        self._scorer = labelling.scorer()
        self._layout = problem.new_layout(range(problem.size))
        self._on_batch = on_batch
        self._before = frozenset(answers.of)
        self._most = max(1, QUESTIONS_A_BATCH // problem.size)
        self._at_once = 1

    async def ask(self, labelings: Sequence[Labeling]) -> None:
        """Evaluate those whose labels were not asked about yet."""
        self.labelings += labelings
        new = list(dict.fromkeys(each.labels for each in labelings if each.labels not in self.answers.of))
        while new:
            batch, new = new[: self._at_once], new[self._at_once :]
            started = time.perf_counter()
            evaluations = await self._scorer.evaluate([Candidate(labels, self._layout) for labels in batch])
            for labels, evaluation in zip(batch, evaluations, strict=True):
                self.answers.of[labels] = tuple(evaluation.log_odds[claim] for claim in range(len(labels)))
            rate = len(batch) / max(time.perf_counter() - started, 1e-3)
            self._at_once = min(self._most, max(1, round(rate * SECONDS_A_BATCH)))
            answered = [each for each in self.labelings if each.labels in self.answers.of]
            # What a file has from before is never written away.
            if self._before <= {each.labels for each in answered}:
                self._on_batch(answered)


def _generator(problem: Problem, purpose: int) -> np.random.Generator:
    return generator(problem.settings.seed, Stream.LABELINGS, purpose)
