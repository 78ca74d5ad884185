"""Testbeds: how a row becomes a claim, which labels there are, and which claims of a group constrain each other.

The built-in ones are files in this folder (NAME.yaml). Those of the paper's data sets have the templates of the
published code (Wen et al. 2025, appendix). A user's testbed is a file of the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from typing import Any, Final

from src.icm.columns import GroupedBy as GroupedBy
from src.icm.columns import Reading
from src.icm.testbeds.definition import Definition, parse_definition
from src.icm.testbeds.pools import sample_pool as sample_pool
from src.icm.testbeds.pools import split_pools as split_pools
from src.icm.testbeds.rules import by_columns, leaking_comparison, leaking_keys
from src.icm.testbeds.testbed import Claim as Claim
from src.icm.testbeds.testbed import ConsistencyMode as ConsistencyMode
from src.icm.testbeds.testbed import Testbed as Testbed
from src.icm.values import BadInput as BadInput
from src.icm.values import is_missing

NAMES: Final = ("builtin", "truthfulQA", "truthfulQA-preference", "gsm8k", "alpaca")
"""In the order in which they are shown."""

DEFINITIONS: Final[Mapping[str, Definition]] = {
    name: parse_definition((resources.files(__name__) / f"{name}.yaml").read_text("utf-8")) for name in NAMES
}
TESTBEDS: Final[dict[str, Testbed]] = {
    name: replace(definition.testbed(name), reading=Reading(), digest="") for name, definition in DEFINITIONS.items()
}

SINGLE_CLAIM: Final = "Question: {question}\nClaim: {choice}\nI think this claim is"
COMPARISON: Final = (
    "Question: {question}\nAnswer 1: {choice}\nAnswer 2: {choice_2}\n"
    "Claim: Answer 1 is better than Answer 2.\nI think this claim is"
)
"""Templates of --data files."""


def custom_testbed(row: Mapping[str, Any], grouped_by: GroupedBy = "consistency_id") -> Testbed:
    """The testbed of a `--data` file: comparisons if a typical `row` has a choice_2, single claims otherwise."""
    comparison = not is_missing(row.get("choice_2"))
    return Testbed(
        name="data",
        file="",
        template=COMPARISON if comparison else SINGLE_CLAIM,
        columns=("question", "choice", "choice_2") if comparison else ("question", "choice"),
        gold_free=by_columns,
        upstream=leaking_comparison if comparison else leaking_keys,
        grouped_by=grouped_by,
    )


def recorded_testbed(name: str, record: Mapping[str, Any], compares: bool) -> Testbed:
    """The testbed of a run on disk. Only its template and labels are sure to be the run's, not its constraints.

    record: what Testbed.record gave for a testbed file, empty for other data. compares: whether the run's claims are
    comparisons. Raises BadInput for a damaged record.
    """
    if record:
        return Testbed.of_record(record)
    return TESTBEDS.get(name) or custom_testbed({"choice_2": "another" if compares else None})
