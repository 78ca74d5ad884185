"""Two answers to the same prompts, compared to the last bit, and what their difference would do to a search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from core.determinism.asking import Listed

ALPHA: Final = 50.0
"""Weight of mutual predictability in U (Wen et al. 2025, section 2), at its published value."""
FINAL_TEMPERATURE: Final = 0.01
"""Where the search's annealing ends: there the smallest changes of U decide."""


@dataclass(frozen=True, slots=True)
class Compared:
    """prompts: how many were compared; differing: how many have any value that is not the same to the last bit.

    largest: largest difference of a log-probability, nats; inf where one lists a token or text that the other does not.
    labels_changed: scores (log-odds) whose sign changed. utility_moved: |change of U| of a pool with these scores, each
    claim labelled by the sign of its score.
    """

    prompts: int
    differing: int
    largest: float = 0.0
    labels_changed: int = 0
    utility_moved: float = 0.0

    @property
    def acceptance_changed(self) -> float:
        """Probability that a proposal which does not change U is decided differently, at the final temperature.

        |min(1, exp(0)) - min(1, exp(-utility_moved / T))|, the Metropolis rule of Wen et al. 2025, algorithm 1.
        """
        return 1.0 - math.exp(-self.utility_moved / FINAL_TEMPERATURE)


def compare(pairs: Sequence[tuple[Listed, Listed]], labels: tuple[int, int] | None) -> Compared:
    """Compare (reference, answer) pairs, on the tokens that the answers list.

    labels: (true, false) token ids where all list both; None where no scores can be computed.
    """
    differing, largest = 0, 0.0
    for reference, answer in pairs:
        if not answer.keys() <= reference.keys():
            differing, largest = differing + 1, math.inf
            continue
        gaps = [abs(reference[token] - answer[token]) for token in answer if reference[token] != answer[token]]
        if gaps:
            differing += 1
            largest = max(largest, *gaps)
    changed, moved = (0, 0.0) if labels is None else _scores(pairs, labels)
    return Compared(len(pairs), differing, largest, changed, moved)


def _scores(pairs: Sequence[tuple[Listed, Listed]], labels: tuple[int, int]) -> tuple[int, float]:
    """(scores of another sign, |change of U|)."""
    if not pairs:
        return 0, 0.0
    true, false = labels
    before = [reference[true] - reference[false] for reference, _ in pairs]
    after = [answer[true] - answer[false] for _, answer in pairs]
    changed = sum((a > 0) != (b > 0) for a, b in zip(before, after, strict=True))
    signed = [(b - a) if a > 0 else (a - b) for a, b in zip(before, after, strict=True)]
    return changed, ALPHA * abs(math.fsum(signed) / len(signed))
