"""Groups of claims, and pools of whole groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from src.icm.columns import GroupedBy
from src.icm.consistency import Relation
from src.icm.testbeds.testbed import Claim
from src.icm.values import BadInput, shown


def grouped_by_question(claims: Sequence[Claim]) -> list[Claim]:
    """The claims, those with the same question (spaces around it ignored) in one group, named after its first row."""
    groups: dict[str, str] = {}
    return [replace(claim, group=groups.setdefault(claim.question.strip(), claim.group)) for claim in claims]


class BadRow(BadInput):
    """Of the row with this index among those of its file (of_row)."""

    def __init__(self, of_row: int, message: str) -> None:
        super().__init__(message)
        self.of_row = of_row


def check_relations(claims: Sequence[Claim]) -> None:
    """Raises BadRow where rows of a group state different relations, or exactly one of its claims cannot be true."""
    groups: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.option is None:
            groups[claim.group].append(claim)
    for members in groups.values():
        first = members[0]
        for claim in members[1:]:
            if claim.relation is not first.relation:
                stated = ["none" if each.relation is None else each.relation.value for each in (first, claim)]
                raise BadRow(
                    claim.of_row,
                    f"rows {first.of_row} and {claim.of_row} are of one group ({shown(first.group)}), and their "
                    f"consistency_relation differs: {stated[0]}, {stated[1]}",
                )
        if first.relation is Relation.EXACTLY_ONE:
            seen: dict[str, Claim] = {}
            for claim in members:
                if (other := seen.setdefault(claim.text, claim)) is not claim:
                    raise BadRow(
                        claim.of_row,
                        f"rows {other.of_row} and {claim.of_row} are the same claim, and exactly one of their "
                        f"group ({shown(first.group)}) must be true",
                    )
            if len(members) == 1:
                raise BadRow(
                    first.of_row,
                    f"row {first.of_row} is the only one of its group ({shown(first.group)}), of which exactly one "
                    'must be true: add the group\'s other rows, or say "at most one" or "none" in its '
                    "consistency_relation",
                )


def sample_pool(claims: Sequence[Claim], batch_size: int, rng: np.random.Generator) -> list[Claim]:
    """At most batch_size claims: whole groups in random order, without those that no longer fit.

    Raises BadInput where not one group fits.
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
    hint = "; rows with the same question are one group, unless --group_by none" if grouped_by == "question" else ""
    if min(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the smallest group of claims ({min(sizes)}){hint}")
    if count is None and max(sizes) > batch_size:
        raise BadInput(f"--batch_size {batch_size} is smaller than the largest group of claims ({max(sizes)}){hint}")
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
