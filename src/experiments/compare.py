"""Put runs side by side: settings that differ, results with intervals, cost, and how far their labels agree.

    icm compare runs/A runs/B
    icm compare runs/A runs/B runs/C -o comparison.html

Prints tables; with -o also writes them, with all curves in the same panels, as one self-contained HTML page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import StorageFailed
from core.files import write_atomically
from src.experiments.arguments_of_reports import parser_of, print_error, run_folders
from src.icm.testbeds import BadInput
from src.results.flips import flips
from src.results.page import render_comparison
from src.results.prices import read_prices
from src.results.run_reader import read_all
from src.results.side_by_side import as_text, compare, shared_curves


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm compare", __doc__)
    run_folders(parser, least=2)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write an HTML page")
    parser.add_argument("--prices", type=Path, metavar="FILE", help="YAML: what models cost")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 compared, 2 fewer than two runs, no such run, or a file that cannot be read or written."""
    args = build_parser().parse_args(arguments)
    try:
        prices = read_prices(args.prices) if args.prices else None
        tables, runs = read_all(args.runs)
        if len(runs) < 2:
            raise BadInput(f"a comparison needs two runs at least, and here is {len(runs)}")
        grids = compare(runs, prices)
        print(as_text(grids))
        if args.output:
            if args.output.is_dir():
                raise BadInput(f"{args.output}: is a folder; name a file")
            searches = [search for run in runs for search in run.searches]
            names = ", ".join(run.name for run in runs)
            page = render_comparison(grids, shared_curves(runs), flips(searches), tables, names)
            write_atomically(args.output, page.encode("utf-8", "replace"))
            print(f"\n{args.output}")
    except (BadInput, StorageFailed, OSError) as error:
        return print_error(error, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
