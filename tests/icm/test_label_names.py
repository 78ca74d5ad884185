"""Labels as a run's files have them: what is written is read again."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.icm.label_names import (
    TRUE_FALSE_NAMES,
    confusion,
    confusion_lines,
    counts_of,
    describe_counts,
    logprobs,
    names_of,
    read_label,
    read_odds,
    written_label,
    written_odds,
)
from src.icm.objective import LogOdds

MOODS = ("negative", "neutral", "positive")
odds = st.floats(-30, 30)


@given(st.sampled_from([None, False, True]), odds)
def test_true_and_false_are_written_as_such(label: bool | None, log_odds: float) -> None:
    assert written_label(label, TRUE_FALSE_NAMES) is label
    assert read_label(label, TRUE_FALSE_NAMES) is label
    assert written_odds(log_odds, TRUE_FALSE_NAMES) == {"log_odds": log_odds}
    assert written_odds(log_odds, TRUE_FALSE_NAMES, "zero_shot") == {"zero_shot": log_odds}
    assert read_odds({"log_odds": log_odds}, TRUE_FALSE_NAMES) == log_odds


@given(st.one_of(st.tuples(odds, odds), odds), st.sampled_from(["log_odds", "zero_shot"]))
def test_others_are_written_by_name(log_odds: LogOdds, key: str) -> None:
    names = MOODS if isinstance(log_odds, tuple) else ("no", "yes")
    row = json.loads(json.dumps(written_odds(log_odds, names, key)))
    assert list(row) == ["logprobs" if key == "log_odds" else key]
    assert math.fsum(map(math.exp, row[next(iter(row))].values())) == pytest.approx(1)
    assert read_odds(row, names, key) == pytest.approx(log_odds, abs=1e-9)
    for label in range(len(names)):
        again = read_label(written_label(label, names), names)
        assert again == label
        assert type(again) is (bool if len(names) == 2 else int)


@pytest.mark.parametrize(
    "row", [{}, {"logprobs": None}, {"logprobs": {"negative": -1.0}}, {"logprobs": [1, 2, 3]},
            {"logprobs": {"negative": -1.0, "neutral": "x", "positive": -1.0}}]
)  # fmt: skip
def test_what_is_damaged_is_not_known(row: dict[str, Any]) -> None:
    assert read_odds(row, MOODS) is None
    assert read_label(True, MOODS) is None
    assert read_label("true", TRUE_FALSE_NAMES) is None
    assert read_label("other", MOODS) is None


@pytest.mark.parametrize("settings", [{}, {"labels": None}, {"labels": "ab"}, {"labels": ["one"]}, {"labels": [1, 2]}])
def test_a_run_that_tells_no_names_is_of_true_and_false(settings: dict[str, Any]) -> None:
    assert names_of(settings) == TRUE_FALSE_NAMES


def test_counts_and_the_confusion_table() -> None:
    assert counts_of([True, None, False, True], TRUE_FALSE_NAMES) == {"true_labels": 2}
    counts = counts_of([2, None, 0, 2], MOODS)
    assert counts == {"label_counts": {"negative": 1, "neutral": 0, "positive": 2}}
    assert describe_counts(counts) == "1 negative, 0 neutral, 2 positive"
    assert describe_counts({"true_labels": 2}) == "2 True"
    table = confusion([(2, 0), (2, 2), (None, 1), (1, None), (0, 0), (2, 2)], 3)
    assert table == [[1, 0, 1], [0, 0, 0], [0, 0, 2]]
    assert confusion_lines(table, MOODS) == [
        "gold      negative  neutral  positive",
        "negative         1        0         1",
        "neutral          0        0         0",
        "positive         0        0         2",
    ]


def test_log_probabilities_of_far_apart_labels_stay_finite() -> None:
    assert logprobs((800.0, -800.0)) == pytest.approx([-800.0, 0.0, -1600.0])
