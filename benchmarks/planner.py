"""Tokens computed by constant tail lengths and by the planner, on a simulated prefix cache. No model, no server.

    python benchmarks/planner.py

A search grows from --seeds to --size labels. Every step evaluates either the flip of a random label (with probability
--flips; taken with probability 1/4, else refused) or a new claim (taken with probability --accept). The cache keeps
whole demonstrations by their prefix, least recently used last to stay; its capacity is a multiple of what the last bare
tree holds. The same steps are walked with every rule, so the columns differ by the rebuilds alone.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from src.icm.annealing import (
    Outcome,
    SearchState,
    advance,
    extra_tokens,
    flipped,
    proposal,
    rebuild,
    rebuilt_layout,
    wants_rebuild,
)
from src.icm.consistency import Consistency, Labels
from src.icm.objective import Evaluation, Objective
from src.icm.planner import TokenCosts, tree_tokens
from src.icm.prefix_tree import Layout
from src.icm.problem import Problem, SearchSettings

CONSTANTS = (4, 8, 16, 32, 64)
WORTH = Evaluation({}, 0.0, 0.0, 0, 0.0)


class Cache:
    """A prefix cache of demonstrations; a question's own tokens are always computed. capacity in tokens."""

    def __init__(self, costs: TokenCosts) -> None:
        self._costs = costs
        self._held: OrderedDict[int, int] = OrderedDict()
        self._tokens = 0
        self.computed = 0

    def evaluate(self, labels: Labels, layout: Layout) -> None:
        """Ask every question of a layout, in its order."""
        for claim in layout.questions:
            self.ask(claim, layout.context(claim), labels)

    def ask(self, claim: int, context: Sequence[int], labels: Labels) -> None:
        """One prompt: everything from the first missing demonstration on is computed."""
        key, found = 0, True
        prefix = []
        for other in context:
            key = hash((key, other, labels[other]))
            found = found and key in self._held
            if not found:
                tokens = self._costs.demonstrations[other]
                self.computed += tokens
                self._tokens += tokens - self._held.pop(key, 0)
                self._held[key] = tokens
            prefix.append(key)
        for key in reversed(prefix):  # an engine evicts a prompt's end before its beginning
            self._held.move_to_end(key)
        self.computed += self._costs.questions[claim]
        while self._costs.capacity is not None and self._tokens > self._costs.capacity:
            self._tokens -= self._held.popitem(last=False)[1]


@dataclass(frozen=True)
class Scenario:
    """What a search does, in any layout."""

    size: int
    seeds: int
    flips: float
    accept: float
    pairs: bool
    capacity: float | None  # bare trees of all claims

    def problem(self, max_tail: int | None, capacity: int | None) -> Problem:
        """max_tail None: the planner."""
        rng = np.random.default_rng(3)
        costs = TokenCosts(
            tuple(rng.integers(20, 65, self.size).tolist()), tuple(rng.integers(18, 62, self.size).tolist()), capacity
        )
        groups = tuple(str(i // (2 if self.pairs else 1)) for i in range(self.size))
        settings = SearchSettings(seed=1, max_tail=max_tail)
        return Problem(groups, Consistency([]), Objective(1.0), settings, costs)

    def steps(self, rng: np.random.Generator) -> Iterator[tuple[int, bool, bool]]:
        """(random number that picks a claim, whether it is a flip, whether it is taken), until all are labelled."""
        while True:
            flip = bool(rng.random() < self.flips)
            yield int(rng.integers(2**31)), flip, bool(rng.random() < (0.25 if flip else self.accept))


def walk(scenario: Scenario, max_tail: int | None) -> tuple[int, int]:
    """(tokens computed, rebuilds) of one rule."""
    problem = scenario.problem(max_tail, None)
    sizes = problem.costs.demonstrations
    if scenario.capacity is not None:
        held = scenario.capacity * (tree_tokens(len(sizes), sum(sizes)) + sum(problem.costs.questions))
        problem = replace(problem, costs=replace(problem.costs, capacity=int(held)))
    if max_tail is not None:  # a constant does not depend on capacity or tokens spent
        planned = problem
        problem = replace(problem, costs=replace(problem.costs, capacity=None))
        cache = Cache(planned.costs)
    else:
        cache = Cache(problem.costs)
    labels: Labels = tuple(True if i < scenario.seeds else None for i in range(scenario.size))
    state = SearchState(0, labels, problem.new_layout(range(scenario.seeds)), WORTH)
    cache.evaluate(state.labels, state.layout)
    for draw, flip, taken in scenario.steps(np.random.default_rng(11)):
        left = [i for i, label in enumerate(state.labels) if label is None]
        if not left:
            return cache.computed, state.rebuilds
        if wants_rebuild(problem, state):
            layout = rebuilt_layout(problem, state)
            cache.evaluate(state.labels, layout)
            state = rebuild(state, layout, WORTH)
        claim = state.labelled[draw % len(state.labelled)] if flip else left[draw % len(left)]
        start = proposal(state, claim, not state.labels[claim])
        if not flip:
            cache.ask(claim, state.layout.context(claim), state.labels)
        cache.evaluate(start.labels, start.layout)
        spent = 0 if max_tail is not None else extra_tokens(problem, state, [start.labels])
        outcome = Outcome(claim, 0.0, True, 1.0, spent_on_tail=spent)
        if taken:
            labels = flipped(state.labels, {claim: bool(start.labels[claim])})
            outcome = replace(outcome, labels=labels, evaluation=WORTH)
        state = advance(problem, state, outcome)
    raise AssertionError("the steps are endless")


def main() -> int:
    """Print computed tokens (millions) and rebuilds of every rule and scenario."""
    parser = FlagParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--accept", type=float, default=0.7)
    parser.add_argument("--flips", type=float, nargs="+", default=[0.0, 0.02, 0.1, 0.3])
    parser.add_argument("--capacity", type=float, nargs="+", default=[0, 6, 2.5, 1, 0.5], help="0: unlimited")
    parser.add_argument("--pairs", action="store_true", help="claims in groups of two")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.size <= args.seeds or args.seeds < 1:
        parser.error("--seeds must be at least 1 and --size above it")
    rows = []
    print(f"{args.size} claims{', in pairs' if args.pairs else ''}; tokens computed / 1000 (rebuilds)")
    print(f"{'capacity':<10}{'flips':>6}" + "".join(f"{f'tail {c}':>13}" for c in CONSTANTS) + f"{'planner':>13}"
          f"{'to best':>9}")  # fmt: skip
    for capacity in args.capacity:
        for flips in args.flips:
            scenario = Scenario(args.size, args.seeds, flips, args.accept, args.pairs, capacity or None)
            found = {str(rule): walk(scenario, rule) for rule in (*CONSTANTS, None)}
            best = min(found[str(rule)][0] for rule in CONSTANTS)
            ratio = found["None"][0] / best
            rows.append({"capacity": capacity or None, "flips": flips, "computed": found, "ratio": ratio})
            cells = "".join(f"{f'{tokens / 1e3:.0f} ({times})':>13}" for tokens, times in found.values())
            print(
                f"{f'{capacity:g} trees' if capacity else 'unlimited':<10}{flips:>6g}{cells}{ratio:>9.2f}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
