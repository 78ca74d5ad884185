"""Queries that are asked one per request, in order, and errors that name the prompt."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from core.errors import APIError, RequestRejected, RetriesExhausted, TransientError
from core.llm_api.http.gather import all_or_settle
from core.llm_api.types import EngineAnswer, OnAnswer, Prompt, Query


async def score_each(
    queries: Sequence[Query],
    ask: Callable[[Query, Sequence[APIError]], Awaitable[EngineAnswer]],
    on_answer: OnAnswer | None,
) -> EngineAnswer:
    """Engine.score of engines that take one prompt a request. Requests start in the queries' order.

    ask(query, failed): sends nothing and ends as cancelled once `failed`, the errors so far, is not empty. Where a
    query fails, requests in flight have some seconds to finish: they may be paid for. Raises the first error, with the
    prompt's name.
    """
    failed: list[APIError] = []

    async def one(position: int, query: Query) -> EngineAnswer:
        try:
            answer = await ask(query, failed)
        except APIError as error:
            failed.append(of_prompt(error, query.prompt))
            raise failed[-1] from error.__cause__
        if on_answer is not None:
            on_answer([position], answer)
        return answer

    return EngineAnswer.joined(await all_or_settle(one(position, query) for position, query in enumerate(queries)))


def of_prompt(error: APIError, prompt: Prompt) -> APIError:
    """The error, with the prompt's name where it may be about that prompt and does not say so yet."""
    if repr(prompt.name) in error.args[0]:
        return error
    match error:
        case RequestRejected(status=413):
            size = len(prompt.content)
            return RequestRejected(
                f"prompt {prompt.name!r}, {size:,} bytes: {error.args[0]}",
                status=413,
                hint="Raise what the server, or a proxy before it, takes (nginx: client_max_body_size), or show fewer "
                "claims at a time (--context_cap).",
            )
        case RequestRejected(status=400 | 422):
            return RequestRejected(f"prompt {prompt.name!r}: {error.args[0]}", status=error.status, hint=error.hint)
        case RetriesExhausted(__cause__=TransientError()):
            return RetriesExhausted(f"prompt {prompt.name!r}: {error.args[0]}", hint=error.hint)
        case _:
            return error
