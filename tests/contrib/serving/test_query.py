"""POST /query: topics, passages, answer; and what happens when one of them is missing."""

from __future__ import annotations

import pytest

from contrib.serving.answering import MAX_TOPICS, read_topics
from fakes.vllm_server import Fault
from tests.contrib.serving.conftest import Serve, WritingVLLM

QUESTION = {"question": "Where does it\n\nflow?"}


async def test_the_answer_is_made_from_the_passages_that_the_topics_find(serve: Serve, model: WritingVLLM) -> None:
    async with serve() as site:
        status, answer = await site.post("/query", QUESTION)
    assert status == 200
    assert answer["topics"] == ["danube", "rivers"]
    assert answer["answer"] == "Through ten countries."
    assert [source["path"] for source in answer["sources"]] == ["rivers/danube.txt"]
    assert answer["sources"][0]["line"] == 1
    assert set(answer["seconds"]) == {"topics", "retrieval", "answer"}
    assert answer["model"] == model.model
    asked, answered = [prompt for prompt in model.prompts if "Question:" in prompt]
    assert asked.endswith("Question: Where does it flow?\nTopics:"), "on one line, so that it ends where it ends"
    assert "ten countries. It ends in the Black Sea." in answered
    assert answered.endswith("Question: Where does it flow?\nAnswer:")


async def test_without_passages_there_is_no_answer(serve: Serve, model: WritingVLLM) -> None:
    model.topics = "volcanoes"
    async with serve() as site:
        status, answer = await site.post("/query", {"question": "Why?"})
        metrics = (await site.get("/metrics"))[1]
    assert status == 200
    assert answer["answer"] is None
    assert answer["sources"] == []
    assert "icm_serving_questions_without_passages_total 1.0" in metrics


async def test_what_does_not_fit_the_model_is_the_clients_to_change(serve: Serve, model: WritingVLLM) -> None:
    async with serve() as site:
        model.faults = [Fault(status=400, body={"error": {"message": "maximum context length"}})]
        status, problem = await site.post("/query", QUESTION)
    assert status == 422
    assert "do not fit" in problem["error"]


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        (" Bees, honey ,  winter.\nQuestion: more", ["bees", "honey", "winter"]),
        ("bees, Bees, ,", ["bees"]),
        ("", []),
        ("\n\n", []),
        (f"{'a sentence that goes on ' * 9}, bees", ["bees"]),
        (",".join(map(str, range(50))), [str(n) for n in range(MAX_TOPICS)]),
    ],
)
def test_topics_are_read_from_the_first_line(text: str, topics: list[str]) -> None:
    assert read_topics(text) == topics
