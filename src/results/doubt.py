"""Doubt: claims whose label is not handed over, because it is too likely to be wrong.

A label is kept where its margin (log P of the label less that of all others, in nats) is at least a threshold. With
labels of some claims that the search was not shown, the threshold is the smallest one t for which

    m / (n + 1) * (1 + wrong ones among the n checked claims with a margin of at least t)  <=  risk * kept(t),

where kept(t) of the m other claims have a margin of at least t. Then the expected share of wrong labels among those
that are kept of the m is at most `risk`, for any n and m, if the checked claims are a random draw of all: conformal
selection (Jin and Candes 2023, "Selection by prediction with conformal p-values"), whose Benjamini-Hochberg step is the
rule above. The 1 is its correction for a finite sample. Conformal risk control (Angelopoulos et al. 2022, arXiv
2208.02814) does not promise this: it needs a loss that falls as the threshold rises, such as wrong and kept, over
*all* claims, and a share among the kept need not fall.

Claims of the pool and claims outside it were asked differently, so each of the two has a threshold of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from src.icm.consistency import Label
from src.icm.problem import Stream, generator
from src.icm.testbeds import BadInput
from src.results.run_record import LabelledClaim, RunRecord

KNOWN: Final = "known"
"""`by` of a claim whose label the search was given."""
PLACES: Final = {True: "in the pool", False: "outside the pool"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for: `abstain`, a share of wrong labels, or `abstain_below`, a margin in nats.

    abstain_on: whose labels check the search's, "gold", "known" (None too), or the name of a file. abstain_labels: how
    many of these to draw; None: all, or half of them where every claim has one.
    """

    abstain: float | None = None
    abstain_below: float | None = None
    abstain_on: str | None = None
    abstain_labels: int | None = None

    def __bool__(self) -> bool:
        return self.abstain is not None or self.abstain_below is not None

    @property
    def basis(self) -> str:
        """Whose labels check the search's."""
        return self.abstain_on or KNOWN

    @property
    def least_labels(self) -> int:
        """With fewer checked claims than this no label can be kept: 1 / (n + 1) would be above the share."""
        return 0 if self.abstain is None else math.ceil(1 / self.abstain - 1 - 1e-9)


@dataclass(frozen=True, slots=True)
class Part:
    """Of the claims in the pool, or outside it. threshold: nats, infinite where no label is kept.

    checked: how many claims' labels were compared with the search's, wrong: how many of them it has wrong, and of those
    that are kept, kept_checked and kept_wrong. agreeing, compared: kept labels of other claims whose gold label is
    known. by_group: whether one checked claim of each group counted, since labels were known of whole groups.
    """

    in_pool: bool
    threshold: float
    claims: int
    kept: int
    checked: int = 0
    wrong: int = 0
    kept_checked: int = 0
    kept_wrong: int = 0
    agreeing: int = 0
    compared: int = 0
    by_group: bool = False


@dataclass(frozen=True, slots=True)
class Doubt:
    """Which claims of a run, by their position there, keep no label, and why."""

    wanted: Wanted
    parts: tuple[Part, ...]
    abstained: frozenset[int]

    def record(self) -> dict[str, Any]:
        """For run.json; a threshold is null where no label is kept."""
        return {name: value for name, value in asdict(self.wanted).items() if value is not None} | {
            "claims": sum(part.claims for part in self.parts),
            "kept": sum(part.kept for part in self.parts),
            "parts": [_record_of(part) for part in self.parts],
        }


def least_margin(others: Sequence[float], checked: Sequence[tuple[float, bool]], risk: float) -> float:
    """The threshold (nats) of the module's text; infinite where none is low enough to keep a label.

    others: margins of the claims whose label was not checked. checked: margin of each checked claim, and whether its
    label is wrong.
    """
    margins = np.sort(np.asarray(others, dtype=np.float64))
    wrong = np.sort(np.asarray([margin for margin, is_wrong in checked if is_wrong], dtype=np.float64))
    tried = np.unique(np.concatenate([margins, [margin for margin, _ in checked]]))
    kept = len(margins) - np.searchsorted(margins, tried, "left")
    bound = len(margins) / (len(checked) + 1) * (1 + len(wrong) - np.searchsorted(wrong, tried, "left"))
    low_enough = np.flatnonzero((kept > 0) & (bound <= risk * kept * (1 + 1e-12)))
    return float(tried[low_enough[0]]) if len(low_enough) else math.inf


