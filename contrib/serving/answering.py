"""A question to an answer: topics from the question, passages by the topics, an answer from the passages.

The prompts show what is wanted instead of asking for it, so that base models, which know no instructions, go along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from contrib.serving.documents import Library, Passage
from contrib.serving.messages import Query, QueryAnswer, Source
from contrib.serving.scoring import TooLong
from core.errors import RequestRejected
from core.llm_api.llm import ModelAPI
from core.llm_api.text.generation import SamplingOptions

MAX_TOPICS: Final = 6
MAX_TOPIC: Final = 60
"""Characters; longer ones are sentences, not topics."""

TOPIC_PROMPT: Final = """\
Each question is followed by its topics.

Question: How do bees make honey in winter?
Topics: bees, honey, winter

Question: Which port does the database listen on, and how can I change it?
Topics: database, port, configuration

Question: {question}
Topics:"""

ANSWER_PROMPT: Final = """\
Each question is answered in one or two sentences, from the passages before it.

Passage: The museum is open from ten to six. On Mondays it is closed.
Question: When can I visit the museum on Monday?
Answer: Not at all: the museum is closed on Mondays.

{passages}
Question: {question}
Answer:"""


async def answer(api: ModelAPI, library: Library, query: Query) -> QueryAnswer:
    """Greedy, so that the same question gets the same answer. Raises TooLong or an APIError."""
    question = " ".join(query.question.split())  # a line break would end it in the prompts
    clock = _Clock()
    [listed] = await _complete(api, TOPIC_PROMPT.format(question=question), 32, ("\n",))
    topics = read_topics(listed)
    clock.lap("topics")
    # In a thread: over many texts it takes milliseconds in which no other request would get on.
    found = await asyncio.to_thread(library.search, " ".join([question, *topics]), query.passages)
    clock.lap("retrieval")
    text: str | None = None
    if found:
        passages = "\n".join(f"Passage: {' '.join(passage.text.split())}" for passage, _ in found)
        [text] = await _complete(
            api,
            ANSWER_PROMPT.format(passages=passages, question=question),
            query.max_tokens,
            ("\nQuestion:", "\nPassage:", "\n\n"),
        )
        text = text.strip()
        clock.lap("answer")
    return QueryAnswer(
        answer=text,
        topics=topics,
        sources=[_source(passage, score) for passage, score in found],
        model=api.identity.model,
        seconds=clock.laps,
    )


def read_topics(text: str) -> list[str]:
    """What stands between commas on the first line, without repetitions; nothing where the model said nothing."""
    line = text.strip().split("\n")[0]
    topics = dict.fromkeys(topic.strip(" .;:-").lower() for topic in line.split(","))
    return [topic for topic in topics if topic and len(topic) <= MAX_TOPIC][:MAX_TOPICS]


async def _complete(api: ModelAPI, prompt: str, max_tokens: int, stop: tuple[str, ...]) -> Sequence[str]:
    try:
        generations = await api.complete([prompt], SamplingOptions(max_tokens=max_tokens, stop=stop))
    except RequestRejected as error:
        if error.status == 400:
            raise TooLong(
                "the question and its passages do not fit the model's context: ask for fewer passages or max_tokens"
            ) from error
        raise
    return [generation.text for generation in generations]


def _source(passage: Passage, score: float) -> Source:
    return Source(path=passage.path, line=passage.line, text=passage.text, score=round(score, 4))


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """What has passed since the last one is called `name`."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 4)
        self._last = now
