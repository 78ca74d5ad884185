"""Sums whose answers must differ by parity: a rule that no name in a YAML file stands for. This file is run."""

from src.icm.consistency import Relation
from src.icm.testbeds import Claim, Testbed


def same_parity(first: Claim, second: Claim) -> Relation | None:
    """Of one sum, an even and an odd answer cannot both be right; of answers alike in that, nothing is known."""
    even = [int(claim.choice) % 2 == 0 for claim in (first, second)]
    return None if even[0] == even[1] else Relation.AT_MOST_ONE


TESTBED = Testbed(
    name="sums",
    file="sums.csv",
    template="Sum: {question}\nResult: {choice}\nThe result is",
    columns=("question", "choice"),
    gold_free=same_parity,
    upstream=same_parity,
    grouped_by="question",
)
