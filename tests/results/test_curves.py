"""Curves of a journal."""

from __future__ import annotations

from src.results.curves import curves_of

START = {"event": "start", "labels": {"0": True, "1": False}, "U": 1.0, "seconds": 2.0}
STEP = {"event": "step", "iteration": 0, "T": 10.0, "accepted": True, "changes": {"2": True}, "U": 3.0,
        "inconsistent": 1, "tokens_cached": 30, "tokens_computed": 10, "seconds": 1.0}  # fmt: skip
REFUSED = {"event": "step", "iteration": 1, "T": 5.0, "accepted": False, "U": 3.0, "inconsistent": 1, "seconds": 0.0}
FLIP = {"event": "step", "iteration": 2, "T": 4.0, "accepted": True, "changes": {"0": False, "2": False}, "U": 4.0}
REBUILD = {"event": "rebuild", "iteration": 3, "U": 3.5}
MIRROR = {"event": "mirror", "iteration": 3, "accepted": True, "changes": {"0": True, "1": True, "2": True}, "U": 5.0}


def test_every_series_has_a_value_a_line() -> None:
    curves = curves_of([START, STEP, REFUSED, FLIP, REBUILD, MIRROR], [True, True, False])
    assert curves.iteration == [0, 1, 2, 3, 3, 3]
    assert curves.utility == [1.0, 3.0, 3.0, 4.0, 3.5, 5.0]
    assert curves.labelled == [2, 3, 3, 3, 3, 3]
    assert curves.balance == [0.5, 2 / 3, 2 / 3, 0.0, 0.0, 1.0]
    assert curves.accuracy == [0.5, 1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3]
    assert curves.temperature == [None, 10.0, 5.0, 4.0, None, None]
    assert curves.acceptance == [None, 1.0, 0.5, 2 / 3, 2 / 3, 2 / 3]
    assert curves.hit_rate == [None, 0.75, 0.75, 0.75, 0.75, 0.75]
    assert curves.seconds == [2.0, 1.5, 1.0, 1.0, 1.0, 1.0]
    assert curves.inconsistent == [None, 1, 1, 1, 1, 1]
    assert (curves.rebuilds, curves.mirrors) == ([3], [3])


def test_gold_that_is_not_known_is_not_compared() -> None:
    assert curves_of([START, STEP], [None, False]).accuracy == [1.0, 1.0]
    assert curves_of([START], []).accuracy == [None]


def test_no_journal_no_curve() -> None:
    assert curves_of([], []).utility == []
