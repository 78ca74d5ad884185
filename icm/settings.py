"""Settings as keywords of a function -> a command's parsed flags: every flag, under its own name.

The keywords become the words of a command line, so that names, types, ranges and contradictions have one place.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from inspect import isfunction
from numbers import Number
from pathlib import Path
from types import TracebackType
from typing import Any, Final, get_type_hints

import yaml

from icm.claims import FOLDER, Given, given, known, write_once
from icm.result import Result
from src.experiments.arguments import Parser
from src.experiments.request import RunRequest
from src.icm.testbeds import BadInput
from src.icm.values import shown

ELSEWHERE: Final = frozenset(("help", "data", "check", "is_complete"))
"""Flags that are no settings of a call: `claims` are the data, and a call always ends with labels."""
OF_A_TEXT: Final = "Claim: {choice}\nI think this claim is"
"""The template of claims that are plain texts."""
OF_A_TESTBED: Final = {"columns": "columns", "map": "map", "group_by": "groups"}
"""Settings that a testbed file holds, where there is one: its name of each."""
SKIPPED: Final = "(--skip_bad_rows): line "
OTHER_LINE: Final = re.compile(r"(\bas )line (\d+)")
OTHER_LINES: Final = re.compile(r"(\): |; )(?:line )?(\d+)(?=: )")
"""Lines that a warning names besides the one that it begins with: of an equal claim, of rows that are left out."""


@dataclass(frozen=True)
class Asked:
    """What the model is asked about, and where, besides the flags of a command. See `label`."""

    claims: Any
    testbed: str | Path | Mapping[str, Any] | None
    template: str | None
    labels: Sequence[str] | Mapping[str, str] | None
    base_url: str | Sequence[str] | None


@dataclass(frozen=True)
class Parsed:
    """The parsed flags of a command, and the claims, where they were given as a program has them."""

    flags: argparse.Namespace
    rows: Given | None


class Written:
    """The files that a call made of its arguments: in errors they have the arguments' names.

    Used as a context manager: neither BadInput that is raised in it nor a warning that is logged names such a file.
    """

    def __init__(self) -> None:
        self._files: dict[Path, str] = {}
        self._loggers: list[logging.Logger] = []

    def add(self, path: Path, argument: str) -> Path:
        """The file of an argument; returns it."""
        self._files[path] = argument
        return path

    def named(self, message: str) -> str:
        """The message with arguments in place of files, and rows (from 0) in place of their lines."""
        for path, argument in self._files.items():

            def row(line: re.Match[str], argument: str = argument) -> str:
                return f"{argument}, row {int(line[1]) - 1}: "

            message = re.sub(rf"--(?:data|known|testbed) {re.escape(str(path))}(?!:)", argument, message)
            message = re.sub(rf"{re.escape(str(path))}:\d+: (?=row \d)", f"{argument}: ", message)
            message = re.sub(rf"{re.escape(str(path))}:(\d+): ", row, message)
            if message.startswith((argument, f"{path}: ")):
                lines = OTHER_LINES if SKIPPED in message else OTHER_LINE
                message = lines.sub(lambda line: f"{line[1]}row {int(line[2]) - 1}", message)
            message = message.replace(str(path), argument).replace(path.name, argument)
        return message

    def filter(self, record: logging.LogRecord) -> bool:
        """As a filter of logging: lets every record pass, by its message with arguments in place of files."""
        message = record.getMessage()
        if (told := self.named(message)) != message:
            record.msg, record.args = told, None
        return True

    def __enter__(self) -> Written:
        # A filter is not asked about what is logged below a logger, so each of this project's has it.
        known = [name for name in logging.root.manager.loggerDict if name.startswith("src.")]
        self._loggers = [logging.getLogger(name) for name in known]
        for logger in self._loggers:
            logger.addFilter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)
        if isinstance(error, BadInput):
            error.args = (self.named(str(error)),)


def names(parser: Parser) -> tuple[str, ...]:
    """The flags of a command that a function takes as keywords."""
    return tuple(action.dest for action in parser._actions if action.dest not in ELSEWHERE)


def parsed(asked: Asked, parser: Parser, settings: Mapping[str, Any], written: Written) -> Parsed:
    """A call's settings as the flags of a command.

    parser: the command's. settings: its flags by name. written: gets the files that are made. Raises TypeError for a
    keyword that there is not, or of a wrong type, and BadInput as the command line does.
    """
    parser.raises = True
    _check_names(settings, parser)
    wanted = {name: value for name, value in settings.items() if value is not None}
    folder = Path(wanted["runs_dir"]) / FOLDER
    rows, testbed, template = None, asked.testbed, asked.template
    if asked.claims is None and testbed is None:
        raise BadInput("there are no claims: give a list of dicts, a data frame, a path, or a testbed")
    if isinstance(asked.claims, str | Path):
        wanted["data"] = asked.claims
    elif asked.claims is not None:
        rows = given(asked.claims)
        wanted["data"] = written.add(rows.write(folder), "claims")
    if not isinstance(wanted.get("known"), str | Path | None):
        labels = known(wanted.pop("known"), rows)
        if labels is not None:
            wanted["known"] = written.add(labels.write(folder, "known"), "known")
    if template is None and testbed is None and rows is not None and rows.texts:
        template = OF_A_TEXT
    if template is not None or asked.labels is not None or isinstance(testbed, Mapping):
        keys = _testbed(testbed, template, asked.labels)
        keys |= {theirs: wanted.pop(ours) for ours, theirs in OF_A_TESTBED.items() if ours in wanted}
        argument = "labels" if asked.template is None else "template"
        argument = "testbed" if isinstance(asked.testbed, Mapping) else argument
        testbed = written.add(_write_testbed(keys, folder), argument)
    if testbed is not None:
        wanted["testbed"] = testbed
    if "label_rest" in names(parser) and "num_batches" not in wanted and "passes" not in wanted:
        wanted.setdefault("label_rest", True)
    return Parsed(_parsed(parser, wanted), rows)


def quietly(request: RunRequest, asked: Asked) -> RunRequest:
    """The request, which asks the server that `asked` names, and prints no opening and no summary."""
    if asked.base_url is not None:
        if request.model.direct:
            raise BadInput("base_url and direct contradict each other: vLLM in this process is no server")
        urls = (asked.base_url,) if isinstance(asked.base_url, str) else tuple(asked.base_url)
        request = replace(request, model=replace(request.model, base_url=urls))
    return replace(request, output=replace(request.output, told=False))


def _check_names(settings: Mapping[str, Any], parser: Parser) -> None:
    flags = names(parser)
    for name in settings:
        if name not in flags:
            close = get_close_matches(name, [*flags, *(each.name for each in fields(Asked))], n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ". docs/library.md lists the settings"
            raise TypeError(f"{parser.prog.replace(' ', '.')}() has no setting {name!r}{meant}")


def _testbed(
    testbed: str | Path | Mapping[str, Any] | None,
    template: str | None,
    labels: Sequence[str] | Mapping[str, str] | None,
) -> dict[str, Any]:
    """The keys of a testbed file. Raises BadInput where the testbed is a file or has a name."""
    if testbed is not None and not isinstance(testbed, Mapping):
        raise BadInput(f"testbed {testbed} has a template and labels of its own; leave out template and labels")
    keys = {} if testbed is None else dict(testbed)
    for name, value in (("template", template), ("labels", labels)):
        if value is not None:
            if name in keys:
                raise BadInput(f"{name}: is in testbed, too")
            keys[name] = dict(value) if isinstance(value, Mapping) else value if isinstance(value, str) else list(value)
    return keys


def _write_testbed(keys: Mapping[str, Any], folder: Path) -> Path:
    content = yaml.safe_dump(dict(keys), sort_keys=False, allow_unicode=True).encode()
    path = folder / f"testbed-{hashlib.sha256(content).hexdigest()[:8]}.yaml"
    write_once(path, content)
    return path


def _parsed(parser: Parser, wanted: Mapping[str, Any]) -> argparse.Namespace:
    actions = {action.dest: action for action in parser._actions}
    words = [word for name, value in wanted.items() for word in _words(actions[name], value)]
    parsed = parser.parse_args(words)
    for name, value in wanted.items():
        if isinstance(value, str) and isinstance(getattr(parsed, name), int | float):
            raise TypeError(f"{name} is a number, not the text {shown(value)}")
    return parsed


def _words(action: argparse.Action, value: Any) -> list[str]:
    """The words of a command line that give a flag this value. Raises TypeError for a value of a wrong type."""
    name, flag = action.dest, action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TypeError(f"{name} is True or False, not {shown(value)}")
        if value:
            return [flag]
        return [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
    if name == "columns" and isinstance(value, Mapping):
        value = ",".join(f"{ours}={theirs}" for ours, theirs in value.items())
    if name == "map" and isinstance(value, Mapping):
        meanings = {ours: ",".join(f"{a}:{b}" for a, b in each.items()) for ours, each in value.items()}
        return [flag, *(f"{ours}={each}" for ours, each in meanings.items())]
    if name == "continue_from" and isinstance(value, Result):
        return [flag, str(value.run_folder)]
    if action.nargs == "+" and isinstance(value, Sequence) and not isinstance(value, str):
        return [flag, *(str(each.run_folder if isinstance(each, Result) else each) for each in value)]
    if isinstance(value, bool) or not isinstance(value, str | Path | Number):
        raise TypeError(f"{name} cannot be {shown(value)}")
    if isinstance(value, str) and _is_number(action):
        raise TypeError(f"{name} is a number, not the text {shown(value)}")
    if isinstance(value, Number) and action.type is None and not action.choices:
        raise TypeError(f"{name} is a text, not the number {value}")
    return [f"{flag}={value}"]


def _is_number(action: argparse.Action) -> bool:
    """Whether every value of the flag is a number, unlike that of a flag that takes a word, too (auto, all)."""
    kind = action.type
    return kind in (int, float) or (isfunction(kind) and get_type_hints(kind).get("return") in (int, float))
