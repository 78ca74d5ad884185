"""The relations between claims of one group, by the names that a testbed file uses.

A rule takes two claims and says how their labels constrain each other. The leaking_* rules of the published code read
gold labels; all others read only what the claims say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from src.icm.consistency import Relation

if TYPE_CHECKING:
    from src.icm.testbeds.testbed import Claim

RelationRule = Callable[["Claim", "Claim"], Relation | None]


def identical_agree(first: Claim, second: Claim) -> Relation | None:
    """Two copies of one claim have the same label. Nothing is known of two different claims."""
    same = (first.question, first.choice, first.choice_2) == (second.question, second.choice, second.choice_2)
    return Relation.AGREE if same and first.shown == second.shown else None


def compare_two(first: Claim, second: Claim) -> Relation | None:
    """Of "A is better than B" and "B is better than A" exactly one holds."""
    if (first.choice, first.choice_2) == (second.choice_2, second.choice):
        return Relation.EXACTLY_ONE
    return identical_agree(first, second)


def same_answer(first: Claim, second: Claim) -> Relation | None:
    """Solutions with different answers cannot both be right; those with the same answer have the same label.

    Of a solution without an answer nothing is known.
    """
    if first.answer is None or second.answer is None:
        return identical_agree(first, second)
    return Relation.AGREE if first.answer == second.answer else Relation.AT_MOST_ONE


def by_columns(first: Claim, second: Claim) -> Relation | None:
    """For users' data files: compare_two where both claims have a choice_2, else same_answer."""
    if first.choice_2 is not None and second.choice_2 is not None:
        return compare_two(first, second)
    return same_answer(first, second)


def leaking_keys(first: Claim, second: Claim) -> Relation | None:
    """Published TruthfulQA keys: 'A' if gold is true else 'B'. Gold never breaks them, so they leak it."""
    return Relation.AGREE if first.gold == second.gold else Relation.AT_MOST_ONE


def leaking_comparison(first: Claim, second: Claim) -> Relation | None:
    """Published comparison keys: 'A>B' if gold is true else 'B>A'; the same leak, with exactly one of two."""
    return Relation.AGREE if first.gold == second.gold else Relation.EXACTLY_ONE


def unrelated(first: Claim, second: Claim) -> Relation | None:
    """Nothing is known of any two claims."""
    return None


RULES: Final[Mapping[str, RelationRule]] = {
    "identical_agree": identical_agree,
    "compare_two": compare_two,
    "same_answer": same_answer,
    "by_columns": by_columns,
    "none": unrelated,
}
"""What a testbed file can say of pairs, under `relations`."""
SETS: Final[Mapping[str, Relation]] = {
    "agree": Relation.AGREE,
    "different": Relation.DIFFERENT,
    "at_most_one": Relation.AT_MOST_ONE,
    "exactly_one": Relation.EXACTLY_ONE,
}
"""What it can say there of a whole group."""
OF_ANY_LABELS: Final = ("identical_agree", "agree", "different", "none")
"""Those for any number of labels; all others say which claim is true."""
PUBLISHED: Final[Mapping[str, RelationRule]] = {
    "leaking_keys": leaking_keys,
    "leaking_comparison": leaking_comparison,
    "same_answer": same_answer,
}
"""What a testbed file can say under `upstream`."""
LEAKING: Final = (leaking_keys, leaking_comparison)
"""Made from gold labels."""
