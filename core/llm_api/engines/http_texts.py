"""The texts of an engine over HTTP, which every such engine inherits; scoring needs none of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpTransport
from core.llm_api.telemetry import RequestTelemetry

if TYPE_CHECKING:
    from core.llm_api.text.generation import Embeddings, Generation, Piece, TextRequest
    from core.llm_api.text.http_text import HttpText


class HttpTexts:
    """A TextEngine without `connect`. The engine sets `_http`, its connections, and `_model`, its model's name."""

    _http: HttpTransport
    _model: str

    async def generate(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> Generation:
        """See TextEngine.generate. retry: in place of the options' policy."""
        return await self._text.generate(request, retry=retry)

    def stream(self, request: TextRequest, *, retry: RetryPolicy | None = None) -> AsyncGenerator[Piece, None]:
        """See TextEngine.stream. retry: in place of the options' policy."""
        return self._text.stream(request, retry=retry)

    async def embed(self, texts: Sequence[str]) -> Embeddings:
        """See TextEngine.embed; the server must have been started for embeddings."""
        return await self._text.embed(texts)

    async def models(self) -> list[str]:
        """See TextEngine.models."""
        return await self._text.models()

    @property
    def telemetry(self) -> list[RequestTelemetry]:
        """What was counted about the requests to the server."""
        return [self._http.telemetry]

    async def aclose(self) -> None:
        """Close the connections, which stops what a server is still computing; idempotent."""
        await self._http.aclose()

    @cached_property
    def _text(self) -> HttpText:
        from core.llm_api.text.http_text import HttpText  # not imported where nobody asks for texts

        return HttpText(self._http, self._model)
