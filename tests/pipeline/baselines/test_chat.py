"""A chat model is asked in the testbed's words, as an answer begins with them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.labels import TRUE_FALSE, LabelSpace
from core.llm_api.llm import ModelAPI
from src.pipeline.baselines.chat import ask_chat
from tests.core.fake_server import FakeVLLM, encode

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
