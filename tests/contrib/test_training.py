"""Trainers' configuration files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from contrib.training import axolotl_rows, beginning_token, read_extra, trainer_config
from src.icm.testbeds import BadInput


def test_trl_config(tmp_path: Path) -> None:
    text = trainer_config("trl", model="m", data=tmp_path / "d.jsonl", output=tmp_path / "o", seed=3)
    config = yaml.safe_load(text)
    assert config["datasets"] == [{"path": "json", "data_files": str(tmp_path / "d.jsonl")}]
    assert (config["model_name_or_path"], config["output_dir"], config["seed"]) == ("m", str(tmp_path / "o"), 3)
    assert config["completion_only_loss"] is True


def test_axolotl_config_and_what_the_machine_needs(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("adapter: lora\nmicro_batch_size: 1\n")
    extra = read_extra(tmp_path / "x.yaml")
    text = trainer_config("axolotl", model="m", data=tmp_path / "d", output=tmp_path / "o", seed=0, extra=extra)
    config = yaml.safe_load(text)
    assert config["datasets"][0]["type"] == "input_output"
    assert (config["adapter"], config["micro_batch_size"], config["train_on_inputs"]) == ("lora", 1, False)


def test_axolotl_rows_learn_the_label_alone() -> None:
    assert list(axolotl_rows([{"prompt": "Is it", "completion": " True"}], "<s>")) == [
        {"segments": [{"label": False, "text": "<s>Is it"}, {"label": True, "text": " True"}]}
    ]


@pytest.mark.parametrize(
    ("content", "token"),
    [
        ({"bos_token": "<s>"}, "<s>"),
        ({"bos_token": {"content": "<bos>"}}, "<bos>"),
        ({}, ""),
        ({"bos_token": None}, ""),
    ],
)
def test_the_beginning_token_is_the_models(tmp_path: Path, content: dict[str, object], token: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    assert beginning_token(tmp_path) == token
    assert beginning_token(tmp_path / "org" / "name") == ""


@pytest.mark.parametrize("text", ["- a list", "a: [", "just text"])
def test_extra_keys_must_be_a_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"x\.yaml"):
        read_extra(tmp_path / "x.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        read_extra(tmp_path / "none.yaml")
