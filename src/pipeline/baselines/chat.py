"""Zero-shot answers of a chat model: one user turn a claim, in the model's chat template; the label is the beginning of
its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from core.errors import ConfigurationError
from core.llm_api.labels import TRUE_FALSE, LabelSpace
from core.llm_api.llm import ModelAPI
from core.llm_api.types import Prompt, Segment
from src.icm.objective import no_offset
from src.icm.prompts import PromptBook
from src.pipeline.baselines.row_result import RowResult
from src.pipeline.baselines.trial import HeldOut, Trial
from src.pipeline.predictions import Prediction, predict
from src.pipeline.scoring import log_odds_of

REQUEST: Final = "Complete the last line with one word, {labels}.\n\n{text}"
PLAIN_ANSWER: Final = "\n\nAnswer:"


@dataclass(frozen=True, slots=True)
class ChatAnswers:
    """template: whether the model has a chat template; without one it was asked the same in plain text."""

    prediction: Prediction
    template: bool


async def run(trial: Trial) -> RowResult:
    """The cost is that of the questions to the chat model."""
    assert trial.chat is not None, "the row zero-shot-chat needs a chat model"
    pool = trial.labelling.pool
    async with trial.chat.open() as api:
        spending = trial.spending(api.stats)
        answers = await ask_chat(api, [claim.text for claim in pool.claims], pool.testbed.space)
        cost = spending.cost()
        trial.chat.on_asked(api.identity, answers.template)
        rest = await ask_chat(api, [claim.text for claim in pool.rest], pool.testbed.space)
    # Positions are those of the texts in one call of ask_chat; in the book, held-out claims come after the pool.
    log_odds = {trial.held_out_claims[at]: value for at, value in rest.prediction.log_odds.items()}
    return trial.result(answers.prediction, HeldOut(replace(rest.prediction, log_odds=log_odds)), cost)


async def ask_chat(api: ModelAPI, texts: Sequence[str], space: LabelSpace = TRUE_FALSE) -> ChatAnswers:
    """log-odds (nats) of the label as the beginning of the answer to each text, by position.

    With a template the labels are without the space that they begin with in plain text, as an answer begins.
    Raises ConfigurationError for an engine that is asked in text: a template is applied where its tokens are known.
    """
    answers = LabelSpace(space.names, tuple(text.strip() for text in space.texts))
    *words, last = answers.texts[::-1] if len(space) == 2 else answers.texts
    messages = [REQUEST.format(labels=f"{', '.join(words)} or {last}", text=text) for text in texts]
    tokens = await api.tokenize_chat(messages)
    if tokens is None:
        book = await PromptBook.open(api, [message + PLAIN_ANSWER for message in messages], space=space)
        if book.prefix.tokens is None:
            raise ConfigurationError(
                f"{api.identity.model} is asked in text, and a chat template needs its tokens.",
                hint="Serve the chat model with vLLM, and name it with --chat_url.",
            )
        return ChatAnswers(await predict(api, book, range(len(messages))), template=False)
    prompts = [
        Prompt((Segment(message, ids),), name=f"claim {position}", place=position / len(messages))
        for position, (message, ids) in enumerate(zip(messages, tokens, strict=True))
    ]
    scores = await api.score(prompts, await api.spell_labels(answers, after=""))
    return ChatAnswers(Prediction(dict(enumerate(log_odds_of(scores))), no_offset(len(space))), template=True)
