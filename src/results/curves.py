"""How a run went, as series over its iterations, from its journal."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.icm.consistency import Label
from src.results.run_record import PROPOSALS, changes_in

WINDOW = 50  # iterations of a running share: few enough to show a freeze, enough for a share
RECENT = 10  # journal lines behind a running mean of seconds and of the cache hit rate


@dataclass(frozen=True)
class Curves:
    """One value for each journal line, None where a line has none; all lists have the same length.

    utility: U(D). accuracy: share of labels that agree with gold, of those with gold. temperature: of steps, in
    units of U. acceptance: share of the last WINDOW iterations that changed a label. labelled: claims. balance: of two
    labels the share of True, of more that of the most frequent. hit_rate: share of prompt tokens found cached; seconds:
    of a step; both over the last RECENT lines. rebuilds, mirrors: iterations at which the tree was rebuilt, and at
    which flipping all labels was tried.
    """

    iteration: list[int] = field(default_factory=list)
    utility: list[float] = field(default_factory=list)
    accuracy: list[float | None] = field(default_factory=list)
    temperature: list[float | None] = field(default_factory=list)
    acceptance: list[float | None] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    balance: list[float | None] = field(default_factory=list)
    inconsistent: list[int | None] = field(default_factory=list)
    hit_rate: list[float | None] = field(default_factory=list)
    seconds: list[float | None] = field(default_factory=list)
    rebuilds: list[int] = field(default_factory=list)
    mirrors: list[int] = field(default_factory=list)


class CurvesSoFar:
    """The curves of a journal whose lines come one after another. gold: by pool position; shorter or empty where it is
    not known."""

    def __init__(self, gold: Sequence[Label]) -> None:
        self.curves = Curves()
        self._gold = gold
        self._labels: dict[int, int] = {}
        self._counts: Counter[int] = Counter()
        self._two = True
        self._agreeing = self._compared = 0
        self._changed: deque[bool] = deque(maxlen=WINDOW)
        self._tokens: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._inconsistent: int | None = None

    def add(self, record: Mapping[str, Any]) -> bool:
        """Draw one line; False where it is not drawn, because there is no U yet."""
        event, iteration = record["event"], int(record.get("iteration", 0))
        drawn = self.curves
        if event in ("start", "evaluation"):
            self._two = record.get("num_labels", 2) == 2
        if event == "rebuild":
            drawn.rebuilds.append(iteration)
        if event == "mirror":
            drawn.mirrors.append(iteration)
        self._change(event, changes_in(record))
        if event == "questions" and not self._labels:
            return False  # before the first evaluation there is no U
        if event in PROPOSALS:
            self._changed.append(bool(record["accepted"]))
            self._inconsistent = record.get("inconsistent", self._inconsistent)
        if record.get("tokens_cached") is not None and record.get("tokens_computed") is not None:
            self._tokens.append((record["tokens_cached"], record["tokens_computed"]))
        if record.get("seconds") is not None:
            self._seconds.append(record["seconds"])
        sent = sum(cached + computed for cached, computed in self._tokens)
        counts, labelled = self._counts, len(self._labels)
        drawn.iteration.append(iteration + (event == "step"))
        drawn.utility.append(float(record["U"]))
        drawn.accuracy.append(self._agreeing / self._compared if self._compared else None)
        drawn.temperature.append(record.get("T"))
        drawn.acceptance.append(sum(self._changed) / len(self._changed) if self._changed else None)
        drawn.labelled.append(labelled)
        drawn.balance.append((counts[1] if self._two else max(counts.values())) / labelled if labelled else None)
        drawn.inconsistent.append(self._inconsistent)
        drawn.hit_rate.append(sum(cached for cached, _ in self._tokens) / sent if sent else None)
        drawn.seconds.append(sum(self._seconds) / len(self._seconds) if self._seconds else None)
        return True

    def _change(self, event: str, changes: Mapping[Any, Any]) -> None:
        if event == "evaluation" and changes:
            self._labels, self._counts, self._agreeing, self._compared = {}, Counter(), 0, 0
        for key, value in changes.items():
            claim, label = int(key), bool(value) if self._two else value
            known = self._gold[claim] if claim < len(self._gold) else None
            before = self._labels.get(claim)
            self._counts[label] += 1
            if before is not None:
                self._counts[before] -= 1
            if known is not None:
                self._agreeing += (label == known) - (before == known)
                self._compared += before is None
            self._labels[claim] = label


def curves_of(records: Iterable[Mapping[str, Any]], gold: Sequence[Label]) -> Curves:
    """The curves of a journal. gold: by pool position; shorter or empty where it is not known."""
    drawing = CurvesSoFar(gold)
    for record in records:
        drawing.add(record)
    return drawing.curves
