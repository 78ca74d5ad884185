"""What comes in and goes out as JSON. Everything from outside is checked here, so that the rest can rely on it.

Strict: no number stands for a text or a truth value. Unknown fields are refused, because a misspelt one would
otherwise be ignored.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from src.icm.testbeds import NAMES, TESTBEDS

MAX_TEXT: Final = 20_000
"""Characters of one text."""
MAX_CLAIMS: Final = 256

SOMETHING: Final = r"[^\s\x1c-\x1f]"
"""At least one character that is no blank: the testbeds refuse columns that hold nothing. To Python the four separators
from U+001C on are blanks, to regular expressions elsewhere they are not."""
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT, pattern=SOMETHING)]


def _whole(value: object) -> object:
    """To JSON, 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


COMPARING: Final = tuple(name for name in NAMES if "choice_2" in TESTBEDS[name].columns)
SINGLE: Final = tuple(name for name in NAMES if name not in COMPARING)
"""The built-in testbeds, by whether a claim has one answer or compares two."""


class Incoming(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(Incoming):
    """A question to be answered from the texts."""

    question: Annotated[str, Field(min_length=1, max_length=2_000, pattern=SOMETHING)]
    passages: Whole = Field(default=3, ge=1, le=10, description="how many passages the model reads at most")
    max_tokens: Whole = Field(default=128, ge=1, le=512, description="of the answer")


class Single(Incoming):
    """A question and a proposed answer to it."""

    question: Text
    choice: Text


class LabelledSingle(Single):
    """A demonstration: a claim and its label."""

    label: bool


class Comparison(Incoming):
    """A question and two answers; the claim is that the first is the better one."""

    question: Text
    choice: Text
    choice_2: Text


class LabelledComparison(Comparison):
    """A demonstration: a comparison and its label."""

    label: bool


class ScoreSingles(Incoming):
    """Claims of one answer each. builtin: reviews ("positive?"; only `choice` is shown). Others: "is it true?"."""

    testbed: Literal[SINGLE]  # type: ignore[valid-type]
    claims: Annotated[list[Single], Field(min_length=1, max_length=MAX_CLAIMS)]
    demonstrations: Annotated[list[LabelledSingle], Field(max_length=MAX_CLAIMS)] = []


class ScoreComparisons(Incoming):
    """Claims that compare two answers: "more truthful", or for alpaca "more helpful and harmless"."""

    testbed: Literal[COMPARING]  # type: ignore[valid-type]
    claims: Annotated[list[Comparison], Field(min_length=1, max_length=MAX_CLAIMS)]
    demonstrations: Annotated[list[LabelledComparison], Field(max_length=MAX_CLAIMS)] = []


Score = Annotated[ScoreSingles | ScoreComparisons, Field(discriminator="testbed")]


class Source(BaseModel):
    """A passage that the answer was made from. path: in the folder of texts; line: where it begins; score: BM25."""

    path: str
    line: int
    text: str
    score: float


class QueryAnswer(BaseModel):
    """answer is null where no passage shares a word with the question or its topics. seconds: by step."""

    answer: str | None
    topics: list[str]
    sources: list[Source]
    model: str
    seconds: dict[str, float]


class ClaimScore(BaseModel):
    """Natural logarithms. log_odds: log P(True) - log P(False) after the claim; label: whether it is above 0."""

    log_odds: float
    log_p_true: float
    log_p_false: float
    label: bool


class ScoreAnswer(BaseModel):
    """One score a claim, in the order of the claims. prompt_tokens: sent to the model; mean_log_odds: of the scores."""

    scores: list[ClaimScore]
    mean_log_odds: float
    prompt_tokens: int
    model: str


class Health(BaseModel):
    """seconds: of the model's answer, for /ready."""

    status: Literal["ok"]
    model: str | None = None
    seconds: float | None = None


class Problem(BaseModel):
    """Why a request was not answered. details: one line for each field that is wrong."""

    error: str
    details: list[str] = []
