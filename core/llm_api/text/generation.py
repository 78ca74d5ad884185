"""The types of text generation: what is asked, what comes back whole, and what comes back as a stream of events.

    async with open_model_api(Settings.load(), model="gemma-3-270m", scores=False) as api:
        answer = await api.chat([Message("user", "Name a river.")], SamplingOptions(max_tokens=20))
        async with aclosing(api.stream_chat([Message("user", "Name a river.")])) as events:
            async for event in events:
                ...

A stream is always: started, token (any number), metrics, and then exactly one of end and error.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from core.errors import APIError, TransientError
from core.llm_api.telemetry import RequestTelemetry
from core.llm_api.types import EngineIdentity

Role = Literal["system", "user", "assistant"]
Embeddings: TypeAlias = npt.NDArray[np.float32]
"""Shape [number of texts, dimensions]."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise ValueError(f"role must be system, user or assistant, not {self.role!r}")


def _within(name: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{name} must be from {least:g} to {most:g}, not {value}")


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How a text is continued. The default is greedy, so that the same prompt gives the same text.

    max_tokens: of the answer, at least 1. temperature: 0 takes the most probable token, up to 2. top_p: share of the
    probability to draw from, above 0 and up to 1. seed: makes draws repeatable, in one batch of one engine. stop: the
    text ends before the first of these, at most 16. The penalties, from -2 to 2, lower the logits of tokens that the
    answer holds already: by how often (frequency) or whether at all (presence). Raises ValueError outside of these.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise ValueError("top_p must be above 0")
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, not {self.seed}")
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError("stop must be at most 16 texts, none of them empty")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def as_dict(self) -> dict[str, object]:
        """By the names that OpenAI's API and vLLM's SamplingParams share, without options at their default."""
        fields: dict[str, object] = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.top_p != 1.0:
            fields["top_p"] = self.top_p
        if self.seed is not None:
            fields["seed"] = self.seed
        if self.stops:
            fields["stop"] = list(self.stops)
        if self.frequency_penalty:
            fields["frequency_penalty"] = self.frequency_penalty
        if self.presence_penalty:
            fields["presence_penalty"] = self.presence_penalty
        return fields


GREEDY: Final = SamplingOptions()
"""The default of every call."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. finish_reason: "stop" (the model's end or a stop text), "length", or what the server says.

    The token counts are the engine's; 0 where it does not say.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """First event: the request goes out to `model`. request_id: sent as X-Request-Id, and found in the server's log."""

    kind: ClassVar[Literal["started"]] = "started"
    request_id: str
    model: str


@dataclass(frozen=True, slots=True)
class Token:
    """The next piece of text, usually one token. index: 0, 1, 2, ... without a gap."""

    kind: ClassVar[Literal["token"]] = "token"
    index: int
    text: str


@dataclass(frozen=True, slots=True)
class Metrics:
    """What the stream took, seen from here. Seconds from the call, waiting for a free slot and retries included.

    time_to_first_token: None where no text came. tokens_per_second: of the tokens after the first, None for fewer than
    two. completion_tokens: as the engine counts; where it does not say, the number of token events.
    """

    kind: ClassVar[Literal["metrics"]] = "metrics"
    seconds: float
    time_to_first_token: float | None
    tokens_per_second: float | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class End:
    """Last event of a stream that worked. finish_reason: see Generation."""

    kind: ClassVar[Literal["end"]] = "end"
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Last event of a stream that failed; the tokens before it are valid. `error` says what to do."""

    kind: ClassVar[Literal["error"]] = "error"
    error: APIError


StreamEvent: TypeAlias = Started | Token | Metrics | End | Failed


async def collect(events: AsyncIterator[StreamEvent]) -> Generation:
    """Read a stream to its end: the same answer, whole. Raises the error that it ends with."""
    pieces: list[str] = []
    prompt_tokens = completion_tokens = 0
    async for event in events:
        match event:
            case Token(text=text):
                pieces.append(text)
            case Metrics():
                prompt_tokens, completion_tokens = event.prompt_tokens, event.completion_tokens
            case End(finish_reason=reason):
                return Generation("".join(pieces), reason, prompt_tokens, completion_tokens)
            case Failed(error=error):
                raise error
            case Started():
                pass
    raise TransientError("the stream stopped before its end.")


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What an engine is asked for: the next turn of a conversation, or where there is none, the prompt continued."""

    request_id: str
    options: SamplingOptions
    prompt: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What an engine's stream is made of: more text, and in the last one the reason to finish and the counts."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@runtime_checkable
class TextEngine(Protocol):
    """What ModelAPI needs of an engine that writes text. Each engine in engines/ is one, too."""

    async def connect(self) -> EngineIdentity:
        """Find the model without asking it anything, in place of Engine.start, where only texts are wanted.

        The identity has no fingerprint. Raises an APIError that says what to do.
        """
        ...

    async def generate(self, request: TextRequest) -> Generation:
        """The whole answer. The engine batches requests that are made at the same time."""
        ...

    def stream(self, request: TextRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer. The last one has a finish_reason; raises an APIError otherwise.

        Closing the generator, or cancelling the task that waits for it, stops the computation.
        """
        ...

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """One vector a text, in order. Raises ConfigurationError where the engine serves no embeddings."""
        ...

    async def models(self) -> list[str]:
        """The names of the models it serves."""
        ...

    @property
    def telemetry(self) -> Sequence[RequestTelemetry]:
        """What was counted about the requests to each server; nothing for an engine in process."""
        ...

    async def aclose(self) -> None:
        """Give back connections and processes; idempotent."""
        ...
