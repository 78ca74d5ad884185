"""The progress bar of a search: the time that it says is left."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from src.icm.annealing import SearchState
from src.icm.consistency import Consistency
from src.icm.objective import Evaluation, Objective
from src.icm.problem import Problem, SearchSettings
from src.pipeline.progress import ELSEWHERE, GROWTH, PartsProgress, SearchProgress


def pool(size: int, **settings: Any) -> Any:
    groups = tuple(str(claim) for claim in range(size))
    problem = Problem(groups, Consistency([]), Objective(1.0), SearchSettings(**{"K": size, **settings}))
    return SimpleNamespace(problem=problem, gold_to_find=[True] * size, names=("False", "True"))


def state(labelled: int, size: int, **more: Any) -> SearchState:
    labels = tuple(claim % 2 == 0 if claim < labelled else None for claim in range(size))
    problem = pool(size).problem
    evaluation = Evaluation({}, 0.0, 1.0, 0, 1.0)
    return SearchState(
        **{"iteration": labelled, "labels": labels, "layout": problem.new_layout(range(labelled)),
           "evaluation": evaluation, "accepted": labelled, **more}
    )  # fmt: skip


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
            texts.append(capsys.readouterr().err.splitlines()[-1])
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_a_search_is_told_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with SearchProgress(pool(64), quiet=False, clock=lambda: now) as progress:
        for labelled in (8, 16, 16, 16, 24):
            progress.update(state(labelled, 64), {})
        now = ELSEWHERE + 1
        progress.update(state(24, 64, iteration=30), {})  # nothing was labelled, and it says so all the same
        progress.update(state(24, 64, iteration=31), {})
    said = capsys.readouterr()
    assert said.out == ""
    assert "\r" not in said.err
    lines = said.err.splitlines()
    assert [line.split(" claims [")[0] for line in lines] == ["0/64", "24/64", "24/64"]
    assert "iteration=30" in lines[1]
    assert "\u2588" not in said.err


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with SearchProgress(pool(64), quiet=False, clock=lambda: 0.0) as progress:
        progress.update(state(16, 64), {})
        progress._bar.refresh()
    assert "\r" in terminal.getvalue()
    assert "25%|" in terminal.getvalue()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, None),
        ({"unchanged": 3}, "asking all with every label flipped"),
        ({"unchanged": 3, "mirror_tried": True}, None),  # it has ended
        ({"layout_tail": True}, "asking all in a new order"),
    ],
)
def test_what_takes_long_without_a_label_is_told_when_it_begins(
    capsys: pytest.CaptureFixture[str], more: dict[str, Any], told: str | None
) -> None:
    size, settings = 8, {"patience": 3, "K": 100, "max_tail": 2}
    changes = dict(more)
    if changes.pop("layout_tail", False):
        layout = pool(size).problem.new_layout(range(6))
        changes["layout"] = layout.append(6).append(7)
    at = state(size, size, **changes)
    assert at.asks_next(pool(size, **settings).problem) == told
    with SearchProgress(pool(size, **settings), quiet=False, clock=lambda: 0.0) as progress:
        progress.update(at, {})
        said = capsys.readouterr().err
    assert (f"now={told}" in said) == (told is not None)


def test_parts_are_told_in_lines_too(capsys: pytest.CaptureFixture[str]) -> None:
    with PartsProgress(16, 2, quiet=False) as progress:
        progress.of("batch-000").update(state(4, 8), {})
        progress.finish("batch-000", 8, "U 1.0")
    said = capsys.readouterr()
    assert (said.out, "\r" in said.err) == ("", False)
    assert "batch-000: U 1.0" in said.err.splitlines()


def test_an_ascent_counts_its_questions_and_has_no_u_before_its_first_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    with SearchProgress(pool(16, search="ascent", ascent_questions=12), quiet=False) as progress:
        for labelled, asked in ((0, 16), (0, 20), (16, 16)):
            progress.update(state(labelled, 16), {"asked": asked})
            progress._bar.refresh()
            texts.append(capsys.readouterr().err.splitlines()[-1])
    assert ["16/240 questions at most" in texts[0], "36/240" in texts[1], "52/240" in texts[2]] == [True] * 3
    assert ["U=" in text for text in texts] == [False, False, True]


def test_an_ascent_that_asks_again_after_a_stop_keeps_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchProgress(pool(16, search="ascent", ascent_questions=1), quiet=False) as progress:
        progress.update(state(16, 16), {"asked": 64})
        progress.update(state(16, 16), {"asked": 5})
        progress._bar.refresh()
    assert "69/69 questions at most" in capsys.readouterr().err.splitlines()[-1]
