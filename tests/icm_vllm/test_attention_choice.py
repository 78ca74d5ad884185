"""Which attention is exact for a model, by its config.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from icm_vllm.attention_choice import exact_backend, read_config


@pytest.mark.parametrize(
    ("config", "backend"),
    [
        ({}, "FLASH_ATTN"),
        ({"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False}, "FLASH_ATTN"),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, "TRITON_ATTN"),
        ({"model_type": "mistral", "sliding_window": 4096}, "TRITON_ATTN"),
        ({"model_type": "mistral", "sliding_window": None}, "FLASH_ATTN"),
        ({"sliding_window": 4096, "layer_types": ["full_attention"]}, "FLASH_ATTN"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "TRITON_ATTN"),
        ({"model_type": "gemma3", "text_config": {"sliding_window": 1024}}, "TRITON_ATTN"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}, "sliding_window": 3}, "FLASH_ATTN"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "FLASH_ATTN_MLA"),
        ({"text_config": {"model_type": "kimi_k2", "kv_lora_rank": 512}}, "FLASH_ATTN_MLA"),
    ],
)
def test_the_backend_follows_from_the_layers(config: dict[str, object], backend: str) -> None:
    assert exact_backend(config) == backend


def test_a_configuration_is_read_from_a_folder_or_from_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"kv_lora_rank": 1}')
    assert read_config(str(tmp_path)) == {"kv_lora_rank": 1}
    for text in ("[1]", "{", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        assert read_config(str(tmp_path)) == {}
    hub = pytest.importorskip("huggingface_hub")
    kept = tmp_path / "hub" / "models--org--name"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc" / "config.json").write_text(json.dumps({"sliding_window": 8}))
    monkeypatch.setattr(hub, "try_to_load_from_cache", _in(str(tmp_path / "hub"), hub.try_to_load_from_cache))
    assert read_config("org/name") == {"sliding_window": 8}
    assert read_config("org/other") == {}
    assert read_config("no/such/folder") == {}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert read_config("org/name") == {}


def _in(folder: str, own: object) -> object:
    return lambda *arguments, **named: own(*arguments, cache_dir=folder, **named)  # type: ignore[operator]
