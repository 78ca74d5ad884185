"""The one thread in which vLLM's synchronous engine runs, shared by everyone in this process who asks it.

vllm.LLM works for one caller at a time, and its `generate` collects the outputs of every request it finds. So it is
only touched here: by calls, one by one, and by texts, which are written together, step by step. An exclusive call waits
for the texts before it, and texts that come later wait for the call.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Sink: TypeAlias = Callable[[Any], None]
"""Gets every output of one text up to its last, or the exception that it failed with. Called in the thread."""


@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[], Any]
    result: Future[Any]
    exclusive: bool


@dataclass(frozen=True, slots=True)
class _Text:
    key: str
    prepare: Callable[[], tuple[Mapping[str, Any], Any]]
    sink: Sink


@dataclass(frozen=True, slots=True)
class _Abort:
    key: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


class EngineThread:
    """`engine` is None until a call loads vLLM and sets it to vLLM's LLMEngine."""

    def __init__(self) -> None:
        self.engine: Any = None
        self._jobs: queue.SimpleQueue[_Call | _Text | _Abort | _Stop] = queue.SimpleQueue()
        self._waiting: deque[_Call | _Text] = deque()
        self._sinks: dict[str, Sink] = {}  # of the texts that are being written
        # A daemon, so that a program which forgets to close its engine can still end.
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    def call(self, run: Callable[[], T], *, exclusive: bool = False) -> Future[T]:
        """Call `run` in the thread; exclusive: not while texts are being written."""
        result: Future[T] = Future()
        self._jobs.put(_Call(run, result, exclusive))
        return result

    def write(self, key: str, prepare: Callable[[], tuple[Mapping[str, Any], Any]], sink: Sink) -> None:
        """Write a text. key: unique to it; prepare: called in the thread, for its prompt and sampling parameters as
        LLMEngine.add_request takes them."""
        self._jobs.put(_Text(key, prepare, sink))

    def abort(self, key: str) -> None:
        """Stop writing a text, if it is still being written; its sink is not called any more."""
        self._jobs.put(_Abort(key))

    def stop(self) -> None:
        """End the thread. Texts that are still being written fail, and calls that have not begun."""
        self._jobs.put(_Stop())
        self._thread.join()

    # What follows runs in the thread.

    def _run(self) -> None:
        while self._receive():
            while self._waiting and (isinstance(self._waiting[0], _Text) or not self._sinks):
                self._begin(self._waiting.popleft())
            if self._sinks:
                self._step()

    def _receive(self) -> bool:
        """Take in all jobs that have come, and wait for one if there is nothing to do. False: the thread must end."""
        block = not (self._waiting or self._sinks)
        while True:
            try:
                job = self._jobs.get(block=block)
            except queue.Empty:
                return True
            block = False
            match job:
                case _Abort():
                    self._abort(job.key)
                case _Call(exclusive=False):
                    self._begin(job)
                case _Stop():
                    self._fail(RuntimeError("the engine was closed"))
                    return False
                case _:
                    self._waiting.append(job)

    def _begin(self, job: _Call | _Text) -> None:
        if isinstance(job, _Call):
            if job.result.set_running_or_notify_cancel():
                try:
                    job.result.set_result(job.run())
                except BaseException as error:  # noqa: BLE001 - it is the caller's, whatever it is
                    job.result.set_exception(error)
            return
        try:
            self.engine.add_request(job.key, *job.prepare())
        except Exception as error:  # noqa: BLE001 - vLLM raises whatever its parts raise
            job.sink(error)
        else:
            self._sinks[job.key] = job.sink

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:  # noqa: BLE001 - the engine is dead for all of them
            self._fail_texts(error)
            return
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is not None:
                if output.finished:
                    del self._sinks[output.request_id]
                sink(output)

    def _abort(self, key: str) -> None:
        self._waiting = deque(job for job in self._waiting if not (isinstance(job, _Text) and job.key == key))
        if self._sinks.pop(key, None) is not None:
            self.engine.abort_request([key])

    def _fail_texts(self, error: Exception) -> None:
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink(error)

    def _fail(self, error: Exception) -> None:
        self._fail_texts(error)
        for job in self._waiting:
            if isinstance(job, _Text):
                job.sink(error)
            elif job.result.set_running_or_notify_cancel():
                job.result.set_exception(error)
