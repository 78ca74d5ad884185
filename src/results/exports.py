"""A run's labels as rows for other tools: plain, for spreadsheets, as preference pairs, and for fine-tuning."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.icm.label_names import TRUE_FALSE_NAMES, Names, logprobs, written_label
from src.icm.objective import LogOdds
from src.icm.testbeds import BadInput
from src.results.rows import ABSTAINED
from src.results.run_record import LabelledClaim, RunRecord, probability
from src.results.text import visible

Only = Literal["all", "search"]
Pairs = Literal["best", "all"]

# Beginnings that make a spreadsheet read a cell as a formula (OWASP, CSV injection), full-width forms included.
FORMULA = re.compile(r"\s*[=+\-@\t\r\n＝＋－＠'|%]")
SPLIT_FORMULA = re.compile(r"([;\t]\s*)(?=[=+\-@＝＋－＠])")
CELL_LIMIT = 32_767  # characters that Excel keeps of a cell
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class PairCount:
    """Preference pairs, and how many claims without a partner and contradictory pairs are left out."""

    pairs: list[dict[str, Any]]
    unpaired: int
    contradicting: int


def chosen_claims(
    run: RunRecord, only: Only = "all", least: float = 0.0, *, abstained: bool = True
) -> list[LabelledClaim]:
    """The labelled claims to export. least: the smallest margin of a label, nats; a known label needs none. abstained:
    also those whose label is not handed over."""
    return [
        claim
        for claim in run.claims
        if claim.label is not None
        and (abstained or not claim.abstained)
        and (only == "all" or claim.searched)
        and (not least or claim.is_known or (run.sureness(claim) or 0.0) >= least)
    ]


def plain_rows(run: RunRecord, claims: Iterable[LabelledClaim]) -> Iterator[dict[str, Any]]:
    """One row a claim, with the columns that `--data` reads; `probability` is P(True) against the offset of its pool.

    Other placeholders of a testbed file's template are columns of the same names. Labels other than True and False are
    given by name; `probability` is then that of the label, and log_odds and zero_shot are replaced by one column of
    log-probabilities for each label. A claim whose label is not handed over has none, and says what it would have had;
    `probability` is still there. Every row has the same columns, for readers that infer types from the first rows.
    """
    compared = any(claim.choice_2 is not None for claim in run.claims)
    doubted = any(claim.abstained for claim in run.claims)
    for claim in claims:
        label = None if claim.abstained else claim.label
        yield {
            "question": mended(claim.question),
            "choice": mended(claim.choice),
            **({"choice_2": None if claim.choice_2 is None else mended(claim.choice_2)} if compared else {}),
            **{name: mended(text) for name, text in claim.shown},
            "label": written_label(label, run.names),
            **_columns(claim.log_odds, run.names, "log_odds", "logprob"),
            "probability": _probability(run, claim),
            **_columns(claim.zero_shot, run.names, "zero_shot", "zero_shot"),
            "gold": written_label(claim.gold, run.names),
            "by": ABSTAINED if claim.abstained else claim.by,
            **(_withheld(run, claim) if doubted else {}),
            "consistency_id": mended(claim.group),
            "row": claim.row,
        }


def _withheld(run: RunRecord, claim: LabelledClaim) -> dict[str, Any]:
    """The label that a claim would have had; nothing in these columns for one that has it."""
    return {
        "abstained_label": written_label(claim.label, run.names) if claim.abstained else None,
        "abstained_by": claim.by if claim.abstained else None,
    }


def _columns(log_odds: LogOdds | None, names: Names, of_two: str, each: str) -> dict[str, Any]:
    if names == TRUE_FALSE_NAMES:
        return {of_two: log_odds}
    values = [None] * len(names) if log_odds is None else logprobs(log_odds)
    return {f"{each}_{name}": value for name, value in zip(names, values, strict=True)}


def _probability(run: RunRecord, claim: LabelledClaim) -> float | None:
    margins, label = run.margins(claim), True if run.says_true else claim.label
    return None if margins is None or label is None else probability(margins[label])


def check_makes_pairs(run: RunRecord) -> None:
    """Raises BadInput where the labels are not True and False, of which preference pairs are made."""
    if not run.says_true:
        raise BadInput(
            f"preference pairs are made of True and False; the labels of this run are {', '.join(run.names)}"
        )


def preference_pairs(run: RunRecord, claims: Sequence[LabelledClaim], pairs: Pairs = "best") -> PairCount:
    """prompt, chosen, rejected, and the margin in nats between the two; then what trainers do not read, see _pair.

    For comparisons the better answer is chosen; both orders of a pair make one row, or none if they contradict each
    other. For single claims a True one is chosen over a False one of the same question: the pair with the largest
    margin, or every pair. Raises BadInput where the labels are not True and False.
    """
    check_makes_pairs(run)
    return _of_comparisons(run, claims) if run.compares else _of_claims(run, claims, pairs)


def dataset_rows(run: RunRecord, claims: Iterable[LabelledClaim]) -> Iterator[dict[str, Any]]:
    """`plain_rows` with the run's name, for rows of several runs that are put together."""
    for row in plain_rows(run, claims):
        yield {**row, "run": mended(run.name)}


