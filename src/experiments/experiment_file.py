"""An experiment as a file (experiments/*.yaml): a command, its settings, the paper's results and yours.

Keys are checked: the file's by its schema, the settings' against the command's flags. An unknown key is reported with
the nearest valid one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core.settings import server_urls
from src.experiments.arguments import Parser
from src.experiments.commands import COMMANDS
from src.icm.testbeds import BadInput

Command = Literal["label", "baselines"]
Value = bool | int | float | str | list[int] | list[str] | None
NOT_SETTINGS: Final = ("help", "is_complete", "check")
"""Flags that ask about a run instead of describing it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PaperFigures(_Strict):
    """What a publication reports for this setting; None where it gives no number.

    accuracy: by method, shares 0 to 1. read: how exact they are ("table", or "bars of a figure", or "not given").
    """

    source: str
    accuracy: dict[str, float | None]
    read: str


class Experiment(_Strict):
    """One reproducible experiment. settings: the command's flags without their dashes.

    hardware: what it needs or was measured on. yours: your own results, by method.

    sweep: settings with several values each, of which every combination is run (see sweep_cells). at_once: how many of
    them at the same time on each engine. servers: by model, the URL of its vLLM server, or of several.
    """

    title: str
    command: Command
    settings: dict[str, Value]
    sweep: dict[str, Any] | None = None
    at_once: int | None = Field(default=None, ge=1)
    servers: dict[str, str | list[str]] = Field(default_factory=dict)
    hardware: str | None = None
    notes: str | None = None
    paper: PaperFigures | None = None
    yours: dict[str, float | None] = Field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """An experiment and the command line it stands for. In a sweep, `arguments` are what all its cells share."""

    path: Path
    experiment: Experiment
    arguments: list[str]


def load_experiment(path: Path) -> Loaded:
    """Read and check one file. Raises BadInput in one line with what to write instead."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path}: does not hold keys and values")
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise BadInput(f"{path}: {_message(error)}") from None
    if experiment.sweep is None:
        for name, given in (("at_once", experiment.at_once), ("servers", experiment.servers)):
            if given:
                raise BadInput(f"{path}: {name}: is for a sweep, and there is no sweep")
    for model, urls in experiment.servers.items():
        try:
            server_urls(urls)
        except ValueError as error:
            raise BadInput(f"{path}: servers: {model}: {error}") from None
    return Loaded(path, experiment, arguments_of(path, parser_of(experiment.command), experiment.settings))


def parser_of(command: Command) -> Parser:
    """The parser of `icm COMMAND`."""
    parser: Parser = import_module(COMMANDS[command][0]).build_parser()
    parser.also = ("--check_only", "--dry_run")  # of `icm run`, whose other flags this parser reads
    return parser


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The command's settings: its flags by name."""
    return {action.dest: action for action in parser._actions if action.dest not in NOT_SETTINGS}


def arguments_of(
    path: Path, parser: argparse.ArgumentParser, settings: Mapping[str, Value], where: str = "settings"
) -> list[str]:
    """The settings as a command line: switches by themselves, lists as several values, null as the flag's default.

    where: of the file they stand, for messages.
    """
    actions = actions_of(parser)
    arguments = []
    for name, value in settings.items():
        if name not in actions:
            raise BadInput(f"{path}: {where}: there is no {name!r}{nearest(name, actions)}")
        action = actions[name]
        if value is None:
            continue
        if isinstance(value, bool):
            if action.nargs != 0:
                raise BadInput(f"{path}: {where}: {name} takes a value, not {str(value).lower()}")
            if isinstance(action, argparse.BooleanOptionalAction):
                arguments.append(f"--{name}" if value else f"--no-{name}")
            elif value:
                arguments.append(f"--{name}")
        elif action.nargs == 0:
            raise BadInput(f"{path}: {where}: {name} is true or false, not {value!r}")
        elif isinstance(value, list):
            if action.nargs != "+":
                raise BadInput(f"{path}: {where}: {name} takes one value, not a list; values to compare stand in sweep")
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


_FIGURES: Final = "figures by method, as in {icm: 0.9}"
_MEANT: Final[dict[tuple[str, ...], str]] = {
    ("settings",): "flags of the command without their dashes and their values, as in {alpha: 50}",
    ("settings", "*"): "a value, or a list of texts or of whole numbers",
    ("sweep",): "settings with several values each, as in {alpha: [10, 50]}",
    ("at_once",): "a whole number of at least 1",
    ("servers",): "the URL of each model's server, as in {MODEL: http://gpu1:8000}",
    ("servers", "*"): "a URL, or a list of URLs",
    ("paper",): "what the paper reports, with source, accuracy and read",
    ("paper", "accuracy"): _FIGURES,
    ("paper", "*"): "a text",
    ("paper", "accuracy", "*"): "a number, or null",
    ("yours",): _FIGURES,
    ("yours", "*"): "a number, or null",
}
"""What must stand at a place of a file, which is a text elsewhere."""


def _message(error: ValidationError) -> str:
    """The first complaint, a misspelt key with the nearest valid one."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *above, key = place
        model: type[BaseModel] = PaperFigures if above else Experiment
        return f"{': '.join([*above, ''])}there is no {key!r}{nearest(key, model.model_fields)}"
    if place == ["command"]:
        return f"command: {first['input']!r} is none of {', '.join(get_args(Command))}"
    if first["type"] == "missing":
        return f"{': '.join(place)}: is missing"
    if place[-1] == "[key]":
        return f"{': '.join(place[:-1])}: is a key, which must be a text"
    # Of a value that may be of several types, the place goes on with the type that was tried first.
    deepest = max((each for each in _MEANT if _begins(place, each)), key=len, default=("",))
    known = place[: len(deepest)]
    return f"{': '.join(known)}: must be {_MEANT.get(deepest, 'a text')}, not {first['input']!r}"


def _begins(place: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the place is as `pattern`, in which "*" stands for any key, or below it."""
    return len(place) >= len(pattern) and all(b in ("*", a) for a, b in zip(place, pattern, strict=False))


def nearest(key: str, valid: Any) -> str:
    """What to write in place of a misspelt key, as the end of a message."""
    names = [str(name) for name in valid]
    close = get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"
