"""A sweep as a list of cells: every combination of the values that an experiment file gives, each a run by itself.

    sweep:
      alpha: [30, 50]                          # a list: values of that setting
      seed: [1, 2, 3]
      size:                                    # names: settings that change together
        small: {batch_size: 32, K: 500}
        large: {batch_size: 64, K: 1000}

Here 2 x 3 x 2 cells. Nothing is asked, and no data is read.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import PurePath
from typing import Any, Final

from core.flags import FlagParser
from src.experiments.arguments import Parser
from src.experiments.contradictions import refuse
from src.experiments.experiment_file import Loaded, Value, actions_of, arguments_of, nearest, parser_of
from src.icm.testbeds import BadInput

MOST_CELLS: Final = 10_000
LONGEST_NAME: Final = 100  # characters of a run's name, and of a cell's
SAYS_ITSELF: Final = ("testbed", "model", "data", "search")
"""Settings whose values are clear without the setting's name."""
OF_THE_WHOLE: Final = ("run", "runs_dir", "quiet", "metrics_port")
"""Settings that no cell can have for itself."""
OF_ONE_RUN: Final = ("check", "is_complete")
"""Flags that ask about a single run."""
COLUMNS: Final = ("cell", "cells", "of", "row")
"""Columns of tables, which no combination of settings can have the name of."""
SEED: Final = ("seed", "seeds")
"""Settings whose values are repetitions: a table has their mean."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """What is varied. values: each value's name, and the settings that it stands for."""

    name: str
    values: Mapping[str, Mapping[str, Value]]

    @property
    def repeats(self) -> bool:
        """Whether its values are seeds."""
        return self.name in SEED


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep. name: of its folder. values: each dimension's value by name. arguments: its command line."""

    name: str
    values: Mapping[str, str]
    arguments: Sequence[str]


@dataclass(frozen=True, slots=True)
class Sweep:
    """A loaded experiment as dimensions and cells. more: flags that were given behind the file, for every cell."""

    loaded: Loaded
    dimensions: Sequence[Dimension]
    cells: Sequence[Cell]
    more: Sequence[str]

    @property
    def columns(self) -> list[str]:
        """Dimensions of a table: all but seeds."""
        return [each.name for each in self.dimensions if not each.repeats]

    @property
    def size_in_words(self) -> str:
        """'24 cells: 2 alpha x 4 model x 3 seed'."""
        if not self.dimensions:
            return "one run"
        sizes = " x ".join(f"{len(each.values)} {each.name}" for each in self.dimensions)
        return f"{len(self.cells)} cells: {sizes}" if len(self.cells) != 1 else f"1 cell: {sizes}"


def sweep_of(loaded: Loaded, more: Sequence[str]) -> Sweep:
    """The cells of an experiment: one, which has no name, where it has no sweep.

    Raises BadInput, in one line, for what cannot be run.
    """
    experiment, parser = loaded.experiment, parser_of(loaded.experiment.command)
    if experiment.sweep is None:
        only = Cell("", {}, [*loaded.arguments, *more])
        _check_cells(loaded, parser, [only])
        return Sweep(loaded, (), [only], more)
    dimensions = [_dimension(loaded, parser, name, values) for name, values in (experiment.sweep or {}).items()]
    if not dimensions:
        raise BadInput(f"{loaded.path}: sweep: names no setting")
    _check_names(loaded, parser, dimensions, more)
    count = prod(len(each.values) for each in dimensions)
    if count > MOST_CELLS:
        raise BadInput(f"{loaded.path}: sweep: {count:,} cells; at most {MOST_CELLS:,}")
    cells = []
    for chosen in product(*(each.values.items() for each in dimensions)):
        values = {each.name: name for each, (name, _) in zip(dimensions, chosen, strict=True)}
        settings = {name: value for _, settings in chosen for name, value in settings.items()}
        arguments = [*loaded.arguments, *arguments_of(loaded.path, parser, settings, "sweep"), *more]
        cells.append(Cell(_name(dimensions, values), values, arguments))
    twice = [name for name, number in Counter(cell.name for cell in cells).items() if number > 1]
    if twice:
        raise BadInput(
            f"{loaded.path}: sweep: two cells would have the folder {twice[0]!r}; give such values names of their own, "
            "as in testbed: {first: {testbed: a/t.yaml}, second: {testbed: b/t.yaml}}"
        )
    _check_cells(loaded, parser, cells)
    return Sweep(loaded, dimensions, cells, more)


