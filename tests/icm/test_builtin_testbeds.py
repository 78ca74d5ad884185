"""The testbeds that ship as files put claims as they did when they were code, to the byte, and relate them alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from src.icm import testbeds

# What the classes of commit 5794ad2 made of these rows, before testbeds were files.
BEFORE: dict[str, Any] = json.loads((Path(__file__).parent / "builtin_testbeds.json").read_text("utf-8"))
NOW: dict[str, testbeds.Testbed] = {
    **testbeds.TESTBEDS,
    "data2": testbeds.custom_testbed({}),
    "data3": testbeds.custom_testbed({"choice_2": "x"}),
}


def test_there_are_as_many() -> None:
    assert list(BEFORE["testbeds"]) == list(NOW)


@pytest.mark.parametrize("name", NOW)
def test_claims_groups_and_relations_are_those_of_before(name: str) -> None:
    before, testbed = BEFORE["testbeds"][name], NOW[name]
    claims = [testbed.claim(row, index) for index, row in enumerate(BEFORE["rows"])]
    assert [claim.text for claim in claims] == before["texts"]
    assert [claim.group for claim in claims] == before["groups"]
    assert [claim.gold for claim in claims] == before["gold"]
    modes: tuple[Any, ...] = ("gold-free", "upstream", "none")
    found = {mode: [[list(c.claims), c.relation.value] for c in testbed.consistency(claims, mode).constraints]
             for mode in modes}  # fmt: skip
    assert found == before["constraints"]
    assert list(testbed.columns) == before["columns"]
    assert list(testbed.may_be_empty) == before["partly"]
    assert (testbed.file, testbed.grouped_by) == (before["file"], before["grouped_by"])
    assert testbed.upstream_leaks is before["leaks"]
    assert testbed.digest == "", "settings of runs name no file"
    assert testbed.separator == "\n\n"
    assert testbed.space.texts == (" False", " True")
