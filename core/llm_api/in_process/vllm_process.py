"""The one vLLM of this process, shared by all who ask for it with the same settings."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from core.errors import ConfigurationError
from core.llm_api.in_process.engine_thread import EngineThread


@dataclass(eq=False, slots=True)
class Loaded:
    """The vLLM of this process. asked: what it was started with; users: how many DirectEngines hold it; takes_pools:
    whether its engine takes a pool in one call."""

    asked: Mapping[str, object] = field(repr=False)  # may hold a key
    thread: EngineThread = field(default_factory=EngineThread)
    users: int = 0
    vllm: Any = None
    llm: Any = None
    takes_pools: bool = False


class VLLMProcess:
    """Gives the one vLLM to whoever asks for it with the same settings, and stops it after the last one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None

    def take(self, asked: Mapping[str, object]) -> Loaded:
        """Blocks while a vLLM is being stopped. Raises ConfigurationError where one runs with other settings."""
        with self._lock:
            if self._loaded is None:
                self._loaded = Loaded(asked)
            elif self._loaded.asked != asked:
                there = self._loaded.asked
                unlike = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
                differences = ", ".join(
                    name if name == "hf_token" else f"{name} {there.get(name)!r}, not {asked.get(name)!r}"
                    for name in unlike
                )
                raise ConfigurationError(
                    f"this process already runs vLLM with {differences}.",
                    hint="One engine a process: close the first one, or start a server for one of them.",
                )
            self._loaded.users += 1
            return self._loaded

    def give_back(self, loaded: Loaded) -> None:
        """Blocks until vLLM has stopped, if this was its last user."""
        with self._lock:
            loaded.users -= 1
            if loaded.users:
                return
            self._loaded = None
            if loaded.llm is not None:
                loaded.thread.call(functools.partial(_stop, loaded.llm), exclusive=True).result()
            loaded.thread.stop()


def _stop(llm: Any) -> None:
    engine_core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
    if engine_core is not None:
        engine_core.shutdown()


PROCESS: Final = VLLMProcess()
"""The one of this process."""
