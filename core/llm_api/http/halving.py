"""Which of a request's prompts a server cannot answer, where it fails the whole request because of one of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from core.errors import APIError, RequestRejected, RetriesExhausted, TransientError

NAMED: Final = 3
"""Prompts that are looked for at most: finding one takes 2 * log2(prompts of the request) requests."""
ALIKE: Final = 2
"""Failures after a prompt that failed by itself, with none answered, that mean that the server is at fault."""


def may_be_one_prompt(error: APIError) -> bool:
    """Whether one prompt may be why a request failed: status 400 or 422, or after all retries 500 or an answer that
    cannot be read, such as one with a NaN. Any other error is the server's or the connection's."""
    if isinstance(error, RequestRejected):
        return error.status in (400, 422)
    cause = error.__cause__
    return isinstance(error, RetriesExhausted) and isinstance(cause, TransientError) and cause.status in (200, 500)


async def ask_in_halves(
    ask: Callable[[int, int], Awaitable[None]], count: int, whole: APIError, *, ours: Callable[[APIError], bool]
) -> dict[int, APIError]:
    """Ask again about `count` prompts whose common request failed with `whole`: {position: error} of those at fault.

    ask(start, end): send the prompts in [start, end) and keep their answers; raises an APIError. ours: whether such an
    error may be the fault of one prompt; others are raised at once. Ends at the failure after NAMED prompts. Raises
    `whole` where nothing is answered: after log2(count) + 1 + ALIKE requests.
    """
    failed: dict[int, APIError] = {}
    answered, alike = False, 0
    waiting = _halves(0, count)
    while waiting:
        start, end = waiting.pop()
        try:
            await ask(start, end)
            answered = True
        except APIError as error:
            if not ours(error):
                raise
            if len(failed) == NAMED:
                break
            alike += bool(failed)
            if end - start > 1:
                waiting += _halves(start, end)
            else:
                failed[start] = error
            if alike >= ALIKE and not answered:
                raise whole from whole.__cause__
    if failed and not answered:
        raise whole from whole.__cause__
    return failed


def _halves(start: int, end: int) -> list[tuple[int, int]]:
    """The first half last, because waiting.pop() takes the last."""
    middle = (start + end) // 2
    return [(middle, end), (start, middle)]
