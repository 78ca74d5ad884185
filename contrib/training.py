"""Configuration files of trainers, written out: labels in, a fine-tuned model's folder out. Nothing is trained here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from src.icm.testbeds import BadInput

Trainer = Literal["trl", "axolotl"]


def axolotl_rows(rows: Iterable[Mapping[str, Any]], bos: str) -> Iterator[dict[str, Any]]:
    """prompt and completion as axolotl's input_output segments: the label alone is learnt.

    axolotl adds no token to segments, so the prompt begins with `bos`. It drops all columns beside `segments`.
    """
    for row in rows:
        yield {
            "segments": [
                {"label": False, "text": bos + row["prompt"]},
                {"label": True, "text": row["completion"]},
            ],
            **{name: value for name, value in row.items() if name not in ("prompt", "completion")},
        }


def trainer_config(
    trainer: Trainer, *, model: str, data: Path, output: Path, seed: int, extra: Mapping[str, Any] | None = None
) -> str:
    """YAML for `trl sft --config FILE` or `axolotl train FILE`.

    model: path or id to begin from. data: JSONL of `training_rows` (trl) or `axolotl_rows`. output: folder of the tuned
    model. extra: keys that are added or win, for what depends on the machine (batch, precision, LoRA).
    """
    config = {"trl": _trl, "axolotl": _axolotl}[trainer](model, data, output, seed)
    return yaml.safe_dump(config | dict(extra or {}), sort_keys=False)


def read_extra(path: Path) -> dict[str, Any]:
    """A YAML mapping of trainer keys. Raises BadInput where it is none."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise BadInput(f"{path}: is not a mapping of keys to values")
    return document


def beginning_token(model: Path) -> str:
    """The text of the token that a prompt begins with, as the model's folder says; "" where it does not."""
    try:
        document = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    token = document.get("bos_token") if isinstance(document, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _trl(model: str, data: Path, output: Path, seed: int) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "datasets": [{"path": "json", "data_files": str(data)}],
        "output_dir": str(output),
        "completion_only_loss": True,
        "max_length": 4096,
        "learning_rate": 1.0e-5,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "lr_scheduler_type": "cosine",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def _axolotl(model: str, data: Path, output: Path, seed: int) -> dict[str, Any]:
    return {
        "base_model": model,
        "datasets": [{"path": str(data), "ds_type": "json", "type": "input_output"}],
        "dataset_prepared_path": str(output.with_name(output.name + "-prepared")),
        "output_dir": str(output),
        "train_on_inputs": False,
        "sequence_len": 4096,
        "sample_packing": False,
        "learning_rate": 1.0e-5,
        "optimizer": "adamw_torch_fused",
        "lr_scheduler": "cosine",
        "num_epochs": 2,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "bf16": "auto",
        "logging_steps": 5,
        "save_strategy": "no",
        "seed": seed,
    }
