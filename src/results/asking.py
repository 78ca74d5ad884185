"""Which claims of a run a human should be asked about: those whose label its search is least sure of.

Three scores, none of which costs a question; all come from what the run's folder holds:

- margin, nats: of the label found, after all other labels (see objective.py). Small: the model would nearly say another
  label; below 0: it does, and a constraint or the rest of U holds the label.
- disagreement, 0 to 1: the share that says another label than the one found, of the answers about the claim in the
  journal (each after other labels: of other starts, of earlier rounds), and of other runs. The journal counts as much
  as one other run. Answers and runs that follow another labeling altogether, as an inverted one, are left out.
- leverage, in U: what U would change by if the claim had another label, and its group the likeliest labels that then
  break no constraint, by the answers at hand. About 0, or above: nothing holds the label. Far below: its margin or
  other claims of its group hold it.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from src.icm.consistency import Consistency, Constraint, Label
from src.icm.objective import LogOdds, calibration_offset, label_of
from src.results.agreement import agreement_of, labels_by_claim
from src.results.run_record import LabelledClaim, RunRecord
from src.results.text import counted

By = Literal["margin", "disagreement", "leverage", "all", "random"]
HELD: Final = 1e6
"""Nats by which a known label is held, and the label found is ruled out where another one is tried."""
SAME_LABELING: Final = 0.5
"""Share of claims on which answers or runs must agree with the labels found to follow the same labeling."""
SAME_ROUND: Final = 0.25
OPEN_ROUNDS: Final = 32
"""Rounds of a journal, from its end, that a line can still belong to."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A claim that can be asked about, and how unsure its label is.

    margin, disagreement, leverage: None where nothing is known. said, answers: how many answers of the journal say
    another label, of how many. differing, others: the same of other runs. follow: claims of its group that would change
    with it. known_beside: claims of its group whose label is known.
    """

    claim: LabelledClaim
    margin: float | None = None
    said: int = 0
    answers: int = 0
    differing: int = 0
    others: int = 0
    leverage: float | None = None
    follow: int = 0
    known_beside: int = 0

    @property
    def disagreement(self) -> float | None:
        votes = self.others + (self.answers > 0)
        if not votes:
            return None
        return (self.differing + (self.said / self.answers if self.answers else 0.0)) / votes


@dataclass(frozen=True, slots=True)
class Doubts:
    """Of one run. settled: claims whose label follows from known ones. unlike: other runs that were left out, because
    their labels follow another labeling, with the share of claims on which they agree."""

    found: tuple[Doubt, ...]
    known: tuple[LabelledClaim, ...] = ()
    settled: tuple[LabelledClaim, ...] = ()
    unlike: tuple[tuple[str, float], ...] = ()


Key = Callable[[Doubt], tuple[float, float]]


@dataclass(slots=True)
class _Measured:
    """What the searches of a run say of one claim."""

    margins: list[float] = field(default_factory=list)
    leverages: list[float] = field(default_factory=list)
    follow: int = 0
    said: int = 0
    answers: int = 0
    settled: bool = False


def doubts_of(run: RunRecord, others: Sequence[RunRecord] = ()) -> Doubts:
    """Every claim of the pool that is not known, in the run's order. others: runs that labelled the same claims."""
    pool = {claim.row: claim for claim in run.pool if claim.row >= 0}  # of a damaged line no row is known
    known = tuple(claim for claim in run.claims if claim.is_known)
    beside = Counter(claim.group for claim in known)
    found = {row: claim.label for row, claim in pool.items()}
    given = {claim.row: claim.label for claim in known}
    measured: dict[int, _Measured] = defaultdict(_Measured)
    for search in run.searches:
        _measure(search, found | given, set(given), measured)
    alike, unlike = _alike(run, others)
    votes = [{claim.row: claim.label for claim in labels_by_claim(other).values()} for other in alike]
    rows, settled = [], []
    for row, claim in pool.items():
        if row in given:
            continue
        one = measured[row]
        if one.settled:
            settled.append(claim)
            continue
        labels = [labels[row] for labels in votes if row in labels] if claim.label is not None else []
        rows.append(
            Doubt(
                claim=claim,
                margin=_mean(one.margins),
                said=one.said,
                answers=one.answers,
                differing=sum(label != claim.label for label in labels),
                others=len(labels),
                leverage=_mean(one.leverages),
                follow=one.follow,
                known_beside=beside[claim.group],
            )
        )
    return Doubts(tuple(rows), known, tuple(settled), unlike)


def choose(doubts: Sequence[Doubt], count: int, by: By, seed: int = 0) -> list[Doubt]:
    """The `count` claims to ask about, the least sure first. A second claim of a group comes after the first of every
    other group: the answer to one says something of the others.

    seed: of "random", which is a plain draw without turns, so that the claims are a sample of all.
    """
    if by == "random":
        return _by_random(doubts, seed)[:count]
    order = sorted(doubts, key=_order(doubts, by))
    seen: Counter[str] = Counter()
    turns = []
    for doubt in order:
        turns.append(doubt.known_beside + seen[doubt.claim.group])
        seen[doubt.claim.group] += 1
    chosen = sorted(range(len(order)), key=lambda at: turns[at])
    return [order[at] for at in chosen[:count]]


