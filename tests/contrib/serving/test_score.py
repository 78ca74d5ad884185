"""POST /score: the numbers are the model's, for the very prompts that ICM would ask."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.vllm_server import BOS, FALSE, TRUE, encode, hashed_log_odds
from src.icm.testbeds import NAMES, TESTBEDS
from tests.contrib.serving.conftest import Serve, WritingVLLM

CLAIM = {"question": "Is fire hot?", "choice": "Yes"}
OTHER = {"question": "Is ice hot?", "choice": "Yes"}
COMPARISON = {"question": "Is fire hot?", "choice": "Yes", "choice_2": "No"}


def asked(testbed: str, claim: dict[str, str], *demonstrations: tuple[dict[str, str], bool]) -> list[int]:
    """Token ids of a prompt."""
    template = TESTBEDS[testbed].template
    tokens = [BOS]
    for row, label in demonstrations:
        tokens += [*encode(template.format_map(row)), TRUE if label else FALSE, *encode("\n\n")]
    return tokens + encode(template.format_map(claim))


@pytest.mark.parametrize("testbed", NAMES)
async def test_the_scores_are_the_models_for_the_testbeds_prompt(serve: Serve, testbed: str) -> None:
    claim = COMPARISON if "choice_2" in TESTBEDS[testbed].columns else CLAIM
    async with serve() as site:
        status, answer = await site.post("/score", {"testbed": testbed, "claims": [claim]})
    assert status == 200
    expected = hashed_log_odds(asked(testbed, claim))
    [score] = answer["scores"]
    assert score["log_odds"] == pytest.approx(expected)
    assert score["log_p_true"] - score["log_p_false"] == pytest.approx(expected)
    assert score["label"] == (expected > 0)
    assert answer["mean_log_odds"] == pytest.approx(expected)


async def test_demonstrations_stand_before_every_claim_in_their_order(serve: Serve) -> None:
    demonstrations = [{**OTHER, "label": False}, {"question": "Is tea a drink?", "choice": "No", "label": True}]
    request = {"testbed": "truthfulQA", "claims": [CLAIM, OTHER], "demonstrations": demonstrations}
    async with serve() as site:
        status, answer = await site.post("/score", request)
        metrics = (await site.get("/metrics"))[1]
    assert status == 200
    shown = [({k: v for k, v in row.items() if k != "label"}, row["label"]) for row in demonstrations]
    prompts = [asked("truthfulQA", claim, *shown) for claim in (CLAIM, OTHER)]
    assert [score["log_odds"] for score in answer["scores"]] == pytest.approx([hashed_log_odds(p) for p in prompts])
    assert answer["prompt_tokens"] == sum(map(len, prompts))
    assert "icm_serving_claims_scored_total 2.0" in metrics
    assert "icm_client_requests_total{" in metrics, "the model's client shows its own"


async def test_too_many_demonstrations_for_the_model_are_refused_before_it_is_asked(
    serve: Serve, model: WritingVLLM
) -> None:
    long = {"question": "word " * 3_000, "choice": "Yes", "label": True}
    async with serve() as site:
        before = len(model.completions)
        status, problem = await site.post(
            "/score", {"testbed": "truthfulQA", "claims": [CLAIM], "demonstrations": [long] * 3}
        )
        assert len(model.completions) == before
    assert status == 422
    assert "the model takes 8191" in problem["error"]


@pytest.mark.parametrize(
    ("request_body", "complaint"),
    [
        ({}, "testbed: Field required"),
        ({"testbed": "gsm9k", "claims": [CLAIM]}, "testbed"),
        ({"testbed": "truthfulQA", "claims": []}, "claims"),
        ({"testbed": "truthfulQA", "claims": [CLAIM] * 257}, "claims"),
        ({"testbed": "truthfulQA", "claims": [{"question": "x"}]}, "claims.0.choice"),
        ({"testbed": "truthfulQA", "claims": [{"question": "x", "choice": " \n"}]}, "claims.0.choice"),
        ({"testbed": "truthfulQA", "claims": [{"question": "x", "choice": "\x1e"}]}, "claims.0.choice"),
        ({"testbed": "truthfulQA", "claims": [{"question": "x", "choice": 7}]}, "claims.0.choice"),
        ({"testbed": "truthfulQA", "claims": [{**CLAIM, "weight": 1}]}, "claims.0.weight"),
        ({"testbed": "truthfulQA", "claims": [COMPARISON]}, "claims.0.choice_2"),
        ({"testbed": "alpaca", "claims": [CLAIM]}, "claims.0.choice_2"),
        ({"testbed": "truthfulQA", "claims": [CLAIM], "demonstrations": [CLAIM]}, "demonstrations.0.label"),
        (
            {"testbed": "truthfulQA", "claims": [CLAIM], "demonstrations": [{**CLAIM, "label": 1}]},
            "demonstrations.0.label",
        ),
        ([], "valid"),
        (None, "valid"),
        ("x", "valid"),
    ],
)
async def test_what_is_wrong_is_named(serve: Serve, request_body: Any, complaint: str) -> None:
    async with serve() as site:
        status, problem = await site.post("/score", request_body)
    assert status == 422
    assert complaint in " ".join([problem["error"], *problem["details"]])
