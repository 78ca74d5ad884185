"""Say what may be wrong with the labels of runs, and what the literature says to do about it.

    icm diagnose runs/NAME
    icm diagnose runs/seed-1 runs/seed-2 runs/seed-3

Checks each search for a collapse to one label, a start that froze it, groups that stay inconsistent, a concept that
is not salient to the model, and inverted labels; several runs of one data file also for labels that flip between them.
The exit code is 1 where a problem was found, so that scripts can stop there.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from src.experiments.arguments_of_reports import parser_of, run_folders
from src.icm.testbeds import BadInput
from src.results.diagnosis import diagnose
from src.results.findings import Finding, Verdict
from src.results.flips import flips
from src.results.run_reader import read_all
from src.results.text import one_line

MARKS = {Verdict.OK: "ok", Verdict.WATCH: "LOOK", Verdict.PROBLEM: "PROBLEM", Verdict.UNKNOWN: "?"}
WIDTH = 110


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm diagnose", __doc__)
    run_folders(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 no problem, 1 a problem was found, 2 no such run."""
    args = build_parser().parse_args(arguments)
    try:
        _, runs = read_all(args.runs)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    searches = [search for run in runs for search in run.searches]
    worst = False
    for search in searches:
        print(f"{one_line(search.name)}: {one_line(search.testbed)}, {one_line(search.model)}")
        for finding in diagnose(search):
            worst |= _show(finding)
    if len(searches) > 1:
        print("across runs")
        worst |= _show(flips(searches))
    return int(worst)


def _show(finding: Finding) -> bool:
    """Print a finding; returns whether it is a problem."""
    _wrapped(f"  {MARKS[finding.verdict]:<8} {finding.title}: {finding.text}", 11)
    for line in finding.details:
        _wrapped(f"           - {one_line(line, 400)}", 13)
    for advice in finding.advice:
        sources = "".join(f" [{source.name}, arXiv {source.arxiv}]" for source in advice.sources)
        _wrapped(f"           -> {advice.text}{sources}", 14)
    return finding.verdict is Verdict.PROBLEM


def _wrapped(text: str, indent: int) -> None:
    head = text[: len(text) - len(text.lstrip())]
    print(
        textwrap.fill(text.strip(), WIDTH, initial_indent=head, subsequent_indent=" " * indent, break_on_hyphens=False)
    )


if __name__ == "__main__":
    sys.exit(main())
