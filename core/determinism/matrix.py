"""The matrix: the same prompts asked in every way in which an engine might answer them differently.

Every row compares its answers bit by bit with the references: each prompt asked by itself, one after the other, nothing
cached. A row changes only what is computed or cached beside a prompt, never the prompt.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from core.determinism.asking import Asker, Generated, Listed, Request, Sampling, Tokens
from core.determinism.bits import Compared, compare
from core.llm_api.types import Engine, NextTokens, Prompt, Query, Segment

AT_ONCE: Final = 10
"""Requests in flight in the rows that ask many single prompts."""
SUFFIXES: Final = (1, 2, 15, 16, 17)
"""Uncached tokens at a prompt's end, around what kernels treat as few: one, two, and a block of 16."""


SEARCHED: Final = "as a search asks"
REPEATED: Final = "in the check before this one"
TEXTS: Final = ("greedy", "temperature 0.7, seeded")
COMPANY: Final = ("beside others", "prompts cached")
"""Names of rows: of the pool, of the last check's answers, and of generated texts by kind and by what runs beside."""


@dataclass(frozen=True, slots=True)
class Material:
    """What is asked. Token ids throughout.

    prompts: the prompts compared, each longer than two cache blocks. labels: (true, false) of the score. others:
    further tokens whose logprobs are compared with the labels'. long, short: other prompts to ask beside them, which
    the rows' names call strangers. block: tokens of a cache block.
    """

    prompts: tuple[Tokens, ...]
    labels: tuple[int, int]
    others: tuple[int, ...]
    long: tuple[Tokens, ...]
    short: tuple[Tokens, ...]
    block: int = 16

    @property
    def chosen(self) -> tuple[int, ...]:
        """Tokens whose logprobs are asked for."""
        return (*self.labels, *self.others)

    @property
    def digest(self) -> str:
        """SHA-256 of the prompts and of the tokens whose logprobs are asked for."""
        return hashlib.sha256(orjson.dumps([self.prompts, self.chosen])).hexdigest()


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked. repeats: requests of the first row. lists: prompts a request. generated: tokens; 0: none.

    top: whether the 20 most probable tokens are compared too, each row then asked twice.
    """

    repeats: int = 100
    lists: tuple[int, ...] = (1, 2, 3, 8, 64, 256)
    generated: int = 100
    texts: int = 4
    top: bool = True


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report. cached: share of the row's prompt tokens found cached, None if unknown."""

    name: str
    compared: Compared
    cached: float | None = None


Answers = list[tuple[Tokens, Listed]]
Step = Callable[[bool], Awaitable[Answers]]
"""Asks in one way, for the chosen tokens or (True) for the 20 most probable ones."""


