"""The table of results: each labeling's agreement with gold, with its interval; the confusion table."""

from __future__ import annotations

from dataclasses import dataclass

from src.icm.label_names import confusion
from src.icm.objective import wilson_interval
from src.results.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One labeling. interval: Wilson, 95%. share and interval are None where no gold label is known."""

    title: str
    note: str
    agreeing: int
    compared: int

    @property
    def share(self) -> float | None:
        return self.agreeing / self.compared if self.compared else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson_interval(self.agreeing, self.compared) if self.compared else None


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many labelled claims have which gold label (row) and label (column), shape [K, K]."""

    names: tuple[str, ...]
    table: list[list[int]]


def confusion_of(run: RunRecord) -> Confusion | None:
    """The confusion table of the claims that the search labelled; None where no gold label is known."""
    pairs = [(claim.label, claim.gold) for claim in run.claims if claim.searched and claim.gold is not None]
    return Confusion(run.names, confusion(pairs, run.num_labels)) if pairs else None


def results_of(run: RunRecord) -> list[ResultRow]:
    """One row for a run's labels and one for each of its baselines; of a run in progress only its labels so far."""
    if run.result is None:
        known = [claim.agrees for claim in run.pool if claim.agrees is not None]
        return [ResultRow("ICM", "labels so far", sum(known), len(known))]
    result = run.result
    offset = "its mean" if run.prior is None else run.offset_in_words
    rows = [
        ResultRow("ICM", "claims that the search labelled", *_counts(result.get("icm"))),
        ResultRow("zero-shot", "the pool, without demonstrations", *_counts(result.get("zero_shot"))),
        ResultRow("zero-shot, calibrated", f"the same against {offset}", *_counts(result.get("zero_shot_calibrated"))),
    ]
    notes = {
        "predicted": "claims of the pool that the search did not take in",
        "many-shot": "claims outside the pool, after the pool's labels",
    }
    rows += [
        ResultRow(str(by), notes.get(by, ""), *_counts(counts)) for by, counts in result.get("predicted", {}).items()
    ]
    return rows


def _counts(value: object) -> tuple[int, int]:
    match value:
        case [int(agreeing), int(compared)]:
            return agreeing, compared
    return 0, 0
