"""Known labels: labels of some claims that a user gives, from a file (`--known`), from a column of the data, or, for
experiments, from gold (`--gold_seeds`). A search keeps them and labels the other claims.

In a file a claim is named by its row in the data, as in labels.jsonl, by its own columns, or by both, which must then
agree. Every error is a BadInput of one line.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from src.icm.columns import Reading, as_written, fold
from src.icm.consistency import MOST_ASSIGNMENTS, Consistency, Label, Labels
from src.icm.label_names import Names, counts_of, describe_counts
from src.icm.testbeds import BadInput, Claim, Testbed
from src.icm.testbeds.testbed import TEXTS, column_of, pieces
from src.icm.values import UNSURE, is_missing, listed, parse_label, shown
from src.pipeline.file_kinds import Row, read_rows
from src.results.exports import spreadsheet_text
from src.results.text import counted


@dataclass(frozen=True, slots=True)
class KnownLabels:
    """labels: by the claim's row. sources: where they are from, in words."""

    labels: Mapping[int, int]
    sources: tuple[str, ...]

    def of(self, claims: Sequence[Claim]) -> Labels | None:
        """By position; None where none of the claims has one."""
        found = tuple(self.labels.get(claim.row) for claim in claims)
        return found if any(label is not None for label in found) else None

    def digest(self, claims: Sequence[Claim]) -> str:
        """SHA-256 of the claims that have one, with their labels. claims: all of the data."""
        content = [[claim.row, claim.text, self.labels[claim.row]] for claim in claims if claim.row in self.labels]
        return hashlib.sha256(orjson.dumps(content)).hexdigest()

    def line(self, pool: Sequence[Claim], names: Names, *, in_batches: bool = False) -> str:
        """One line for the opening. pool: the claims that are searched."""
        inside = [self.labels[claim.row] for claim in pool if claim.row in self.labels]
        outside = len(self.labels) - len(inside)
        where = "any batch" if in_batches else "the pool"
        more = f"; {outside} more of claims outside {where}" if outside else ""
        counts = describe_counts(counts_of(inside, names))
        return f"{counted(len(inside), 'label')} ({counts}) from {' and '.join(self.sources)}, kept{more}"


def merged(first: KnownLabels | None, second: KnownLabels | None) -> KnownLabels | None:
    """Both; where they differ, `second` counts."""
    if first is None or second is None:
        return first or second
    sources = tuple(dict.fromkeys((*first.sources, *second.sources)))
    return KnownLabels({**first.labels, **second.labels}, sources)


def known_labels(
    file: Path | None, testbed: Testbed, claims: Sequence[Claim], data: Path, reading: Reading
) -> KnownLabels | None:
    """The labels of `file` and of the data's own column; None where there is neither. claims: all of `data`.

    Raises BadInput where the two differ, and as read_known does.
    """
    of_column = {claim.row: claim.known for claim in claims if claim.known is not None}
    column = KnownLabels(of_column, (f"the column {reading.columns.get('known', 'known')} of {data.name}",))
    if file is None:
        return column if of_column else None
    found = read_known(file, testbed, claims, data, reading)
    for row, label in found.labels.items():
        if of_column.get(row, label) != label:
            names = testbed.space.names
            raise BadInput(
                f"{file}: row {row} has the label {names[label]}, and {names[of_column[row]]} in the column "
                f"{reading.columns.get('known', 'known')} of {data}"
            )
    return merged(column, found) if of_column else found


