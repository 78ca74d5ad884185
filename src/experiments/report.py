"""Write one self-contained HTML page of one or several runs.

    icm report runs/NAME -o report.html
    icm report runs/A runs/B --prices prices.yaml

A run may be finished, in progress or stopped; a folder of `icm baselines` gives its table and its searches. The page
needs no network and, but for filtering its claims, no JavaScript. Money is shown where --prices names the model:
docs/reports.md has the file's format.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import StorageFailed
from core.files import write_atomically
from src.experiments.arguments_of_reports import check_keeps, parser_of, print_error, run_folders
from src.icm.testbeds import BadInput
from src.results.page import render_report
from src.results.prices import read_prices
from src.results.run_reader import read_all


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm report", __doc__)
    run_folders(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first folder")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="YAML: what models cost")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 no such run, or a file that cannot be read or written."""
    args = build_parser().parse_args(arguments)
    path = args.output or args.runs[0] / "report.html"
    try:
        prices = read_prices(args.prices) if args.prices else None
        tables, runs = read_all(args.runs)
        page = render_report(tables, runs, prices)
        if path.is_dir():
            raise BadInput(f"{path}: is a folder; name a file")
        check_keeps(path, args.runs, runs)
        write_atomically(path, page.encode("utf-8", "replace"))
    except (BadInput, StorageFailed, OSError) as error:
        return print_error(error, path)
    if prices and not any(prices.price_of(run) for run in runs):
        print(f"warning: {args.prices} has no price for {', '.join({run.model for run in runs})}", file=sys.stderr)
    print(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}, {sum(len(run.claims) for run in runs):,} claims")
    return 0


if __name__ == "__main__":
    sys.exit(main())
