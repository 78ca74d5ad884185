"""The lines of a run's claims.jsonl and labels.jsonl, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from src.icm.consistency import Consistency, Label, Labels
from src.icm.label_names import TRUE_FALSE_NAMES, Names, written_label, written_odds
from src.icm.objective import LogOdds
from src.icm.testbeds import Claim

ABSTAINED: Final = "abstained"
"""`by` of a claim whose label is not handed over (see doubt)."""


def claim_row(claim: Claim) -> dict[str, Any]:
    """The part of a line that describes the claim itself."""
    row: dict[str, Any] = {"row": claim.row, "consistency_id": claim.group, "question": claim.question}
    row["choice"] = claim.choice
    if claim.choice_2 is not None:
        row["choice_2"] = claim.choice_2
    if claim.shown:
        row["shown"] = dict(claim.shown)
    if claim.of_row != claim.row or claim.option is not None:
        row |= {"of_row": claim.of_row, "option": claim.option}
    return row


def label_row(
    claim: Claim,
    label: Label,
    log_odds: LogOdds | None,
    by: str,
    zero_shot: LogOdds | None = None,
    names: Names = TRUE_FALSE_NAMES,
) -> dict[str, Any]:
    """One line of labels.jsonl. log_odds and zero_shot (without demonstrations, where it was asked) in nats.

    by: "icm" for a label of the search, "known" for one that was given, else how it was predicted. names: of the
    labels; a line holds names, or true and false where those are the labels (see label_names).
    """
    without_demonstrations = {} if zero_shot is None else written_odds(zero_shot, names, "zero_shot")
    given = {"label": written_label(label, names), **written_odds(log_odds, names), **without_demonstrations}
    return claim_row(claim) | given | {"gold": written_label(claim.gold, names), "by": by}


def pool_rows(
    claims: Sequence[Claim],
    consistency: Consistency,
    names: Names = TRUE_FALSE_NAMES,
    known: Labels | None = None,
) -> list[dict[str, Any]]:
    """The lines of claims.jsonl: the pool in its order, each constraint at its first claim as [position, relation].

    A constraint between more than two claims has more positions. A known label is a line's "known".
    """
    rows = [claim_row(claim) | {"gold": written_label(claim.gold, names), "constraints": []} for claim in claims]
    for row, label in zip(rows, known or (), strict=False):
        if label is not None:
            row["known"] = written_label(label, names)
    for constraint in consistency.constraints:
        first, *others = constraint.claims
        rows[first]["constraints"].append([*others, constraint.relation.value])
    return rows


def known_rows(claims: Sequence[Claim], labels: Mapping[int, int], names: Names) -> list[dict[str, Any]]:
    """The lines of known.jsonl: known labels of claims outside the pool. labels: by row."""
    return [claim_row(claim) | {"label": written_label(labels[claim.row], names), "by": "known"} for claim in claims]


def abstained_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The line of labels.jsonl of a claim without a label."""
    whole = labelled_row(row)
    return whole | {
        "label": None,
        "by": ABSTAINED,
        "abstained_label": whole["label"],
        "abstained_by": whole["by"],
    }


def labelled_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same line with its label."""
    if row.get("by") != ABSTAINED:
        return dict(row)
    rest = {name: value for name, value in row.items() if name not in ("abstained_label", "abstained_by")}
    return rest | {"label": row.get("abstained_label"), "by": row.get("abstained_by", "icm")}
