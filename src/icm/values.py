"""What a cell of a data file says: nothing, a text, a gold label, a relation, or the options of a question.

Values come as the readers give them (JSON, CSV, Arrow); every error is a BadInput that names the column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from src.icm.consistency import Label, Relation

NO_ID: Final = frozenset(("nan", "<na>", "none", "null"))
"""Missing values of a table that was turned into text. As a group's name one would join unrelated claims."""
NO_LABEL: Final = NO_ID | {"na", "n/a"}
UNSURE: Final = "unsure"
"""In place of a known label: what a person writes who cannot tell."""

SHOWN_COLUMNS: Final = 20
"""How many columns an error message lists."""

RELATIONS: Final[Mapping[str, Relation | None]] = {
    "exactly one": Relation.EXACTLY_ONE,
    "at most one": Relation.AT_MOST_ONE,
    "agree": Relation.AGREE,
    "different": Relation.DIFFERENT,
    "none": None,
}


class BadInput(Exception):
    """Input that cannot be used; the message names the file, the line and what to do."""


class BadLabel(BadInput):
    """A gold label that cannot be read.

    value: as it was read. names: of the labels, where they are not true and false.
    """

    def __init__(self, value: object, names: Sequence[str] = ()) -> None:
        expected = f"none of {', '.join(names)}" if names else "neither 0/1 nor true/false"
        super().__init__(f"has the label {shown(value)}, which is {expected}")
        self.value = value


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a multiple-choice question, and whether it is right; None where the file does not say."""

    text: str
    gold: bool | None


def shown(value: object) -> str:
    """A value as an error message shows it: at most 60 characters, in one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Sequence[str]) -> str:
    """The names of columns as an error message lists them."""
    more = ["..."] if len(names) > SHOWN_COLUMNS else []
    return ", ".join([*map(shown, names[:SHOWN_COLUMNS]), *more]) or "none"


def is_missing(value: object) -> bool:
    """None, NaN, or nothing but space."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(column: str, value: object) -> str:
    """The text of a cell that is not missing. Raises BadInput for what is no text."""
    if isinstance(value, list | tuple | dict | bytes):
        raise BadInput(f"holds a {type(value).__name__} in {column}, not a text")
    if column == "answer" and isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of whole numbers with gaps comes out of pandas as 7.0
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"has half a character (a lone surrogate) in {column}")
    return text


def group_of(value: object) -> str | None:
    """The group that a consistency_id names, or None."""
    if is_missing(value):
        return None
    text = text_of("consistency_id", value)
    return None if text.strip().lower() in NO_ID else text


def parse_label(value: object, space: LabelSpace = TRUE_FALSE) -> Label:
    """A gold label, or None where it is missing. Raises BadLabel for anything else.

    True and False are written 0/1 or true/false, other labels by name. Case and spaces around it do not count.
    """
    if is_missing(value):
        return None
    text = str(value).strip().casefold()
    if space != TRUE_FALSE:
        names = [name.strip().casefold() for name in space.names]
        if isinstance(value, float) and value.is_integer() and text not in names:
            text = str(int(value))
        if text in names:
            index: Any = names.index(text)
            return bool(index) if len(names) == 2 else index
    elif text in ("1", "1.0", "true"):
        return True
    elif text in ("0", "0.0", "false"):
        return False
    if text in NO_LABEL:
        return None
    raise BadLabel(value, () if space == TRUE_FALSE else space.names)


def parse_relation(value: object) -> Relation | None:
    """What a consistency_relation says. Raises BadInput for anything but the names in RELATIONS."""
    text = " ".join(str(value).lower().replace("_", " ").replace("-", " ").removesuffix("is true").split())
    if text not in RELATIONS:
        raise BadInput(f"has the consistency_relation {shown(value)}, which is none of: {', '.join(RELATIONS)}")
    return RELATIONS[text]


def options_of(choice: object, label: object) -> tuple[Option, ...] | None:
    """The options that `choice` lists: ["Yes", "No"], or {"text": [...], "label": ["A", "B"]}; None for one text.

    label: which one is right, as its index (from 0; -1 for unknown), its letter, its name or its text, or a list with
    0/1 for each. Raises BadInput where that is unclear.
    """
    names: Sequence[str] = ()
    if isinstance(choice, dict):
        texts, listed = choice.get("text"), choice.get("label", [])
        if set(choice) - {"text", "label"} or not isinstance(texts, list) or not isinstance(listed, list):
            raise BadInput("holds a dict in choice; a dict of options has two lists in it, text and label")
        if listed and len(listed) != len(texts):
            raise BadInput(f"has {len(texts)} options in choice and {len(listed)} names for them")
        choice, names = texts, [str(name).strip() for name in listed]
    if not isinstance(choice, list):
        return None
    if any(is_missing(text) for text in choice):
        raise BadInput("has an option in choice with nothing in it")
    options = [text_of("choice", text) for text in choice]
    if len(options) < 2:
        raise BadInput(f"lists {len(options)} option{'s' * (not options)} in choice; there must be two or more")
    twice = [text for text in options if options.count(text) > 1]
    if twice:
        raise BadInput(f"lists the option {shown(twice[0])} twice")
    by_number = isinstance(label, int | float) and all(isinstance(text, str) for text in choice)
    return tuple(map(Option, options, _gold(label, options, names, by_number)))


def _gold(label: Any, options: Sequence[str], names: Sequence[str], by_number: bool) -> list[bool | None]:
    """Whether each option is right. by_number: `label` is a number and no option is, so it can only be an index."""
    if isinstance(label, list):
        if len(label) != len(options):
            raise BadInput(f"has {len(label)} labels for its {len(options)} options")
        given = map(parse_label, label)
        return [None if gold is None else bool(gold) for gold in given]
    if is_missing(label) or (str(label).strip().lower() in NO_LABEL and str(label) not in options):
        return [None] * len(options)
    named = str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()
    found = {at for at, name in enumerate(names) if name == named}
    if not found:
        if named == "-1":  # how data sets on the Hugging Face hub hide the answers of a test set
            return [None] * len(options)
        found = {at for at, text in enumerate(options) if text.strip() == named and not by_number}
        found |= {at for at in range(len(options)) if str(at) == named}
        if len(named) == 1 and named.isascii() and named.isalpha() and ord(named.upper()) - ord("A") < len(options):
            found.add(ord(named.upper()) - ord("A"))
    if not found:
        raise BadInput(
            f"has the label {shown(label)}, which names none of its {len(options)} options: write an index from 0 "
            f"to {len(options) - 1}, a letter from A or the option's text, or map it with --map label=THEIRS:INDEX"
        )
    if len(found) > 1:
        readings = " or ".join(f"option {at}, {shown(options[at])}" for at in sorted(found))
        raise BadInput(
            f"has the label {shown(label)}, which could be {readings}: write a letter, as with --map label=0:A,1:B"
        )
    return [at in found for at in range(len(options))]
