"""Runs compared: which settings differ, how far labels agree, whether one is better by more than chance."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from src.results.run_record import LabelledClaim, RunRecord
from src.results.statistics import mcnemar_exact

ClaimKey = tuple[str, int]
"""SHA-256 of the data file, and the row in it: the same claim in any run."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two runs' labels of the claims that both labelled. kappa: Cohen's, None where it is not defined."""

    first: str
    second: str
    agreeing: int
    compared: int
    kappa: float | None

    @property
    def share(self) -> float | None:
        return self.agreeing / self.compared if self.compared else None


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two runs against gold on the claims that both labelled: how often only one is right, and McNemar's exact p."""

    only_first: int
    only_second: int
    compared: int
    p: float | None


def labels_by_claim(run: RunRecord) -> dict[ClaimKey, LabelledClaim]:
    """Every labelled claim of a run under a key that other runs share."""
    data = str(run.settings.get("data_sha256", run.name))
    return {(data, claim.row): claim for claim in run.claims if claim.label is not None and claim.row >= 0}


def agreement_of(first: RunRecord, second: RunRecord) -> Agreement:
    """How far two runs' labels agree with each other. Labels that were known to both say nothing, and do not count."""
    ours, theirs = labels_by_claim(first), labels_by_claim(second)
    shared = [key for key in ours.keys() & theirs.keys() if not (ours[key].is_known and theirs[key].is_known)]
    pairs = [(ours[key].label or 0, theirs[key].label or 0) for key in shared]
    return Agreement(first.name, second.name, sum(a == b for a, b in pairs), len(pairs), cohens_kappa(pairs))


def cohens_kappa(pairs: Sequence[tuple[int, int]]) -> float | None:
    """Agreement beyond chance (Cohen 1960): 1 the same, 0 as by chance, -1 mirror images.

    None where nothing was compared, or both sides are the same constant, so that chance agreement is certain.
    """
    if not pairs:
        return None
    total = len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(count * second[label] for label, count in first.items()) / total**2
    if chance == 1:
        return None
    return (sum(a == b for a, b in pairs) / total - chance) / (1 - chance)


def paired_test(first: RunRecord, second: RunRecord) -> PairedTest:
    """McNemar's exact test of two runs' agreement with gold, two-sided; p is None where they never differ."""
    ours, theirs = labels_by_claim(first), labels_by_claim(second)
    shared = ours.keys() & theirs.keys()
    both = [key for key in shared if ours[key].agrees is not None and theirs[key].agrees is not None]
    only_first = sum(ours[key].agrees is True and theirs[key].agrees is False for key in both)
    only_second = sum(ours[key].agrees is False and theirs[key].agrees is True for key in both)
    p = mcnemar_exact(only_first, only_second).p if only_first or only_second else None
    return PairedTest(only_first, only_second, len(both), p)


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Settings and facts about the engine that differ: name -> each run's value (None where it has none)."""
    described = [_described(run) for run in runs]
    names = dict.fromkeys(name for one in described for name in one)
    table = {name: [one.get(name) for one in described] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def votes(runs: Sequence[RunRecord]) -> dict[ClaimKey, list[LabelledClaim]]:
    """The claims that at least two runs labelled, with each run's version of them."""
    found: dict[ClaimKey, list[LabelledClaim]] = defaultdict(list)
    for run in runs:
        for key, claim in labels_by_claim(run).items():
            found[key].append(claim)
    return {key: claims for key, claims in found.items() if len(claims) > 1}


def _described(run: RunRecord) -> Mapping[str, Any]:
    engine = {f"engine {name}": run.engine.get(name) for name in ("kind", "root", "version", "determinism")}
    return {**run.settings, **engine, "code": run.environment.get("git")}
