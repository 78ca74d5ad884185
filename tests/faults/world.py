"""A fake server behind the fault proxy, in a thread of their own, and whole runs of the command line against them.

A run is `ICM.main` in this process and thread, so that a thousand of them take minutes, or a process of its own where
it is to be killed. Every run has an end: one that takes longer than it may is a hang, and reported as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar
from unittest import mock

from matplotlib.figure import Figure

from core.llm_api.engines.vllm import VLLMClient
from core.llm_api.llm import ModelAPI
from core.llm_api.response_cache import cache_keys
from core.llm_api.types import EngineIdentity, Prompt, Segment
from fakes.vllm_server import FALSE, TRUE, FakeVLLM, label_distribution
from src.experiments.ICM import main
from tests.core.two_labels import two
from tests.faults.proxy import FaultProxy

T = TypeVar("T")
SCRIPT = Path(__file__).resolve().parents[2] / "src" / "experiments" / "ICM.py"
LABELS = two(TRUE, FALSE)
MODEL = "fake-8b"
PATIENCE = {
    "ICM_READ_TIMEOUT": "4",
    "ICM_CONNECT_TIMEOUT": "4",
    "ICM_LIVENESS_TIMEOUT": "3",
    "ICM_RETRY_BASE": "0.05",
    "ICM_MAX_ATTEMPTS": "10",
}
"""Faults that take minutes are played in tenths of seconds: the client's patience is shortened alike."""


def signed_by_words(tokens: Sequence[int]) -> float:
    """A model whose answer depends on every token of the prompt, more on the last ones."""
    total = sum(
        ((token * 2654435761) % 1000 - 499.5) / 500 * (3 if i > len(tokens) - 12 else 0.2)
        for i, token in enumerate(tokens)
    )
    return max(-8.0, min(8.0, total))


def other_weights(tokens: Sequence[int]) -> float:
    return -signed_by_words(tokens) + 0.5


class Hang(BaseException):
    """A run that went on for longer than it may."""


@dataclass
class Ended:
    """How a run ended. hung: it did not."""

    code: int
    out: str
    err: str
    seconds: float
    hung: bool = False


@dataclass
class Verdict:
    """What is wrong with a run that was faulted and, where it stopped, resumed; empty lists where nothing is."""

    wrong: list[str] = field(default_factory=list)
    resumed: bool = False


