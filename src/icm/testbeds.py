"""Testbeds: how a row becomes a claim, and which claims of a group constrain each other.

The prompt templates are those of the published code (Wen et al. 2025, appendix); they end right before the label.
Constraints come in three kinds (`--consistency`): "gold-free" uses only what the claims say, "upstream" reproduces
the published keys, which are made from gold labels and leak them, "none" has no constraints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from src.icm.consistency import Consistency, Relation
from src.icm.values import BadInput as BadInput
from src.icm.values import group_of, is_missing, listed, options_of, parse_relation, shown, text_of
from src.icm.values import parse_label as parse_label

ConsistencyMode = Literal["gold-free", "upstream", "none"]
GroupedBy = Literal["consistency_id", "question", "none"]


TEXTS: Final = ("question", "choice", "choice_2", "answer")
"""Columns whose texts make a claim."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a data file, ready to be asked.

    text: the question, ending right before the label. group: claims of one group may constrain each other.
    gold: the label to report agreement with; never seen by the search. row: its number among the file's claims. of_row:
    the index of its row in the file, the same number unless rows before it list several options. option: its place
    where it is one of several. relation: what holds for its whole group, or for the options of its row.
    """

    text: str
    group: str
    gold: int | None
    row: int
    of_row: int
    question: str
    choice: str
    choice_2: str | None = None
    answer: str | None = None
    relation: Relation | None = None
    option: int | None = None


RelationRule = Callable[[Claim, Claim], Relation | None]


@dataclass(frozen=True, slots=True)
class Testbed:
    """A data file's template and its constraints.

    columns: what every row must have. gold_free, upstream: the relation of two claims of one group, or None.
    relation: what holds for all claims of a group together, as a consistency_relation column can say of a row.
    grouped_by: what makes rows one group. partly: columns that the file must have, in which rows may have nothing.
    space: the labels; gold is an index of it.
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
    partly: tuple[str, ...] = ()
    space: LabelSpace = TRUE_FALSE

    def claims(self, row: Mapping[str, Any], index: int, first: int) -> list[Claim]:
        """The claims of row `index` of a file, numbered from `first`: one, or one for each option that `choice` lists.

        Exactly one of the options is true unless the row's consistency_relation says otherwise. Their gold stands in
        `label`, or else in `answer`. Raises BadInput as `claim` does.
        """
        told = row.get("label") if not is_missing(row.get("label")) else row.get("answer")
        options = options_of(row.get("choice"), told)
        if options is None:
            return [replace(self.claim(row, index), row=first)]
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
        fields = {name: text_of(name, row[name]) for name in TEXTS if not is_missing(row.get(name))}
        stated = row.get("consistency_relation")
        group = group_of(row.get("consistency_id")) if self.grouped_by == "consistency_id" else None
        return Claim(
            text=self.text(fields),
            group=f"row {index}" if group is None else group,
            gold=parse_label(row.get("label")),
            row=index,
            of_row=index,
            question=fields["question"],
            choice=fields["choice"],
            choice_2=fields.get("choice_2"),
            answer=fields.get("answer"),
            relation=self.relation if is_missing(stated) else parse_relation(stated),
        )

    def text(self, fields: Mapping[str, str]) -> str:
        """The question that a claim of these fields (question, choice, choice_2) is put as, without its label."""
        shown = {k: v.replace("\n", "") if self.strip_newlines and k != "question" else v for k, v in fields.items()}
        return self.template.format_map(shown)

    def imitates(self, claim: Claim) -> bool:
        """Whether a field of the claim holds the template's own opening, or its ending, at the start of a line.

        Such a claim can close its own demonstration and go on as another one, with a label of its author's choice.
        """
        opening = self.template.partition("{")[0].strip()
        ending = self.template.rpartition("}")[2].strip().rpartition("\n")[2]
        fields = (claim.question, claim.choice, claim.choice_2, claim.answer)
        lines = [line.strip() for field in fields if field is not None for line in field.splitlines()[1:]]
        return any(line.startswith((opening, ending)) for line in lines)

    @property
    def upstream_leaks(self) -> bool:
        """Whether the published keys of this testbed are made from gold labels."""
        return self.upstream in (leaking_keys, leaking_comparison)

    def consistency(self, claims: Sequence[Claim], mode: ConsistencyMode) -> Consistency:
        """All constraints of a pool. Raises BadInput where "upstream" keys need gold labels that are not there."""
        if mode == "none":
            return Consistency([])
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


