"""What a search is given: the pool's groups and constraints, the objective, the settings, and its random numbers.

Random numbers come from generators seeded by (seed, purpose, index) alone, so that a search can stop, resume, or look
ahead without changing a draw.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Literal

import numpy as np

from src.icm.capped_layout import CappedLayout
from src.icm.carried import Carried
from src.icm.consistency import Consistency, Labels, Margins
from src.icm.objective import Objective, label_of
from src.icm.planner import TokenCosts
from src.icm.prefix_tree import Layout, TreeLayout, UpstreamLayout

Scheduler = Literal["log", "log-upstream", "exp"]
Stop = Literal["labelled", "K"]
LayoutName = Literal["tree", "upstream"]
BootstrapStart = Literal["random", "zero-shot"]
StartShare = Literal["half", "prior"]


class Stream(IntEnum):
    """Independent streams of random numbers drawn from one seed."""

    POOL = 0
    SEEDS = 1
    LAYOUT = 2
    STEP = 3
    PART = 4
    LABELINGS = 5
    KNOWN = 6


def generator(seed: int, stream: Stream, index: int = 0) -> np.random.Generator:
    """The generator of one purpose (and one iteration) of a run."""
    return np.random.default_rng([seed, stream, index])


def part_seed(seed: int, batch: int, number: int) -> int:
    """The seed of one search of a run of several: of a batch, in pass `number`."""
    return int(np.random.SeedSequence([seed, Stream.PART, batch, number]).generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """The flags of the published code, and what it lacks. Temperatures are in units of U.

    search: which one (src/icm/searches/). Its file says which of the others it uses.
    decay: the paper's beta in scheduler "log", the base of the power in "exp", unused in "log-upstream".
    patience: proposals in a row that change nothing before stop "labelled" ends (see `finished`).
    anchors: claims that stand last in every prompt when a tree is built (see prefix_tree); 0 is cheapest.
    max_tail: appended demonstrations after which the tree is built anew at the latest; None: the planner decides.
    mirror: once the search has settled, try to swap two labels everywhere (see `wants_mirror`).
    context_cap: demonstrations at most in every prompt (see capped_layout); None: all. Another objective.
    best_of: claims whose labels an iteration predicts; only the surest change is evaluated (see `choose`).
    local_gain: a new claim is accepted by its own term of U, the others' as they last were (see `decides_by_itself`).
    start_share: of True among random first labels, where the objective has a prior.
    bootstrap_rounds, bootstrap_start: of search "bootstrapping".
    ascent_starts, ascent_sweeps, ascent_questions (a claim), ascent_error: of search "ascent".
    gibbs_sweeps, gibbs_temperature (nats), gibbs_cooling: of search "gibbs".
    """

    search: str = "annealing"
    seed: int = 27565976
    num_seed: int = 8
    K: int = 3000
    consistency_fix_K: int = 10
    decay: float = 0.99
    initial_T: float = 10.0
    final_T: float = 0.01
    scheduler: Scheduler = "log"
    stop: Stop = "labelled"
    patience: int = 30
    layout: LayoutName = "tree"
    anchors: int = 0
    max_tail: int | None = None
    mirror: bool = True
    context_cap: int | None = None
    best_of: int = 1
    local_gain: bool = False
    start_share: StartShare = "half"
    bootstrap_rounds: int = 4
    bootstrap_start: BootstrapStart = "random"
    ascent_starts: int = 4
    ascent_sweeps: int = 3
    ascent_questions: int = 12
    ascent_error: float = 0.02
    gibbs_sweeps: int = 6
    gibbs_temperature: float = 1.0
    gibbs_cooling: float = 0.5

    def temperature(self, iteration: int, accepted: int) -> float:
        """T of iteration n = 0, 1, ... after `accepted` accepted changes.

        "log": max(T_min, T_0 / (1 + beta * ln(n + 1))), the paper's algorithm 1 with its n counted from 1.
        "log-upstream": the published code's T_0 / (1 + 2 ln(1 + accepted)), which ignores --decay.
        "exp": the published code's T_0 * decay ** accepted.
        """
        if self.scheduler == "log":
            cooled = self.initial_T / (1 + self.decay * math.log(iteration + 1))
        elif self.scheduler == "log-upstream":
            cooled = self.initial_T / (1 + 2 * math.log(1 + accepted))
        else:
            cooled = self.initial_T * self.decay**accepted
        return max(self.final_T, cooled)


@dataclass(frozen=True)
class Problem:
    """What stays the same through a search: the pool's groups and constraints, the objective, the settings, and what
    its claims cost on the server it began on. start_labels: what it starts with in place of random labels. known:
    labels that are given and never change, by pool position, None for a claim whose label is searched for; None where
    no label is known. carried: the end of the search that start_labels are of, where it is known."""

    groups: tuple[str, ...]
    consistency: Consistency
    objective: Objective
    settings: SearchSettings
    costs: TokenCosts = field(default_factory=TokenCosts)
    start_labels: Labels | None = None
    known: Labels | None = None
    carried: Carried | None = None

    @property
    def size(self) -> int:
        return len(self.groups)

    @property
    def num_labels(self) -> int:
        return self.objective.num_labels

    @property
    def starts_at_random(self) -> bool:
        """Whether a search that changes none of its first labels ends with random ones."""
        if self.settings.search == "bootstrapping":
            return self.settings.bootstrap_start == "random"
        seeded = self.known is None or self.settings.num_seed > 0
        return self.settings.search == "annealing" and self.start_labels is None and seeded

    @property
    def num_known(self) -> int:
        """How many labels are known."""
        return sum(label is not None for label in self.known or ())

    def is_known(self, claim: int) -> bool:
        """Whether the claim's label is known."""
        return self.known is not None and self.known[claim] is not None

    def with_known(self, labels: Labels) -> Labels:
        """`labels`, the known ones in place of theirs."""
        if self.known is None:
            return labels
        return tuple(label if kept is None else kept for label, kept in zip(labels, self.known, strict=True))

    def likeliest(self, margins: Sequence[Margins]) -> Labels:
        """The labels, shape [N], that break no constraint at the smallest loss of margin (nats, as in
        Consistency.nearest), the known ones kept. Every search chooses its labels here."""
        return self.consistency.nearest(margins, self.known)

    def new_layout(self, labelled: Sequence[int], rebuilds: int = 0, *, labels: Labels | None = None) -> Layout:
        """A layout of `labelled`. labels: what a sample of demonstrations is balanced by, where there is a cap."""
        rng = generator(self.settings.seed, Stream.LAYOUT, rebuilds)
        cap, anchors = self.settings.context_cap, self.settings.anchors
        if cap is not None:
            return CappedLayout.build(labelled, labels, self.groups, rng, cap=cap, anchors=anchors)
        if self.settings.layout == "upstream":
            return UpstreamLayout.build(labelled)
        return TreeLayout.build(labelled, self.groups, rng, anchors=self.settings.anchors)

    @property
    def prior_of_starts(self) -> float | None:
        """The share of True among random first labels; None for as many of each label."""
        return self.objective.prior if self.settings.start_share == "prior" else None

    def random_labels(self, count: int, rng: np.random.Generator) -> list[int]:
        """`count` labels in random order: as many of each, or the prior's share of True."""
        share = self.prior_of_starts
        if share is None:
            return balanced_labels(count, self.num_labels, rng)
        drawn: list[int] = rng.permutation(np.arange(count) < round(count * share)).tolist()
        return drawn

    def first_layout(self, labels: Labels) -> Layout:
        """The layout that a search begins in with these labels: that of the search that it goes on from, else a new
        one."""
        labelled = [claim for claim, label in enumerate(labels) if label is not None]
        if self.carried is not None:
            return self.carried.grown(labelled)
        return self.new_layout(labelled, labels=labels)

    def temperature(self, iteration: int, accepted: int) -> float:
        """T of a search's iteration, in units of U: that of the search that it goes on from has cooled before."""
        before = (0, 0) if self.carried is None else (self.carried.iterations, self.carried.accepted)
        return self.settings.temperature(iteration + before[0], accepted + before[1])

    def keeps_side(self, labels: Labels) -> bool:
        """Whether two labels swapped everywhere need not be tried: the search that it goes on from has done so, and no
        label that is known now was another one there."""
        carried = self.carried
        if carried is None or not carried.keeps_side(labels):
            return False
        return all(
            before in (None, now) for before, now in zip(carried.labels, self.with_known(carried.labels), strict=True)
        )

    def resting(self, labels: Labels) -> frozenset[int]:
        """The claims that are not proposed while these are the labels: what the search that it goes on from had
        settled, as long as the pool has not doubled."""
        carried = self.carried
        if carried is None or carried.has_doubled(labels):
            return frozenset()
        return frozenset(claim for claim in self._settled_before if labels[claim] == carried.labels[claim])

    @cached_property
    def _settled_before(self) -> frozenset[int]:
        """Claims that kept their label against their own log-odds, or were not taken in, when that search ended."""
        carried = self.carried
        if carried is None:
            return frozenset()
        offset = self.objective.offset(list(carried.log_odds.values()))
        disputed = {claim for claim, z in carried.log_odds.items() if label_of(z, offset) != carried.labels[claim]}
        refused = {claim for claim in carried.claims if carried.labels[claim] is None} if carried.settled else set()
        return frozenset(disputed | refused)

    def seed_labels(self) -> Labels:
        """start_labels where there are any, else random ones (see random_labels) for num_seed claims; the rest None.
        Known labels are in place of either.

        The claims are the first of each group in the pool's order, then the second of each, and so on: random labels
        of one group would contradict each other, and repairing them would pick the seeds by their score.
        """
        if self.start_labels is not None:
            return self.with_known(self.start_labels)
        count = min(self.settings.num_seed, self.size - self.num_known)
        drawn = self.random_labels(count, generator(self.settings.seed, Stream.SEEDS))
        seen: Counter[str] = Counter()
        rank = []
        for claim, group in enumerate(self.groups):
            rank.append((seen[group], claim))
            seen[group] += 1
        free = (claim for _, claim in sorted(rank) if not self.is_known(claim))
        seeds = dict(zip(free, drawn, strict=False))
        return self.with_known(tuple(seeds.get(claim) for claim in range(self.size)))


def balanced_labels(count: int, num_labels: int, rng: np.random.Generator) -> list[int]:
    """`count` labels in random order, equally many of each; which labels get one more is random."""
    share, over = divmod(count, num_labels)
    if num_labels == 2:
        odd = [bool(rng.random() < 0.5)] * over
        drawn = rng.permutation(np.array([True] * share + [False] * share + odd, dtype=bool))
    else:
        rest = rng.permutation(num_labels)[:over]
        drawn = rng.permutation(np.concatenate([np.repeat(np.arange(num_labels), share), rest]))
    labels: list[int] = drawn.tolist()
    return labels


@dataclass(frozen=True, slots=True)
class Candidate:
    """A labeling to evaluate, and the order of its demonstrations."""

    labels: Labels
    layout: Layout