class World:
    """Servers in a thread, data and run folders in a temporary place. A context manager."""

    model = MODEL
    labels = LABELS
    patience: Mapping[str, str] = PATIENCE

    def __init__(self, claims: int = 24) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="icm-faults-"))
        self.data = self.home / "claims.jsonl"
        rows = [
            {"question": f"Is {n} even?", "choice": answer, "label": int((n % 2 == 0) == (answer == "yes")),
             "consistency_id": n}
            for n in range(claims // 2) for answer in ("yes", "no")
        ]  # fmt: skip
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.loop = asyncio.new_event_loop()
        self.server = FakeVLLM(model=MODEL, log_odds=signed_by_words)
        self.proxy: FaultProxy
        self._whole: dict[tuple[str, ...], bytes] = {}
        self._thread = threading.Thread(target=self._serve, name="servers", daemon=True)
        self._ready = threading.Event()
        self._stop: Callable[[], None]

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)
        shutil.rmtree(self.home, ignore_errors=True)

    def _serve(self) -> None:
        async def serve() -> None:
            stopped = asyncio.Event()
            self._stop = stopped.set
            async with self.server as server, self.between(server.port) as self.proxy:
                self._ready.set()
                await stopped.wait()

        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(serve())
        self.loop.close()

    def between(self, port: int) -> FaultProxy:
        """The proxy before the server at this port."""
        return FaultProxy(port, labels=self.labels.asked.ids)

    def at_server(self, action: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the servers' loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(action, self.loop)
        return future.result(10)

    def be(self, *, log_odds: Callable[[Sequence[int]], float] = signed_by_words, **attributes: Any) -> None:
        """What the server is from now on; attributes that are not named are as they were at first."""
        plain = {"root": "/models/fake", "salt": "", "version": "0.26.0+fake", "model": MODEL, "trees": False}
        for name, value in {**plain, **attributes, "log_odds": log_odds}.items():
            setattr(self.server, name, value)

    def arguments(self, runs: Path, *more: str) -> list[str]:
        return [
            *("--data", str(self.data), "--model", self.model, "--runs_dir", str(runs), "--run", "a", "--quiet"),
            *("--num_seed", "4", "--batch_size", "16", "--max_tail", "4", *more),
        ]

    def environment(self) -> dict[str, str]:
        return {"VLLM_BASE_URL": self.proxy.url, "ICM_SECRETS": os.devnull, **self.patience}

    def run(self, runs: Path, *more: str, env: Mapping[str, str] | None = None, limit: float = 60.0) -> Ended:
        """`ICM.main` here and now."""
        out, err = io.StringIO(), io.StringIO()
        started = time.perf_counter()
        before = dict(os.environ)
        os.environ.update({**self.environment(), **(env or {})})
        for handler in list(logging.root.handlers):
            logging.root.removeHandler(handler)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _watchdog(limit), _no_drawing():
                code = main(self.arguments(runs, *more))
        except Hang:
            return Ended(-1, out.getvalue(), err.getvalue(), time.perf_counter() - started, hung=True)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception as crash:  # noqa: BLE001 - that is what is looked for
            return Ended(-2, out.getvalue(), f"{err.getvalue()}\nTraceback: {crash!r}", time.perf_counter() - started)
        finally:
            os.environ.clear()
            os.environ.update(before)
        return Ended(code, out.getvalue(), err.getvalue(), time.perf_counter() - started)

    def process(self, runs: Path, *more: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        """The same in a process of its own. before: done in it first."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *self.arguments(runs, *more)],
            env={**os.environ, **self.environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def undisturbed(self, *more: str) -> bytes:
        """labels.jsonl of a run with these flags on which nothing befell."""
        if more not in self._whole:
            runs = self.home / f"whole {len(self._whole)}"
            self.be()
            self.proxy.renew([])
            ended = self.run(runs, *more, limit=400.0)
            assert ended.code == 0, ended.err
            self._whole[more] = labels_of(runs)
        return self._whole[more]

    def _keys(self, runs: Path) -> dict[bytes, tuple[int, ...]]:
        """Every prompt that passed the proxy, by its key in the response cache of this run."""
        identity = EngineIdentity(**json.loads((runs / "a" / "run.json").read_text())["engine"])
        keys = {}
        for prompt in {prompt for exchange in self.proxy.exchanges for prompt in exchange.prompts}:
            digest = hashlib.sha256(json.dumps(list(prompt), separators=(",", ":")).encode()).hexdigest()
            keys[cache_keys(identity, self.labels.asked, [digest])[0]] = prompt
        return keys

    def stored(self, runs: Path) -> set[tuple[int, ...]]:
        """Prompts whose answers are in the response cache; none before the run has begun."""
        if not (runs / "a" / "run.json").exists():
            return set()
        keys = self._keys(runs)
        return {keys[key] for key, *_ in _rows(runs) if key in keys}

    def wrong_in_cache(self, runs: Path) -> int:
        """Rows of the response cache that the honest server would not have given for their prompt."""
        keys = self._keys(runs)
        truth = dict(zip(keys, self.truth(list(keys.values())), strict=True))
        return sum(truth.get(key) != (true, false) for key, true, false in _rows(runs))

    def truth(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[float, float]]:
        """What the honest server answers to each."""
        return [label_distribution(signed_by_words(prompt)) for prompt in prompts]

    def paid_twice(self) -> int:
        """Prompts that were asked again after their whole honest answer had been handed over."""
        have: set[tuple[int, ...]] = set()
        again = 0
        for exchange in self.proxy.exchanges:
            again += len(have.intersection(exchange.prompts))
            if exchange.delivered is not None:
                have.update(exchange.prompts)
        return again


class RealWorld(World):
    """The same before a real vLLM server, which answers exactly by prompt and cannot become another."""

    patience: Mapping[str, str] = {**PATIENCE, "ICM_READ_TIMEOUT": "30", "ICM_LIVENESS_TIMEOUT": "10"}
    """A pool takes the small model on two cores some seconds, and beside other work several times that."""

    def __init__(self, url: str, model: str, claims: int = 16) -> None:
        super().__init__(claims)
        self.url, self.model = url, model
        self.labels = asyncio.run(self._ask(lambda api: api.spell_labels()))

    def between(self, port: int) -> FaultProxy:
        """Before the real server, whatever the fake one's port."""
        return FaultProxy(int(self.url.rsplit(":", 1)[1]), labels=self.labels.asked.ids, stall=40.0, silence=20.0)

    def be(self, **attributes: Any) -> None:  # type: ignore[override]
        """Nothing but itself."""

    def truth(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[float, float]]:
        """Asked of the server itself, past proxy and caches."""
        asked = [Prompt((Segment("", prompt),)) for prompt in prompts]
        scores = asyncio.run(self._ask(lambda api: api.score(asked, self.labels)))
        return [(float(true), float(false)) for false, true in scores.logprobs]

    async def _ask(self, question: Callable[[ModelAPI], Coroutine[Any, Any, T]]) -> T:
        async with ModelAPI(VLLMClient(self.url, self.model)) as api:
            return await question(api)


def labels_of(runs: Path) -> bytes:
    return (runs / "a" / "labels.jsonl").read_bytes()


def _rows(runs: Path) -> list[tuple[bytes, float, float]]:
    """key, log P(True), log P(False) of every answer."""
    with contextlib.closing(sqlite3.connect(runs / "responses.sqlite")) as db:
        return db.execute("SELECT key, first_logprob, last_logprob FROM answers").fetchall()


def _no_drawing() -> contextlib.AbstractContextManager[object]:
    """Curves are most of a small run's work, and no fault touches them."""

    def save(figure: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"\x89PNG")

    return mock.patch.object(Figure, "savefig", save)


@contextlib.contextmanager
def _watchdog(limit: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, left)  # a test's own timeout, begun anew
