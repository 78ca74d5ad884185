"""What can go wrong between a prompt and its score.

    APIError                    base; str() is one line for a user
      ConfigurationError        settings that cannot work: wrong model, no logprobs, a malformed file. Exit code 2
      ServerUnreachable         nothing answers at the URL (connection refused, DNS failure)
      RequestRejected           the server refuses this request for good: 400, 401, 403, 404, 413, 422
      RateLimited               429, with the wait the server asked for
      TransientError            may go away: 408, 5xx, reset, timeout, truncated or malformed body
        NotLogprobs             numbers above 0 where log-probabilities were asked for
      ServerChanged             another model or version answers than at the start
      StorageFailed             a disk that is full, read-only or broken, or a file that another process holds
      MissingLabel              the answer lacks a label token; names the prompt
      RetriesExhausted          attempts or deadline used up; its __cause__ is the last error

Only RateLimited, TransientError and ServerUnreachable are ever retried (see retry.py). No message holds a key.
"""

from __future__ import annotations


class APIError(Exception):
    """Base of every error of the model layer. `hint` says what the user can do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.hint}".rstrip() if self.hint else message


class ConfigurationError(APIError):
    """Settings that cannot work; nothing was asked of the model."""


class ServerUnreachable(APIError):
    """Nothing answers at the URL."""


class RequestRejected(APIError):
    """The server refuses this request and would refuse it again."""

    def __init__(self, message: str, *, status: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class RateLimited(APIError):
    """The server asks for fewer requests. `retry_after`: seconds it asked us to wait, or None."""

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TransientError(APIError):
    """May go away by itself. `retry_after`: seconds the server asked us to wait, or None.

    status: HTTP status of the answer, 200 where only its content was wrong; None where no answer came.
    """

    def __init__(
        self, message: str, *, retry_after: float | None = None, hint: str = "", status: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after
        self.status = status


class NotLogprobs(TransientError):
    """The answer holds numbers that cannot be log-probabilities."""


class ServerChanged(APIError):
    """Another model or version answers than at the start, and its scores cannot be mixed with the first one's."""


class StorageFailed(APIError):
    """Results cannot be written or read: disk full, read-only, broken, or held by another process."""


class MissingLabel(APIError):
    """The answer holds no log-probability for a label token."""


class RetriesExhausted(APIError):
    """The attempts or the deadline are used up; `__cause__` is the last error."""
