"""Flags that contradict each other, and why. One of the two would have to be ignored, so they are refused together.

A default contradicts nothing, unless a rule says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Final

from src.experiments.request import TRACKERS
from src.icm.columns import KNOWN
from src.icm.problem import SearchSettings
from src.icm.searches import search_named
from src.icm.testbeds import BadInput
from src.pipeline.testbed_files import testbed_path


@dataclass(frozen=True, slots=True)
class Rule:
    """`flag` is of no use beside `other` where `holds`. by_default: also where `other` was not given."""

    flag: str
    other: str
    why: str
    holds: Callable[[argparse.Namespace], bool]
    by_default: bool = False

    @property
    def of_the_search(self) -> bool:
        """Whether both are recorded with a run: an earlier version may have begun one in spite of the rule."""
        return {self.flag, self.other} <= _OF_THE_SEARCH


_OF_THE_SEARCH: Final = {field.name for field in fields(SearchSettings)} | {"batch_size"}


def _upstream(args: argparse.Namespace) -> bool:
    return bool(args.layout == "upstream")


def _always(_: argparse.Namespace) -> bool:
    return True


def _known_column(args: argparse.Namespace) -> bool:
    return KNOWN in {part.partition("=")[0].strip() for part in args.columns.split(",")}


_OF_EVERY_SEARCH: Final = {"search", "seed", "layout", "anchors", "context_cap", "start_share"}


def _unused(flag: str) -> Callable[[argparse.Namespace], bool]:
    return lambda args: flag not in search_named(args.search).SETTINGS


RULES: Final = (
    Rule(
        *("testbed", "data", "a file of yours is read in place of a testbed"),
        lambda a: testbed_path(a.testbed) is None,  # a testbed file says how to read any data
    ),
    Rule("data_dir", "data", "a file of yours is read from where its own path says", _always),
    Rule("use_vllm", "direct", "vLLM in this process is neither a server nor an external API", lambda a: a.direct),
    Rule("prompts_per_request", "direct", "vLLM in this process is sent no requests", lambda a: a.direct),
    Rule("read_timeout", "direct", "vLLM in this process is sent no requests", lambda a: a.direct),
    Rule(
        *("prompts_per_request", "use_vllm", "an external API gets one prompt a request"),
        lambda a: a.use_vllm is False,
    ),
    Rule("gold_seeds", "known", "gold labels take the place of labels that a file gives", lambda a: a.gold_seeds > 0),
    Rule(
        *("gold_seeds", "columns", "gold labels take the place of labels that a column gives"),
        lambda a: a.gold_seeds > 0 and _known_column(a),
    ),
    Rule("context_cap", "layout", "a capped sample has its own order", _upstream),
    Rule("anchors", "layout", "upstream's order has no anchors", lambda a: _upstream(a) and a.anchors > 0),
    Rule("max_tail", "layout", "upstream's order has no tail", _upstream),
    Rule("decay", "scheduler", "that schedule has no decay", lambda a: a.scheduler == "log-upstream"),
    Rule("patience", "stop", "only --K ends such a search", lambda a: a.stop == "K"),
    Rule(
        *("prior", "calibrate", "the share of True claims is what --calibrate mean calibrates to"),
        lambda a: a.calibrate == "none",
        by_default=True,
    ),
    Rule(
        *("start_share", "prior", "without a share of True claims random labels are halves"),
        lambda a: a.start_share == "prior" and a.prior is None,
        by_default=True,
    ),
    Rule(
        *("num_seed", "batch_size", "the pool holds fewer claims than are to be labelled at random"),
        lambda a: a.num_seed > a.batch_size,
        by_default=True,
    ),
    Rule(
        *("initial_T", "final_T", "the lowest temperature is above the first"),
        lambda a: a.final_T > a.initial_T > 0,
        by_default=True,
    ),
    Rule(
        *("final_T", "initial_T", "the lowest temperature is above the first"),
        lambda a: a.final_T > a.initial_T > 0,
        by_default=True,
    ),
    Rule(
        *("lookahead", "best_of", "what it asks next depends on its answers, so nothing can be asked ahead"),
        lambda a: a.best_of > 1 and bool(a.lookahead),
    ),
    *(
        Rule(flag, "search", "that search does not use it", _unused(flag), by_default=True)
        for flag in (*(field.name for field in fields(SearchSettings)), "lookahead", "continue_from")
        if flag not in _OF_EVERY_SEARCH
    ),
    Rule("is_complete", "check", "one looks at a run, the other measures a pool", _always),
    Rule("log_to", "check", "one logs a run, the other measures a pool", lambda a: a.check),
    Rule("metrics_port", "num_batches", "of several searches none has the port", lambda a: a.num_batches != 1),
    Rule("metrics_port", "passes", "of several searches none has the port", lambda a: a.passes != 1),
    Rule("chat_url", "chat_model", "no chat model is asked", lambda a: a.chat_model is None, by_default=True),
    Rule(
        *("restarts", "rows", "only the row bootstrap-best has several starts, and it is not asked for"),
        lambda a: "bootstrap-best" not in (a.rows or ()),
        by_default=True,
    ),
    Rule(
        *("chat_model", "rows", "only the row zero-shot-chat asks a chat model, and it is not asked for"),
        lambda a: bool(a.rows) and "zero-shot-chat" not in a.rows,
    ),
    Rule("seed", "by", "only a random choice depends on it", lambda a: a.by != "random", by_default=True),
    Rule("abstain_below", "abstain", "the other finds the margin that this one would give", _always),
    *(
        Rule(flag, "abstain", "it says how the other is kept", lambda a: a.abstain is None, by_default=True)
        for flag in ("abstain_on", "abstain_labels")
    ),
    *(
        Rule(flag, "format", "the whole run is logged, not its labels alone", lambda a: a.format in TRACKERS)
        for flag in ("only", "least", "abstain", "abstain_below")
    ),
    Rule("hub", "format", "only the folder of datasets is pushed", lambda a: a.format != "datasets", by_default=True),
    Rule("public", "hub", "nothing is pushed", lambda a: a.hub is None, by_default=True),
    Rule("pairs", "format", "only dpo writes pairs", lambda a: a.format != "dpo", by_default=True),
    Rule("bos", "format", "only axolotl's rows hold that token", lambda a: a.format != "axolotl", by_default=True),
)


def contradicted(args: argparse.Namespace, given: Collection[str]) -> list[Rule]:
    """The rules that `args` break. given: the flags that were named, without their dashes."""
    return [
        rule
        for rule in RULES
        if rule.flag in given and (rule.other in given or (rule.by_default and rule.other in args)) and rule.holds(args)
    ]


LARGEST_ALPHA: Final = 1e100


def out_of_range(args: argparse.Namespace) -> str | None:
    """One line about a setting of the search without a meaning, with which an earlier version could begin runs."""
    alpha = getattr(args, "alpha", None)
    if alpha is None or 0 < alpha <= LARGEST_ALPHA:
        return None
    if alpha > 0:
        return f"--alpha {alpha:g} must be at most {LARGEST_ALPHA:g}, or U has no number"
    return f"--alpha {alpha:g} must be above 0, or predictable labels are worth nothing"


def refuse(contradiction: str | None) -> None:
    """Raises BadInput with the line, if there is one. For new runs."""
    if contradiction:
        raise BadInput(contradiction)


def message_of(rule: Rule, args: argparse.Namespace) -> str:
    """One line that names both flags with their values."""
    first, second = (_shown(name, getattr(args, name)) for name in (rule.flag, rule.other))
    return f"{first} and {second} contradict each other: {rule.why}"


def _shown(name: str, value: Any) -> str:
    if value is None:
        return f"no --{name}"
    if isinstance(value, list):
        return f"--{name} {' '.join(map(str, value))}"
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"
