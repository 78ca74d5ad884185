"""Claims are other people's text: made safe to show in a page and a terminal. Numbers and durations as text."""

from __future__ import annotations

import unicodedata

KEPT = {"\n", "\t"}
TURNING = {*"\u061c\u200e\u200f", *"\u202a\u202b\u202c\u202d\u202e", *"\u2066\u2067\u2068\u2069"}
NOT_IN_XML = {"\ufffe", "\uffff"}


def visible(text: str) -> str:
    """`text` with every character that would act rather than show replaced by its code, as <U+202E>.

    These are control characters (of escape sequences, too), half characters, characters that XML cannot hold, and marks
    that change the writing direction; tabs and line ends stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"<U+{ord(one):04X}>" if _acts(one) else one for one in text)


def one_line(text: str, length: int = 120) -> str:
    """Visible text on one line, cut to `length` characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def number(value: float | None, digits: int = 2) -> str:
    """A figure with thousands separated, '–' where there is none."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}"


def whole(value: float | None) -> str:
    """A count with thousands separated, '–' where there is none."""
    return number(value, 0)


def counted(count: int, thing: str) -> str:
    """'1 claim', '2 claims'."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _acts(character: str) -> bool:
    if character in KEPT:
        return False
    if character in TURNING or character in NOT_IN_XML:
        return True
    return unicodedata.category(character) in ("Cc", "Cs", "Co", "Zl", "Zp")
