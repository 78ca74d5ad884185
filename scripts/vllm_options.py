"""vLLM's options as its command line spells them: in full, short, abbreviated, as JSON.

`spelled_out` brings those that the launcher reads into one form, so that each is found by its name. vLLM takes `-tp 2`,
`-tp=2`, `-t 2` and `--tensor-para 2` for `--tensor-parallel-size 2`, `-qfp8` for `--quantization fp8`, and
`-ac '{"backend": "FLASH_ATTN"}'` for `--attention-config.backend FLASH_ATTN`. All others stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

SHORT: Final = {
    "-ac": "--attention-config",
    "-dp": "--data-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-tp": "--tensor-parallel-size",
}
"""Short options that are read here, and what they are short for."""
OTHER_SHORT: Final = (
    *("-asc", "-cc", "-dc", "-dcp", "-dpa", "-dpb", "-dpe", "-dph", "-dpl", "-dpm", "-dpn", "-dpp", "-dpr", "-h", "-n"),
    *("-pcp", "-r", "-sc"),
)
"""vLLM's other short options (0.26 to 0.33): what begins one of these as well is not an abbreviation of ours."""
READ: Final = {
    "api-key": "api-k",
    "attention-backend": "attention-b",
    "attention-config": "attention-c",
    "data-parallel-size": "data-parallel-size",
    "dtype": "dt",
    "enable-expert-parallel": "enable-ex",
    "enforce-eager": "enf",
    "headless": "hea",
    "host": "ho",
    "model": "model",
    "pipeline-parallel-size": "pi",
    "port": "por",
    "quantization": "quantization",
    "served-model-name": "ser",
    "tensor-parallel-size": "te",
}
"""Options that are read here, each with its shortest abbreviation: what is shorter begins another one as well. None of
vLLM's other options is the beginning of one of these."""
OBJECT: Final = "attention-config"
"""The one of them whose value may be a JSON object."""


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the options of READ by their full names, each key of a JSON object as an option of its own.

    What is ambiguous, or no option of READ, stays as it is: vLLM says what is wrong with it.
    """
    full: list[str] = []
    words = iter(arguments)
    for word in words:
        option = _in_full(word)
        name, has_value, value = option.partition("=")
        if name != f"--{OBJECT}":
            full.append(option)
            continue
        value = value if has_value else next(words, "")
        full += _of_object(value) or [name, *([value] if value else [])]
    return full


def _in_full(word: str) -> str:
    """An option by its full name, with its `=value` if it has one; another word as it is."""
    if word.startswith("--"):
        name, *value = word.split("=", 1)
        begin, *keys = name.split(".", 1)
        begin = begin[2:].replace("_", "-")
        negated = "no-" if begin.startswith("no-") else ""
        begin = begin.removeprefix("no-")
        found = [full for full, least in READ.items() if full.startswith(begin) and begin.startswith(least)]
        return word if not found else "=".join([".".join([f"--{negated}{found[0]}", *keys]), *value])
    if not word.startswith("-") or len(word) < 2:
        return word
    name, *value = word.split("=", 1)
    begin, *keys = name.split(".", 1)
    found = [begin] if begin in SHORT else [each for each in (*SHORT, *OTHER_SHORT) if each.startswith(begin)]
    if len(found) == 1 and found[0] in SHORT:
        return "=".join([".".join([SHORT[found[0]], *keys]), *value])
    # `-qfp8`: a value may follow an option of one letter at once.
    return f"{SHORT['-q']}={word[2:]}" if word.startswith("-q") else word


def _of_object(text: str) -> list[str]:
    """`--attention-config.KEY VALUE` for each key of a JSON object; [] of what is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    if not isinstance(found, dict):
        return []
    return [
        word
        for key, value in found.items()
        for word in (f"--{OBJECT}.{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def option_name(argument: str) -> str:
    """`some-option`, of `--some-option=1`, `--some_option` and `--no-some-option`."""
    return argument[2:].split("=", 1)[0].replace("_", "-").removeprefix("no-")


def option_names(arguments: Sequence[str]) -> Iterator[str]:
    """The names of all options among arguments."""
    return (option_name(argument) for argument in arguments if argument.startswith("--"))


def value_of(options: Sequence[str], name: str, default: str) -> str:
    """The value of vLLM's option, the last one given."""
    value = default
    for position, argument in enumerate(options):
        if argument.startswith("--") and option_name(argument) == name:
            value = argument.partition("=")[2] if "=" in argument else "".join(options[position + 1 : position + 2])
    return value


def count_of(options: Sequence[str], name: str) -> int:
    """The value of an option that is a number of devices; 1 of what is no number, which vLLM refuses."""
    text = value_of(options, name, "1")
    return int(text) if text.isdecimal() else 1


def is_on(options: Sequence[str], name: str) -> bool:
    """Whether a switch is on: the last of `--name` and `--no-name`."""
    given = [argument for argument in options if argument.startswith("--") and option_name(argument) == name]
    return bool(given) and not given[-1].startswith("--no-")