def read_known(path: Path, testbed: Testbed, claims: Sequence[Claim], data: Path, reading: Reading) -> KnownLabels:
    """The labels that a file gives to claims of `data`.

    reading: how the data is read: the file's columns may have the same names, and its labels the same meanings. Raises
    BadInput where a row names no claim, or another one than its text does, where a label is none, where a claim has two
    labels, or no row has one.
    """
    book = _ClaimsByName(testbed, claims, data, reading)
    found: dict[int, tuple[int, Row]] = {}
    rows = read_rows(path, ("row", *reading.columns.values()))
    for row in rows:
        if row.bad is not None:
            raise BadInput(f"{path}:{row.line}: {row.bad}")
        try:
            fields = book.named(row.fields)
            label = _label(fields, testbed, reading)
            named = book.claims_of(fields)
        except BadInput as error:
            raise BadInput(f"{path}:{row.line}: {error}") from None
        for claim in named if label is not None else ():
            assert label is not None
            before = found.setdefault(claim.row, (label, row))
            if before[0] != label:
                one, other = (testbed.space.names[each] for each in (before[0], label))
                raise BadInput(
                    f"{path}: {_named_claim(claim)} has two labels, {one} on line {before[1].line} and {other} on line "
                    f"{row.line}"
                )
    if not found:
        raise BadInput(
            f"{path}: gives no label: all of its {counted(len(rows), 'row')} are empty or {UNSURE} in the column label"
        )
    return KnownLabels({row: label for row, (label, _) in sorted(found.items())}, (path.name,))


def gold_seeds(claims: Sequence[Claim], consistency: Consistency, count: int, rng: np.random.Generator) -> KnownLabels:
    """Gold labels of `count` claims of a pool, drawn at random: fewer are always the first of more.

    Gold can contradict a constraint; a claim whose label contradicts those drawn before it is passed over. Raises
    BadInput where fewer can be drawn.
    """
    drawn = compatible(rng.permutation(len(claims)).tolist(), [claim.gold for claim in claims], consistency)
    if len(drawn) < count:
        raise BadInput(
            f"--gold_seeds {count}: only {len(drawn)} of the pool's {len(claims)} claims have a gold label that "
            "contradicts no other"
        )
    found = {claims[at].row: label for at in drawn[:count] if (label := claims[at].gold) is not None}
    return KnownLabels(found, ("gold (--gold_seeds)",))


def compatible(order: Sequence[int], labels: Sequence[Label], consistency: Consistency) -> list[int]:
    """The positions of `order`, without those that have no label and those whose label breaks a constraint with those
    before."""
    taken: list[Label] = [None] * len(labels)
    found = []
    for at in order:
        taken[at] = labels[at]
        if consistency.broken(taken):
            taken[at] = None
        elif labels[at] is not None:
            found.append(at)
    return found


def check_known(known: Labels, claims: Sequence[Claim], consistency: Consistency, names: Names) -> None:
    """Raises BadInput where known labels of a pool contradict each other: where they break a constraint, or leave the
    claims that are linked with them no labels that break none."""

    def refuse(positions: Sequence[int], why: str) -> None:
        given = [(at, label) for at in positions if (label := known[at]) is not None]
        each = ", ".join(f"{_named_claim(claims[at])} is {names[label]}" for at, label in given)
        raise BadInput(f"the known labels contradict each other: {each}; {why}")

    for constraint in consistency.broken(known):
        refuse(constraint.claims, f"what must hold between them: {constraint.relation.value}")
    for linked in consistency.linked():
        free = sum(known[claim] is None for claim in linked)
        if free and free < len(linked) and len(names) ** free <= MOST_ASSIGNMENTS:
            broken = _broken_at_best(linked, known, consistency, len(names))
            if broken > _broken_at_best(linked, (None,) * len(known), consistency, len(names)):
                refuse(linked, "the claims that are linked with them can have no labels that break no constraint")


def _broken_at_best(linked: Sequence[int], known: Labels, consistency: Consistency, num_labels: int) -> int:
    """How many constraints of linked claims are broken by the labels that break the fewest, the known ones kept."""
    nearest = consistency.nearest([(0.0,) * num_labels] * len(known), known)
    return sum(constraint.claims[0] in linked for constraint in consistency.broken(nearest))


