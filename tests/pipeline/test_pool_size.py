"""How large a pool fits into a time: the choice, and the measurement against a fake server."""

from __future__ import annotations

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from core.llm_api.types import Prompt
from fakes.vllm_server import FakeVLLM
from src.experiments.ICM import build_parser
from src.experiments.loading import pool_of
from src.experiments.request import RunRequest
from src.icm.problem import Candidate, Stream, generator
from src.pipeline.labelling import Labelling
from src.pipeline.pool_size import ASCENT_EVALUATIONS, ASKED, COST_OF_SEARCH, Speed, choose_pool, measure, search_tokens

MEAN = 33.7  # of the built-in claims, Gemma's tokens


POOLS = (64, 32, 16)


@pytest.mark.parametrize(("rate", "pool"), [(2000, 64), (1500, 64), (500, 32), (300, 32), (100, 16), (1, 16)])
def test_the_largest_pool_that_ends_in_time_is_taken(rate: int, pool: int) -> None:
    chosen, seconds = choose_pool(Speed(rate * 7, 7.0), MEAN, 192, 240.0, POOLS)
    assert chosen == pool
    assert seconds <= 240.0 or pool == POOLS[-1]


def test_a_larger_pool_takes_longer_and_so_do_longer_claims_and_more_of_them() -> None:
    assert [search_tokens(size, MEAN) for size in COST_OF_SEARCH] == pytest.approx(
        [MEAN * worth for worth in COST_OF_SEARCH.values()]
    )
    needed = [search_tokens(size, MEAN) for size in (1, 2, 10, 16, 17, 20, 32, 50, 64, 65, 100)]
    assert needed == sorted(needed)
    assert needed[-1] < 4 * search_tokens(64, MEAN)
    assert search_tokens(64, 2 * MEAN) == pytest.approx(2 * search_tokens(64, MEAN))
    speed = Speed(1000, 1.0)
    assert choose_pool(speed, MEAN, 0, 1e9, [20, 16])[0] == 20
    [none, few, many] = [choose_pool(speed, MEAN, later, 0.0, [20])[1] for later in (0, 100, 1000)]
    assert none == pytest.approx((search_tokens(20, MEAN) + 20 * MEAN) / 1000)
    assert many - few == pytest.approx(900 * MEAN / 1000)


def test_an_ascent_takes_a_few_cold_trees() -> None:
    needed = [search_tokens(size, MEAN, "ascent") for size in (2, 16, 32, 64, 128)]
    assert needed == sorted(needed)
    assert needed[3] == pytest.approx(MEAN * ASCENT_EVALUATIONS * (64 * 6 + 64))
    assert all(search_tokens(size, MEAN, "ascent") < search_tokens(size, MEAN) for size in (16, 32, 64))
    slow = Speed(800 * 7, 7.0)
    assert choose_pool(slow, MEAN, 192, 240.0, POOLS, "ascent")[0] > choose_pool(slow, MEAN, 192, 240.0, POOLS)[0]


@pytest.mark.parametrize("flags", [[], ["--layout", "upstream"], ["--context_cap", "8"]])
@pytest.mark.parametrize("metrics", [True, False])
async def test_the_speed_is_that_of_the_runs_own_questions(flags: list[str], metrics: bool) -> None:
    async with FakeVLLM(trees=True, metrics=metrics) as server, ModelAPI(VLLMClient(server.url, server.model)) as api:
        request = RunRequest.of(build_parser().parse_args(["--testbed", "builtin", "--model", server.model, *flags]))
        labelling = await Labelling.open(pool_of(request), api)
        speed = await measure(labelling)
        assert speed.seconds > 0
        # A warm-up, a tree without its last claim, and that claim appended.
        assert api.stats.asked == 1 + (ASKED - 1) + ASKED
        # All but the warm-up, or less than that where the engine counts what it found cached.
        sent = api.stats.prompt_tokens - len(labelling.book.prefix) - len(labelling.book.questions[0])
        assert speed.tokens < sent if metrics else speed.tokens == sent


async def test_a_run_finds_hardly_anything_cached_of_what_was_timed() -> None:
    async with FakeVLLM(trees=True) as server, ModelAPI(VLLMClient(server.url, server.model)) as api:
        request = RunRequest.of(
            build_parser().parse_args(["--testbed", "builtin", "--model", server.model, "--batch_size", "16"])
        )
        labelling = await Labelling.open(pool_of(request), api)
        problem, scorer = labelling.pool.problem, labelling.scorer()
        labels = tuple((generator(problem.settings.seed, Stream.SEEDS, 2).random(16) < 0.5).tolist())
        layout = problem.new_layout(range(15), 0)
        own = [scorer.prompt(claim, Candidate(labels, layout)) for claim in layout.questions]
        await measure(labelling)
        after_measuring = await computed_by(api, own, labelling)
    async with FakeVLLM(trees=True) as other, ModelAPI(VLLMClient(other.url, other.model)) as api:
        alone = await computed_by(api, own, labelling)
    assert after_measuring >= 0.9 * alone


async def computed_by(api: ModelAPI, prompts: list[Prompt], labelling: Labelling) -> int:
    before = await api.prefix_cache()
    await api.score(prompts, labelling.book.labels)
    after = await api.prefix_cache()
    assert before is not None
    assert after is not None
    return (after - before).computed