class Matrix:
    """Asks everything, row by row, in an order that does not depend on the answers.

    engine: the one behind `asker`, for asking as a search does. seed: of shuffles and salts; a seed that was used
    before on the same server finds its prompts cached.
    """

    def __init__(self, asker: Asker, engine: Engine, material: Material, size: Size, *, seed: int) -> None:
        self.asker = asker
        self.engine = engine
        self.material = material
        self.size = size
        self.seed = seed
        self._salts = 0
        self._cached: float | None = None  # share of the prompt tokens of the last `ask` that were found cached
        self._references: dict[tuple[Tokens, bool], Listed] = {}

    async def rows(self, earlier: Sequence[Listed] | None = None) -> AsyncGenerator[Row]:
        """Every row of the matrix. earlier: references of an earlier run of the same material, to compare with."""
        for top in (False, True) if self.size.top else (False,):
            await self.refer(self.material.prompts, top)
            for name, step in _steps(self):
                answers = await step(top)
                yield Row(name + (", top 20" if top else ""), self._compare(answers, top), self._cached)
        yield Row(SEARCHED, self._compare(await _searched(self), False))
        if earlier is not None:
            yield Row(REPEATED, self._compare(zip(self.material.prompts, earlier, strict=True)))
        if self.size.generated:
            async for row in _generated(self):
                yield row

    async def seconds_a_prompt(self) -> float:
        """Seconds for one of the material's prompts, asked by itself, nothing cached; the first only warms up."""
        first, *others = self.material.prompts
        await self.ask([Request((first,), self.salt())], False)
        started = time.perf_counter()
        await self.ask([Request((prompt,), self.salt()) for prompt in others], False)
        return (time.perf_counter() - started) / len(others)

    def names(self, earlier: Sequence[Listed] | None = None) -> list[str]:
        """The names of what `rows` yields, in order."""
        steps = [name for name, _ in _steps(self)]
        found = [*steps, *(f"{name}, top 20" for name in steps if self.size.top), SEARCHED]
        if earlier is not None:
            found.append(REPEATED)
        if self.size.generated:
            found += [_text_name(self.size, kind, how) for kind in TEXTS for how in COMPANY]
        return found

    def references(self) -> list[Listed]:
        """Answers to the material's prompts, each asked by itself, nothing cached; known after the first row."""
        return [self._references[prompt, False] for prompt in self.material.prompts]

    def salt(self) -> str:
        """The name of a new, empty prefix cache."""
        self._salts += 1
        return f"determinism-{self.seed}-{self._salts}"

    async def ask(self, requests: Sequence[Request], top: bool, at_once: int = 1) -> Answers:
        """Every prompt with its answer, in order."""
        before = await self.asker.prefix_cache()
        answers = await self.asker.listed(requests, None if top else self.material.chosen, at_once=at_once)
        after = await self.asker.prefix_cache()
        counted = None if before is None or after is None else after - before
        self._cached = counted.hit_rate if counted is not None and counted.queries else None
        return [
            (prompt, listed)
            for request, part in zip(requests, answers, strict=True)
            for prompt, listed in zip(request.prompts, part, strict=True)
        ]

    async def refer(self, prompts: Sequence[Tokens], top: bool) -> None:
        """Ask the prompts that have no reference yet, each by itself with nothing cached."""
        new = [prompt for prompt in prompts if (prompt, top) not in self._references]
        for prompt, listed in await self.ask([Request((prompt,), self.salt()) for prompt in new], top):
            self._references[prompt, top] = listed

    def _compare(self, answers: Iterable[tuple[Tokens, Listed]], top: bool = False) -> Compared:
        """Compare with the references; answers to prompts without one are left out."""
        pairs = [(found, listed) for prompt, listed in answers if (found := self._references.get((prompt, top)))]
        return compare(pairs, None if top else self.material.labels)


