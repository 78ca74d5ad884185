"""The matrix finds what it is made to find, in the rows that should show it, and passes what is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from core.determinism.asking import Generated, Listed, Request, Sampling, Tokens
from core.determinism.bits import Compared, compare
from core.determinism.matrix import Material, Matrix, Row, Size
from core.llm_api.types import (
    EngineAnswer,
    EngineIdentity,
    OnAnswer,
    PrefixCacheCounters,
    Query,
    TokenLogprobs,
)

LABELS = (7, 8)
BLOCK = 16
MATERIAL = Material(
    prompts=tuple(tuple(range(100 * at, 100 * at + 70 + at)) for at in range(1, 10)),
    labels=LABELS,
    others=(9, 10),
    long=(tuple(range(5000, 5400)),),
    short=((1, 2, 3),),
    block=BLOCK,
)
SIZE = Size(repeats=12, lists=(1, 2, 3, 8, 64), generated=5, texts=2)

Error = Callable[[int, int, int], float]
"""What an inexact engine adds to a logprob: of (prompts computed together, cached tokens, uncached tokens)."""


class Computer:
    """An engine with a prefix cache whose arithmetic may depend on what it should not depend on."""

    def __init__(self, error: Error) -> None:
        self._error = error
        self._seen: set[tuple[str, Tokens]] = set()
        self.queries = self.hits = 0

    async def listed(
        self, requests: Sequence[Request], chosen: Sequence[int] | None, *, at_once: int
    ) -> list[list[Listed]]:
        answers = []
        for start in range(0, len(requests), at_once):
            together = requests[start : start + at_once]
            count = sum(len(request.prompts) for request in together)
            answers += [[self._answer(p, r.salt, count, chosen) for p in r.prompts] for r in together]
        return answers

    def _answer(self, prompt: Tokens, salt: str, count: int, chosen: Sequence[int] | None) -> Listed:
        cached = 0
        for end in range(BLOCK, len(prompt), BLOCK):
            if (salt, prompt[:end]) not in self._seen:
                break
            cached = end
        self._seen |= {(salt, prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)}
        self.queries += len(prompt)
        self.hits += cached
        extra = self._error(count, cached, len(prompt) - cached)
        tokens = chosen if chosen is not None else range(20)
        return {token: -1.0 - (sum(prompt) * 31 + token * 17) % 97 / 100 + extra for token in tokens}

    async def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Generated]]:
        count = sum(len(request.prompts) for request in requests)
        return [
            [
                Generated(
                    tuple(prompt[at % len(prompt)] + (sampling.seed or 0) % 5 for at in range(sampling.max_tokens)),
                    (-1.0 + self._error(count, 0, len(prompt)),) * sampling.max_tokens,
                )
                for prompt in request.prompts
            ]
            for request in requests
        ]

    async def prefix_cache(self) -> PrefixCacheCounters:
        return PrefixCacheCounters(self.queries, self.hits)

    # As a search asks it.

    async def start(self) -> EngineIdentity:
        return EngineIdentity("fake", "fake")

    async def tokenize(self, texts: Sequence[str], *, special: bool = False) -> None:
        return None

    async def score(self, queries: Sequence[Query], *, on_answer: OnAnswer | None = None) -> EngineAnswer:
        asked = [(tuple(query.prompt.token_ids), query.tokens.ids) for query in queries]
        tops = [self._answer(prompt, "search", len(queries), ids) for prompt, ids in asked]
        return EngineAnswer([TokenLogprobs(tuple(top.values())) for top in tops], 0)

    async def kv_cache_tokens(self) -> None:
        return None

    async def aclose(self) -> None:
        pass


async def rows_of(error: Error, size: Size = SIZE, earlier: Sequence[Listed] | None = None) -> dict[str, Row]:
    computer = Computer(error)
    matrix = Matrix(computer, computer, MATERIAL, size, seed=1)
    return {row.name: row async for row in matrix.rows(earlier)}


def differing(rows: dict[str, Row]) -> set[str]:
    return {name for name, row in rows.items() if row.compared.differing}


async def test_an_exact_engine_passes_every_row() -> None:
    rows = await rows_of(lambda together, cached, uncached: 0.0)
    assert not differing(rows)
    assert len(rows) > 40
    assert all(row.compared.prompts for row in rows.values())


@pytest.mark.parametrize("earlier", [None, [dict.fromkeys(MATERIAL.chosen, -1.0)] * len(MATERIAL.prompts)])
@pytest.mark.parametrize("size", [SIZE, replace(SIZE, generated=0), replace(SIZE, top=False)])
async def test_the_rows_to_come_are_known_by_name(size: Size, earlier: list[Listed] | None) -> None:
    computer = Computer(lambda together, cached, uncached: 0.0)
    matrix = Matrix(computer, computer, MATERIAL, size, seed=1)
    assert matrix.names(earlier) == list(await rows_of(lambda together, cached, uncached: 0.0, size, earlier))


async def test_every_row_asks_in_the_state_that_it_names() -> None:
    rows = await rows_of(lambda together, cached, uncached: 0.0)
    cold = ["alone, again", "single requests, 10 at a time", "beside long strangers", "shuffled"]
    assert all(rows[name].cached == 0 for name in cold)
    assert 0.3 < (rows["half of each prompt cached"].cached or 0) < 0.5
    assert (rows["fully cached, one at a time"].cached or 0) > 0.8
    assert (rows["1 token not cached, alone"].cached or 0) > 0.97


async def test_a_batch_that_matters_shows_wherever_prompts_are_batched() -> None:
    rows = await rows_of(lambda together, cached, uncached: 0.01 * (together > 1))
    found = differing(rows)
    assert {"lists of 2", "shuffled", "beside short strangers", "5 tokens, greedy, beside others"} <= found
    assert not {"alone, again", "lists of 1", "fully cached, one at a time", "1 token not cached, alone"} & found


async def test_a_cache_that_matters_shows_wherever_something_was_cached() -> None:
    rows = await rows_of(lambda together, cached, uncached: 0.01 * (cached > 0))
    found = differing(rows)
    assert {"half of each prompt cached", "fully cached, one list", "17 tokens not cached, alone"} <= found
    assert not {"alone, again", "lists of 8", "shuffled", "beside long strangers"} & found


async def test_a_kernel_for_single_tokens_shows_in_its_row_alone() -> None:
    rows = await rows_of(lambda together, cached, uncached: 0.01 * (uncached == 1))
    found = {name.removesuffix(", top 20") for name in differing(rows)}
    assert found == {"1 token not cached, one list", "1 token not cached, alone"}


async def test_the_check_before_is_compared_with() -> None:
    computer = Computer(lambda together, cached, uncached: 0.0)
    matrix = Matrix(computer, computer, MATERIAL, replace(SIZE, generated=0, top=False), seed=1)
    assert [row async for row in matrix.rows()]
    same = await rows_of(lambda together, cached, uncached: 0.0, earlier=matrix.references())
    other = await rows_of(lambda together, cached, uncached: 1e-9, earlier=matrix.references())
    assert same["in the check before this one"].compared.differing == 0
    assert other["in the check before this one"].compared.differing == len(MATERIAL.prompts)


async def test_a_prompt_shorter_than_a_block_is_refused() -> None:
    material = replace(MATERIAL, prompts=((1, 2, 3),))
    computer = Computer(lambda together, cached, uncached: 0.0)
    with pytest.raises(ValueError, match="too short"):
        assert [row async for row in Matrix(computer, computer, material, SIZE, seed=1).rows()]


def test_a_comparison_says_what_a_difference_would_do() -> None:
    reference = {7: -1.0, 8: -1.5, 9: -3.0}
    found = compare([(reference, {7: -1.0, 8: -1.5, 9: -3.0}), (reference, {7: -1.5, 8: -1.25, 9: -3.0})], LABELS)
    assert found.prompts == 2
    assert found.differing == 1
    assert found.largest == 0.5
    assert found.labels_changed == 1  # 0.5 became -0.25
    assert found.utility_moved == pytest.approx(50 * 0.75 / 2)
    assert found.acceptance_changed == pytest.approx(1.0)


def test_equal_scores_change_no_decision() -> None:
    assert Compared(3, 0).acceptance_changed == 0.0


def test_another_token_is_an_infinite_difference() -> None:
    assert compare([({1: -1.0}, {2: -1.0})], None).largest == math.inf
