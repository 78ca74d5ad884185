"""When answers wait for a check of who gave them, and for which one."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import ConfigurationError, ServerChanged
from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.http.identity_check import Counting, two_ids
from core.llm_api.http.retry import RetryPolicy
from core.llm_api.http.transport import HttpOptions
from fakes.vllm_server import FakeVLLM

QUICK = RetryPolicy(max_attempts=3, deadline=10, base=0.01, cap=0.02)


async def test_one_check_serves_all_answers_that_came_before_it_began(server: FakeVLLM) -> None:
    client = VLLMClient(server.url, server.model, options=HttpOptions(retry=QUICK))
    await client.start()
    check, http = client._check, client._http
    assert check is not None
    began = server.requests.count("/version")
    await check.pass_answers_of(http.epoch)
    assert server.requests.count("/version") == began, "no other server can have answered"
    http.epoch += 3
    await asyncio.gather(*(check.pass_answers_of(http.epoch - before) for before in (0, 1, 2, 0)))
    assert server.requests.count("/version") == began + 1
    await client.aclose()


async def test_an_answer_that_comes_while_a_check_lasts_waits_for_another_one(server: FakeVLLM) -> None:
    client = VLLMClient(server.url, server.model, options=HttpOptions(retry=QUICK))
    await client.start()
    check, http = client._check, client._http
    assert check is not None
    began = server.requests.count("/version")
    http.epoch += 1
    server.latency = 0.2
    first = asyncio.create_task(check.pass_answers_of(http.epoch))
    while server.requests.count("/version") == began:
        await asyncio.sleep(0.01)
    http.epoch += 1  # what the check has asked so far was another server's to answer, perhaps
    await asyncio.gather(first, check.pass_answers_of(http.epoch))
    assert server.requests.count("/version") == began + 2
    server.version = "0.99"
    http.epoch += 1
    for _ in range(2):  # a check that was not passed is not passed later
        with pytest.raises(ServerChanged, match=r"version '0\.99'"):
            await check.pass_answers_of(http.epoch)
    await client.aclose()


@pytest.mark.parametrize("logits", [-40.0, 2.0])
async def test_numbers_that_are_no_probabilities_are_refused_though_none_is_above_0(logits: float) -> None:
    async with FakeVLLM(logits=logits, log_odds=lambda _: 0.0) as server:
        server.drop = {5852} if logits > 0 else set()
        client = VLLMClient(server.url, server.model, options=HttpOptions(retry=QUICK))
        with pytest.raises(ConfigurationError, match="--logprobs-mode raw_logprobs"):
            await client.start()
        await client.aclose()


def test_what_is_counted_beyond_what_was_sent() -> None:
    assert [Counting(1, 0).beyond(5), Counting(0, 1).beyond(5), Counting().beyond(5)] == [1, 5, 0]


@pytest.mark.parametrize(("ids", "two"), [([5, 9, 7, 9], (7, 9)), ([4, 4, 4], (4, 3)), ([0, 0], (0, 1))])
def test_two_tokens_are_asked_for_by_id_also_where_the_prompt_repeats_one(ids: list[int], two: tuple[int, int]) -> None:
    """A tokenizer without a token for any of its words makes one unknown token of each."""
    assert two_ids(ids) == two
