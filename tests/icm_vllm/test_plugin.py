"""What our plugin in vLLM tells of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from icm_vllm.plugin import config_digest

GEMMA = {
    "model_type": "gemma3_text",
    "sliding_window": 512,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    "layer_types": ["sliding_attention", "full_attention"],
}
WRITTEN = {"_name_or_path": "/models/gemma", "transformers_version": "5.19.0", "dtype": "bfloat16"}


def engine(config: dict[str, Any], cache_dtype: str = "auto") -> SimpleNamespace:
    """vLLM's configuration, as far as it is looked at."""
    model = SimpleNamespace(hf_config=SimpleNamespace(to_dict=lambda: config))
    return SimpleNamespace(model_config=model, cache_config=SimpleNamespace(cache_dtype=cache_dtype))


def test_where_a_model_lies_who_wrote_it_and_its_type_are_no_part_of_its_configuration() -> None:
    digest = config_digest(engine(GEMMA))
    assert len(digest) == 64
    assert config_digest(engine(dict(reversed((GEMMA | WRITTEN).items())))) == digest
    nested = {"text_config": GEMMA}
    assert config_digest(engine({"text_config": GEMMA | WRITTEN})) == config_digest(engine(nested)) != digest


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 1024},
        {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}}},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_what_a_short_prompt_does_not_show_is(change: dict[str, Any]) -> None:
    assert config_digest(engine(GEMMA | change)) != config_digest(engine(GEMMA))
    assert config_digest(engine(GEMMA, "fp8")) != config_digest(engine(GEMMA))


def test_values_that_are_no_json_do_not_change_it_from_start_to_start() -> None:
    assert config_digest(engine(GEMMA | {"odd": object()})) == config_digest(engine(GEMMA | {"odd": object()}))


def test_an_engine_that_does_not_say_has_none() -> None:
    assert config_digest(None) == config_digest(SimpleNamespace()) == ""
    assert config_digest(SimpleNamespace(model_config=SimpleNamespace())) == ""
