"""A pipeline of load, transform, query and evaluate steps around a ModelAPI. See docs/pipeline.md for an example.

    pipeline = Pipeline("zero-shot", api)
    claims = pipeline.load("claims", read_claims)
    prompts = pipeline.transform("prompts", zero_shot_prompts, claims)
    scores = pipeline.query("log-odds", prompts, labels)
    report = pipeline.evaluate("accuracy", accuracy, claims, scores)
    print((await pipeline.run())[report])

Steps run once what they need is there; independent ones run together. With a `folder`, each result is written as
JSON beside a digest of what it was made from (function source, arguments, inputs), and read back instead of made
again as long as that digest is the same. Load steps always run: what they read may have changed.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast, get_type_hints

import orjson
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from core.files import write_atomically
from core.llm_api.types import LabelTokens, PoolScores, Prompt

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Scores(Protocol):
    """What a query step needs: a ModelAPI, or what stands in front of one."""

    async def score(self, prompts: Sequence[Prompt], labels: LabelTokens) -> PoolScores:
        """See ModelAPI.score."""
        ...


@dataclass(frozen=True, eq=False)
class Step(Generic[T]):
    """A handle on a step's result of type T; made by the methods of Pipeline."""

    name: str
    function: Callable[..., T | Awaitable[T]]
    needs: tuple[Step[Any], ...] = ()
    kept: bool = True


@dataclass(frozen=True)
class Results:
    """The results of a run, by step handle: `results[step]` has the step's type."""

    _values: dict[Step[Any], Any] = field(repr=False)

    def __getitem__(self, step: Step[T]) -> T:
        return cast(T, self._values[step])


class Pipeline:
    """Steps and their dependencies. `api` is needed by query steps only; `folder` keeps results."""

    def __init__(self, name: str, api: Scores | None = None, *, folder: Path | None = None) -> None:
        self.name = name
        self._api = api
        self._folder = folder
        self._steps: list[Step[Any]] = []

    def load(self, name: str, function: Callable[[], T | Awaitable[T]]) -> Step[T]:
        """A step that brings something in. Runs every time."""
        return self._add(Step(name, function, kept=False))

    def transform(self, name: str, function: Callable[..., T | Awaitable[T]], *needs: Step[Any]) -> Step[T]:
        """A step that computes from the results of `needs`, in their order."""
        return self._add(Step(name, function, needs))

    def query(self, name: str, prompts: Step[Sequence[Prompt]], labels: LabelTokens) -> Step[PoolScores]:
        """A step that asks the model for the label log-odds of `prompts`, in order."""
        if self._api is None:
            raise ValueError(f"pipeline {self.name!r} has no ModelAPI to query")
        api = self._api

        async def ask(asked: Sequence[Prompt]) -> PoolScores:
            return await api.score(asked, labels)

        # Not kept here: ModelAPI's response cache keeps every score by its prompt.
        return self._add(Step(name, ask, (prompts,), kept=False))

    def evaluate(self, name: str, function: Callable[..., T | Awaitable[T]], *needs: Step[Any]) -> Step[T]:
        """A step that measures: a transform by another name, so that a pipeline reads as what it does."""
        return self.transform(name, function, *needs)

    async def run(self) -> Results:
        """Run every step. The first failure cancels the others and is raised as it is."""
        tasks: dict[Step[Any], asyncio.Task[Any]] = {}

        async def execute(step: Step[Any]) -> Any:
            inputs = [await tasks[need] for need in step.needs]
            return await self._result(step, inputs)

        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for step in self._steps:
                    tasks[step] = group.create_task(execute(step), name=f"{self.name}: {step.name}")
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
        if failure is not None:
            raise failure
        return Results({step: task.result() for step, task in tasks.items()})

    def _add(self, step: Step[T]) -> Step[T]:
        if any(known.name == step.name for known in self._steps):
            raise ValueError(f"pipeline {self.name!r} already has a step {step.name!r}")
        unknown = [need.name for need in step.needs if need not in self._steps]
        if unknown:
            raise ValueError(f"step {step.name!r} needs steps of another pipeline: {', '.join(unknown)}")
        self._steps.append(step)
        return step

    async def _result(self, step: Step[Any], inputs: Sequence[Any]) -> Any:
        if self._folder is None or not step.kept:
            return await _call(step.function, inputs)
        made_from = _digest_of_call(step.function, inputs)
        adapter = _result_type(step.function)
        if made_from is None or adapter is None:
            logger.debug("step %r is not kept: its inputs or its result have no JSON form", step.name)
            return await _call(step.function, inputs)
        path = self._folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', step.name)}.json"
        kept = _read_kept(path, made_from, adapter)
        if kept is not _ABSENT:
            return kept
        result = await _call(step.function, inputs)
        document = {"step": step.name, "made_from": made_from, "result": adapter.dump_python(result, mode="json")}
        write_atomically(path, orjson.dumps(document, option=orjson.OPT_INDENT_2))
        return result


_ABSENT = object()


async def _call(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    result = function(*inputs)
    return await result if inspect.isawaitable(result) else result


def _result_type(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """How to write and read the function's declared result; None where it declares none."""
    target = function.func if isinstance(function, partial) else function
    try:
        declared = get_type_hints(target).get("return")
        return None if declared is None else TypeAdapter(declared)
    except (NameError, TypeError, PydanticUserError):  # the last: a type that pydantic cannot read back
        return None


def _digest_of_call(function: Callable[..., Any], inputs: Sequence[Any]) -> str | None:
    """SHA-256 of source, bound arguments, captured variables and inputs; None where one has no canonical form."""
    bound: list[Any] = []
    if isinstance(function, partial):
        bound += [function.args, function.keywords]
        function = function.func
    if inspect.ismethod(function):
        bound.append(function.__self__)
        function = function.__func__
    try:
        variables = inspect.getclosurevars(function)
        content = orjson.dumps(
            [
                inspect.getsource(function),
                bound,
                [function.__defaults__, function.__kwdefaults__],
                {name: _content(value) for name, value in {**variables.globals, **variables.nonlocals}.items()},
                list(inputs),
            ],
            option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
        )
    except (OSError, TypeError, AttributeError):
        return None
    return hashlib.sha256(content).hexdigest()


def _content(value: Any) -> Any:
    """What a captured or global variable is in a digest: a module its name, code its source, anything else itself."""
    if inspect.ismodule(value):
        return value.__name__
    if inspect.isfunction(value) or inspect.isclass(value):
        return inspect.getsource(value)
    return value


def _read_kept(path: Path, made_from: str, adapter: TypeAdapter[Any]) -> Any:
    try:
        document = orjson.loads(path.read_bytes())
        if document["made_from"] != made_from:
            return _ABSENT
        return adapter.validate_json(orjson.dumps(document["result"]))
    except FileNotFoundError:
        return _ABSENT
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        logger.warning("%s is damaged (%s) and is made again", path, type(error).__name__)
        return _ABSENT
