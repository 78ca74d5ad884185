"""The flags of doubt, and a finished run's labels written with it (src/results/doubt.py). No model is asked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import orjson

from src.experiments.arguments import at_least, finite, share
from src.icm.consistency import Label
from src.icm.testbeds import BadInput
from src.pipeline.labelling import Pool
from src.results.doubt import Doubt, Wanted, coverage_of, doubt_of, too_many
from src.results.doubt_words import doubt_lines
from src.results.rows import ABSTAINED, abstained_row, labelled_row
from src.results.run_folder import RunFolder
from src.results.run_reader import read_run


def add_doubt_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add the flags that say which labels are not handed over."""
    parser.add_argument(
        "--abstain",
        type=share,
        metavar="RISK",
        help="hand over only labels that are sure enough: of those, the expected share of wrong ones is at most RISK, "
        "if the labels of --abstain_on are of a random draw of the claims. The others' label is null (docs/doubt.md)",
    )
    parser.add_argument(
        "--abstain_on",
        choices=("known", "gold"),
        help="with --abstain: which labels check those of the search; gold is otherwise only compared with the result",
    )
    parser.add_argument(
        "--abstain_labels",
        type=at_least(1),
        metavar="N",
        help="with --abstain: how many of these, drawn by the run's seed (default: all, or half of them where every "
        "claim has one, so that the others show whether the promise is kept)",
    )
    parser.add_argument(
        "--abstain_below",
        type=finite,
        metavar="NATS",
        help="hand over only labels with a margin of at least NATS, which promises nothing about them",
    )


def wanted_of(args: argparse.Namespace) -> Wanted:
    """What these flags ask for."""
    return Wanted(**{field.name: getattr(args, field.name) for field in fields(Wanted)})


def check_wanted(wanted: Wanted, pools: Sequence[Pool]) -> None:
    """Before a model is asked: raises BadInput where nothing could be promised, warns where nothing could be kept."""
    if wanted.abstain is None:
        return
    on_gold = wanted.basis == "gold"
    gold = [label for pool in pools for label in _gold_to_find(pool, outside=len(pools) == 1)]
    count = sum(label is not None for label in gold) if on_gold else sum(map(_given, pools))
    if not count:
        missing = "none of the claims has a gold label" if on_gold else "no label is known to the search"
        raise BadInput(
            f"--abstain {wanted.abstain:g}: {missing}, and nothing can be promised without labels to check: "
            "--abstain_on gold, or --abstain_below NATS, which promises nothing"
        )
    there = count if on_gold else count + sum(map(_given_outside, pools))
    if wanted.abstain_labels is not None and wanted.abstain_labels > there:
        raise BadInput(too_many(wanted.abstain_labels, there, wanted.basis))
    everyone = on_gold and count == len(gold)
    checked = min(count, wanted.abstain_labels or ((count + 1) // 2 if everyone else count))
    if checked < wanted.least_labels:
        print(
            f"warning: --abstain {wanted.abstain:g} keeps labels only where those of at least {wanted.least_labels} "
            f"claims are checked, and here are {checked}",
            file=sys.stderr,
        )


def _gold_to_find(pool: Pool, *, outside: bool) -> list[Label]:
    """Gold of the claims whose label is not known; None where there is none. outside: also those outside the pool."""
    free = [at for at in range(len(pool.claims)) if not pool.problem.is_known(at)]
    rest = enumerate(pool.rest if outside else (), start=len(pool.claims))
    return [pool.claims[at].gold for at in free] + [claim.gold for at, claim in rest if pool.known_outside(at) is None]


def _given(pool: Pool) -> int:
    """How many labels the search is given."""
    return pool.problem.num_known


def _given_outside(pool: Pool) -> int:
    """How many known labels there are of claims outside the pool that are labelled afterwards."""
    size = len(pool.claims)
    return sum(pool.known_outside(at) is not None for at in range(size, size + len(pool.rest)))


def write_doubt(folder: RunFolder, document: Mapping[str, Any], wanted: Wanted, *, told: bool = True) -> dict[str, Any]:
    """Write a finished run's labels.jsonl and run.json with `wanted`, or with every label where nothing is wanted.

    document: its run.json, which is returned as it is now. Nothing is written where nothing changes. told: whether a
    user is told about it.
    """
    return _write(folder, document, _wanted_now(folder, document, wanted), told=told)


def _write(folder: RunFolder, document: Mapping[str, Any], found: _Wanted, *, told: bool) -> dict[str, Any]:
    """What of `found` is not there yet."""
    if found.rows != found.before:
        folder.write_labels(found.rows)
    if found.document != document:
        folder.write_run(found.document)
    if found.doubt is not None and told:
        say_doubt(found.doubt)
    elif told and found.doubt is None and any(row.get("by") == ABSTAINED for row in found.before):
        print("every label is handed over again: this command is without --abstain", file=sys.stderr)
    return found.document


def write_doubt_again(
    folder: RunFolder, document: Mapping[str, Any], wanted: Wanted, *, told: bool = True
) -> dict[str, Any]:
    """write_doubt of a run that was finished before. Where something changes, it is written under the folder's lock:
    raises BadInput where another process is at work there. Where nothing does, the folder need not be writable."""
    found = _wanted_now(folder, document, wanted)
    if found.rows == found.before and found.document == document:
        return _write(folder, document, found, told=told)
    with folder:
        return write_doubt(folder, folder.read_run() or document, wanted, told=told)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The lines of labels.jsonl as they are, as they should be, and run.json as it should be."""

    before: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    document: dict[str, Any]
    doubt: Doubt | None


def _wanted_now(folder: RunFolder, document: Mapping[str, Any], wanted: Wanted) -> _Wanted:
    before = [orjson.loads(line) for line in folder.labels_path.read_bytes().splitlines()]
    rest = {name: value for name, value in document.items() if name != "doubt"}
    doubt = None
    if wanted:
        run = read_run(folder.path)
        doubt = doubt_of(run, wanted)
        found = coverage_of(run)
        area = {} if found is None else {"area": found.area}
        rest["doubt"] = doubt.record() | area
    abstained = frozenset() if doubt is None else doubt.abstained
    rows = [abstained_row(row) if at in abstained else labelled_row(row) for at, row in enumerate(before)]
    return _Wanted(before, rows, rest, doubt)


def say_doubt(doubt: Doubt) -> None:
    """Print what was kept, and what is promised about it, on standard error."""
    for line in doubt_lines(doubt):
        print(f"doubt: {line}", file=sys.stderr)
