"""Engines are found by name, imported when they are asked for, and say themselves what sets them apart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from core.errors import ConfigurationError
from core.llm_api import engines
from core.llm_api.engines import ENGINES, open_engine
from core.llm_api.llm import ModelAPI
from core.llm_api.types import Capabilities, Engine
from core.settings import Settings
from fakes.vllm_server import TRUE, FakeVLLM
from tests.core.two_labels import two

REPOSITORY = Path(__file__).resolve().parents[3]
SETTINGS = Settings(
    vllm_base_url=("http://127.0.0.1:9",),
    llama_server_url="http://127.0.0.1:9",
    llama_api_base="http://127.0.0.1:9/v1",
)


@pytest.mark.parametrize(
    ("name", "kind", "capabilities"),
    [
        ("vllm", "VLLMClient", Capabilities()),
        ("direct", "DirectEngine", Capabilities()),
        ("llama_server", "LlamaServer", Capabilities(checkable=False)),
        ("external", "ExternalAPI", Capabilities(billed=True, checkable=False)),
    ],
)
async def test_each_is_opened_by_its_name(name: str, kind: str, capabilities: Capabilities) -> None:
    engine = open_engine(name, SETTINGS, "m")
    assert isinstance(engine, Engine)
    assert type(engine).__name__ == kind
    api = ModelAPI(engine)
    assert api.capabilities == capabilities
    await api.aclose()


async def test_several_servers_are_one_engine() -> None:
    group = open_engine("vllm", Settings(vllm_base_url=("http://127.0.0.1:9", "http://127.0.0.1:10")), "m")
    assert (type(group).__name__, group.capabilities) == ("VLLMGroup", Capabilities())
    await group.aclose()


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no engine 'sglang'.*vllm, direct, llama_server, external"):
        open_engine("sglang", SETTINGS, "m")


def test_only_what_is_asked_for_is_imported() -> None:
    program = (
        "import sys; import core.llm_api.llm; "
        "print([name for name in sys.modules if name.startswith('core.llm_api.engines.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_an_engine_is_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a line in the table."""

    async with FakeVLLM() as server:
        file = ModuleType("another_engine")
        told: list[object] = []

        def open_another(settings: Settings, model: str, options: object) -> Engine:
            told.append(options)
            return open_engine("vllm", settings, model)

        file.open_engine = open_another  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "another_engine", file)
        monkeypatch.setattr(engines, "ENGINES", {**ENGINES, "another": "another_engine"})
        settings = Settings(vllm_base_url=(server.url,))
        async with ModelAPI(open_engine("another", settings, server.model, {"its": "own"})) as api:
            assert await api.tokenize([" True"]) == [[TRUE]]
            assert (await api.score([], two(TRUE, 2))).logprobs.shape == (0, 2)
        assert told == [{"its": "own"}]
