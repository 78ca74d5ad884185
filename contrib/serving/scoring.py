"""Claims to log-odds: the testbeds' templates, demonstrations before every claim, one pool to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from contrib.serving.messages import ClaimScore, ScoreAnswer, ScoreComparisons, ScoreSingles
from core.llm_api.llm import ModelAPI
from core.llm_api.tokens import Spelling
from src.icm.prompts import SEPARATOR, PromptBook
from src.icm.testbeds import TESTBEDS, BadInput


class TooLong(Exception):
    """What was asked does not fit the model's context; the message is for the client."""


@dataclass(frozen=True)
class Scorer:
    """What every pool of one model shares: how it spells demonstrations."""

    api: ModelAPI
    spelling: Spelling

    @classmethod
    async def open(cls, api: ModelAPI) -> Self:
        """Ask the model's tokenizer once. Raises an APIError."""
        return cls(api, await Spelling.of(api, separator=SEPARATOR))

    async def score(self, request: ScoreSingles | ScoreComparisons) -> ScoreAnswer:
        """log P(True) - log P(False), nats, of every claim after all demonstrations, in the order they are given.

        Raises BadInput for a claim that the testbed refuses, TooLong, or an APIError.
        """
        testbed = TESTBEDS[request.testbed]
        rows = [*request.demonstrations, *request.claims]
        texts = []
        for index, row in enumerate(rows):
            try:
                texts.append(testbed.claim(row.model_dump(exclude={"label"}), index).text)
            except BadInput as error:
                raise BadInput(f"{_place(index, len(request.demonstrations))} {error}") from None
        book = await PromptBook.open(self.api, texts, self.spelling)
        count = len(request.demonstrations)
        labels = [row.label for row in request.demonstrations]
        # All share the demonstrations, so that a prefix cache computes them once.
        prompts = [
            book.prompt(claim, range(count), labels, (claim - count) / len(request.claims))
            for claim in range(count, len(rows))
        ]
        self._check(max(prompt.num_tokens for prompt in prompts))
        scores = await self.api.score(prompts, book.labels)
        return ScoreAnswer(
            scores=[
                ClaimScore(log_odds=log_odds, log_p_true=true, log_p_false=false, label=log_odds > 0)
                for log_odds, (false, true) in zip(scores.log_odds, scores.logprobs.tolist(), strict=True)
            ],
            mean_log_odds=_mean(scores.log_odds),
            prompt_tokens=scores.prompt_tokens,
            model=self.api.identity.model,
        )

    def _check(self, longest: int) -> None:
        limit = self.api.identity.max_model_len
        if limit is not None and longest >= limit:  # the label itself needs one token
            raise TooLong(
                f"a claim with its demonstrations has {longest} tokens, and the model takes {limit - 1}: "
                "send fewer or shorter demonstrations"
            )


def _place(index: int, demonstrations: int) -> str:
    return f"demonstrations.{index}" if index < demonstrations else f"claims.{index - demonstrations}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
