"""Claims put to a chat model: one user turn each, in the model's own template, the label where its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from core.llm_api.errors import ConfigurationError
from core.llm_api.labels import LabelSpace
from core.llm_api.llm import ModelAPI
from core.llm_api.types import Prompt, Segment
from src.icm.prompts import PromptBook
from src.pipeline.baselines import Prediction

REQUEST: Final = "Complete the last line with one word, True or False.\n\n{text}"
PLAIN_ANSWER: Final = "\n\nAnswer:"


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """template: whether the model has a chat template; without one it was asked the same in plain text."""

    prediction: Prediction
    template: bool


async def ask_chat(api: ModelAPI, texts: Sequence[str]) -> ChatAnswers:
    """log-odds (nats) of the label as the first token of the answer to each text, by position.

    With a template the labels are "True" and "False" as an answer begins with them; in plain text, with a space before.
    Raises ConfigurationError for an engine that is asked in text: a template is applied where its tokens are known.
    """
    messages = [REQUEST.format(text=text) for text in texts]
    tokens = await api.tokenize_chat(messages)
    if tokens is None:
        book = await PromptBook.open(api, [message + PLAIN_ANSWER for message in messages])
        if book.prefix.tokens is None:
            raise ConfigurationError(
                f"{api.identity.model} is asked in text, and a chat template needs its tokens.",
                hint="Serve the chat model with vLLM, and name it with --chat_url.",
            )
        labels = book.labels
        prompts = [book.prompt(claim, (), (), claim / len(messages)) for claim in range(len(messages))]
    else:
        labels = await api.spell_labels(LabelSpace(("False", "True"), ("False", "True")), after="")
        prompts = [
            Prompt((Segment(message, ids),), name=f"claim {position}", place=position / len(messages))
            for position, (message, ids) in enumerate(zip(messages, tokens, strict=True))
        ]
    scores = await api.score(prompts, labels)
    return ChatAnswers(Prediction(dict(enumerate(scores.log_odds))), tokens is not None)
