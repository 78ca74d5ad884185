"""Claims that several runs of the same data label differently."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from src.results.agreement import agreement_of, votes
from src.results.findings import FLIPS_ADVICE, INVERTED_ADVICE, SHOWN, Finding, Verdict
from src.results.messages import COLLAPSE_MIN_LABELS
from src.results.run_record import LabelledClaim, RunRecord
from src.results.text import one_line

FLIPPING_WATCH, FLIPPING_PROBLEM = 0.05, 0.20  # share of claims that runs label differently
MIRRORED_KAPPA = -0.5


def flips(runs: Sequence[RunRecord]) -> Finding:
    """The check for such claims, with agreement between runs (Cohen's kappa)."""
    title = "Labels that flip between runs"
    shared = votes(runs)
    if len(shared) < COLLAPSE_MIN_LABELS:
        text = f"Two runs of the same data file are needed; these share {len(shared)} claims, too few to say."
        return Finding("flips", title, Verdict.UNKNOWN, text)
    flipping = {key: claims for key, claims in shared.items() if len({claim.label for claim in claims}) > 1}
    share = len(flipping) / len(shared)
    text = (
        f"{len(flipping)} of {len(shared)} claims that at least two runs labelled have different labels ({share:.0%})."
    )
    agreements = [agreement_of(first, second) for first, second in combinations(runs, 2)]
    kappas = [found for found in agreements if found.kappa is not None and found.compared >= COLLAPSE_MIN_LABELS]
    mirrored = [found for found in kappas if (found.kappa or 0.0) < MIRRORED_KAPPA]
    if kappas:
        lowest = min(kappas, key=lambda found: found.kappa or 0.0)
        text += f" Lowest agreement of two runs: kappa {lowest.kappa:.2f} ({lowest.first} and {lowest.second})."
    details = [f"{found.first} and {found.second} are mirror images of each other." for found in mirrored]
    for claims in sorted(flipping.values(), key=_commonest_share)[:SHOWN]:
        labels = [claim.label for claim in claims]
        side = 1 if runs[0].num_labels == 2 else max(labels, key=labels.count)
        said = f"{labels.count(side)} of {len(claims)} say {runs[0].name_of(side)}"
        claim = claims[0]
        details.append(f"{said}: row {claim.row}, " + one_line(f"{claim.question} {claim.choice}", 100))
    if share < FLIPPING_WATCH:
        return Finding("flips", title, Verdict.OK, text, tuple(details))
    verdict = Verdict.PROBLEM if share >= FLIPPING_PROBLEM else Verdict.WATCH
    advice = (*INVERTED_ADVICE[:2], *FLIPS_ADVICE) if mirrored else FLIPS_ADVICE
    return Finding("flips", title, verdict, text, tuple(details), advice)


def _commonest_share(claims: Sequence[LabelledClaim]) -> float:
    labels = [claim.label for claim in claims]
    return max(map(labels.count, labels)) / len(labels)
