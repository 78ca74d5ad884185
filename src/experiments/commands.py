"""`icm COMMAND ...`: the commands of this package by name, each a module."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import Final

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "label": ("src.experiments.ICM", "label a data set: the search, its baselines, labels and curves"),
    "landscape": ("src.experiments.landscape", "see whether U leads to truth for this model and data, before a search"),
    "baselines": ("src.experiments.baselines", "hold ICM against zero-shot, many-shot and bootstrapping"),
    "run": ("src.experiments.run_experiment", "run an experiment that a file describes (experiments/*.yaml)"),
    "testbed": ("src.experiments.testbed", "show what a testbed asks: a whole prompt, its tokens, groups, relations"),
    "diagnose": ("src.experiments.diagnose", "say what may be wrong with a run's labels, and what to do about it"),
    "report": ("src.experiments.report", "write one HTML page of one or several runs"),
    "compare": ("src.experiments.compare", "put runs side by side"),
    "watch": ("src.experiments.watch", "follow a run in progress in the terminal"),
    "ask": ("src.experiments.ask", "list the claims of a run that a human should be asked about, and take the answers"),
    "export": ("src.experiments.export", "write a run's labels for other tools"),
    "cache": ("src.experiments.cache_command", "look after cached scores: stats, verify, prune"),
    "serve": ("contrib.serving.command", "a web application: answers from a folder of texts, claims scored"),
    "check-direct": ("src.experiments.check_direct", "check chats and completions of a model in this process"),
    "metrics": (
        "contrib.monitoring.vllm_scrape",
        "the metrics of several vLLM servers as one page for Prometheus",
    ),
}
"""Name -> (module with `main(arguments) -> exit code`, what it does). Imported only when called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named command and return its exit code; 2 for an unknown name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"icm {_version()}")
        return 0
    name, *rest = given
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else "."
        print(f"error: no command {name!r}{meant} There are: {', '.join(COMMANDS)} (see --help)", file=sys.stderr)
        return 2
    try:
        command: Callable[[Sequence[str]], int] = import_module(COMMANDS[name][0]).main
        return command(rest)
    except KeyboardInterrupt:  # while modules are imported; a command that has begun says where it goes on
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough (icm diagnose ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is flushed to it at exit
        return 141  # as a shell counts a program that SIGPIPE ended
    except OSError as error:  # that no command foresees: a path that is too long, a disk that is gone
        print(f"error: {error}", file=sys.stderr)
        return 2


def _version() -> str:
    try:
        return metadata.version("icm-elicitation")
    except metadata.PackageNotFoundError:
        return "from a checkout that is not installed"


def _usage() -> str:
    lines = ["usage: icm COMMAND ...", "       icm --version", "", "commands (icm COMMAND --help says more):"]
    width = max(map(len, COMMANDS))
    return "\n".join(lines + [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()])


if __name__ == "__main__":
    sys.exit(main())
