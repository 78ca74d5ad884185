"""Engines, one file each, imported when the engine is asked for by its name.

Such a file has `open_engine(settings, model, options)`, which returns an Engine that is not started yet; `options` are
those that only this engine understands, None for its defaults. To add one: a file like that, and a line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Final

from core.errors import ConfigurationError
from core.llm_api.types import Engine
from core.settings import Settings

ENGINES: Final[Mapping[str, str]] = {
    "vllm": "core.llm_api.engines.vllm_group",
    "direct": "core.llm_api.engines.direct",
    "llama_server": "core.llm_api.engines.llama_server",
    "external": "core.llm_api.engines.external",
}
"""Module of each: servers of vLLM, vLLM in this process, llama.cpp's server, an OpenAI-compatible API."""


def open_engine(name: str, settings: Settings, model: str, options: object = None) -> Engine:
    """The engine of that name, not yet started. Raises ConfigurationError for an unknown name."""
    if name not in ENGINES:
        raise ConfigurationError(f"there is no engine {name!r}.", hint=f"There are {', '.join(ENGINES)}.")
    engine: Engine = importlib.import_module(ENGINES[name]).open_engine(settings, model, options)
    return engine
