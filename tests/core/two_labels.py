"""True and False as tests ask for them, and what the answers make of them."""

from __future__ import annotations

from core.llm_api.labels import TRUE_FALSE, SpelledLabels
from core.llm_api.types import TokenLogprobs

IN_TEXT = SpelledLabels(TRUE_FALSE)


def two(true: int, false: int) -> SpelledLabels:
    """Each one token."""
    return SpelledLabels(TRUE_FALSE, ((false,), (true,)))


def pair(true: float, false: float, floored: bool = False) -> TokenLogprobs:
    """The answer to a question about both: True is asked for first."""
    return TokenLogprobs((true, false), floored)


def log_odds(answer: TokenLogprobs) -> float:
    """Nats."""
    true, false = answer.values
    return true - false
