"""The claims to ask about as rows of a CSV file, as a table for the terminal, and as what a page shows of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from src.icm.label_names import written_label
from src.icm.testbeds import BadInput
from src.icm.testbeds.testbed import pieces
from src.results.asking import Doubt, reason
from src.results.handover import csv_line
from src.results.run_record import KNOWN, LabelledClaim, RunRecord
from src.results.side_by_side import Grid
from src.results.text import number, one_line, visible

UNSURE: Final = "unsure"
"""What stands in the column `label` of a claim that a human was asked about and could not tell."""
LINE_END: Final = "\r\n"
LONG: Final = 1500
"""Characters of a text that are shown at once; the rest unfolds."""
SCORES: Final = ("margin", "disagreement", "leverage")


@dataclass(frozen=True, slots=True)
class Button:
    """A label to click. cell: as the file has it. key: that gives it, "" where there is none."""

    name: str
    cell: str
    key: str


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a claim. heading: what it is, "" where that is plain; rest: what unfolds."""

    heading: str
    text: str
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One claim on the page. before, after: the line of the file up to the label, and from there."""

    row: str
    texts: tuple[Text, ...]
    found: str
    why: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Sheet:
    """The page's claims.

    asks: the end of the template, which the label answers. head: the first line of the file. tail: the lines of claims
    that are known already. Lines are without their end. digest: of the file, by which a browser knows answers that it
    was given before.
    """

    cards: tuple[Card, ...]
    buttons: tuple[Button, ...]
    asks: str
    head: str
    tail: tuple[str, ...]
    digest: str

    @property
    def content(self) -> str:
        """The file without an answer."""
        lines = [self.head, *(f'{card.before}""{card.after}' for card in self.cards), *self.tail]
        return "".join(line + LINE_END for line in lines)


def sheet_of(run: RunRecord, chosen: Sequence[Doubt], doubts: Sequence[Doubt], known: Sequence[LabelledClaim]) -> Sheet:
    """The claims to ask about, and the known ones behind them: one file then holds every answer. doubts: all that
    could be asked about."""
    compared = run.compares
    shown = list(dict.fromkeys(name for each in chosen for name, _ in each.claim.shown))
    texts = ["question", "choice", *(["choice_2"] if compared else []), *shown]
    ours = [_free(name, texts) for name in ("found", *SCORES, "reason")]
    cards = []
    for doubt in chosen:
        why = reason(doubt, doubts)
        scores = [_rounded(getattr(doubt, name)) for name in SCORES]
        values = [written_label(doubt.claim.label, run.names), *scores, why]
        after = _cells([*_texts(doubt.claim, texts), *values])
        cards.append(
            Card(
                row=str(doubt.claim.row),
                texts=_shown(run, doubt.claim),
                found=visible(run.name_of(doubt.claim.label)),
                why=why,
                prompt=_prompt(run, doubt.claim),
                before=f"{doubt.claim.row},",
                after=f",{after}",
            )
        )
    given = [
        _cells([claim.row, written_label(claim.label, run.names), *_texts(claim, texts), None, None, None, None, KNOWN])
        for claim in known
    ]
    head = ",".join(f'"{name.replace(chr(34), chr(34) * 2)}"' for name in ("row", "label", *texts, *ours))
    sheet = Sheet(tuple(cards), buttons_of(run), _asks(run), head, tuple(given), "")
    digest = hashlib.sha256(f"{run.name}\n{sheet.content}".encode("utf-8", "replace")).hexdigest()[:16]
    return replace(sheet, digest=digest)


def buttons_of(run: RunRecord) -> tuple[Button, ...]:
    """True before False, other labels in their order; the first nine have their number as key. "unsure" is last."""
    order = list(range(run.num_labels))
    if run.says_true:
        order.reverse()
    labels = [
        Button(visible(run.names[label]), _cells([written_label(label, run.names)]), str(place) if place < 10 else "")
        for place, label in enumerate(order, start=1)
    ]
    return (*labels, Button(UNSURE, _cells([UNSURE]), "u"))


def grid_of(run: RunRecord, chosen: Sequence[Doubt], by: str) -> Grid:
    """The table of the terminal."""
    rows = [
        [
            _short(doubt.claim, run.compares),
            str(doubt.claim.row),
            run.name_of(doubt.claim.label),
            *(number(getattr(doubt, name)) for name in SCORES),
        ]
        for doubt in chosen
    ]
    return Grid(f"Claims to ask about, by {by}", run.name, ["claim", "row", "found", *SCORES], rows)


def _short(claim: LabelledClaim, compares: bool) -> str:
    second = claim.choice_2 if compares else None
    texts = [text for text in (claim.question, claim.choice, second or "") if text.strip()]
    each = max(20, 60 // max(1, len(texts)))
    return " / ".join(one_line(text, each) for text in texts) or "(empty)"


def _free(name: str, taken: Sequence[str]) -> str:
    """The name of a column, changed where the claims have one of that name."""
    while name in taken:
        name += "_"
    return name


def _texts(claim: LabelledClaim, columns: Sequence[str]) -> list[str]:
    fields: Mapping[str, Any] = claim.fields
    return [str(fields.get(column, "")) for column in columns]


def _cells(values: Sequence[object]) -> str:
    return csv_line(values).removesuffix(LINE_END)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _shown(run: RunRecord, claim: LabelledClaim) -> tuple[Text, ...]:
    second = [("better than", claim.choice_2 or "")] if run.compares else []
    texts = [("", claim.question), ("", claim.choice), *second, *claim.shown]
    found = [_text(heading, text) for heading, text in texts if heading or text.strip()]
    return tuple(found) or (Text("", "(this claim is empty)"),)


def _text(heading: str, text: str) -> Text:
    shown = visible(text) if text.strip() else "(empty)"
    return Text(visible(heading), shown[:LONG], shown[LONG:])


def _asks(run: RunRecord) -> str:
    """What stands behind the claim in its template, as in "I think this claim is"."""
    try:
        literal, name = pieces(run.asked_by.template)[-1]
    except BadInput:
        return ""
    return visible(" ".join(literal.split())) if name is None else ""


def _prompt(run: RunRecord, claim: LabelledClaim) -> str:
    """The question as the model is asked it; empty where the run's testbed cannot be read."""
    try:
        return visible(run.asked_by.text(claim.fields))
    except (BadInput, KeyError):
        return ""