def _dimension(loaded: Loaded, parser: Parser, name: str, values: Any) -> Dimension:
    path, actions = loaded.path, actions_of(parser)
    if name in COLUMNS:
        raise BadInput(f"{path}: sweep: {name} is a column of the table already; choose another name")
    if isinstance(values, dict) and values:
        return Dimension(name, {str(key): _together(loaded, parser, name, key, each) for key, each in values.items()})
    if name not in actions:
        raise BadInput(f"{path}: sweep: there is no {name!r}{nearest(name, actions)}")
    if not isinstance(values, list) or not values:
        raise BadInput(f"{path}: sweep: {name} is a list of values, or names with their settings, not {values!r}")
    named: dict[str, Mapping[str, Value]] = {}
    for value in values:
        if not (value is None or isinstance(value, bool | int | float | str | list)):
            raise BadInput(f"{path}: sweep: {name}: {value!r} is not a value")
        text = _shown(value)
        if text in named:
            raise BadInput(f"{path}: sweep: {name}: {text} stands there twice")
        named[text] = {name: value}
    return Dimension(name, named)


def _together(loaded: Loaded, parser: Parser, name: str, key: object, settings: Any) -> Mapping[str, Value]:
    where = f"sweep: {name}: {key}"
    if not isinstance(settings, dict) or not settings:
        raise BadInput(f"{loaded.path}: {where}: holds no settings, as in {{batch_size: 64, K: 1000}}")
    arguments_of(loaded.path, parser, settings, where)
    return settings


def _check_names(loaded: Loaded, parser: Parser, dimensions: Sequence[Dimension], more: Sequence[str]) -> None:
    """Every setting has its values in one place."""
    given = _given(parser, more)
    places = dict.fromkeys(loaded.experiment.settings, "settings")
    for dimension in dimensions:
        for name in dict.fromkeys(name for settings in dimension.values.values() for name in settings):
            if name in OF_THE_WHOLE:
                raise BadInput(f"{loaded.path}: sweep: {name} is of the whole sweep; it stands in settings")
            if name in places:
                raise BadInput(
                    f"{loaded.path}: {name} stands in {places[name]} and in sweep: {dimension.name}; keep one of them"
                )
            if name in given:
                raise BadInput(f"{loaded.path}: --{name} is varied by the sweep; change it in a copy of the file")
            places[name] = f"sweep: {dimension.name}"
    for name in OF_ONE_RUN:
        if name in given:
            raise BadInput(f"{loaded.path}: --{name} is of a single run; --check_only prints each cell's command line")
    if "metrics_port" in {*places, *given}:
        raise BadInput(f"{loaded.path}: metrics_port: of several runs none has the port")


def _given(parser: Parser, arguments: Sequence[str]) -> set[str]:
    """The settings that a command line names. Raises SystemExit for flags that the command does not have."""
    absent = object()
    empty = argparse.Namespace(**{action.dest: absent for action in parser._actions})
    found = FlagParser.parse_args(parser, arguments, empty)
    return {name for name, value in vars(found).items() if value is not absent}


def _check_cells(loaded: Loaded, parser: Parser, cells: Sequence[Cell]) -> None:
    """Raises BadInput for settings that cannot be combined: the first cell's line, and how many cells it is of."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                parser.parse_args(list(cell.arguments))
            refuse(parser.contradiction)
        except SystemExit:
            line = told.getvalue().strip().removeprefix("error: ").removesuffix(" (see --help)")
            found.setdefault(line, []).append(cell.name)
        except BadInput as error:
            found.setdefault(str(error), []).append(cell.name)
    if found:
        line, names = next(iter(found.items()))
        of = f"sweep: cell {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        others = f" ({len(found) - 1} more complaints about other cells)" if len(found) > 1 else ""
        raise BadInput(f"{loaded.path}: {of}: {line}{others}" if names[0] else f"{loaded.path}: {line}")


def _name(dimensions: Sequence[Dimension], values: Mapping[str, str]) -> str:
    """The folder of a cell: its values, each after its setting unless the value says itself what it is."""
    parts = []
    for dimension in dimensions:
        text = re.sub(r"^-(?=[\d.])", "minus", values[dimension.name])
        if dimension.name in SAYS_ITSELF:
            path = PurePath(text)
            text = path.stem if path.suffix in (".yaml", ".py", ".jsonl", ".json", ".csv", ".parquet") else path.name
            parts.append(text)
        else:
            parts.append(f"{dimension.name}-{text}")
    name = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") or "none" for part in parts)
    name = re.sub(r"[^A-Za-z0-9]", "x", name[0]) + name[1:]
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"


def _shown(value: Any) -> str:
    """A value as a table and a folder's name have it."""
    if value is None:
        return "default"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
