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


def curves_of(records: Iterable[Mapping[str, Any]], gold: Sequence[Label]) -> Curves:
    """The curves of a journal. gold: by pool position; shorter or empty where it is not known."""
    drawn = Curves()
    labels: dict[int, int] = {}
    counts: Counter[int] = Counter()
    two = True
    agreeing = compared = 0
    changed: deque[bool] = deque(maxlen=WINDOW)
    tokens: deque[tuple[float, float]] = deque(maxlen=RECENT)
    seconds: deque[float] = deque(maxlen=RECENT)
    inconsistent: int | None = None
    for record in records:
        event, iteration = record["event"], int(record.get("iteration", 0))
        if event in ("start", "evaluation"):
            two = record.get("num_labels", 2) == 2
        if event == "rebuild":
            drawn.rebuilds.append(iteration)
        if event == "mirror":
            drawn.mirrors.append(iteration)
        changes = changes_in(record)
        if event == "evaluation" and changes:
            labels, counts, agreeing, compared = {}, Counter(), 0, 0
        for key, value in changes.items():
            claim, label = int(key), bool(value) if two else value
            known = gold[claim] if claim < len(gold) else None
            before = labels.get(claim)
            counts[label] += 1
            if before is not None:
                counts[before] -= 1
            if known is not None:
                agreeing += (label == known) - (before == known)
                compared += before is None
            labels[claim] = label
        if event == "questions" and not labels:
            continue  # before the first evaluation there is no U
        if event in PROPOSALS:
            changed.append(bool(record["accepted"]))
            inconsistent = record.get("inconsistent", inconsistent)
        if record.get("tokens_cached") is not None and record.get("tokens_computed") is not None:
            tokens.append((record["tokens_cached"], record["tokens_computed"]))
        if record.get("seconds") is not None:
            seconds.append(record["seconds"])
        sent = sum(cached + computed for cached, computed in tokens)
        drawn.iteration.append(iteration + (event == "step"))
        drawn.utility.append(float(record["U"]))
        drawn.accuracy.append(agreeing / compared if compared else None)
        drawn.temperature.append(record.get("T"))
        drawn.acceptance.append(sum(changed) / len(changed) if changed else None)
        drawn.labelled.append(len(labels))
        drawn.balance.append((counts[1] if two else max(counts.values())) / len(labels) if labels else None)
        drawn.inconsistent.append(inconsistent)
        drawn.hit_rate.append(sum(cached for cached, _ in tokens) / sent if sent else None)
        drawn.seconds.append(sum(seconds) / len(seconds) if seconds else None)
    return drawn
