"""Testbeds: how a row becomes a claim, and which claims of a group constrain each other.

The prompt templates are those of the published code (Wen et al. 2025, appendix); they end right before the label.
Constraints come in three kinds (`--consistency`): "gold-free" uses only what the claims say, "upstream" reproduces
the published keys, which are made from gold labels and leak them, "none" has no constraints.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from src.icm.consistency import Consistency, Relation

ConsistencyMode = Literal["gold-free", "upstream", "none"]
GroupedBy = Literal["consistency_id", "question", "none"]


class BadInput(Exception):
    """Input that cannot be used; the message names the file, the line and what to do."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of a data file, ready to be asked.

    text: the question, ending right before the label. group: claims of one group may constrain each other.
    gold: the label to report agreement with; never seen by the search. row: index in the data file.
    """

    text: str
    group: str
    gold: bool | None
    row: int
    question: str
    choice: str
    choice_2: str | None = None
    answer: str | None = None


RelationRule = Callable[[Claim, Claim], Relation | None]


@dataclass(frozen=True, slots=True)
class Testbed:
    """A data file's template and its constraints.

    columns: what every row must have. gold_free, upstream: the relation of two claims of one group, or None.
    grouped_by: what makes rows one group.
    """

    name: str
    file: str
    template: str
    columns: tuple[str, ...]
    gold_free: RelationRule
    upstream: RelationRule
    strip_newlines: bool = False
    grouped_by: GroupedBy = "consistency_id"

    def claim(self, row: Mapping[str, Any], index: int) -> Claim:
        """The claim of one row. Raises BadInput naming the missing column or unusable value."""
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            raise BadInput(f"lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
        empty = [column for column in self.columns if str(row[column]).strip() == ""]
        if empty:
            raise BadInput(f"has nothing in {', '.join(empty)}")
        fields = {
            key: str(row[key]) for key in ("question", "choice", "choice_2", "answer") if row.get(key) is not None
        }
        group = row.get("consistency_id")
        for name, text in {**fields, "consistency_id": str(group)}.items():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise BadInput(f"has half a character (a lone surrogate) in {name}")
        return Claim(
            text=self.text(fields),
            group=f"row {index}" if group in (None, "") else str(group),
            gold=parse_label(row.get("label")),
            row=index,
            question=fields["question"],
            choice=fields["choice"],
            choice_2=fields.get("choice_2"),
            answer=fields.get("answer"),
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
        rule = self.gold_free if mode == "gold-free" else self.upstream
        return Consistency.of_groups([c.group for c in claims], lambda i, j: rule(claims[i], claims[j]))


def parse_label(value: object) -> bool | None:
    """A gold label: 0/1, true/false in any case, or absent. Raises BadInput for anything else."""
    if value is None or value == "":
        return None
    text = str(value).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise BadInput(f"has the label {value!r}, which is neither 0/1 nor true/false")


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
    """Solutions that end in different answers cannot both be right; those with one answer stand or fall together."""
    return Relation.AGREE if first.answer == second.answer else Relation.AT_MOST_ONE


def opposite_opinions(first: Claim, second: Claim) -> Relation | None:
    """The built-in pairs hold two opposite opinions of one thing: exactly one of them is positive."""
    return Relation.EXACTLY_ONE


def by_columns(first: Claim, second: Claim) -> Relation | None:
    """For data files of users: comparisons where there is a choice_2, answers where there are answers."""
    if first.choice_2 is not None and second.choice_2 is not None:
        return compare_two(first, second)
    if first.answer is not None and second.answer is not None:
        return same_answer(first, second)
    return identical_agree(first, second)


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
            gold_free=opposite_opinions,
            upstream=leaking_comparison,
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
            columns=("question", "choice", "answer"),
            gold_free=same_answer,
            upstream=same_answer,
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


def custom_testbed(first_row: Mapping[str, Any]) -> Testbed:
    """The testbed of a `--data` file: comparisons if its first row has a choice_2, single claims otherwise."""
    comparison = first_row.get("choice_2") not in (None, "")
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
    )


def sample_pool(claims: Sequence[Claim], batch_size: int, rng: np.random.Generator) -> list[Claim]:
    """At most batch_size claims, whole groups of any size, in random order of groups.

    A group that would overflow is passed over for a smaller one. Raises BadInput where not one group fits.
    """
    return split_pools(claims, batch_size, 1, rng)[0]


def split_pools(
    claims: Sequence[Claim], batch_size: int, count: int | None, rng: np.random.Generator
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
    if min(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the smallest group of claims ({min(sizes)})")
    if count is None and max(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the largest group of claims ({max(sizes)})")
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