def reason(doubt: Doubt, doubts: Sequence[Doubt]) -> str:
    """Why this claim, in words. doubts: all that could be asked about."""
    parts = [_margin_in_words(doubt, doubts)]
    if doubt.said:
        parts.append(f"{doubt.said} of {counted(doubt.answers, 'answer')} in the journal say another label")
    if doubt.differing:
        parts.append(f"{doubt.differing} of {counted(doubt.others, 'other run')} found another label")
    if doubt.leverage is not None:
        change = "raise" if doubt.leverage > 0 else "lower"
        more = f" and change {counted(doubt.follow, 'more label')} of its group" if doubt.follow else ""
        parts.append(f"another label would {change} U by {abs(doubt.leverage):.2f}{more}")
    if doubt.claim.abstained:
        parts.append("its label is not handed over (--abstain)")
    return "; ".join(parts)


def _margin_in_words(doubt: Doubt, doubts: Sequence[Doubt]) -> str:
    if doubt.claim.label is None:
        return "no label yet"
    if doubt.margin is None:
        return "its log-odds are not known"
    known = [each.margin for each in doubts if each.margin is not None]
    place = 1 + sum(margin < doubt.margin for margin in known)
    said = f"margin {doubt.margin:.2f} nat, number {place} of {len(known)} from the least sure"
    return said + (": the model says another label" if doubt.margin < 0 else "")


def _order(doubts: Sequence[Doubt], by: By) -> Key:
    """A key that sorts the least sure claims to the front; those of which nothing is known come last."""
    keys: dict[str, Key] = {
        "margin": lambda doubt: (_first(doubt.margin), 0.0),
        "disagreement": lambda doubt: (_first(_negative(doubt.disagreement)), _first(doubt.margin)),
        "leverage": lambda doubt: (_first(_negative(doubt.leverage)), _first(doubt.margin)),
    }
    if by != "all":
        return keys[by]
    ranks: Counter[int] = Counter()
    for key in keys.values():
        values = [key(doubt) for doubt in doubts]
        places = {value: place for place, value in reversed(list(enumerate(sorted(values))))}  # of equals the first
        for doubt, value in zip(doubts, values, strict=True):
            ranks[doubt.claim.row] += places[value]
    return lambda doubt: (float(ranks[doubt.claim.row]), 0.0)


def _first(value: float | None) -> float:
    return math.inf if value is None else value


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


def _by_random(doubts: Sequence[Doubt], seed: int) -> list[Doubt]:
    order = list(doubts)
    random.Random(seed).shuffle(order)
    return order


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _alike(run: RunRecord, others: Sequence[RunRecord]) -> tuple[list[RunRecord], tuple[tuple[str, float], ...]]:
    """The runs whose labels follow the same labeling, and the names of the others with their agreement."""
    alike, unlike = [], []
    for other in others:
        share = agreement_of(run, other).share
        if share is not None and share >= SAME_LABELING:
            alike.append(other)
        else:
            unlike.append((other.name, share or 0.0))
    return alike, tuple(unlike)


def _measure(search: RunRecord, found: Mapping[int, Label], known: set[int], measured: dict[int, _Measured]) -> None:
    """Add what one search says of its claims, by row. found: the labels, by row; known: rows whose label is given."""
    pool = search.pool
    labels = [found.get(claim.row) for claim in pool]
    margins = [search.margins(claim) or (0.0,) * search.num_labels for claim in pool]
    for claim, label, each in zip(pool, labels, margins, strict=True):
        if label is not None and claim.log_odds is not None:
            measured[claim.row].margins.append(each[label])
    for said in _labelings(search, labels):
        for at, label in said.items():
            measured[pool[at].row].answers += 1
            measured[pool[at].row].said += label != labels[at]
    members: dict[str, list[int]] = defaultdict(list)
    for at, claim in enumerate(pool):
        members[claim.group].append(at)
    weight = _alpha(search) / max(1, sum(label is not None for label in labels))
    of_group: dict[str, list[Constraint]] = defaultdict(list)
    for constraint in search.constraints or ():
        of_group[pool[constraint.claims[0]].group].append(constraint)
    for group, claims in members.items():
        place = {at: number for number, at in enumerate(claims)}
        rules = [
            Constraint(tuple(place[at] for at in rule.claims), rule.relation)
            for rule in of_group[group]
            if place.keys() >= set(rule.claims)
        ]
        known_here = [pool[at].row in known for at in claims]
        turned = _Turned(Consistency(rules), [labels[at] for at in claims], [margins[at] for at in claims], known_here)
        for at in claims:
            if labels[at] is None or pool[at].row in known or pool[at].log_odds is None:
                continue
            one = measured[pool[at].row]
            change = turned.change(place[at], weight)
            if change is None:
                one.settled = True
            else:
                one.leverages.append(change[0])
                one.follow = change[1]


