"""The progress bar of a search: the time that it says is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from src.icm.annealing import SearchSettings
from src.icm.objective import Objective
from src.pipeline.progress import GROWTH, SearchProgress


def pool(size: int, **settings: Any) -> Any:
    problem = SimpleNamespace(size=size, settings=SearchSettings(K=size, **settings), objective=Objective(1.0))
    return SimpleNamespace(problem=problem, gold=[True] * size)


def state(labelled: int, size: int) -> Any:
    labels = tuple(True if claim < labelled else None for claim in range(size))
    return SimpleNamespace(
        labels=labels,
        labelled=range(labelled),
        iteration=labelled,
        accepted=labelled,
        evaluation=SimpleNamespace(utility=1.0),
    )


def shown(
    capsys: pytest.CaptureFixture[str], moments: list[tuple[float, int]], size: int = 64, **more: Any
) -> list[str]:
    """The last text of the bar at each moment: (seconds, claims labelled)."""
    now = 0.0
    texts = []
    with SearchProgress(pool(size, **more), quiet=False, clock=lambda: now) as progress:
        for seconds, labelled in moments:
            now = seconds
            progress.update(state(labelled, size), {})
            progress._bar.refresh()
            texts.append(capsys.readouterr().err.split("\r")[-1])
    return texts


def test_claims_that_cost_more_and_more_are_not_taken_to_cost_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, half, whole = shown(capsys, [(0.0, 8), (30.0, 32), (170.0, 64)])
    assert "left" not in begun  # nothing is known yet
    share, first = 0.5**GROWTH, (8 / 64) ** GROWTH
    expected = 30.0 * (1 - share) / (share - first)
    assert f"left={int(expected) // 60:02d}:{int(expected) % 60:02d}" in half
    assert 120 < expected < 160  # a bar that takes all claims alike would say 40 s
    assert "left=00:00" in whole
    assert "32/64" in half


def test_what_an_earlier_session_did_does_not_count_as_speed(capsys: pytest.CaptureFixture[str]) -> None:
    resumed, later = shown(capsys, [(5.0, 48), (15.0, 56)])
    assert "left" not in resumed
    share, first = (56 / 64) ** GROWTH, (48 / 64) ** GROWTH
    assert f"left=00:{int(10.0 * (1 - share) / (share - first)):02d}" in later


def test_capped_questions_cost_the_same_throughout(capsys: pytest.CaptureFixture[str]) -> None:
    _, half = shown(capsys, [(0.0, 0), (30.0, 32)], context_cap=8)
    assert "left=00:30" in half


def test_iterations_are_as_tqdm_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    _, half = shown(capsys, [(0.0, 8), (30.0, 32)], stop="K")
    assert "left" not in half
    assert "step" in half


def test_a_quiet_search_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchProgress(pool(8), quiet=True) as progress:
        progress.update(state(4, 8), {})
        progress.update(state(6, 8), {})
    assert capsys.readouterr() == ("", "")
