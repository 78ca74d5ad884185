"""From the text of a testbed file to a Testbed. Every error message is one line that names the key.

All values are read as text: `no` is the word no and 1 the digit, so label words need no quotes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from src.icm.columns import KNOWN, OURS, GroupedBy, Reading, as_written, nearest
from src.icm.prompts import SEPARATOR
from src.icm.testbeds.rules import OF_ANY_LABELS, PUBLISHED, RULES, SETS
from src.icm.testbeds.testbed import Testbed, column_of, label_space, pieces
from src.icm.values import BadInput, shown

Relations = Literal[
    "identical_agree",
    "compare_two",
    "same_answer",
    "by_columns",
    "agree",
    "different",
    "at_most_one",
    "exactly_one",
    "none",
]
Upstream = Literal["leaking_keys", "leaking_comparison", "same_answer"]


class Definition(BaseModel):
    """A testbed file. docs/testbeds.md explains its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str
    about: str = ""
    data: str = ""
    columns: dict[str, str] = {}
    required: list[str] = []
    may_be_empty: list[str] = []
    labels: list[str] | dict[str, str] | None = None
    separator: str = SEPARATOR
    groups: GroupedBy | None = None
    relations: Relations | None = None
    upstream: Upstream | None = None
    map: dict[str, dict[str, str]] = {}
    strip_newlines: bool = False

    def space(self) -> LabelSpace:
        """The labels, in the order of the file. Raises BadInput."""
        if self.labels is None:
            return TRUE_FALSE
        texts = self.labels if isinstance(self.labels, dict) else {name: f" {name}" for name in self.labels}
        if len(texts) < len(self.labels):
            raise BadInput("labels: one of them is there twice")
        return label_space(list(texts.items()))

    def digest(self) -> str:
        """SHA-256 of all that decides what the model is asked; not of comments, `about`, or where the data is."""
        labels = self.space()
        content = self.model_dump(exclude={"about", "data", "labels"})
        content["labels"] = [labels.names, labels.texts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def testbed(self, name: str) -> Testbed:
        """The testbed of this name. Raises BadInput."""
        space = self.space()
        placeholders = [each for _, each in pieces(self.template) if each is not None]
        named = dict.fromkeys([*map(column_of, placeholders), *self.required])
        columns = (*(each for each in OURS if each in named), *(each for each in named if each not in OURS))
        for key, names in (("columns", self.columns), ("map", self.map)):
            for ours in names:
                if ours not in OURS and ours not in columns and ours != KNOWN:
                    raise BadInput(f"{key}: no column {ours!r} is read{nearest(ours, [*OURS, KNOWN, *columns])}")
        theirs = list(self.columns.values())
        twice = next((each for each in theirs if theirs.count(each) > 1), None)
        if twice is not None:
            raise BadInput(f"columns: names {twice!r} twice")
        relations = self.relations or ("by_columns" if len(space) == 2 else "identical_agree")
        if len(space) > 2 and relations not in OF_ANY_LABELS:
            raise BadInput(
                f"relations: {relations} says which claim is true, and there are {len(space)} labels; with more "
                f"than two, use one of {', '.join(OF_ANY_LABELS)}"
            )
        compared = "choice_2" in columns
        return Testbed(
            name=name,
            file=self.data,
            template=self.template,
            columns=columns,
            gold_free=RULES.get(relations, RULES["identical_agree"]),
            upstream=PUBLISHED[self.upstream or ("leaking_comparison" if compared else "leaking_keys")],
            strip_newlines=self.strip_newlines,
            grouped_by=self.groups or "consistency_id",
            relation=SETS.get(relations),
            may_be_empty=tuple(self.may_be_empty),
            space=space,
            separator=self.separator,
            reading=Reading(
                columns=self.columns,
                values={column: self._meanings(column, given, space) for column, given in self.map.items()},
                group_by=self.groups,
                in_file=True,
            ),
            digest=self.digest(),
        )

    def _meanings(self, column: str, given: dict[str, str], space: LabelSpace) -> dict[str, str]:
        """Our values by the file's (folded). Raises BadInput for a value given twice, and for an unknown label."""
        meanings: dict[str, str] = {}
        for theirs, ours in given.items():
            if as_written(theirs) in meanings:
                raise BadInput(f"map: {column}: says twice what {theirs.strip()!r} means")
            if column == "label" and space != TRUE_FALSE and ours.strip() not in space.names:
                raise BadInput(f"map: label: {theirs}: there is no label {shown(ours)}{nearest(ours, space.names)}")
            meanings[as_written(theirs)] = ours.strip()
        return meanings


class _Texts(yaml.SafeLoader):
    """YAML in which every scalar is text, and a repeated key is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            where = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise BadInput(f"{where}: a key is one text")
            if key.value in seen:
                raise BadInput(f"{where}: has the key {key.value!r} twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Texts.yaml_implicit_resolvers = {}


def parse_definition(text: str) -> Definition:
    """The keys of a file, each checked for itself; Definition.testbed checks them together. Raises BadInput."""
    try:
        content = yaml.load(text, Loader=_Texts)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise BadInput(f"is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise BadInput("holds no keys; a testbed has at least a template")
    try:
        return Definition.model_validate(content)
    except ValidationError as error:
        raise BadInput(_message(error)) from None


def parse_testbed(text: str, name: str) -> Testbed:
    """The testbed that a file's text defines. Raises BadInput in one line that names the key, not the file."""
    return parse_definition(text).testbed(name)


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return f"there is no key {place[-1]!r}{nearest(place[-1], Definition.model_fields)}"
    if first["type"] == "missing":
        return f'{place[0]}: is missing; it is how a claim is asked, as in template: "Review: {{choice}}\\nPositive:"'
    if first["type"] == "literal_error":
        expected = first["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{place[0]}: {shown(first['input'])} is none of {expected}"
    if place[0] == "labels":
        return 'labels: is neither a list of names nor one text for each name, as in positive: " positive"'
    return f"{': '.join(place)}: {first['msg'][0].lower()}{first['msg'][1:]}, not {shown(first['input'])}"