@dataclass(frozen=True, slots=True)
class _Turned:
    """One group, to try another label for one of its claims. Lists are by member; margins in nats, shape [M, K]."""

    consistency: Consistency
    labels: Sequence[Label]
    margins: Sequence[tuple[float, ...]]
    known: Sequence[bool]

    def change(self, member: int, weight: float) -> tuple[float, int] | None:
        """What U changes by, and how many other members' labels do, if `member` had another label; None where known
        labels leave it no other one. weight: of a nat, in U."""
        held = [
            _without(each, label) if at == member else _only(each, label) if known else each
            for at, (each, label, known) in enumerate(zip(self.margins, self.labels, self.known, strict=True))
        ]
        turned = self.consistency.nearest(held)
        kept = all(turned[at] == self.labels[at] for at, known in enumerate(self.known) if known)
        if any(self.known) and (not kept or turned[member] == self.labels[member]):
            return None
        new = [label if before is not None else None for label, before in zip(turned, self.labels, strict=True)]
        gained = sum(
            each[after] - each[before]
            for each, after, before in zip(self.margins, new, self.labels, strict=True)
            if after is not None and before is not None
        )
        broken = self.consistency.count(new) - self.consistency.count(self.labels)
        follow = sum(after != before for after, before in zip(new, self.labels, strict=True)) - 1
        return weight * gained - broken, max(0, follow)


def _without(margins: tuple[float, ...], label: Label) -> tuple[float, ...]:
    return tuple(-HELD if at == label else margin for at, margin in enumerate(margins))


def _only(margins: tuple[float, ...], label: Label) -> tuple[float, ...]:
    return tuple(HELD if at == label else -HELD for at in range(len(margins)))


def _alpha(search: RunRecord) -> float:
    alpha = search.settings.get("alpha")
    return float(alpha) if isinstance(alpha, int | float) else 1.0


def _labelings(search: RunRecord, labels: Sequence[Label]) -> Iterator[Mapping[int, int]]:
    """What the model said in each round of the journal: a label by pool position. A round that follows another labeling
    than `labels` is left out."""
    size = len(labels)
    mean, prior = search.settings.get("calibrate") == "mean", search.prior
    for answers in rounds_of(search.journal, size):
        known = {at: value for at, value in answers.items() if at < size and labels[at] is not None}
        whole = 2 * len(known) >= size  # an offset of a few claims would be none of the pool
        offset = search.offset
        if mean and whole:
            offset = calibration_offset(list(known.values()), "mean", prior, search.num_labels)
        said = {at: label_of(value, offset) for at, value in known.items()}
        agreeing = sum(label == labels[at] for at, label in said.items())
        if not whole or agreeing >= SAME_LABELING * len(said):
            yield said


@dataclass(slots=True)
class _Round:
    """Answers (log-odds by pool position) after nearly the same labels; shown: those of the last line."""

    answers: dict[int, LogOdds]
    shown: Mapping[int, int] | None = None

    def distance(self, answers: Mapping[int, LogOdds], shown: Mapping[int, int]) -> int | None:
        """Labels by which a line's differ; None where that line cannot be of this round."""
        if self.shown is None or any(self.answers.get(at, value) != value for at, value in answers.items()):
            return None
        return sum(self.shown.get(at) != shown.get(at) for at in self.shown.keys() | shown.keys())


def rounds_of(journal: Sequence[Mapping[str, Any]], size: int) -> Iterator[Mapping[int, LogOdds]]:
    """The answers of a journal of a pool of `size` claims in rounds: log-odds (nats) by pool position.

    A round has each claim once at most, all after nearly the same labels: lines that tell the labels that were shown
    belong together where these differ by at most SAME_ROUND of the pool and no claim is answered differently. Starts
    that a search asks about by turns are told apart so.
    """
    rounds: list[_Round] = []
    for line in journal:
        answers, shown = _answers(line), line.get("shown", line.get("labels"))
        if not answers:
            continue
        near = [
            (far, each)
            for each in (rounds[-OPEN_ROUNDS:] if shown is not None else [])
            if (far := each.distance(answers, shown)) is not None and far <= SAME_ROUND * size
        ]
        if near:
            _, nearest = min(near, key=lambda pair: pair[0])
            nearest.answers |= answers
            nearest.shown = shown
        else:
            rounds.append(_Round(answers, shown))
    yield from (each.answers for each in rounds)


def _answers(line: Mapping[str, Any]) -> dict[int, LogOdds]:
    if "answers" in line:
        pairs = zip(line["claims"], line["answers"], strict=False)
    elif line.get("scores"):
        pairs = zip(line["scores"], line["scores"].values(), strict=True)
    elif line.get("log_odds") is not None and "claim" in line:
        pairs = zip([line["claim"]], [line["log_odds"]], strict=True)
    else:
        return {}
    return {int(at): tuple(value) if isinstance(value, list | tuple) else float(value) for at, value in pairs}