def given_margin(run: RunRecord, claim: LabelledClaim) -> float:
    """The margin of the label that a claim has (nats, below 0 where another is likelier); lowest where unknown."""
    margins = run.margins(claim)
    return -math.inf if margins is None or claim.label is None else margins[claim.label]


def gold_checks(run: RunRecord) -> dict[int, Label]:
    """Gold labels by the position of their claim; none of claims whose label the search was given."""
    return {
        at: claim.gold
        for at, claim in enumerate(run.claims)
        if claim.gold is not None and claim.label is not None and claim.by != KNOWN
    }


def known_checks(run: RunRecord) -> dict[int, Label]:
    """Labels that the search was given, by the position of their claim."""
    return {at: claim.label for at, claim in enumerate(run.claims) if claim.by == KNOWN}


def doubt_of(run: RunRecord, wanted: Wanted, checks: Mapping[int, Label] | None = None) -> Doubt:
    """Which labels of a run are kept. checks: labels that the search's are compared with, by position; None: as
    `wanted` says. Raises BadInput where there are none."""
    if checks is None:
        checks = {} if wanted.abstain is None else checks_named(run, wanted.basis)
    if wanted.abstain is not None:
        checks = _drawn(run, checks, wanted.abstain_labels, wanted.basis)
    parts, abstained = [], set[int]()
    for in_pool in (True, False):
        places = [at for at, claim in enumerate(run.claims) if claim.label is not None and claim.in_pool == in_pool]
        if places:
            part, without = _part_of(run, places, wanted, checks)
            parts.append(replace(part, in_pool=in_pool))
            abstained |= without
    return Doubt(wanted, tuple(parts), frozenset(abstained))


def checks_named(run: RunRecord, basis: str) -> dict[int, Label]:
    """The labels that "gold" or "known" means. Raises BadInput where the run has none of these."""
    if basis == "gold":
        found, missing = gold_checks(run), "none of its claims has a gold label"
    else:
        found, missing = known_checks(run), "it was given no known labels"
    if not found:
        raise BadInput(
            f"{run.name}: {missing}, and nothing can be promised without labels to check. Name some with --abstain_on, "
            "or take --abstain_below NATS, which promises nothing"
        )
    return found


