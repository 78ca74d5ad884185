"""Environment variables of the package: a wrong value is told by name before anything starts."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import ConfigurationError
from core.llm_api.engines.direct import DirectEngine
from icm_vllm import environment, exactness, plugin

REPOSITORY = Path(__file__).resolve().parents[2]

WRONG = {
    plugin.BATCH_INVARIANT: ("true", "2", " 1", "on"),
    plugin.CHECK: ("no", "00"),
    plugin.ATTENTION: ("false",),
    plugin.ALL_REDUCE: ("off",),
    plugin.FP8: ("-1",),
    plugin.EXPERTS: ("none",),
    plugin.FAST_PREFIXES: ("yes",),
    plugin.QUICK_START: ("1 if x",),
    plugin.TILE: ("64x128", "64x128x", "axbxc", "64x128x128x4", "0x1x1", "9" * 5000 + "x1x1"),
    plugin.WINDOW_TILE: ("abc", "63x64", "64", "8x32", "64x32x3x2", "64x32x64x2", "64x32x4", "²x²"),
}
RIGHT = {plugin.TILE: ("64x128x128",), plugin.WINDOW_TILE: ("64x32", "128x64x8x2", "64x32x4x3")}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_told_in_one_line(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=") as error:
        environment.check({name: value})
    assert "expected" in str(error.value) or "must be" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistyped_name_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match=r"_WINDOWTILE is no variable of .*; did you mean \w+_WINDOW_TILE\?$"):
        environment.check({"ICM_BATCH_INVARIANT_WINDOWTILE": "64x64"})
    environment.check({"ICM_BATCH_INVARIANTS": "x", "ICM_READ_TIMEOUT": "3", "ICM_OF_MINE": "y"})


def test_right_values_and_empty_ones_are_taken() -> None:
    for name in environment.VARIABLES:
        for value in ("", *RIGHT.get(name, ("0", "1"))):
            environment.check({name: value})
    environment.check({})


def test_every_variable_of_the_package_is_checked_and_in_the_docs() -> None:
    sources = "".join(path.read_text() for path in (REPOSITORY / "icm_vllm").rglob("*.py"))
    assert set(re.findall(r"\"(ICM_[A-Z0-9_]+)\"", sources)) == set(environment.VARIABLES) == set(WRONG)
    told = (REPOSITORY / "docs" / "environment.md").read_text()
    assert all(f"`{name}`" in told for name in environment.VARIABLES)


def test_the_plugin_says_it_in_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.WINDOW_TILE, "63x64")
    with pytest.raises(ValueError, match="63x64: queries and keys must be powers of 2"):
        plugin.register()


async def test_vllm_in_this_process_says_it_before_it_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(plugin.FAST_PREFIXES, "yes")
    (tmp_path / "config.json").write_text("{}")
    engine = DirectEngine(str(tmp_path))
    try:
        with pytest.raises(ConfigurationError, match=r"ICM_FAST_PREFIXES=yes: 1 .on. or 0 .off. was expected"):
            await engine.start()
    finally:
        await engine.aclose()


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch (make setup-local)")
def test_a_tile_that_this_gpu_has_not_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.TILE, "64x64x32")
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(to_dict=dict), dtype="torch.bfloat16"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=None,
    )
    with pytest.raises(ValueError, match=r"^ICM_BATCH_INVARIANT_TILE=64x64x32: this GPU has 128x256x64, "):
        exactness.check(config, "gpu", 90, warn=[].append)
    exactness.check(config, "gpu", 80, warn=[].append)


def test_the_command_lists_them_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert environment.main() == 0
    told = capsys.readouterr().out
    assert all(f"{name}=" in told for name in environment.VARIABLES)
    monkeypatch.setenv(plugin.CHECK, "no")
    assert environment.main() == 2
    assert capsys.readouterr().err == "ICM_BATCH_INVARIANT_CHECK=no: 1 (on) or 0 (off) was expected\n"
