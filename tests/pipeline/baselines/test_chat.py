"""A chat model is asked in the testbed's words, as an answer begins with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.labels import TRUE_FALSE, LabelSpace
from core.llm_api.llm import ModelAPI
from fakes.vllm_server import FakeVLLM, encode
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.testbeds import custom_testbed
from src.pipeline.baselines import run_baseline
from src.pipeline.baselines.chat import ask_chat
from src.pipeline.baselines.trial import ChatModel, Trial
from src.pipeline.labelling import Labelling, prepare_batches

YES_NO = LabelSpace(("no", "yes"), (" no", " yes"))
STARS = LabelSpace(("bad", "so", "good"), (" bad", " so", " good"))


@pytest.mark.parametrize(
    ("space", "request_", "likeliest"),
    [(TRUE_FALSE, "True or False", True), (YES_NO, "yes or no", True), (STARS, "bad, so or good", 2)],
)
@pytest.mark.parametrize("template", ["<user>{}<assistant>", None])
async def test_the_request_names_the_labels_and_they_are_what_is_asked_for(
    space: LabelSpace, request_: str, likeliest: int, template: str | None
) -> None:
    asked = [encode(text if template is None else text.strip())[0] for text in space.texts]

    def distribution(tokens: Sequence[int]) -> dict[int, float]:
        return {token: math.log(0.1 + 0.2 * at) for at, token in enumerate(asked)}

    async with FakeVLLM(chat_template=template, distribution=distribution) as server:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            answers = await ask_chat(api, ["Is ice cold?", "Is fire wet?"], space)
        assert answers.template == (template is not None)
        assert answers.prediction.labels == {0: likeliest, 1: likeliest}
        wanted = encode(f"Complete the last line with one word, {request_}.")[1:-1]
        prompts = [prompt for body in server.pools for prompt in body["prompt"]]
        assert all(any(prompt[at : at + len(wanted)] == wanted for at in range(len(prompt))) for prompt in prompts)
        assert {tuple(sorted(body["logprob_token_ids"])) for body in server.pools} == {tuple(sorted(asked))}


async def test_the_row_has_every_label_and_costs_what_the_chat_model_was_asked_of_the_pool() -> None:
    testbed = replace(custom_testbed({}), name="stars", template="Text: {question} {choice}\nIt is", space=STARS)
    claims = [
        replace(testbed.claim({"question": f"thing {row}", "choice": "seen"}, row), gold=row % 3) for row in range(10)
    ]
    [pool] = prepare_batches(
        testbed,
        claims,
        Path(__file__),
        batch_size=6,
        consistency="none",
        objective=Objective(30.0),
        settings=SearchSettings(),
    )
    words = [encode(text)[0] for text in STARS.texts]

    def distribution(tokens: Sequence[int]) -> dict[int, float]:
        likeliest = sum(tokens) % 3
        return {token: math.log(0.7 if at == likeliest else 0.1) for at, token in enumerate(words)}

    noted: list[tuple[str, bool]] = []
    async with FakeVLLM() as server, FakeVLLM(model="chatty", distribution=distribution) as chat:
        async with ModelAPI(VLLMClient(server.url, server.model)) as api:
            labelling = await Labelling.open(pool, api)
            model = ChatModel(
                lambda: ModelAPI(VLLMClient(chat.url, chat.model)),
                lambda identity, template: noted.append((identity.model, template)),
            )
            result = await run_baseline(Trial("zero-shot-chat", labelling, chat=model))
            assert api.stats.asked == 0
    assert noted == [("chatty", False)]
    assert (result.cost.asked, result.utility) == (6, None)
    assert (len(result.pool), len(result.test)) == (6, 4)
    assert {answer.label for answer in (*result.pool, *result.test)} == {0, 1, 2}
    assert {answer.claim for answer in result.test} == {claim.row for claim in pool.rest}