def with_doubt(run: RunRecord, doubt: Doubt) -> RunRecord:
    """The run, its claims marked as `doubt` says."""
    claims = tuple(replace(claim, abstained=at in doubt.abstained) for at, claim in enumerate(run.claims))
    return replace(run, claims=claims)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often labels are right, the surest first. points: (share of claims, agreement with gold among them).

    area: the mean agreement over all coverages; 1 where every label is right.
    """

    points: tuple[tuple[float, float], ...]
    area: float
    claims: int


def coverage_of(run: RunRecord) -> Coverage | None:
    """Of the claims whose gold label is known; None where there are none. Claims of one margin come in together."""
    blocks: dict[float, list[bool]] = defaultdict(list)
    for claim in run.claims:
        if claim.agrees is not None and claim.by != KNOWN and claim.log_odds is not None:
            blocks[given_margin(run, claim)].append(claim.agrees)
    total = sum(map(len, blocks.values()))
    if not total:
        return None
    points, right, seen, area = [], 0.0, 0, 0.0
    for margin in sorted(blocks, reverse=True):
        share = sum(blocks[margin]) / len(blocks[margin])
        for _ in blocks[margin]:
            seen, right = seen + 1, right + share
            area += right / seen / total
        points.append((seen / total, right / seen))
    return Coverage(tuple(points), area, total)


def too_many(count: int, there: int, basis: str) -> str:
    """The refusal of --abstain_labels `count` where only so many are there. basis: as Wanted has it."""
    kind = f"{basis} label" if basis in ("gold", KNOWN) else f"label in {basis}"
    return f"--abstain_labels {count}: only {there} claims have a {kind} to check; ask for at most so many"


def _drawn(run: RunRecord, checks: Mapping[int, Label], count: int | None, basis: str) -> Mapping[int, Label]:
    """`count` of the checks, drawn by the run's seed; None: all, or half where every claim that the search
    labelled has one."""
    if count is None:
        free = (at for at, claim in enumerate(run.claims) if claim.label is not None and claim.by != KNOWN)
        everyone = all(at in checks for at in free)
        count = (len(checks) + 1) // 2 if everyone else len(checks)
    if count > len(checks):
        raise BadInput(f"{run.name}: {too_many(count, len(checks), basis)}")
    if count == len(checks):
        return checks
    seed = run.settings.get("seed")
    rng = generator(seed if isinstance(seed, int) and seed >= 0 else 0, Stream.LABELINGS, 1)
    places = sorted(checks)
    return {places[at]: checks[places[at]] for at in sorted(rng.permutation(len(places))[:count].tolist())}


def _part_of(
    run: RunRecord, places: Sequence[int], wanted: Wanted, checks: Mapping[int, Label]
) -> tuple[Part, set[int]]:
    """The claims at `places`, and which of them keep no label."""
    claims = {at: run.claims[at] for at in places}
    margins = {at: _margin(run, claim) for at, claim in claims.items()}
    wrong = {at: _says(run, claims[at]) != checks[at] for at in places if at in checks}
    counting = _one_a_group(run, claims, list(wrong))
    if wanted.abstain is None:
        threshold = wanted.abstain_below or 0.0
    else:
        others = [margins[at] for at in places if at not in wrong and claims[at].by != KNOWN]
        threshold = least_margin(others, [(margins[at], wrong[at]) for at in counting], wanted.abstain)
    kept = {at for at in places if margins[at] >= threshold or claims[at].by == KNOWN}
    compared = [agrees for at in kept if at not in wrong and (agrees := claims[at].agrees) is not None]
    part = Part(
        in_pool=True,
        threshold=threshold,
        claims=len(places),
        kept=len(kept),
        checked=len(counting),
        wrong=sum(wrong[at] for at in counting),
        kept_checked=sum(margins[at] >= threshold for at in counting),
        kept_wrong=sum(wrong[at] for at in counting if margins[at] >= threshold),
        agreeing=sum(compared),
        compared=len(compared),
        by_group=len(counting) < len(wrong),
    )
    return part, set(places) - kept


def _says(run: RunRecord, claim: LabelledClaim) -> Label:
    """The label that the model gives to a claim: of one whose label was known, what its margin says."""
    margins = run.margins(claim)
    if claim.by != KNOWN or margins is None:
        return claim.label
    likeliest = max(range(len(margins)), key=lambda label: margins[label])
    return bool(likeliest) if run.num_labels == 2 else likeliest


def _margin(run: RunRecord, claim: LabelledClaim) -> float:
    """The margin of what the model says."""
    says = _says(run, claim)
    margins = run.margins(claim)
    return -math.inf if margins is None or says is None else margins[says]


def _one_a_group(run: RunRecord, claims: Mapping[int, LabelledClaim], checked: Sequence[int]) -> list[int]:
    """The checked claims; where labels are known of whole groups only, one of each: groups were drawn, not claims."""
    sizes: dict[str, int] = defaultdict(int)
    for claim in claims.values():
        sizes[claim.group] += 1
    of_group: dict[str, list[int]] = defaultdict(list)
    for at in checked:
        of_group[claims[at].group].append(at)
    whole = all(len(places) == sizes[group] for group, places in of_group.items())
    if not whole or len(of_group) in (len(checked), len(sizes)):
        return list(checked)
    rng = np.random.default_rng(len(checked))
    return [places[int(rng.integers(len(places)))] for places in of_group.values()]


def _record_of(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {
        "where": PLACES[part.in_pool],
        "threshold": None if math.isinf(part.threshold) else part.threshold,
        "claims": part.claims,
        "kept": part.kept,
    }
    if part.checked:
        found |= {"checked": part.checked, "wrong": part.wrong}
        found |= {"kept_checked": part.kept_checked, "kept_wrong": part.kept_wrong}
    return found | {"agreement": [part.agreeing, part.compared]}
