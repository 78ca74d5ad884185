"""The table of results: each labeling's agreement with gold, balanced accuracy and F1, with their intervals; the
confusion table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from src.icm.consistency import Label
from src.icm.label_names import confusion
from src.icm.objective import calibration_offset, label_of, no_offset, wilson_interval
from src.results.by_class import NOTHING, ByClass, by_class, measure_text, name_of_f1
from src.results.messages import agreement
from src.results.run_record import RunRecord


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One labeling. interval: Wilson, 95%. share and interval are None where no gold label is known.

    by_class: of the same claims; nothing where the run's files do not say how each of them was labelled.
    """

    title: str
    note: str
    agreeing: int
    compared: int
    by_class: ByClass = NOTHING

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


HANDED_OVER: Final = "handed over"
"""The row of the labels that are not withheld (see doubt)."""
Pairs = Sequence[tuple[Label, Label]]
"""(label, gold) of claims."""


def results_of(run: RunRecord) -> list[ResultRow]:
    """One row for a run's labels and one for each of its baselines; of a run in progress only its labels so far."""
    pairs = _pairs(run)
    return [_with_classes(row, pairs.get(row.title, ()), run.num_labels) for row in _rows(run)]


def result_text(row: ResultRow, names: Sequence[str]) -> str:
    """'0.84 (54 of 64, 95% interval 0.74 to 0.91); balanced accuracy 0.80 (0.68 to 0.88), F1 of True 0.90 (...)'."""
    text = agreement(row.agreeing, row.compared)
    found = {"balanced accuracy": row.by_class.balanced, name_of_f1(names): row.by_class.f1}
    known = [f"{name} {measure_text(measure)}" for name, measure in found.items() if measure is not None]
    return f"{text}; {', '.join(known)}" if known else text


def handed_over(run: RunRecord) -> str:
    """'12 of 16': how many labels are not withheld, of all."""
    given = [claim for claim in run.claims if claim.label is not None]
    return f"{sum(not claim.abstained for claim in given)} of {len(given)}"


def _with_classes(row: ResultRow, pairs: Pairs, num_labels: int) -> ResultRow:
    table = confusion(pairs, num_labels)
    whole = sum(map(sum, table)) == row.compared > 0
    return replace(row, by_class=by_class(table)) if whole else row


def _pairs(run: RunRecord) -> dict[str, Pairs]:
    """What each row compares, by its title, as far as the claims say it."""
    found: dict[str, list[tuple[Label, Label]]] = {"ICM": [], "zero-shot": [], "zero-shot, calibrated": []}
    for claim in run.claims:
        if claim.searched or run.result is None:
            found["ICM"].append((claim.label, claim.gold_to_find))
        else:
            found.setdefault(claim.by, []).append((claim.label, claim.gold))
    for search in run.searches:
        known = [(claim.zero_shot, claim.gold_to_find) for claim in search.pool if claim.zero_shot is not None]
        scores = [score for score, _ in known]
        calibrated = calibration_offset(scores, "mean", search.prior, run.num_labels)
        for title, offset in {"zero-shot": no_offset(run.num_labels), "zero-shot, calibrated": calibrated}.items():
            found[title] += [(label_of(score, offset), gold) for score, gold in known]
    found[HANDED_OVER] = [(claim.label, claim.gold_to_find) for claim in run.claims if not claim.abstained]
    return {title: tuple(pairs) for title, pairs in found.items()}


def _rows(run: RunRecord) -> list[ResultRow]:
    if run.result is None:
        known = [claim.agrees for claim in run.pool if claim.agrees is not None]
        return [ResultRow("ICM", "labels so far", sum(known), len(known))]
    result = run.result
    offset = "its mean" if run.prior is None else run.offset_in_words
    num_known = sum(claim.is_known for claim in run.pool)
    more = f"; {num_known} known labels are not counted" if num_known else ""
    rows = [
        ResultRow("ICM", f"claims that the search labelled{more}", *_counts(result.get("icm"))),
        ResultRow("zero-shot", "the pool, without demonstrations", *_counts(result.get("zero_shot"))),
        ResultRow("zero-shot, calibrated", f"the same against {offset}", *_counts(result.get("zero_shot_calibrated"))),
    ]
    notes = {
        "predicted": "claims of the pool that the search did not take in",
        "many-shot": "claims outside the pool, after the pool's labels",
    }
    kept = [claim.agrees for claim in run.claims if not claim.abstained and claim.agrees is not None]
    if any(claim.abstained for claim in run.claims):
        rows.append(ResultRow(HANDED_OVER, f"labels that are not withheld, {handed_over(run)}", sum(kept), len(kept)))
    rows += [
        ResultRow(str(by), notes.get(by, ""), *_counts(counts)) for by, counts in result.get("predicted", {}).items()
    ]
    return rows


def _counts(value: object) -> tuple[int, int]:
    match value:
        case [int(agreeing), int(compared)]:
            return agreeing, compared
    return 0, 0
