"""Labels of claims from a model's answers, and questions that share their demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.llm_api.llm import ModelAPI
from src.icm.consistency import Label
from src.icm.objective import LogOdds, accuracy, auc, calibration_offset, label_of, no_offset, num_labels_of
from src.icm.prompts import PromptBook
from src.pipeline.scoring import log_odds_of


@dataclass(frozen=True, slots=True)
class Prediction:
    """Labels of a set of claims, the likeliest by their log-odds unless something else gave them.

    log_odds: nats, by position. offset: subtracted before the likeliest is taken (0 unless calibrated). given: the
    labels, where they are not the likeliest (annealed, or made consistent).
    """

    log_odds: dict[int, LogOdds]
    offset: LogOdds = 0.0
    given: dict[int, int] | None = None

    def calibrated(self, prior: float | None = None) -> Prediction:
        """The same scores against their mean (batch calibration), or against a known share of True claims."""
        scores, num_labels = list(self.log_odds.values()), num_labels_of(self.offset)
        return replace(self, offset=calibration_offset(scores, "mean", prior, num_labels))

    @property
    def labels(self) -> dict[int, int]:
        if self.given is not None:
            return self.given
        return {claim: label_of(value, self.offset) for claim, value in self.log_odds.items()}

    def agreement(self, gold: Sequence[Label]) -> tuple[int, int]:
        """(agreeing, compared) with gold over the predicted claims whose gold label is known."""
        labels = self.labels
        claims = list(labels)
        return accuracy([labels[c] for c in claims], [gold[c] for c in claims])

    def auc(self, gold: Sequence[Label]) -> float | None:
        """Area under the ROC curve over the claims whose gold label is known; None of more than two labels."""
        known = [(value, gold[c]) for c, value in self.log_odds.items() if gold[c] is not None]
        scores = [value for value, _ in known if not isinstance(value, tuple)]
        return auc(scores, [bool(label) for _, label in known]) if len(scores) == len(known) else None


async def predict(
    api: ModelAPI,
    book: PromptBook,
    claims: Sequence[int],
    *,
    demonstrations: Sequence[int] = (),
    labels: Sequence[Label] = (),
) -> Prediction:
    """Predict `claims` after the same demonstrations for all of them (none: zero-shot).

    demonstrations: book positions, in the order they stand in the prompt. labels: by book position.
    """
    # All share the same prefix: every server computes it once and takes its part of the questions.
    prompts = [book.prompt(claim, demonstrations, labels, at / len(claims)) for at, claim in enumerate(claims)]
    scores = await api.score(prompts, book.labels)
    return Prediction(dict(zip(claims, log_odds_of(scores), strict=True)), no_offset(len(book.labels)))
