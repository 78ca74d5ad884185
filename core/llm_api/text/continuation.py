"""Whether an endpoint that is asked in text goes on with that text, or wraps it in a chat template first.

Gateways to chat models wrap it even at /v1/completions, and so does Ollama for every model that has a template
(ollama#5544). The model then answers the prompt in place of continuing it, and its scores look like any others.
"""

from __future__ import annotations

import re
from typing import Final

from core.llm_api.text.generation import Generation, SamplingOptions

COUNTING: Final = "1 2 3 4 5"
GOES_ON: Final = SamplingOptions(max_tokens=4)
"""Enough for the 6 where the blank before it is a separate token."""
ADDED: Final = 3
"""Tokens that a prompt may have beyond one a character: BOS, SentencePiece's leading blank, one of a wrong count."""


def wrapping_seen(answer: Generation) -> str:
    """How the answer to COUNTING shows that it was wrapped, as the end of a sentence; "" where it does not.

    A chat model may count on, too, but its answer lacks the blank with which the text goes on.
    """
    if answer.prompt_tokens > len(COUNTING) + ADDED:
        return f"it counts {answer.prompt_tokens} tokens in {COUNTING!r}, which has {len(COUNTING)} characters"
    if not re.match(r" +6(?!\d)", answer.text):
        return f"it goes on from {COUNTING!r} with {answer.text[:40]!r} and not with ' 6'"
    return ""
