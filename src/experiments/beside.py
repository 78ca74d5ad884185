"""What a run is given that is one of several in this process: cells of a sweep share engines and one progress bar."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from core.llm_api.llm import ModelAPI
from src.experiments.request import RunRequest
from src.pipeline.progress import CellProgress


@dataclass(frozen=True, slots=True)
class Beside:
    """folder: where this run is kept. opened: the started ModelAPI of a request, with counts of its own.

    cache_share: how many runs share the server's KV cache.
    """

    folder: Path
    opened: Callable[[RunRequest], AbstractAsyncContextManager[ModelAPI]]
    progress: CellProgress
    cache_share: int