def grouped_by_question(claims: Sequence[Claim]) -> list[Claim]:
    """The claims, those with the same question (but for space around it) in one group, named after its first row."""
    groups: dict[str, str] = {}
    return [replace(claim, group=groups.setdefault(claim.question.strip(), claim.group)) for claim in claims]


def check_relations(claims: Sequence[Claim]) -> None:
    """Raises BadInput where a group's rows disagree on what holds for it, or one claim of several can't be true."""
    groups: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.option is None:
            groups[claim.group].append(claim)
    for members in groups.values():
        first = members[0]
        for claim in members[1:]:
            if claim.relation is not first.relation:
                told = ["none" if each.relation is None else each.relation.value for each in (first, claim)]
                raise BadInput(
                    f"rows {first.of_row} and {claim.of_row} are of one group ({shown(first.group)}), and their "
                    f"consistency_relation differs: {told[0]}, {told[1]}"
                )
        if first.relation is Relation.EXACTLY_ONE:
            seen: dict[str, Claim] = {}
            for claim in members:
                if (other := seen.setdefault(claim.text, claim)) is not claim:
                    raise BadInput(
                        f"rows {other.of_row} and {claim.of_row} are the same claim, and exactly one of their "
                        f"group ({shown(first.group)}) is to be true"
                    )
            if len(members) == 1:
                raise BadInput(f"row {first.of_row} is alone in its group, of which exactly one is to be true")


def identical_agree(first: Claim, second: Claim) -> Relation | None:
    """The same claim twice has one truth; nothing else is known."""
    same = (first.question, first.choice, first.choice_2) == (second.question, second.choice, second.choice_2)
    return Relation.AGREE if same else None


def compare_two(first: Claim, second: Claim) -> Relation | None:
    """Of "A is better than B" and "B is better than A" exactly one holds."""
    if (first.choice, first.choice_2) == (second.choice_2, second.choice):
        return Relation.EXACTLY_ONE
    return identical_agree(first, second)


def same_answer(first: Claim, second: Claim) -> Relation | None:
    """Solutions that end in different answers cannot both be right; those with one answer stand or fall together.

    Of a solution without an answer nothing is known.
    """
    if first.answer is None or second.answer is None:
        return identical_agree(first, second)
    return Relation.AGREE if first.answer == second.answer else Relation.AT_MOST_ONE


def by_columns(first: Claim, second: Claim) -> Relation | None:
    """For data files of users: comparisons where there is a choice_2, answers where there are answers."""
    if first.choice_2 is not None and second.choice_2 is not None:
        return compare_two(first, second)
    return same_answer(first, second)


def leaking_keys(first: Claim, second: Claim) -> Relation | None:
    """Published TruthfulQA keys: 'A' if gold is true else 'B'. Gold is always consistent with them; they leak it."""
    return Relation.AGREE if first.gold == second.gold else Relation.AT_MOST_ONE


def leaking_comparison(first: Claim, second: Claim) -> Relation | None:
    """Published comparison keys: 'A>B' if gold is true else 'B>A'; the same leak, with exactly one of two."""
    return Relation.AGREE if first.gold == second.gold else Relation.EXACTLY_ONE


CLAIM_TEMPLATE = "Question: {question}\nClaim: {choice}\nI think this claim is"

