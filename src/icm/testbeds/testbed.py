"""Claims and testbeds: how a row becomes a claim, which labels there are, and which claims constrain each other.

A template ends right before the label. Constraints come in three kinds (`--consistency`): "gold-free" uses only what
the claims say, "upstream" reproduces the published keys, which are made from gold labels and leak them, "none" has no
constraints.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Literal

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from icm_vllm.prompt_tree import MAX_LABELS
from src.icm.columns import GroupedBy, Reading
from src.icm.consistency import Consistency, Label, Relation
from src.icm.prompts import SEPARATOR
from src.icm.testbeds.rules import LEAKING, RelationRule, unrelated
from src.icm.values import BadInput, group_of, is_missing, listed, options_of, parse_label, parse_relation, text_of

ConsistencyMode = Literal["gold-free", "upstream", "none"]

TEXTS: Final = ("question", "choice", "choice_2", "answer")
"""Columns whose texts make a claim."""
JUDGED: Final = ("question", "choice", "choice_2")
"""Those that reports show of a claim."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a data file, ready to be asked.

    text: the question, ending right before the label. group: claims of one group may constrain each other.
    gold: the label to report agreement with; never seen by the search. row: its number among the file's claims. of_row:
    the index of its row in the file, the same number unless rows before it list several options. option: its place
    among the options of its row, None where the row is one claim. relation: what must hold in its whole group, or
    between the options of its row. shown: what else its template shows, by placeholder. known: the label that a column
    of the data gives it, for the search to keep.
    """

    text: str
    group: str
    gold: Label
    row: int
    of_row: int
    question: str
    choice: str
    choice_2: str | None = None
    answer: str | None = None
    relation: Relation | None = None
    option: int | None = None
    shown: tuple[tuple[str, str], ...] = ()
    known: Label = None


@dataclass(frozen=True, slots=True)
class Testbed:
    """A data file's template, its labels and its constraints. Raises BadInput where these contradict each other.

    template: a claim's text with its columns in {braces}, an item of a list as {choice[0]}; {{ and }} are braces.
    columns: what every row must have. gold_free, upstream: the relation of two claims of one group, or None. relation:
    what must hold between all claims of a group, unless a row's consistency_relation says otherwise. grouped_by: what
    makes rows one group. may_be_empty: columns that the file must have, but not every row a value in. space: the
    labels; gold labels are their names. separator: the text between demonstrations. file: where the data is. reading:
    how it is read. digest: SHA-256 of the testbed file, "" for a built-in testbed and for --data.
    """

    name: str
    file: str
    template: str
    columns: tuple[str, ...]
    gold_free: RelationRule
    upstream: RelationRule
    strip_newlines: bool = False
    grouped_by: GroupedBy = "consistency_id"
    relation: Relation | None = None
    may_be_empty: tuple[str, ...] = ()
    space: LabelSpace = TRUE_FALSE
    separator: str = SEPARATOR
    reading: Reading = field(default_factory=Reading)
    digest: str = ""

    def __post_init__(self) -> None:
        placeholders = [name for _, name in pieces(self.template) if name is not None]
        if not {"question", "choice"} & {column_of(name) for name in (*placeholders, *self.columns)}:
            raise BadInput(
                "template: shows neither {question} nor {choice}; say which column is judged, as in columns: {choice: "
                "THEIRS}"
            )
        if "label" in map(column_of, placeholders):
            raise BadInput("template: shows {label}, the gold label, which no model may see")
        spaced = [text for text in self.space.texts if text[0].isspace()]
        if spaced and self.template[-1].isspace():
            raise BadInput(f"template: ends in {self.template[-1]!r}, and the label {spaced[0]!r} begins with a space")
        if not self.separator:
            raise BadInput("separator: is empty; demonstrations would run into each other")
        if self.relation is not None and self.relation.of_true and len(self.space) > 2:
            raise BadInput(f"relations: {self.relation.value}: needs two labels, and there are {len(self.space)}")

    def claims(self, row: Mapping[str, Any], index: int, first: int) -> list[Claim]:
        """The claims of row `index` of a file, numbered from `first`: one, or one for each option that `choice` lists.

        Exactly one of the options is true unless the row's consistency_relation says otherwise. Gold is read from
        `label`, or else from `answer`. Raises BadInput as `claim` does.
        """
        stated_gold = row.get("label") if not is_missing(row.get("label")) else row.get("answer")
        lettered = any(name is not None and name.startswith("choice[") for _, name in pieces(self.template))
        options = None if lettered else options_of(row.get("choice"), None if len(self.space) > 2 else stated_gold)
        if options is None:
            return [replace(self.claim(row, index), row=first)]
        if len(self.space) > 2:
            raise BadInput("lists options in choice; with more than two labels the template shows them, as {choice[0]}")
        if "choice_2" in self.columns:
            raise BadInput("lists options in choice; a comparison is of two texts, choice and choice_2")
        stated = row.get("consistency_relation")
        relation = Relation.EXACTLY_ONE if is_missing(stated) else parse_relation(stated)
        gold = [option.gold for option in options]
        if None not in gold and relation is not None and relation.inconsistencies(gold):
            raise BadInput(
                f"has {gold.count(True)} of its {len(options)} options labelled true, and {relation.value}; say in a "
                "column consistency_relation what holds: exactly one, at most one, or none"
            )
        rest = {name: value for name, value in row.items() if name not in ("label", "answer", "consistency_relation")}
        return [
            replace(
                self.claim({**rest, "choice": option.text}, index),
                row=first + at,
                gold=option.gold,
                relation=relation,
                option=at,
            )
            for at, option in enumerate(options)
        ]

    def claim(self, row: Mapping[str, Any], index: int) -> Claim:
        """The claim of one row. Raises BadInput naming the missing column or unusable value."""
        lacking = [column for column in self.columns if column not in row]
        if lacking:
            several = "s" if len(lacking) > 1 else ""
            raise BadInput(f"lacks the column{several} {', '.join(lacking)} (it has {listed(list(row))})")
        empty = [column for column in self.columns if is_missing(row[column])]
        if empty:
            raise BadInput(f"has nothing in {', '.join(empty)}")
        shown = self._shown(row)
        lists = {column_of(name) for name in shown if name.endswith("]")}
        fields = {
            name: " | ".join(text for placeholder, text in shown.items() if column_of(placeholder) == name)
            if name in lists
            else text_of(name, row[name])
            for name in TEXTS
            if not is_missing(row.get(name))
        }
        stated = row.get("consistency_relation")
        relation = self.relation if is_missing(stated) else parse_relation(stated)
        if relation is not None and relation.of_true and len(self.space) > 2:
            raise BadInput(
                f"has the consistency_relation {stated!r}, which needs two labels; there are {len(self.space)}"
            )
        group = group_of(row.get("consistency_id")) if self.grouped_by == "consistency_id" else None
        return Claim(
            text=self.text(fields | shown),
            group=f"row {index}" if group is None else group,
            gold=parse_label(row.get("label"), self.space),
            row=index,
            of_row=index,
            question=fields.get("question", ""),
            choice=fields.get("choice", ""),
            choice_2=fields.get("choice_2"),
            answer=fields.get("answer"),
            relation=relation,
            shown=tuple(shown.items()),
        )

    def _shown(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What the template shows besides question, choice and choice_2, by placeholder. Raises BadInput."""
        found: dict[str, str] = {}
        for _, name in pieces(self.template):
            if name is None or name in JUDGED:
                continue
            column = column_of(name)
            value = row[column]
            if column != name:
                items = value.get("text") if isinstance(value, dict) else value
                if not isinstance(items, list):
                    raise BadInput(f"has no list in {column}, of which the template shows {{{name}}}")
                if len(items) != (count := 1 + max(self._items(column))):
                    raise BadInput(
                        f"lists {len(items)} items in {column}, and the template shows it up to [{count - 1}]"
                    )
                value = items[item_of(name)]
                if is_missing(value):
                    raise BadInput(f"has nothing in {name}")
            found[name] = text_of(column, value)
        return found

    def _items(self, column: str) -> list[int]:
        """Which items of a column's list the template shows."""
        names = [name for _, name in pieces(self.template) if name is not None and name != column]
        return [item_of(name) for name in names if column_of(name) == column]

    def record(self) -> dict[str, Any]:
        """What a run keeps of a testbed file, so that its claims can be asked in the same words later."""
        return {
            "name": self.name,
            "template": self.template,
            "columns": list(self.columns),
            "labels": [list(pair) for pair in zip(self.space.names, self.space.texts, strict=True)],
            "separator": self.separator,
            "strip_newlines": self.strip_newlines,
            "sha256": self.digest,
        }

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Testbed:
        """The testbed that gave `record`, without constraints. Raises BadInput for a damaged record."""
        try:
            return cls(
                name=record["name"],
                file="",
                template=record["template"],
                columns=tuple(record["columns"]),
                gold_free=unrelated,
                upstream=unrelated,
                space=label_space(record["labels"]),
                separator=record["separator"],
                strip_newlines=record["strip_newlines"],
                digest=record["sha256"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"testbed: the run's record of it is damaged ({error})") from None

    def text(self, fields: Mapping[str, str]) -> str:
        """The question about a claim with these fields (by placeholder), without its label."""
        shown = {k: v.replace("\n", "") if self.strip_newlines and k != "question" else v for k, v in fields.items()}
        return "".join(literal + ("" if name is None else shown[name]) for literal, name in pieces(self.template))

    def imitates(self, claim: Claim) -> bool:
        """Whether a line within a field of the claim begins as the template does, or as its last line does.

        Such a claim can end its demonstration early and add another one, with a label that its author chose.
        """
        first, *_ = (literal for literal, _ in pieces(self.template))
        opening = first.strip()
        ending = pieces(self.template)[-1][0].strip().rpartition("\n")[2]
        fields = (claim.question, claim.choice, claim.choice_2, claim.answer, *(text for _, text in claim.shown))
        lines = [line.strip() for field in fields if field is not None for line in field.splitlines()[1:]]
        return any(line.startswith(tuple(filter(None, (opening, ending)))) for line in lines)

    @property
    def upstream_leaks(self) -> bool:
        """Whether the published keys of this testbed are made from gold labels."""
        return self.upstream in LEAKING

    def consistency(self, claims: Sequence[Claim], mode: ConsistencyMode) -> Consistency:
        """All constraints of a pool. Raises BadInput where "upstream" keys need gold labels that are not there."""
        if mode == "none":
            return Consistency([])
        if mode == "upstream" and len(self.space) > 2:
            raise BadInput(f"--consistency upstream makes keys of two labels, and there are {len(self.space)}")
        if mode == "upstream" and self.upstream_leaks and any(claim.gold is None for claim in claims):
            raise BadInput("--consistency upstream makes its keys from gold labels, and some rows have none")
        groups = [claim.group for claim in claims]
        if mode == "upstream":
            return Consistency.of_groups(groups, lambda i, j: self.upstream(claims[i], claims[j]))
        together = [
            None if claim.relation is None else (None if claim.option is None else claim.of_row, claim.relation)
            for claim in claims
        ]
        return Consistency.of_groups(groups, lambda i, j: self.gold_free(claims[i], claims[j]), together)


@lru_cache
def pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """The template as texts, each with the placeholder after it, None after the last. Raises BadInput."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise BadInput(f"template: {error}; a brace of the text itself is written twice, {{{{ or }}}}") from None
    found: list[tuple[str, str | None]] = []
    before = ""
    for literal, name, form, conversion in parts:
        if name is None:
            before += literal
            continue
        column = column_of(name)
        item = name[len(column) + 1 : -1]
        if form or conversion or not column.strip() or (column != name and not (item.isascii() and item.isdecimal())):
            raise BadInput(
                f"template: {{{name}}} is neither a column, as {{choice}}, nor an item of one, as {{choice[0]}}"
            )
        found.append((before + literal, name))
        before = ""
    if not found:
        raise BadInput("template: shows no column; put one in braces, as {choice}")
    return (*found, (before, None))


def column_of(placeholder: str) -> str:
    """The column of a placeholder, which shows the whole of it or an item of a list."""
    return placeholder.partition("[")[0] if placeholder.endswith("]") else placeholder


def item_of(placeholder: str) -> int:
    """Which item of a list a placeholder shows, from 0."""
    return int(placeholder[len(column_of(placeholder)) + 1 : -1])


def label_space(labels: Sequence[tuple[str, str]]) -> LabelSpace:
    """The labels of these names and texts. Raises BadInput where they cannot be told apart."""
    if not 2 <= len(labels) <= MAX_LABELS:
        raise BadInput(f"labels: there are {len(labels)}; give 2 to {MAX_LABELS}")
    names, texts = zip(*labels, strict=True)
    for kind, given in (("name", names), ("text", texts)):
        bad = next((each for each in given if not each.strip() or given.count(each) > 1), None)
        if bad is not None:
            raise BadInput(f"labels: the {kind} {bad!r} is {'there twice' if bad.strip() else 'blank'}")
    if len({name.strip().casefold() for name in names}) < len(names):
        raise BadInput("labels: two of them differ in case or space only, and gold labels are read without either")
    return LabelSpace(names, texts)