class _ClaimsByName:
    """The claims of the data, found by row and by text."""

    def __init__(self, testbed: Testbed, claims: Sequence[Claim], data: Path, reading: Reading) -> None:
        self._data = data
        self._by_row = {claim.row: claim for claim in claims}
        self._theirs = {theirs: ours for ours, theirs in reading.columns.items() if ours not in ("label", "known")}
        shown_by_template = (name for _, name in pieces(testbed.template) if name is not None)
        self._columns = tuple(dict.fromkeys(map(column_of, shown_by_template)))
        self._by_text: dict[tuple[str, ...], list[Claim]] = defaultdict(list)
        for claim in claims:
            for written in _as_written_by([_text(claim, column) for column in self._columns]):
                self._by_text[written].append(claim)

    def named(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A row under our names: those of the data's columns, of a file that this project wrote, or as they are."""
        ours = {fold(theirs): name for theirs, name in self._theirs.items()}
        own = {fold(name): name for name in ("row", "label", *self._columns)}
        known = {ours[fold(name)]: value for name, value in fields.items() if fold(name) in ours}
        return {**fields, **known, **{own[fold(name)]: value for name, value in fields.items() if fold(name) in own}}

    def claims_of(self, fields: Mapping[str, Any]) -> list[Claim]:
        """The claims that a row is about. Of several with the same text it is about all."""
        texts = {name: _folded(fields[name]) for name in self._columns if not is_missing(fields.get(name))}
        whole = len(texts) == len(self._columns)
        if is_missing(fields.get("row")):
            if not whole:
                lacking = [name for name in self._columns if name not in texts]
                raise BadInput(
                    f"names no claim: it has no row, and nothing in {', '.join(lacking)}; a claim is found by row (as "
                    f"in labels.jsonl) or by {' and '.join(self._columns)} (the columns are {listed(list(fields))})"
                )
            found = self._by_text.get(tuple(texts.values()))
            if not found:
                raise BadInput(f"names a claim that is not in {self._data}: {shown(' / '.join(texts.values()))}")
            return found
        number = _whole_number(fields["row"])
        claim = self._by_row.get(number)
        if claim is None:
            first, last = min(self._by_row), max(self._by_row)
            raise BadInput(f"names row {number}, and {self._data} has no claim of that row (from {first} to {last})")
        for name, text in texts.items():
            if (text,) not in _as_written_by([_text(claim, name)]):
                raise BadInput(
                    f"names row {number} with the {name} {shown(text)}, which in {self._data} has "
                    f"{shown(_folded(_text(claim, name)))}: that file has changed, or another one is meant. Without "
                    "the column row, claims are found by their texts"
                )
        return [claim]


def _label(fields: Mapping[str, Any], testbed: Testbed, reading: Reading) -> Label:
    if "label" not in fields:
        raise BadInput(f"has no column label (empty where it is not known); it has {listed(list(fields))}")
    value = fields["label"]
    names = [name.strip().casefold() for name in testbed.space.names]
    text = "" if is_missing(value) else as_written(value)
    if text == UNSURE and text not in names:
        return None
    meant = reading.values.get("label", {}).get(text, value)
    # Names that a spreadsheet would take for a formula, as this project's CSV files write them.
    cells = {name: spreadsheet_text(name) for name in testbed.space.names}
    of_cell = {cell.strip().casefold(): name for name, cell in cells.items() if cell != name}
    return parse_label(of_cell.get(text, meant), testbed.space)


def _text(claim: Claim, column: str) -> str:
    """What a claim has in a column that its template shows; of a list its items, as reports show them."""
    if column in TEXTS:
        return {
            "question": claim.question,
            "choice": claim.choice,
            "choice_2": claim.choice_2 or "",
            "answer": claim.answer or "",
        }[column]
    return " | ".join(text for placeholder, text in claim.shown if column_of(placeholder) == column)


def _as_written_by(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """A claim's texts as a file may have them: as they are, and as this project's CSV files write them."""
    return {tuple(map(_folded, texts)), tuple(_folded(spreadsheet_text(text)) for text in texts)}


def _folded(value: object) -> str:
    """A text without what CSV files and editors change: space at its ends and kinds of space between words."""
    if isinstance(value, dict):
        value = value.get("text", value)
    if isinstance(value, list):
        value = " | ".join(map(str, value))
    return " ".join(str(value).split())


def _whole_number(value: object) -> int:
    text = as_written(value).removesuffix(".0")
    if isinstance(value, bool) or not text.isdecimal() or len(text) > 15:
        raise BadInput(f"has the row {shown(value)}, which is no number of a row")
    return int(text)


def _named_claim(claim: Claim) -> str:
    texts = " / ".join(part for part in (claim.question, claim.choice, claim.choice_2) if part)
    return f"row {claim.row} ({shown(' '.join(texts.split()))})"
