"""A route of a vLLM server that takes a whole pool as a tree of segments and answers with its label logprobs.

    python -m vllm.entrypoints.openai.api_server ... --middleware icm_vllm.label_logprobs.LabelLogprobs

/v1/completions spends most of its time on what ICM does not need: parsing N whole prompts, and starting a detokenizer
for each, which reads the whole prompt again. This route hands the tree to the engine as it is (pools.py), or, to an
engine that does not take one, the same token ids and sampling parameters prompt by prompt. It is a middleware only
because that is how vLLM loads a class into its API server (`--middleware`); vLLM's --api-key guards the route like any
other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from icm_vllm import block_hashes, pool_calls, pools
from icm_vllm.plugin import config_digest, dtype_of, kernels
from icm_vllm.prompt_tree import ADAPTER_PATH, FORMAT, MAX_LABELS, PATH, PromptTree, read_request

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class LabelLogprobs:
    """ASGI middleware that adds the route to the application when the server starts, and passes everything on."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Add the route at the server's start; pass everything on."""
        if scope["type"] == "lifespan":
            scope["app"].router.add_route(PATH, _describe, methods=["GET"])
            scope["app"].router.add_route(PATH, _answer, methods=["POST"])
            scope["app"].router.add_route(ADAPTER_PATH, _answer, methods=["POST"])
        await self._app(scope, receive, send)


async def _describe(request: Any) -> Any:
    """The format of this route, its models, its LoRA adapters, the most labels, whether shared prefixes are computed
    once, and the kernels, type and configuration of the engine."""
    models = [path.name for path in request.app.state.openai_serving_models.base_model_paths]
    config = getattr(request.app.state.engine_client, "vllm_config", None)
    return _json(
        200,
        {
            "format": FORMAT,
            "models": models,
            "adapters": list(_adapters(request)),
            "max_labels": MAX_LABELS,
            "fast_prefixes": block_hashes.installed(),
            "kernels": kernels(getattr(config, "attention_config", None)),
            "dtype": dtype_of(getattr(config, "model_config", None)),
            "config": config_digest(config),
        },
    )


def _adapters(request: Any) -> dict[str, Any]:
    """The server's LoRA adapters by name, vLLM's LoRARequests; also those that were loaded while it ran."""
    return getattr(request.app.state.openai_serving_models, "lora_requests", {})


async def _answer(request: Any) -> Any:
    """Label logprobs (nats) of every prompt of a PromptTree, in order: a list of one number a label for each.

    -inf and NaN, which JSON cannot hold, are null. cached_tokens: prompt tokens found in the prefix cache.
    """
    engine = request.app.state.engine_client
    try:
        tree, labels, named = read_request(await request.body())
        adapter = None if named is None else _adapters(request).get(named)
        if named is not None and adapter is None:  # as vLLM says it
            error = {"message": f"The model `{named}` does not exist.", "type": "NotFoundError", "code": 404}
            return _json(404, {"error": error})
        lengths = pool_calls.check(tree, labels, engine.model_config)
        ask = _pool if pool_calls.usable(engine.vllm_config) else _one_by_one
        scoring = asyncio.create_task(ask(engine, f"pool-{uuid.uuid4().hex}", tree, labels, adapter))
        leaving = asyncio.create_task(_client_left(request))
        try:
            await asyncio.wait((scoring, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            scoring.cancel()  # aborts the prompts that are still in the engine, if any
        if not scoring.done():
            return _json(499, {"error": {"message": "the client left"}})
        logprobs, cached = scoring.result()
    except pool_calls.Stopped as error:
        return _json(503, {"error": {"message": str(error)}})
    except ValueError as error:  # also vLLM's, for a prompt that it refuses
        return _json(400, {"error": {"message": str(error)}})
    content = [[_finite(value) for value in row] for row in logprobs]
    return _json(200, {"logprobs": content, "prompt_tokens": sum(lengths), "cached_tokens": cached})


async def _pool(
    engine: Any, name: str, tree: PromptTree, labels: Sequence[int], adapter: Any
) -> tuple[Sequence[Sequence[float]], int | None]:
    """Logprobs (nats) of every prompt, and how many of their tokens were cached; cancelled, it cancels the prompts."""
    client, arguments = engine.engine_core, pool_calls.arguments(name, tree, labels, adapter)
    scoring = asyncio.create_task(client.call_utility_async(pools.SCORE, *arguments))
    try:
        while not (await asyncio.wait((scoring,), timeout=pool_calls.ALIVE_S))[0]:
            if engine.errored:
                raise pool_calls.Stopped("the engine has died")
    except asyncio.CancelledError:
        ending = asyncio.create_task(client.call_utility_async(pools.CANCEL, name))
        _ENDING.add(ending)
        ending.add_done_callback(_ended)
        raise
    finally:
        scoring.cancel()
    try:
        result = scoring.result()
    except Exception as error:  # noqa: BLE001 - vLLM raises the bare class for whatever a call to the engine raised
        raise pool_calls.Stopped(str(error)) from None
    answer = pool_calls.PoolAnswer.read(result)
    pool_calls.count(engine, answer)
    return answer.logprobs, answer.tokens.cached + answer.tokens.external


_ENDING: Final[set[asyncio.Task[object]]] = set()
"""Calls that nobody waits for; asyncio keeps no reference to them."""


def _ended(task: asyncio.Task[object]) -> None:
    _ENDING.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a pool could not be cancelled: %s", error)


async def _one_by_one(
    engine: Any, name: str, tree: PromptTree, labels: Sequence[int], adapter: Any
) -> tuple[Sequence[Sequence[float]], int | None]:
    """As _pool, with a vLLM request for each prompt."""
    from vllm.sampling_params import RequestOutputKind

    parameters = pools.label_parameters(
        labels,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # nothing in them changes, and a deep copy for each prompt is a tenth of the route's time
    )

    async def one(number: int, ids: list[int]) -> tuple[list[float], int | None]:
        prompt = {"type": "token", "prompt_token_ids": ids}
        answers = engine.generate(prompt, parameters, f"{name}-{number}", lora_request=adapter)
        outputs = [output async for output in answers]
        if not outputs or not outputs[-1].outputs or not outputs[-1].outputs[0].logprobs:
            raise pool_calls.Stopped(f"prompt {number} was stopped")
        output = outputs[-1]
        listed = output.outputs[0].logprobs[0]
        return [listed[label].logprob for label in labels], output.num_cached_tokens

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, ids)) for number, (ids, _) in enumerate(tree.prompts())]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    answers = [task.result() for task in tasks]
    cached = [tokens for _, tokens in answers if tokens is not None]
    return [logprobs for logprobs, _ in answers], sum(cached) if len(cached) == len(answers) else None


async def _client_left(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(status: int, content: object) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status)