def _steps(run: Matrix) -> list[tuple[str, Step]]:
    """(name, how it is asked) of every row that compares log-probabilities."""
    size = run.size
    prompts = run.material.prompts
    one_each: Callable[[], list[Request]] = lambda: [Request((prompt,), run.salt()) for prompt in prompts]  # noqa: E731

    async def repeated(top: bool) -> Answers:
        salt = run.salt()
        return await run.ask([Request((prompts[0],), salt)] * size.repeats, top, AT_ONCE)

    async def alone_again(top: bool) -> Answers:
        return await run.ask(one_each(), top)

    def in_lists(count: int) -> Step:
        async def lists(top: bool) -> Answers:
            salt = run.salt()
            parts = [prompts[start : start + count] for start in range(0, len(prompts), count)]
            return await run.ask([Request(part, salt) for part in parts], top)

        return lists

    async def at_once(top: bool) -> Answers:
        return await run.ask(one_each(), top, AT_ONCE)

    async def shuffled(top: bool) -> Answers:
        order = random.Random(run.seed).sample(prompts, len(prompts))
        return await run.ask([Request(tuple(order), run.salt())], top)

    def beside(strangers: tuple[Tokens, ...]) -> Step:
        async def together(top: bool) -> Answers:
            requests = [Request(strangers, run.salt()), *one_each()]
            return await run.ask(requests, top, len(requests))

        return together

    async def chunked(top: bool) -> Answers:
        # One list: the strangers are computed first, and the prompts get what is left of a batch.
        return await run.ask([Request((*run.material.long, *prompts), run.salt())], top)

    async def partly_cached(top: bool) -> Answers:
        salt = run.salt()
        halves = tuple(prompt[: len(prompt) // 2] for prompt in prompts)
        await run.ask([Request(halves, salt)], top)
        return await run.ask([Request(prompts, salt)], top)

    async def fully_cached(top: bool) -> Answers:
        salt = run.salt()
        await run.ask([Request(prompts, salt)], top)
        return await run.ask([Request(prompts, salt)], top)

    async def warm_alone(top: bool) -> Answers:
        salt = run.salt()
        await run.ask([Request(prompts, salt)], top)
        return await run.ask([Request((prompt,), salt) for prompt in prompts], top)

    def ending(uncached: int, together: bool) -> Step:
        async def ends(top: bool) -> Answers:
            cut = tuple(_cut(prompt, uncached, run.material.block) for prompt in prompts)
            await run.refer(cut, top)
            salt = run.salt()
            await run.ask([Request(tuple(prompt[: len(prompt) - uncached] for prompt in cut), salt)], top)
            requests = [Request(cut, salt)] if together else [Request((prompt,), salt) for prompt in cut]
            return await run.ask(requests, top)

        return ends

    steps: list[tuple[str, Step]] = [
        (f"one prompt {size.repeats} times, {AT_ONCE} at a time", repeated),
        ("alone, again", alone_again),
        *((f"lists of {count}", in_lists(count)) for count in size.lists if count <= len(prompts)),
        (f"single requests, {AT_ONCE} at a time", at_once),
        ("shuffled", shuffled),
        ("beside short strangers", beside(run.material.short)),
        ("beside long strangers", beside(run.material.long)),
        ("behind long strangers, in chunks", chunked),
        ("half of each prompt cached", partly_cached),
        ("fully cached, one list", fully_cached),
        ("fully cached, one at a time", warm_alone),
    ]
    for uncached in SUFFIXES:
        tokens = "1 token" if uncached == 1 else f"{uncached} tokens"
        steps.append((f"{tokens} not cached, one list", ending(uncached, True)))
        steps.append((f"{tokens} not cached, alone", ending(uncached, False)))
    return steps


def _cut(prompt: Tokens, uncached: int, block: int) -> Tokens:
    """The longest beginning of `prompt` that is whole cache blocks and `uncached` tokens."""
    whole = (len(prompt) - uncached) // block * block
    if whole < block:
        raise ValueError(f"a prompt of {len(prompt)} tokens is too short for blocks of {block}")
    return prompt[: whole + uncached]


async def _searched(run: Matrix) -> Answers:
    """The labels' log-probabilities as ModelAPI gets them: the whole pool at once, twice, in another order."""
    prompts = run.material.prompts
    labels = run.material.labels
    tokens = NextTokens(("",) * len(labels), labels)
    asked = [Query(Prompt((Segment("", ids),), name=f"prompt {at}"), tokens) for at, ids in enumerate(prompts)]
    answers: Answers = []
    for order in (asked, asked[::-1]):
        found = await run.engine.score(order)
        answers += [
            (tuple(query.prompt.token_ids), dict(zip(labels, logprobs.values, strict=True)))
            for query, logprobs in zip(order, found.logprobs, strict=True)
        ]
    return answers


async def _generated(run: Matrix) -> AsyncIterator[Row]:
    size = run.size
    prompts = run.material.prompts[: size.texts]
    samplings = (Sampling(size.generated), Sampling(size.generated, temperature=0.7, seed=run.seed))
    for kind, sampling in zip(TEXTS, samplings, strict=True):
        alone: list[Generated] = []
        for prompt in prompts:
            ((written,),) = await run.asker.generate([Request((prompt,), run.salt())], sampling)
            alone.append(written)
        beside = await run.asker.generate(
            [Request((prompt,), run.salt()) for prompt in (*prompts, *run.material.prompts[size.texts :][:8])], sampling
        )
        salt = run.salt()
        await run.asker.listed([Request(prompts, salt)], run.material.chosen, at_once=1)
        (cached,) = await run.asker.generate([Request(prompts, salt)], sampling)
        for how, answers in zip(COMPANY, ([part[0] for part in beside[: len(prompts)]], cached), strict=True):
            yield Row(_text_name(size, kind, how), compare_texts(alone, answers))


def _text_name(size: Size, kind: str, how: str) -> str:
    return f"{size.generated} tokens, {kind}, {how}"


def compare_texts(alone: Sequence[Generated], answers: Sequence[Generated]) -> Compared:
    """Differing texts: another token, or the same tokens with other logprobs (nats)."""
    differing = 0
    largest = 0.0
    for one, other in zip(alone, answers, strict=True):
        if one.tokens != other.tokens:
            differing, largest = differing + 1, math.inf
        elif one.logprobs != other.logprobs:
            differing += 1
            largest = max(largest, *(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)))
    return Compared(len(alone), differing, largest)