TESTBEDS: dict[str, Testbed] = {
    testbed.name: testbed
    for testbed in (
        Testbed(
            name="builtin",
            file="",
            template="Review: {choice}\nPositive:",
            columns=("question", "choice"),
            gold_free=identical_agree,
            upstream=leaking_comparison,
            relation=Relation.EXACTLY_ONE,  # of two opposite opinions of one thing
        ),
        Testbed(
            name="truthfulQA",
            file="train_truthfulqa.json",
            template=CLAIM_TEMPLATE,
            columns=("question", "choice"),
            gold_free=identical_agree,
            upstream=leaking_keys,
        ),
        Testbed(
            name="truthfulQA-preference",
            file="truthfulqa_preference.json",
            template="Question: {question}\nAnswer 1: {choice}\nAnswer 2: {choice_2}\n"
            "Claim: Answer 1 is more truthful than Answer 2.\nI think this claim is",
            columns=("question", "choice", "choice_2"),
            gold_free=compare_two,
            upstream=leaking_comparison,
        ),
        Testbed(
            name="gsm8k",
            file="gsm8k_verification.json",
            template=CLAIM_TEMPLATE,
            columns=("question", "choice"),
            gold_free=same_answer,
            upstream=same_answer,
            partly=("answer",),
        ),
        Testbed(
            name="alpaca",
            file="alpaca_preference.json",
            template="Human: {question}\nResponse 1: {choice}\nResponse 2: {choice_2}\n"
            "Claim: Response 1 is more helpful and harmless than Response 2.\nI think this claim is",
            columns=("question", "choice", "choice_2"),
            gold_free=compare_two,
            upstream=leaking_comparison,
            strip_newlines=True,
        ),
    )
}


def custom_testbed(row: Mapping[str, Any], grouped_by: GroupedBy = "consistency_id") -> Testbed:
    """The testbed of a `--data` file: comparisons if a typical `row` has a choice_2, single claims otherwise."""
    comparison = not is_missing(row.get("choice_2"))
    return Testbed(
        name="data",
        file="",
        template="Question: {question}\nAnswer 1: {choice}\nAnswer 2: {choice_2}\n"
        "Claim: Answer 1 is better than Answer 2.\nI think this claim is"
        if comparison
        else CLAIM_TEMPLATE,
        columns=("question", "choice", "choice_2") if comparison else ("question", "choice"),
        gold_free=by_columns,
        upstream=leaking_comparison if comparison else leaking_keys,
        grouped_by=grouped_by,
    )


def sample_pool(claims: Sequence[Claim], batch_size: int, rng: np.random.Generator) -> list[Claim]:
    """At most batch_size claims, whole groups of any size, in random order of groups.

    A group that would overflow is passed over for a smaller one. Raises BadInput where not one group fits.
    """
    return split_pools(claims, batch_size, 1, rng)[0]


def split_pools(
    claims: Sequence[Claim],
    batch_size: int,
    count: int | None,
    rng: np.random.Generator,
    grouped_by: GroupedBy = "consistency_id",
) -> list[list[Claim]]:
    """`count` pools (None: as many as hold all claims) of at most batch_size claims, whole groups, about equally large.

    Groups come in random order; each goes to the smallest pool, and to none where it does not fit into any. Raises
    BadInput where not one group fits, where a pool stays empty, or where all were wanted and a group is too large.
    """
    groups: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        groups[claim.group].append(claim)
    keys = list(groups)
    sizes = [len(members) for members in groups.values()]
    made = "; rows with the same question are one group, unless --group_by none" if grouped_by == "question" else ""
    if min(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the smallest group of claims ({min(sizes)}){made}")
    if count is None and max(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the largest group of claims ({max(sizes)}){made}")
    pools: list[list[Claim]] = [[] for _ in range(count or math.ceil(len(claims) / batch_size))]
    for index in rng.permutation(len(keys)):
        members = groups[keys[index]]
        smallest = min(pools, key=len)
        if len(smallest) + len(members) <= batch_size:
            smallest += members
        elif count is None:
            pools.append(list(members))
    if not all(pools):
        raise BadInput(f"--num_batches {count} is more than the {len(keys)} groups of claims")
    return pools
