"""How large a pool fits into a time: the choice, and the measurement against a fake server."""

from __future__ import annotations

import pytest

from core.llm_api.llm import ModelAPI
from core.llm_api.vllm_llm import VLLMClient
from src.experiments.ICM import build_parser
from src.experiments.single_run import pool_of
from src.pipeline.labelling import Labelling
from src.pipeline.pool_size import ASKED, SIZES, Speed, choose_size, measure, search_tokens
from tests.core.fake_server import FakeVLLM

MEAN = 33.7  # of the built-in claims, Gemma's tokens


@pytest.mark.parametrize(
    ("tokens_a_second", "size"), [(2000, 64), (1500, 64), (500, 32), (300, 32), (100, 16), (1, 16)]
)
def test_the_largest_pool_that_ends_in_time_is_taken(tokens_a_second: int, size: int) -> None:
    chosen, seconds = choose_size(Speed(tokens_a_second * 7, 7.0), MEAN, 256, 230.0)
    assert chosen == size
    assert seconds <= 230.0 or size == SIZES[-1]


def test_a_larger_pool_takes_longer_and_so_do_longer_claims() -> None:
    needed = [search_tokens(size, MEAN) for size in SIZES]
    assert needed == sorted(needed, reverse=True)
    assert search_tokens(64, 2 * MEAN) == pytest.approx(2 * search_tokens(64, MEAN))
    speed = Speed(1000, 1.0)
    assert choose_size(speed, MEAN, 256, 1e9, SIZES[1:])[0] == 32
    assert choose_size(speed, MEAN, 2560, 0.0)[1] > choose_size(speed, MEAN, 256, 0.0)[1]


@pytest.mark.parametrize("flags", [[], ["--layout", "upstream"], ["--context_cap", "8"]])
@pytest.mark.parametrize("metrics", [True, False])
async def test_the_speed_is_that_of_the_runs_own_questions(flags: list[str], metrics: bool) -> None:
    async with FakeVLLM(trees=True, metrics=metrics) as server, ModelAPI(VLLMClient(server.url, server.model)) as api:
        args = build_parser().parse_args(["--testbed", "builtin", "--model", server.model, *flags])
        labelling = await Labelling.open(pool_of(args), api)
        speed = await measure(labelling)
        assert speed.seconds > 0
        # A warm-up, a tree without its last claim, and that claim appended.
        assert api.stats.asked == 1 + (ASKED - 1) + ASKED
        if metrics:
            assert speed.tokens < api.stats.prompt_tokens
        again = await measure(labelling)
        if metrics:
            assert again.tokens < speed.tokens  # what was asked is cached, so a run must not measure in its own layout
