"""Other people's text made harmless to look at."""

from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from src.results.text import duration, number, one_line, visible


def test_what_would_act_is_named_instead() -> None:
    assert visible("a\x1b[31mb\x00") == "a<U+001B>[31mb<U+0000>"
    assert visible("evil\u202egpj.exe") == "evil<U+202E>gpj.exe"
    assert visible("half \ud83d") == "half <U+D83D>"


def test_plain_text_of_any_language_stays() -> None:
    for text in ("plain", "Grüße, 世界", "two\nlines\tand a tab", "🦔"):
        assert visible(text) == text


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_nothing_that_acts_is_left_and_everything_can_be_written(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert all(unicodedata.category(one) not in ("Cc", "Cs") for one in shown if one not in "\n\t")
    assert "\n" not in one_line(text)


def test_figures() -> None:
    assert [number(None), number(1234.5), number(2, 0)] == ["–", "1,234.50", "2"]
    assert [duration(s) for s in (0.4, 59.4, 60, 200, 7500)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert one_line("a  b\n" * 90, 10) == "a b a b a…"
