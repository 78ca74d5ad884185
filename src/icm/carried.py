"""Where another run's search ended, so that a larger pool goes on from there: its labels, layout and answers.

A claim that is added to the pool is then one more demonstration at the end of every prompt, as in any search, and what
the other run asked is not asked again. What it had settled rests until the pool has doubled: claims whose label was
kept against their own log-odds, claims that were not taken in, and the swap of two labels everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.icm.consistency import Labels
from src.icm.objective import LogOdds
from src.icm.prefix_tree import Layout, Node, TreeLayout, UpstreamLayout


@dataclass(frozen=True)
class Carried:
    """The end of another search, in the positions of this pool.

    labels: shape [N], None for claims without one. claims: those of them that were in its pool. layout: of those with a
    label. log_odds: of each of them with all others as demonstrations in this layout, nats; empty where they would have
    to be asked anew. iterations, accepted: how many the other search made. settled: whether it ended by itself.
    """

    labels: Labels
    claims: frozenset[int]
    layout: Layout
    log_odds: Mapping[int, LogOdds] = field(default_factory=dict)
    iterations: int = 0
    accepted: int = 0
    settled: bool = True

    def has_doubled(self, labels: Labels) -> bool:
        """Whether at least twice as many claims are labelled as when the other search ended."""
        return len(labels) - labels.count(None) >= 2 * len(self.layout.questions)

    def keeps_side(self, labels: Labels) -> bool:
        """Whether two labels swapped everywhere need not be tried: the other search has done so."""
        return self.settled and not self.has_doubled(labels)

    def grown(self, labelled: Iterable[int]) -> Layout:
        """Its layout, and claims that have a label now appended in the order given."""
        layout, there = self.layout, set(self.layout.questions)
        for claim in labelled:
            if claim not in there:
                layout = layout.append(claim)
        return layout


def layout_record(layout: Layout) -> dict[str, Any] | None:
    """A layout as plain values; None for one that cannot be gone on with (of a sample of the claims)."""
    if isinstance(layout, UpstreamLayout):
        return {"upstream": list(layout.labelled)}
    if isinstance(layout, TreeLayout):
        return {"tree": layout.root, "tail": list(layout.tail), "anchors": layout.anchors}
    return None


def read_layout(record: Mapping[str, Any], places: Mapping[int, int], groups: Sequence[str]) -> Layout:
    """What layout_record wrote, with claims at other positions (`places`, old to new), without those that have none.

    groups: of the new pool. Raises ValueError where it is none.
    """
    try:
        if "upstream" in record:
            return UpstreamLayout.build(places[claim] for claim in _whole(record["upstream"]) if claim in places)
        root, tail, anchors = _node(record["tree"], places), _whole(record["tail"]), _whole([record["anchors"]])[0]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it holds no layout ({type(error).__name__}: {error})") from None
    left = [places[claim] for claim in tail if claim in places]
    layout = TreeLayout(tuple(groups), root, tuple(left), sum(claim in places for claim in tail[:anchors]))
    if any(count > 1 for count in Counter([*_leaves(root), *left]).values()):
        raise ValueError("it holds a claim twice")
    return layout


def _node(record: object, places: Mapping[int, int]) -> Node | None:
    """The tree without the claims that have no place; None where it is empty."""
    if record is None:
        return None
    if isinstance(record, int):
        return places.get(record)
    if not isinstance(record, list | tuple) or len(record) != 2:
        raise TypeError("a node of the tree is neither a claim nor two nodes")
    left, right = (_node(each, places) for each in record)
    if left is None or right is None:
        return right if left is None else left
    return left, right


def _leaves(node: Node | None) -> tuple[int, ...]:
    if node is None or isinstance(node, int):
        return () if node is None else (node,)
    return (*_leaves(node[0]), *_leaves(node[1]))


def _whole(values: Iterable[object]) -> list[int]:
    found = [value for value in values if type(value) is int and value >= 0]
    if len(found) != len(list(values)):
        raise TypeError("a position is not a whole number")
    return found
