"""The FastAPI application: POST /query, POST /score, GET /health, /ready, /metrics, /openapi.json.

    guard = build(open_api, Library.read(Path("docs")), Limits(), token=None)     # an ASGI application

What the guard refuses (token, size, time, concurrency) never gets here. Every answer that is not 200 is a Problem.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.exceptions import HTTPException

from contrib.serving import answering
from contrib.serving.documents import Library
from contrib.serving.guard import Guard
from contrib.serving.messages import Health, Problem, Query, QueryAnswer, Score, ScoreAnswer
from contrib.serving.metrics import CONTENT_TYPE, ServingMetrics
from contrib.serving.model import ModelConnection, NotReady
from contrib.serving.options import Limits
from contrib.serving.scoring import TooLong
from core.errors import APIError, ConfigurationError, MissingLabel, RateLimited, RequestRejected
from core.llm_api.llm import ModelAPI
from src.icm.testbeds import BadInput

log = logging.getLogger(__name__)

_PROBLEMS: Final[dict[int, str]] = {
    400: "The body is no JSON.",
    401: "The bearer token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    422: "A field is missing or wrong, or the whole does not fit the model's context; `details` says which.",
    429: "Too many requests are at work; Retry-After says when to come back.",
    502: "The model's answer cannot be used.",
    503: "There is no model to ask, or the application is being stopped.",
    504: "No answer in time.",
}


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    retry = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return {
        status: {"model": Problem, "description": _PROBLEMS[status]}
        | ({"headers": retry} if status in (429, 503) else {})
        for status in statuses
    }


def build(
    open_api: Callable[[], Awaitable[ModelAPI]],
    library: Library,
    limits: Limits,
    *,
    token: SecretStr | None = None,
    alive: Callable[[], bool] = lambda: True,
) -> Guard:
    """The application behind its guard. alive: whether a model server that it started itself still runs."""
    metrics = ServingMetrics()
    metrics.passages.set(len(library.passages))
    model = ModelConnection(open_api, canary_seconds=limits.canary_seconds)
    metrics.add_client(lambda: model.api)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        model.start()
        try:
            yield
        finally:
            await model.aclose()

    app = FastAPI(
        title="icm serve",
        description="Questions answered from a folder of texts, and claims scored, by a self-hosted model.",
        version="1",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        responses=_responses(401) if token else None,
    )
    guard = Guard(app, limits, token, metrics)

    @app.post("/query", responses=_responses(400, 408, 413, 415, 422, 429, 502, 503, 504))
    async def query(body: Query) -> QueryAnswer:
        """Extract topics from the question, find passages by them, and answer from the passages."""
        found = await answering.answer(model.get().api, library, body)
        if found.answer is None:
            metrics.unanswered.inc()
        return found

    @app.post("/score", responses=_responses(400, 408, 413, 415, 422, 429, 502, 503, 504))
    async def score(body: Score) -> ScoreAnswer:
        """The log-odds of every claim, by the testbed's template, after the demonstrations if there are any."""
        scored = await model.get().scorer.score(body)
        metrics.claims.inc(len(scored.scores))
        metrics.prompt_tokens.inc(scored.prompt_tokens)
        return scored

    @app.get("/health", response_model_exclude_none=True, responses=_responses(503))
    async def health() -> Health:
        """Whether the process lives; asks nothing of the model."""
        if not alive():
            raise NotReady("the model server that this application started has ended")
        if model.failed:
            raise NotReady("the connection to the model failed in a way that only a restart mends")
        return Health(status="ok")

    @app.get("/ready", response_model_exclude_none=True, responses=_responses(503))
    async def ready() -> Health:
        """Whether the model answers one token, at most a second ago, and the application is not being stopped."""
        try:
            if guard.draining:
                raise NotReady("the application is being stopped")
            seconds = await model.canary()
        except NotReady:
            metrics.ready.set(0)
            raise
        metrics.ready.set(1)
        return Health(status="ok", model=model.get().name, seconds=round(seconds, 4))

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    _handle_errors(app)
    if token is not None:
        _declare_token(app)
    return guard


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        if any(problem["type"] == "json_invalid" for problem in error.errors()):
            return _problem(400, "the body is no JSON")
        # Without the input, which may be huge and need not be valid text.
        return _problem(422, "the request is not valid", [_told(problem) for problem in error.errors()[:20]])

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(TooLong)
    @app.exception_handler(BadInput)
    async def unusable(_: Request, error: Exception) -> JSONResponse:
        return _problem(422, str(error))

    @app.exception_handler(NotReady)
    async def away(request: Request, error: NotReady) -> JSONResponse:
        log.warning("%s: %s", request.url.path, error)
        reason = str(error) if request.url.path == "/health" else "the model is not ready"
        return _problem(503, reason, headers={"Retry-After": "5"})

    @app.exception_handler(APIError)
    async def failed(request: Request, error: APIError) -> JSONResponse:
        # The message may name the model's server: it is for the log, not for clients.
        log.warning("%s: %s: %s", request.url.path, type(error).__name__, error)
        match error:
            case MissingLabel() | RequestRejected() | ConfigurationError():
                return _problem(502, "the model's answer cannot be used")
            case RateLimited():
                wait = str(max(1, round(error.retry_after or 1)))
                return _problem(503, "the model is busy", headers={"Retry-After": wait})
            case _:
                return _problem(503, "the model does not answer", headers={"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s failed", request.url.path, exc_info=error)
        return _problem(500, "internal error")


def _told(problem: Mapping[str, Any]) -> str:
    if problem["type"] == "union_tag_not_found":  # pydantic speaks of tags and discriminators
        return f"{problem['ctx']['discriminator']}: Field required".replace("'", "")
    return ": ".join((*_field(problem["loc"]), str(problem["msg"])))


def _field(place: Sequence[int | str]) -> list[str]:
    """`claims.0.choice`; nothing for the body as a whole."""
    return [".".join(map(str, place[1:]))] if len(place) > 1 and place[1] != "" else []


def _problem(status: int, error: str, details: Sequence[str] = (), headers: Any = None) -> JSONResponse:
    clean = [_printable(text) for text in (error, *details)]
    return JSONResponse({"error": clean[0], "details": clean[1:]}, status_code=status, headers=headers)


def _printable(text: str) -> str:
    """At most 500 characters; half characters (lone surrogates) in field names cannot be sent as UTF-8."""
    return text[:500].encode("utf-8", "backslashreplace").decode("utf-8")


def _declare_token(app: FastAPI) -> None:
    """Say in the schema what the guard asks for."""
    schema = app.openapi()
    schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        if path not in ("/health", "/ready"):
            for operation in operations.values():
                operation["security"] = [{"bearer": []}]
