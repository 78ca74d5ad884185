"""Ascent: labels of the whole pool, improved block by block from several starts; the best start climbs on in U.

Every start labels all claims: one as the model does without demonstrations (against the mean of its log-odds), the
others at random. Where the search goes on from another run's labels, these take the place of the first. Known labels
(Problem.known) are those of every start, and none is ever changed. A search that goes on from labels of the whole pool
to take in known ones begins with step 3: the run before had its starts and sweeps, and questions about labels that did
not change were all answered there. Where the known ones are the labels that it had anyway, it leaves out the mirrors,
too.

1. *Sweeps.* The pool's questions stand in four blocks, as its layout orders them: in a tree each is a subtree. A sweep
   asks one block after the other and gives the pool the likeliest consistent labels before the next block is asked
   (Consistency.nearest). Bootstrapping changes all labels at once, and two claims that follow each other can then swap
   labels for ever; a block sees what the one before it has become. Such block-wise best responses are iterated
   conditional modes (Besag 1986), in blocks. The starts of a round are asked about a block in one batch.
2. *Halving.* After each sweep the better half of the starts goes on, by U of the answers at hand (a block's answers are
   a little older than the labels of the next: an estimate that costs nothing), until one is left, and that one until a
   sweep changes nothing or `ascent_sweeps` were made. If the first start's first sweep already changes nothing, the
   labels that the model gives by itself predict each other, and no other start is tried.
3. *Climbing.* U of these labels is evaluated. Then groups of claims whose labels are not the likeliest take those that
   are, the ones that gain most first: half of such groups at once; half as many again where U did not rise, half as
   many more where it did. Only what raises U of the whole pool is kept.
4. *Mirrors.* Two labels swapped everywhere is a second basin (annealing.mirrors_of); it is entered where U is higher.

A change is judged on parts of its questions: the claims whose labels change, where they are few, and then block after
block of the others. Where the answers so far say that U falls, with a probability of error of about `ascent_error` over
all these looks, the remaining blocks are not asked. That is the test of Korattikara, Chen and Welling 2014 ("Austerity
in MCMC land", equation 4): the mean of a sample without replacement, taken to be normally distributed. A block must
be a random sample for it, as in a tree; in other layouts, and with a prior, whose offset is no mean, all N questions
are asked. A change is only ever *accepted* on all N answers, so U is exact; with error 0 refusals are too.

Where it goes on from the end of another search (Problem.carried), there are no starts: the claims that are new are
predicted from all that have a label, everything is evaluated once, in the other search's layout with the new claims at
its end, and the labels climb from there.

All evaluations are in one layout. Nothing new is begun once `ascent_questions` x N questions were asked, but for the
evaluation of the start that is left, and the mirror of two labels: with what was begun before, at most MOST_AFTER x N.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, sqrt
from statistics import NormalDist
from typing import Final

import numpy as np

from src.icm.annealing import mirrors_of
from src.icm.carried import Carried
from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds, margins_of
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate, Problem, Stream, generator
from src.icm.searches.recorded import RecordedAsk
from src.icm.searches.seam import Ask, Found, Journal, JournalMismatch
from src.icm.searches.starts import held, own_labels

SETTINGS: Final = (
    *("ascent_starts", "ascent_sweeps", "ascent_questions", "ascent_error"),
    *("mirror", "continue_from"),
)
BLOCKS: Final = 4
LEAST_SAMPLE: Final = 12
"""Answers before a change is refused on a part of them: the test takes their mean to be normally distributed."""
MOST_AFTER: Final = 3
"""Questions a claim beyond `ascent_questions`: what a step that began before still asks, an evaluation, a mirror."""
MOST_STUCK: Final = 3
"""Single groups refused in a row before climbing ends."""

Answers = Mapping[int, LogOdds]


def most_questions(problem: Problem) -> int:
    """What one search asks at most, but for questions that are asked again after a stop."""
    return (problem.settings.ascent_questions + MOST_AFTER) * problem.size


@dataclass(frozen=True, slots=True)
class Chain:
    """One start and what became of it. answers: the last log-odds of each claim that was asked, nats. fixed: whether
    the last sweep changed nothing, so that the answers are those of these very labels."""

    labels: Labels
    answers: Answers = field(default_factory=dict)
    fixed: bool = False


async def run(problem: Problem, ask: Ask, journal: Journal) -> Found:
    """Label the whole pool. Raises JournalMismatch where the journal is not one of this search.

    Earlier versions swept one start after the other. A journal of theirs is replayed, and goes on, in their order: what
    is found, and the questions that it takes, are the same.
    """
    try:
        return await search(problem, ask, journal, together=True)
    except JournalMismatch as mismatch:  # of a line that is there, and so before anything was asked
        try:
            return await search(problem, ask, journal, together=False)
        except JournalMismatch:
            raise mismatch from None


async def search(problem: Problem, ask: Ask, journal: Journal, *, together: bool) -> Found:
    """As `run`, in one order. together: whether the starts of a round are asked about a block in one batch."""
    asked = RecordedAsk(problem, ask, journal)
    if problem.carried is None:
        first = await own_labels(problem, asked)
        layout = problem.new_layout(range(problem.size), labels=first)
        climb = Climb(problem, asked, layout, together=together)
        labels, turns = (await _best_start(climb, first)).labels, not _only_confirms(problem)
    else:
        labels, layout = await _grown(problem, asked, problem.carried)
        climb, turns = Climb(problem, asked, layout, together=together), not problem.keeps_side(labels)
    [evaluation] = await asked.evaluate([Candidate(labels, layout)])
    labels, evaluation = await climb.up(labels, evaluation)
    if problem.settings.mirror and turns:
        for turned in mirrors_of(problem, labels):
            if problem.num_labels > 2 and not climb.may_ask:
                break  # of K labels there are K (K - 1) / 2
            higher = await climb.judge(turned, labels, evaluation)
            if higher is not None and higher.utility > evaluation.utility:
                labels, evaluation = await climb.up(turned, higher)
    return asked.standing


async def _grown(problem: Problem, asked: RecordedAsk, carried: Carried) -> tuple[Labels, Layout]:
    """The labels of the search that it goes on from, those of new claims as these predict them, and their layout."""
    there = Candidate(carried.labels, carried.layout)
    if carried.log_odds:
        asked.remember(there, carried.log_odds)
    given = problem.with_known(carried.labels)
    shown = tuple(None if label is None else now for label, now in zip(carried.labels, given, strict=True))
    new = [claim for claim, label in enumerate(given) if label is None]
    found = await asked.predict(new, there if shown == carried.labels else Candidate(shown, carried.layout))
    answers = dict(zip(new, found, strict=True))
    offset = problem.objective.offset([*carried.log_odds.values(), *answers.values()])
    margins = [
        margins_of(answers[claim], offset) if claim in answers else held(label, problem.num_labels)
        for claim, label in enumerate(given)
    ]
    labels = problem.likeliest(margins)
    return labels, carried.grown(range(problem.size))


def random_labels(problem: Problem, number: int) -> Labels:
    """Consistent labels of start `number`: those of margins drawn at random, and the known ones."""
    rng = generator(problem.settings.seed, Stream.SEEDS, number + 2)  # 0 to 2 draw other labels
    margins = rng.standard_normal((problem.size, problem.num_labels))
    if problem.prior_of_starts is not None:
        # The difference of two standard normal margins has a standard deviation of the square root of 2.
        margins[:, 1] += sqrt(2) * NormalDist().inv_cdf(problem.prior_of_starts)
    return problem.likeliest([tuple(each) for each in margins.tolist()])


async def _best_start(climb: Climb, first: Labels) -> Chain:
    """The start that is left when all others were dropped, swept until nothing changes."""
    problem = climb.problem
    if _was_searched(problem):
        return Chain(first)
    settings = problem.settings
    chains = await climb.sweep([Chain(first)])
    if not chains[0].fixed:
        others = [Chain(random_labels(problem, number)) for number in range(1, settings.ascent_starts)]
        chains += await climb.sweep_while_allowed(others)
    for _ in range(settings.ascent_sweeps - 1):
        chains = sorted(chains, key=climb.estimate, reverse=True)[: ceil(len(chains) / 2)]
        swept = iter(await climb.sweep_while_allowed([each for each in chains if not each.fixed]))
        chains = [each if each.fixed else next(swept, each) for each in chains]
    return max(chains, key=climb.estimate)


def _was_searched(problem: Problem) -> bool:
    """Whether it only takes in known labels: another search has found the labels of all other claims, from starts of
    its own."""
    return problem.known is not None and None not in problem.with_known(problem.start_labels or (None,) * problem.size)


def _only_confirms(problem: Problem) -> bool:
    """Whether all labels that it takes in are those that the other search had found, which has tried its mirrors."""
    start = problem.start_labels
    return start is not None and _was_searched(problem) and problem.with_known(start) == start


class Climb:
    """Steps of one search in one layout. together: whether starts are swept side by side, in common batches."""

    def __init__(self, problem: Problem, asked: RecordedAsk, layout: Layout, *, together: bool = True) -> None:
        self.problem = problem
        self._together = together
        self._asked = asked
        self._layout = layout
        order = layout.questions
        count = min(BLOCKS, len(order))
        cuts = [len(order) * at // count for at in range(count + 1)]
        self._blocks = [order[start:end] for start, end in pairwise(cuts)]
        if layout.tail_length:  # claims that came later: a part of them in each block
            tree = order[: len(order) - layout.tail_length]
            cuts = [len(tree) * at // count for at in range(count + 1)]
            late = [order[len(tree) + at :: count] for at in range(count)]
            self._blocks = [
                (*tree[start:end], *later) for (start, end), later in zip(pairwise(cuts), late, strict=True)
            ]
        members: dict[str, list[int]] = defaultdict(list)
        for claim, group in enumerate(problem.groups):
            members[group].append(claim)
        self._groups = list(members.values())

    @property
    def may_ask(self) -> bool:
        """Whether the search may begin another evaluation."""
        return self._questions_left > 0

    @property
    def _questions_left(self) -> int:
        return self.problem.settings.ascent_questions * self.problem.size - self._asked.questions

    def estimate(self, chain: Chain) -> float:
        """U of a chain's labels by its last answers, which are exact where it is fixed."""
        return self.problem.objective.evaluate(chain.labels, chain.answers, self.problem.consistency).utility

    async def sweep(self, chains: Sequence[Chain]) -> list[Chain]:
        """Every block asked once, of all chains in one batch; the labels of the pool chosen anew after each block."""
        swept = [replace(chain, fixed=True) for chain in chains]
        for block in self._blocks:
            found = await self._asked.predict_many([(block, Candidate(each.labels, self._layout)) for each in swept])
            for at, log_odds in enumerate(found):
                answers = {**swept[at].answers, **dict(zip(block, log_odds, strict=True))}
                labels = self._likeliest(swept[at].labels, answers)
                swept[at] = Chain(labels, answers, swept[at].fixed and labels == chains[at].labels)
        return swept

    async def sweep_while_allowed(self, chains: Sequence[Chain]) -> list[Chain]:
        """The first of `chains`, swept: as many as the search may begin, one after the other.

        One sweep takes N questions at most, fewer where some are of labels that were asked before. So those that may
        begin whatever the ones before them take are swept side by side, then again, until all are or none may begin.
        """
        swept: list[Chain] = []
        while len(swept) < len(chains) and self.may_ask:
            count = ceil(self._questions_left / self.problem.size) if self._together else 1
            swept += await self.sweep(chains[len(swept) : len(swept) + count])
        return swept

    def _likeliest(self, labels: Labels, answers: Answers) -> Labels:
        """The likeliest consistent labels; claims without an answer keep theirs where they can."""
        offset = self.problem.objective.offset(list(answers.values()))
        return self.problem.likeliest(
            [
                margins_of(answers[claim], offset) if claim in answers else held(label, self.problem.num_labels)
                for claim, label in enumerate(labels)
            ]
        )

    async def up(self, labels: Labels, evaluation: Evaluation) -> tuple[Labels, Evaluation]:
        """Change groups towards their likeliest labels while U rises."""
        share, stuck = 0.5, set[int]()
        while self.may_ask and len(stuck) < MOST_STUCK:
            gains, target = self._gains(labels, evaluation)
            order = sorted((group for group in gains if group not in stuck), key=lambda group: -gains[group])
            if not order:
                break
            count = max(1, ceil(share * len(order)))
            changes = {claim: target[claim] for group in order[:count] for claim in self._groups[group]}
            changed = tuple(changes.get(claim, label) for claim, label in enumerate(labels))
            higher = await self.judge(changed, labels, evaluation)
            if higher is not None and higher.utility > evaluation.utility:
                labels, evaluation = changed, higher
                share, stuck = min(1.0, 1.5 * share), set()
            elif count == 1:
                stuck.add(order[0])
            else:
                share = (count // 2) / len(order)
        return labels, evaluation

    def _gains(self, labels: Labels, evaluation: Evaluation) -> tuple[dict[int, float], Labels]:
        """What each group's margins would gain by its likeliest labels (nats), where these are others; and these."""
        target = self._likeliest(labels, evaluation.log_odds)
        gains: dict[int, float] = {}
        resting = self.problem.resting(labels)
        for group, claims in enumerate(self._groups):
            if resting.issuperset(claim for claim in claims if labels[claim] != target[claim]):
                continue  # nothing in it has changed its mind
            for claim in claims:
                before, after = _known(labels[claim]), _known(target[claim])
                if before != after:
                    margins = margins_of(evaluation.log_odds[claim], evaluation.offset)
                    gains[group] = gains.get(group, 0.0) + margins[after] - margins[before]
        return gains, target

    async def judge(self, changed: Labels, labels: Labels, evaluation: Evaluation) -> Evaluation | None:
        """The worth of `changed`; None where a part of its questions already says that U is lower than that of `labels`
        (`evaluation`)."""
        candidate = Candidate(changed, self._layout)
        if self._may_sample:
            turned = [claim for claim, label in enumerate(changed) if label != labels[claim]]
            # Few changes are rare in a sample, and most of the gain is theirs: they are all asked.
            first = turned if len(turned) <= len(changed) // len(self._blocks) else []
            answers: dict[int, LogOdds] = {}
            for block in self._blocks[:-1]:
                part = [*first, *(claim for claim in block if claim not in first)] if not answers else block
                answers |= dict(zip(part, await self._asked.predict(part, candidate), strict=True))
                if self._falls(changed, labels, answers, first, evaluation):
                    return None
        [worth] = await self._asked.evaluate([candidate])
        return worth

    @property
    def _may_sample(self) -> bool:
        """Whether blocks are random samples, and offsets means of them."""
        settings = self.problem.settings
        tree = settings.layout == "tree" and settings.context_cap is None
        return settings.ascent_error > 0 and tree and self.problem.objective.prior is None

    def _falls(
        self, changed: Labels, labels: Labels, answers: Answers, first: Sequence[int], evaluation: Evaluation
    ) -> bool:
        """Whether U of `changed` is lower than that of `labels` by the claims in `answers`, but for ascent_error.

        first: claims that are in `answers` for sure; the others there are a random sample of the rest.
        """
        sample = [claim for claim in answers if claim not in first]
        if len(sample) < LEAST_SAMPLE:
            return False
        objective, size = self.problem.objective, self.problem.size
        shift = np.subtract(
            objective.offset([answers[claim] for claim in sample]),
            objective.offset([evaluation.log_odds[claim] for claim in sample]),
        )
        moved = np.add(evaluation.offset, shift).tolist()
        offset: LogOdds = tuple(moved) if isinstance(moved, list) else moved

        def gain(claim: int) -> float:
            now = margins_of(answers[claim], offset)[_known(changed[claim])]
            return now - margins_of(evaluation.log_odds[claim], evaluation.offset)[_known(labels[claim])]

        gains, rest = np.array([gain(claim) for claim in sample]), size - len(first)
        total = sum(gain(claim) for claim in first) + rest * gains.mean()
        broken = self.problem.consistency.count(changed) - evaluation.inconsistent
        left_out = sqrt(1 - (len(gains) - 1) / (rest - 1))
        deviation = rest * gains.std(ddof=1) / sqrt(len(gains)) * left_out
        looks = len(self._blocks) - 1
        sure = NormalDist().inv_cdf(1 - self.problem.settings.ascent_error / looks)
        return bool(objective.alpha * total / size - broken < -sure * objective.alpha * deviation / size)


def _known(label: int | None) -> int:
    assert label is not None
    return label
