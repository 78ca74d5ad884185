"""What a baseline says of one pool and its held-out claims, as it is kept in rows/ROW.json."""

from __future__ import annotations

from dataclasses import dataclass

from src.icm.objective import LogOdds


@dataclass(frozen=True, slots=True)
class Answer:
    """One claim's label. claim: its row in the data file. log_odds: raw, nats; offset: subtracted before the likeliest
    label is taken."""

    claim: int
    group: str
    gold: bool | int | None
    label: bool | int
    log_odds: LogOdds
    offset: LogOdds


@dataclass(frozen=True, slots=True)
class Cost:
    """What labelling the pool cost, held-out claims not counted.

    asked: questions, also those that the response cache answered; the others are what was sent.
    """

    seconds: float
    asked: int
    prompt_tokens: int
    cached_tokens: int
    requests: int


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a row says of one pool and its held-out claims. utility: U of the labels that held-out claims are asked
    with; None where they are asked without any."""

    row: str
    pool: tuple[Answer, ...]
    test: tuple[Answer, ...]
    utility: float | None
    cost: Cost