def training_rows(run: RunRecord, claims: Iterable[LabelledClaim]) -> Iterator[dict[str, Any]]:
    """prompt and completion: the question as the run asked it, and its label word.

    Behind them stands what trainers do not read: P of the label, what gave it, its row in the data, the run.
    """
    testbed = run.asked_by
    for claim in claims:
        margins, label = run.margins(claim), claim.label or 0
        yield {
            "prompt": mended(testbed.text(claim.fields)),
            "completion": run.texts[label],
            "probability": None if margins is None else probability(margins[label]),
            "by": claim.by,
            "row": claim.row,
            "run": mended(run.name),
        }


def spreadsheet_cell(text: str) -> str:
    """`text` with a ' before it where a spreadsheet could take it for a formula.

    Also after a semicolon or tab inside, which divides cells in some locales. A ' that was there already gets another
    one, so removing one restores the text.
    """
    safe = SPLIT_FORMULA.sub(r"\1'", text)
    if FORMULA.match(safe):
        safe = "'" + safe
    return safe[:CELL_LIMIT]


def spreadsheet_text(text: str) -> str:
    """`text` as a cell of the CSV files that this project writes: nothing in it acts, as a formula or a control
    character."""
    return spreadsheet_cell(visible(text))


def mended(text: str) -> str:
    """`text` without half characters, which no UTF-8 file can hold."""
    return HALF_CHARACTER.sub("\ufffd", text)


def _of_comparisons(run: RunRecord, claims: Sequence[LabelledClaim]) -> PairCount:
    found: dict[tuple[str, str, str], LabelledClaim] = {}
    contradicting: set[frozenset[tuple[str, str, str]]] = set()
    unpaired = 0
    for claim in claims:
        if claim.choice_2 is None:
            unpaired += 1
            continue
        chosen, rejected = (claim.choice, claim.choice_2) if claim.label else (claim.choice_2, claim.choice)
        if (claim.question, rejected, chosen) in found:
            contradicting.add(frozenset(((claim.question, rejected, chosen), (claim.question, chosen, rejected))))
        found.setdefault((claim.question, chosen, rejected), claim)
    dropped = {key for both in contradicting for key in both}
    rows = [
        _pair(run, question, (chosen, claim), (rejected, claim), run.sureness(claim))
        for (question, chosen, rejected), claim in found.items()
        if (question, chosen, rejected) not in dropped
    ]
    return PairCount(rows, unpaired, len(contradicting))


def _of_claims(run: RunRecord, claims: Sequence[LabelledClaim], pairs: Pairs) -> PairCount:
    questions: Mapping[str, list[LabelledClaim]] = defaultdict(list)
    for claim in claims:
        questions[claim.question].append(claim)
    rows, unpaired = [], 0
    for question, members in questions.items():
        trues = [claim for claim in members if claim.label]
        falses = [claim for claim in members if not claim.label]
        if not trues or not falses:
            unpaired += len(members)
            continue
        found = [(better, worse) for better in trues for worse in falses]
        if pairs == "best":
            found = [max(found, key=lambda pair: _gap(run, *pair) or 0.0)]
        rows += [
            _pair(run, question, (better.choice, better), (worse.choice, worse), _gap(run, better, worse))
            for better, worse in found
        ]
    return PairCount(rows, unpaired, 0)


def _gap(run: RunRecord, better: LabelledClaim, worse: LabelledClaim) -> float | None:
    if better.odds is None or worse.odds is None:
        return None
    apart = 0.0 if better.batch == worse.batch else run.shift_of(better) - run.shift_of(worse)
    return better.odds - worse.odds - apart


def _pair(
    run: RunRecord,
    question: str,
    chosen: tuple[str, LabelledClaim],
    rejected: tuple[str, LabelledClaim],
    margin: float | None,
) -> dict[str, Any]:
    """One row of preference_pairs. chosen, rejected: an answer, and the claim whose label decided about it.

    chosen_probability is P of the label that chose the answer, rejected_probability of the one that rejected the other;
    of a comparison both are the same claim's.
    """
    (better, first), (worse, second) = chosen, rejected
    row = {"prompt": mended(question), "chosen": mended(better), "rejected": mended(worse), "margin": margin}
    row["consistency_id"] = mended(first.group)
    for name, claim in (("chosen", first), ("rejected", second)):
        margins = run.margins(claim)
        row[f"{name}_probability"] = None if margins is None else probability(margins[int(bool(claim.label))])
        row |= {f"{name}_by": claim.by, f"{name}_row": claim.row}
    return {**row, "run": mended(run.name)}
