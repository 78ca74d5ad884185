"""The engine's thread against an engine that says what it was asked, step by step."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from core.llm_api.in_process.engine_thread import EngineThread


class SteppedEngine:
    """One token of every request a step, as LLMEngine does; "bad" is refused, "die" kills it."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.aborted: list[str] = []
        self.most_at_once = 0
        self.inside = 0

    def add_request(self, key: str, prompt: dict[str, Any], tokens: int) -> str:
        if prompt["text"] == "bad":
            raise ValueError("bad prompt")
        self.left[key] = -1 if prompt["text"] == "die" else tokens
        return f"{key}-internal"

    def step(self) -> list[SimpleNamespace]:
        time.sleep(0.002)
        self.most_at_once = max(self.most_at_once, len(self.left))
        outputs = []
        for key in list(self.left):
            if self.left[key] < 0:
                raise RuntimeError("engine died")
            self.left[key] -= 1
            outputs.append(SimpleNamespace(request_id=key, finished=self.left[key] == 0, left=self.left[key]))
            if not self.left[key]:
                del self.left[key]
        return outputs

    def abort_request(self, keys: list[str]) -> None:
        self.aborted += keys
        for key in keys:
            self.left.pop(key, None)


@pytest.fixture
def thread() -> Any:
    made = EngineThread()
    made.engine = SteppedEngine()
    yield made
    made.stop()


def written(thread: EngineThread, key: str, tokens: int, text: str = "x") -> queue.SimpleQueue[Any]:
    outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    thread.write(key, lambda: ({"text": text}, tokens), outputs.put)
    return outputs


def until_end(outputs: queue.SimpleQueue[Any]) -> list[int]:
    found = []
    while True:
        output = outputs.get(timeout=5)
        found.append(output.left)
        if output.finished:
            return found


def test_texts_are_written_together(thread: EngineThread) -> None:
    outputs = [written(thread, str(n), 20 + n) for n in range(8)]
    assert [until_end(one) for one in outputs] == [list(reversed(range(20 + n))) for n in range(8)]
    assert thread.engine.most_at_once == 8


def test_a_call_that_must_be_alone_waits_for_texts_and_later_texts_wait_for_it(thread: EngineThread) -> None:
    first = written(thread, "a", 30)
    first.get(timeout=5)
    running: list[int] = []
    alone = thread.call(lambda: running.append(len(thread.engine.left)), exclusive=True)
    second = written(thread, "b", 3)
    beside = thread.call(lambda: len(thread.engine.left))
    assert beside.result(5) == 1, "other calls come in between"
    alone.result(5)
    assert running == [0]
    assert len(until_end(first)) == 29
    assert len(until_end(second)) == 3
    assert thread.engine.most_at_once == 1


def test_an_aborted_text_is_taken_from_the_engine_and_not_heard_of_again(thread: EngineThread) -> None:
    outputs, other = written(thread, "a", 10**6), written(thread, "b", 20)
    outputs.get(timeout=5)
    thread.abort("a")
    until_end(other)
    assert thread.engine.aborted == ["a"]
    while not outputs.empty():
        outputs.get()
    thread.call(lambda: None, exclusive=True).result(5)
    assert outputs.empty()


def test_a_text_that_waits_can_be_aborted_before_it_begins(thread: EngineThread) -> None:
    started = threading.Event()
    hold = threading.Event()
    thread.call(lambda: (started.set(), hold.wait(5)), exclusive=True)
    started.wait(5)
    outputs = written(thread, "a", 5)
    thread.abort("a")
    hold.set()
    thread.call(lambda: None, exclusive=True).result(5)
    assert outputs.empty()
    assert thread.engine.aborted == []


def test_a_refused_text_fails_alone_and_a_dead_engine_fails_all(thread: EngineThread) -> None:
    good = written(thread, "a", 20)
    assert isinstance(written(thread, "b", 5, "bad").get(timeout=5), ValueError)
    assert len(until_end(good)) == 20
    texts = [written(thread, "c", 10**6), written(thread, "d", 5, "die")]
    for outputs in texts:
        while not isinstance(found := outputs.get(timeout=5), Exception):
            pass
        assert str(found) == "engine died"


def test_stopping_fails_what_is_left(thread: EngineThread) -> None:
    made = EngineThread()
    made.engine = SteppedEngine()
    outputs = written(made, "a", 10**6)
    outputs.get(timeout=5)
    call = made.call(lambda: None, exclusive=True)
    made.stop()
    with pytest.raises(RuntimeError, match="closed"):
        call.result(5)
    while not isinstance(found := outputs.get(timeout=5), Exception):
        pass
    assert "closed" in str(found)


def test_an_error_of_a_call_is_the_callers(thread: EngineThread) -> None:
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0).result(5)
    assert thread.call(lambda: 5).result(5) == 5
