"""bootstrap-best keeps the random start that ends with the highest U."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM, hashed_log_odds
from src.icm.consistency import Labels
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.pipeline.baselines import run_baseline
from src.pipeline.baselines.bootstrapping import bootstrap
from src.pipeline.baselines.trial import Options, Trial
from src.pipeline.datafiles import load_testbed
from src.pipeline.labelling import Labelling, prepare_batches
from src.pipeline.predictions import Prediction

SIZE, ROUNDS, RESTARTS = 12, 2, 6


@pytest.fixture
async def trial() -> AsyncIterator[Trial]:
    """A model whose answers change with every demonstration: every start ends elsewhere."""
    testbed, claims, path = load_testbed("builtin", Path())
    [pool] = prepare_batches(
        testbed,
        claims[:24],
        path,
        batch_size=SIZE,
        consistency="gold-free",
        objective=Objective(50.0, "mean"),
        settings=SearchSettings(seed=5),
    )
    async with FakeVLLM(log_odds=hashed_log_odds) as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            labelling = await Labelling.open(pool, api)
            yield Trial("bootstrap-best", labelling, Options(rounds=ROUNDS, restarts=RESTARTS))


async def test_the_start_with_the_highest_u_is_kept(trial: Trial) -> None:
    before = trial.labelling.api.stats.asked
    result = await run_baseline(trial)
    assert result.cost.asked == RESTARTS * (ROUNDS + 1) * SIZE
    assert trial.labelling.api.stats.asked == before + result.cost.asked + SIZE + len(trial.held_out_claims)
    worth = []
    for restart in range(RESTARTS):
        pool = await bootstrap(trial, trial.random_labels(restart), consistent=True)
        evaluation = await trial.evaluate(trial.in_order(pool.labels))
        assert evaluation.inconsistent == 0
        worth.append((evaluation.utility, trial.in_order(pool.labels)))
    utilities = [utility for utility, _ in worth]
    assert len(set(utilities)) > 2, "the starts end alike, so nothing is chosen"
    assert utilities.index(max(utilities)) > 0, "the first start is the best, so nothing is chosen"
    assert result.utility == max(utilities)
    by_row = {answer.claim: answer.label for answer in result.pool}
    assert tuple(by_row[claim.row] for claim in trial.labelling.pool.claims) == max(worth)[1]
    assert len(result.test) == len(trial.held_out_claims)


async def test_starts_are_balanced_and_differ_and_the_first_is_that_of_the_other_rows(trial: Trial) -> None:
    starts = [trial.random_labels(restart) for restart in range(RESTARTS)]
    assert all(sum(labels) == SIZE // 2 for labels in starts)
    assert len(set(starts)) == RESTARTS
    assert starts[0] == trial.random_labels()


async def test_one_start_gives_the_labels_of_bootstrap_consistent(trial: Trial) -> None:
    """Whatever the other rows start from."""
    one = await run_baseline(replace(trial, options=Options(rounds=ROUNDS, restarts=1, start="zero-shot")))
    plain = await run_baseline(replace(trial, row="bootstrap-consistent", options=Options(rounds=ROUNDS)))
    assert (one.pool, one.test, one.utility) == (plain.pool, plain.test, plain.utility)
    assert one.cost.asked == plain.cost.asked + SIZE


async def test_with_a_known_share_bootstrapping_starts_from_it(trial: Trial) -> None:
    problem = trial.labelling.pool.problem
    known = replace(
        problem,
        objective=replace(problem.objective, prior=0.75),
        settings=replace(problem.settings, start_share="prior"),
    )
    skewed = replace(trial, labelling=replace(trial.labelling, pool=replace(trial.labelling.pool, problem=known)))
    starts = [skewed.random_start(restart) for restart in range(RESTARTS)]
    assert all(sum(labels) == 9 for labels in starts)
    assert len(set(starts)) == RESTARTS
    before = replace(skewed, options=replace(trial.options, halves=True))
    assert before.random_start(2) == trial.random_start(2) == trial.random_labels(2)
    assert sum(skewed.random_labels()) == SIZE // 2, "the row of random labels has halves"
    seen: list[Labels] = []

    class Seen(Trial):
        async def leave_one_out(self, labels: Labels) -> Prediction:
            seen.append(labels)
            return await super().leave_one_out(labels)

    for row in ("bootstrap", "bootstrap-consistent", "bootstrap-best"):
        await run_baseline(Seen(row, skewed.labelling, Options(rounds=1, restarts=1)))
    assert seen == [starts[0]] * 3
