"""What a real llama-server answered (recorded/llama_server.json), and that our fake of it answers in the same form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import aiohttp.web
import orjson
import pytest

from core.llm_api.engines.external import ExternalAPI
from core.llm_api.http.completions import read_answers, token_logprobs
from core.llm_api.text.continuation import COUNTING, GOES_ON, wrapping_seen
from core.llm_api.text.generation import Generation
from core.llm_api.types import Prompt, Segment
from tests.core.fake_endpoint import FakeEndpoint

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded" / "llama_server.json").read_text("utf-8"))
PROMPT = Prompt((Segment(RECORDED["prompt"]),), name="claim 1")


def test_both_labels_are_read_to_the_last_bit() -> None:
    answers = read_answers(orjson.dumps(RECORDED["labels"]), [PROMPT])
    found = token_logprobs(answers.top[0], (" True", " False"), missing="error", name="claim 1")
    assert found.values == (-0.9877262115478516, -0.7164220809936523)
    assert list(answers.top[0]) == [" False", " True", " true", " false", " NOT"]
    assert (answers.prompt_tokens, answers.cached_tokens) == (37, 0)
    assert read_answers(orjson.dumps(RECORDED["labels_from_cache"]), [PROMPT]).cached_tokens == 36


def test_a_text_that_the_model_would_end_here_has_its_labels_too() -> None:
    assert RECORDED["end_of_text"]["choices"][0]["finish_reason"] == "stop"
    top = read_answers(orjson.dumps(RECORDED["end_of_text"]), [PROMPT]).top[0]
    assert (top[" True"], top[" False"]) == (-0.9877262115478516, -0.7164220809936523)


def test_tokens_that_are_no_whole_character_read_alike_and_the_most_probable_counts() -> None:
    answer = RECORDED["partial_characters"]["answer"]
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    alike = [each["logprob"] for each in listed if each["token"] == ""]
    assert len(alike) == 3
    (top,) = read_answers(orjson.dumps(answer), [PROMPT]).top
    assert top[""] == max(alike)
    assert len(top) == len(listed) - 2


def generation(answer: dict[str, Any]) -> Generation:
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Generation(text, choice["finish_reason"], answer["usage"]["prompt_tokens"])


def test_a_real_model_counts_on_and_in_its_chat_template_it_does_not() -> None:
    counted, chat = generation(RECORDED["counting"]), generation(RECORDED["counting_as_a_chat"])
    assert (counted.text, counted.prompt_tokens) == (" 6 7", 9)
    assert wrapping_seen(counted) == ""
    assert "counts 39 tokens" in wrapping_seen(chat)
    assert f"goes on from {COUNTING!r} with '1.1.1.1.'" in wrapping_seen(Generation(chat.text, "length"))


def form(value: object, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """Paths of keys through nested objects; a list counts as its first item."""
    if isinstance(value, list):
        return form(value[0], at) if value else set()
    if isinstance(value, dict):
        return {at} | {path for key, inner in value.items() for path in form(inner, (*at, key))}
    return {at}


@pytest.mark.parametrize("name", ["labels", "counting", "models"])
async def test_the_fake_says_nothing_in_another_form_than_the_real_one(name: str) -> None:
    body = {"model": "m", "prompt": COUNTING, **GOES_ON.as_dict()} | ({"logprobs": 5} if name == "labels" else {})
    async with FakeEndpoint(style="llama", model="m") as server, aiohttp.ClientSession(server.url) as session:
        path = "/v1/models" if name == "models" else "/v1/completions"
        async with session.request("GET" if name == "models" else "POST", path, json=body) as response:
            assert form(await response.json()) <= form(RECORDED[name])


async def test_the_real_card_names_the_model_and_tells_files_apart() -> None:
    class Replayed(FakeEndpoint):
        async def _models(self, _: object) -> Any:
            return aiohttp.web.json_response(RECORDED["models"])

    name = RECORDED["models"]["data"][0]["id"]
    async with Replayed(style="llama", model=name) as server:
        engine = ExternalAPI(server.url + "/v1", name)
        identity = await engine.start()
        await engine.aclose()
    assert len(identity.fingerprint) == 64
