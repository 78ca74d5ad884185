"""What benchmarks/engine_rows.py measures: cells of a YAML or JSON file, checked as it is read.

    defaults: {prompts: 12, limit: 420}
    cells:
      - name: qwen3-8b
        shape: qwen3-8b           # of benchmarks/make_shape.py; or model: FOLDER_OR_ID
        layers: 16
        options: [--max-model-len, "16384"]
        inexact: true             # and the same with --no-deterministic

docs/benchmarks.md has every key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmarks.make_shape import CONFIGS

Check = Literal["smoke", "determinism", "step"]
FOLDER: Final = "{folder}"
"""What stands for the model's folder in a cell's options and environment."""
INEXACT: Final = ", inexact"
"""The end of the name of a cell that was made by `inexact`."""


class BadCells(Exception):
    """One line about a file of cells."""


class Cell(BaseModel):
    """One server and what is asked of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, pattern=r"^\w[\w .,'+()-]*$")
    shape: str | None = None
    layers: int | None = Field(default=None, ge=1)
    tiny: bool = False
    adapter: bool = False
    """A LoRA adapter is made with the shape; the options must serve it."""
    model: str | None = None
    """A folder or Hugging Face id in place of a shape."""
    options: tuple[str, ...] = ()
    env: dict[str, str] = {}
    gpus: int = Field(default=1, ge=1)
    ask: str | None = None
    """The name under which the server is asked, where that is not the model's (an adapter)."""
    checks: tuple[Check, ...] = ("smoke", "determinism", "step")
    inexact: bool | tuple[Check, ...] = False
    """Measure the same with --no-deterministic, too, with these checks (true: the same)."""
    prompts: int = Field(default=12, ge=1, le=256)
    determinism: tuple[str, ...] = ("--quick",)
    """Arguments of scripts/test_determinism.py."""
    step: tuple[str, ...] = ("--cases", "b", "c", "d", "e", "f", "--sizes", "128", "--repeats", "3")
    """Arguments of benchmarks/step.py."""
    limit: float = Field(default=600.0, gt=0)
    """Seconds for the whole cell; its shape is not counted."""

    @model_validator(mode="after")
    def _names_one_model(self) -> Cell:
        if (self.shape is None) == (self.model is None):
            raise ValueError("give either shape or model")
        if self.shape is not None and self.shape not in CONFIGS:
            raise ValueError(f"there is no shape {self.shape!r}: {', '.join(CONFIGS)}")
        if self.model is not None and (self.tiny or self.adapter or self.layers is not None):
            raise ValueError("layers, tiny and adapter are for a shape")
        return self

    def folder(self, shapes: Path) -> str:
        """The model: a folder below `shapes` whose name says what was made, or `model` as it is."""
        if self.shape is None:
            return str(self.model)
        parts = [self.shape, f"{self.layers}-layers" if self.layers else "", "tiny" if self.tiny else ""]
        return str(shapes / "-".join([part for part in parts if part] + (["adapter"] if self.adapter else [])))

    def filled(self, folder: str) -> Cell:
        """With the model's folder for {folder} in options and environment."""
        options = tuple(option.replace(FOLDER, folder) for option in self.options)
        env = {name: value.replace(FOLDER, folder) for name, value in self.env.items()}
        return self.model_copy(update={"options": options, "env": env})

    def with_inexact(self) -> list[Cell]:
        """This cell, and where it is asked for its inexact one."""
        exact = self.model_copy(update={"inexact": False})
        if self.inexact is False:
            return [exact]
        checks = self.checks if self.inexact is True else self.inexact
        changes: dict[str, Any] = {
            "name": self.name + INEXACT,
            "options": (*self.options, "--no-deterministic"),
            "checks": checks,
        }
        return [exact, exact.model_copy(update=changes)]


def read_cells(path: Path) -> list[Cell]:
    """Every cell of the file, the inexact ones after theirs. Raises BadCells, OSError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadCells(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or set(document) - {"defaults", "cells"} or "cells" not in document:
        raise BadCells(f"{path}: expected `cells`, and perhaps `defaults`")
    defaults, listed = document.get("defaults") or {}, document["cells"]
    if not isinstance(defaults, dict) or not isinstance(listed, list) or not listed:
        raise BadCells(f"{path}: `cells` must be a list with an entry, `defaults` a mapping")
    cells: list[Cell] = []
    for number, given in enumerate(listed, start=1):
        if not isinstance(given, dict):
            raise BadCells(f"{path}, cell {number}: must be a mapping")
        try:
            cells += Cell.model_validate(defaults | given).with_inexact()
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            said = f"{place}: {first['msg']}" if place else first["msg"]
            raise BadCells(f"{path}, cell {given.get('name', number)}: {said}") from None
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadCells(f"{path}: two cells are called {twice[0]!r}")
    return cells
