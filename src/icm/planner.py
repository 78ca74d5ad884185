"""When to build the tree of demonstrations anew: token costs on a prefix-caching server, and how much it can hold.

A rebuild costs a cold tree. A long tail costs nothing while labels are only appended: every question computes one
demonstration and itself, however long the tail is. Two things make it expensive. The server must *hold* a copy of the
tail for every question, and its KV cache is finite. And a changed label of a claim that is already in the prompts
makes the server compute everything after it, those copies included, where a rebuilt tree would share them.

So there are two reasons to rebuild (`pays_to_rebuild`): what must be held would no longer fit and would after a
rebuild, or the extra tokens spent on the tail since the last rebuild have reached the price of a rebuild.
The second is the ski-rental rule (Karlin et al. 1988, Competitive snoopy caching): rent until the rent paid equals the
price, then buy. That pays at most twice what the best choice in hindsight would.

Everything is a pure function of the layout, those tokens and the run's fixed costs, so that a search that is replayed
or resumed rebuilds where it did before: layouts decide scores. All amounts are tokens and averages: a balanced tree is
taken to have log2 levels, blocks of the server's cache are not rounded up (KV_SHARE leaves room for that).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from src.icm.prefix_tree import SIBLING_DISTANCE, Layout

KV_SHARE = 0.8  # of the server's KV cache that one run may plan with
EVALUATIONS_HELD = 2  # besides the tree and the tails: an LRU cache still holds the one before


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """What a run's claims cost, fixed when it first starts.

    demonstrations, questions: tokens of each by pool position; empty means one token each. capacity: tokens that the
    engine's KV cache holds, None where it does not say (taken as unlimited: then only what was spent on the
    tail causes rebuilds).
    """

    demonstrations: tuple[int, ...] = ()
    questions: tuple[int, ...] = ()
    capacity: int | None = None

    def of_demonstrations(self, claims: Iterable[int]) -> int:
        return sum(self.demonstrations[claim] if self.demonstrations else 1 for claim in claims)

    def of_questions(self, claims: Iterable[int]) -> int:
        return sum(self.questions[claim] if self.questions else 1 for claim in claims)

    @property
    def mean(self) -> float:
        """The mean demonstration and question of the pool."""
        return (sum(self.demonstrations) + sum(self.questions)) / len(self.questions) if self.questions else 2.0


def tree_tokens(claims: int, tokens: float) -> float:
    """Demonstrations of a balanced tree of n claims whose demonstrations have D tokens together: D * log2(n).

    Every level of the tree shows every claim once. A tree of one claim shows nothing to itself.
    """
    return tokens * math.log2(claims) if claims > 1 else 0.0


def tail_tokens(layout: Layout, tokens: float) -> float:
    """All copies of a tail (or a tail's end) of T tokens: (n + t/2) * T.

    Each of the n questions of the tree has one; the t questions of the tail share another up to halfway, on average.
    """
    return (len(layout.questions) - len(layout.tail) / 2) * tokens


def held_tokens(costs: TokenCosts, layout: Layout) -> float:
    """What the server must hold so that the next evaluation computes new tokens only.

    D log2(n) of the tree, the tail's copies (tail_tokens), D/2 once for those outside the tree, which see both its
    halves, and the layout's detours at the mean demonstration.
    """
    inside = layout.questions[: len(layout.questions) - len(layout.tail)]
    tree, tail = costs.of_demonstrations(inside), costs.of_demonstrations(layout.tail)
    outside = tree / 2 if layout.tail else 0.0
    detours = layout.detours * (tree + tail) / max(1, len(layout.questions))
    return tree_tokens(len(inside), tree) + tail_tokens(layout, tail) + outside + detours


def rebuilt_tokens(costs: TokenCosts, layout: Layout) -> float:
    """What computing the same labels in a rebuilt layout costs, its questions not counted: a cold tree of all claims.

    D log2(n) + N * A + a * mean_group_size detours, with a anchors of A tokens in the tail again; D and n without the
    anchors, a detour of SIBLING_DISTANCE demonstrations but at most half the tree. Which claims will be anchors is
    drawn, so A is a times the mean demonstration.
    """
    count = len(layout.questions)
    if not count:
        return 0.0
    tokens = costs.of_demonstrations(layout.questions)
    anchors = tokens * layout.anchors / count
    tree = tokens - anchors
    inside = count - layout.anchors
    detour = min(tree / 2, SIBLING_DISTANCE * tree / max(1, inside))
    return tree_tokens(inside, tree) + count * anchors + layout.anchors * layout.mean_group_size * detour


def evaluation_tokens(costs: TokenCosts, layout: Layout) -> float:
    """What evaluating with one claim more computes: N + 1 times the pool's mean demonstration and question."""
    return (len(layout.questions) + 1) * costs.mean


def budget(costs: TokenCosts) -> float:
    """KV_SHARE of the capacity; infinite where it is not known."""
    return math.inf if costs.capacity is None else KV_SHARE * costs.capacity


def fits(costs: TokenCosts, layout: Layout) -> bool:
    """Whether the server holds this layout and the evaluations that are tried on it."""
    return held_tokens(costs, layout) + EVALUATIONS_HELD * evaluation_tokens(costs, layout) <= budget(costs)


def fits_rebuilt(costs: TokenCosts, layout: Layout) -> bool:
    """Whether it would after a rebuild."""
    return rebuilt_tokens(costs, layout) + EVALUATIONS_HELD * evaluation_tokens(costs, layout) <= budget(costs)


def evaluations_that_fit(costs: TokenCosts, layout: Layout) -> float:
    """How many evaluations of appended claims the server holds besides the layout; infinite without a capacity."""
    if costs.capacity is None:
        return math.inf
    return max(0.0, (budget(costs) - held_tokens(costs, layout)) // evaluation_tokens(costs, layout))


def relaid_tokens(costs: TokenCosts, layout: Layout, changed: Iterable[int]) -> float:
    """Demonstrations that evaluating `changed` labels of laid-out claims makes the server compute again.

    After a change in the tree: about the whole tree and all tails. In the tail: all copies of the tail from there on.
    Without a change: nothing, unless the layout does not fit; an LRU cache has then dropped all of it.
    """
    touched = set(changed)
    if touched - set(layout.tail) or not fits(costs, layout):
        return held_tokens(costs, layout)
    first = next((place for place, claim in enumerate(layout.tail) if claim in touched), len(layout.tail))
    return tail_tokens(layout, costs.of_demonstrations(layout.tail[first:]))


def extra_tokens_of_tail(costs: TokenCosts, layout: Layout, changed: Iterable[int]) -> int:
    """By how much relaid_tokens exceeds a rebuilt layout's, in which any change computes about the whole tree."""
    if not layout.tail_length:
        return 0
    relaid = relaid_tokens(costs, layout, changed)
    return max(0, round(relaid - rebuilt_tokens(costs, layout))) if relaid else 0


def pays_to_rebuild(costs: TokenCosts, layout: Layout, spent_on_tail: int) -> bool:
    """Whether the tree should be built anew before the next proposal.

    spent_on_tail: the extra_tokens_of_tail of every evaluation since the last rebuild. Never where nothing was
    appended.
    """
    if not layout.tail_length:
        return False
    if not fits(costs, layout) and fits_rebuilt(costs, layout):
        return True
    return spent_on_tail > 0 and spent_on_tail >= rebuilt_tokens(costs, layout) + costs.of_questions(layout.questions)
