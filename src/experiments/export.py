"""Write a run's labels for other tools.

    icm export runs/NAME --format csv -o labels.csv
    icm export runs/NAME --format dpo --least 1 -o pairs.jsonl

jsonl: one claim a line, as `icm label --data` reads it. csv: for spreadsheets; no cell can act as a formula. datasets:
a folder that Hugging Face's load_dataset reads. dpo: prompt, chosen, rejected. sft: prompt and completion, for
fine-tuning. axolotl: the same as its input_output segments. Beside the last three stands FILE.provenance.json: model,
settings, U, and what gave the labels. docs/recipes.md says how each is used.

--abstain leaves claims without a label that are too likely to be wrong; the last three leave such claims out.

inspect: a log of inspect_ai (FILE.eval, or FILE.json), each claim a sample.

wandb, mlflow, tensorboard: log the run to that tool, as --log_to of icm label does while it is searched. More in
docs/handover.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from core.errors import APIError, StorageFailed
from core.flags import number
from src.experiments.arguments_of_reports import check_keeps, parser_of, print_error
from src.experiments.doubting import add_doubt_arguments, say_doubt, wanted_of
from src.experiments.request import TRACKERS
from src.icm.testbeds import BadInput
from src.results.doubt import doubt_of, with_doubt
from src.results.exports import (
    Only,
    Pairs,
    check_makes_pairs,
    chosen_claims,
    plain_rows,
    preference_pairs,
    training_rows,
)
from src.results.handover import DATASET, write_csv, write_dataset, write_jsonl
from src.results.provenance import beside, write_provenance
from src.results.run_reader import is_baselines, read_run
from src.results.run_record import RunRecord

TRAINS = ("dpo", "sft", "axolotl")
"""Formats for training, which hold no claim without a label."""
NAMES = {
    "jsonl": "export.jsonl",
    "csv": "export.csv",
    "datasets": "dataset",
    "dpo": "dpo.jsonl",
    "sft": "sft.jsonl",
    "axolotl": "axolotl.jsonl",
    "inspect": "inspect.eval",
}


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = parser_of("icm export", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, as in runs/NAME")
    parser.add_argument("--format", choices=[*NAMES, *TRACKERS], default="jsonl", help="what to write (default: jsonl)")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="file, or folder; default: in RUN")
    parser.add_argument(
        "--only", choices=get_args(Only), default="all", help="search: leave out labels that the search did not give"
    )
    parser.add_argument("--least", type=_nats, default=0.0, metavar="NATS", help="leave out labels less sure than this")
    add_doubt_arguments(parser)
    parser.add_argument(
        "--pairs", choices=get_args(Pairs), default="best", help="dpo, of single claims: one pair a question, or all"
    )
    parser.add_argument(
        "--hub",
        metavar="NAME",
        help="datasets: also push the folder into a new private repository of this name at the Hugging Face hub (or at "
        "HF_ENDPOINT), by huggingface_hub and its token",
    )
    parser.add_argument("--public", action="store_true", help="with --hub: for everybody to read")
    parser.add_argument("--bos", default="", metavar="TOKEN", help="axolotl: the token that a prompt begins with")
    return parser


def _nats(text: str) -> float:
    value = number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 1 a tool or hub failed, 2 no such run, nothing to write, or what cannot be written."""
    args = build_parser().parse_args(arguments)
    path = args.output or args.run / NAMES.get(args.format, "")
    try:
        if is_baselines(args.run):
            raise BadInput(f"{args.run}: is a table of baselines; name one of its runs, as in {args.run}/seed-1")
        if args.format in TRACKERS:
            return _log_run(args, read_run(args.run))
        run, wanted = read_run(args.run), wanted_of(args)
        if wanted:
            doubt = doubt_of(run, wanted)
            run = with_doubt(run, doubt)
            say_doubt(doubt)
        if args.hub is not None:
            _check_hub(args.hub)
        check_keeps(path, [args.run], [run])
        written = _export(args, run, path)
        print(f"{path}: {written}", flush=True)
        if args.hub is not None:
            _push(args, run, path)
    except (BadInput, StorageFailed, OSError) as error:
        return print_error(error, path)
    except APIError as error:  # of the hub
        print_error(error, path)
        return 1
    return 0


def _check_hub(name: str) -> None:
    """Raises BadInput where nothing can be pushed under this name."""
    check_package("huggingface_hub", "--hub", "hub")
    from contrib.hub import check_can_push  # an extra: imported only where it is asked for

    check_can_push(name)


def _push(args: argparse.Namespace, run: RunRecord, folder: Path) -> None:
    from contrib.hub import push

    address = push(
        folder,
        [folder / name for name in DATASET],
        args.hub,
        public=args.public,
        message=f"Labels of {run.name}",
    )
    print(f"{address}: {'public' if args.public else 'private'}")


def check_package(package: str, flag: str, extra: str) -> None:
    """Raises BadInput where a package is missing, with the extra that brings it."""
    if find_spec(package) is None:
        raise BadInput(f"{flag} needs the package {package}, which is not installed: pip install '.[{extra}]' in this "
                       "project's folder")  # fmt: skip


def _log_run(args: argparse.Namespace, run: RunRecord) -> int:
    """Log the run to a tool; returns the exit code: 1 where the tool failed, which it said."""
    from contrib.tracking.tracking import track_files  # an extra: imported only where it is asked for

    if not any(part.journal for part in run.searches):
        raise BadInput(f"{args.run}: has no journal to log")
    places = track_files(args.format, args.run, run, args.output)
    print("\n".join(places))
    return 0 if len(places) == len(run.searches) else 1


def _export(args: argparse.Namespace, run: RunRecord, path: Path) -> str:
    """Write the labels; returns one line on what was written. Raises BadInput where there is nothing to write."""
    if args.format == "dpo":
        check_makes_pairs(run)
    trains = args.format in TRAINS
    claims = chosen_claims(run, args.only, args.least, abstained=not trains)
    if not claims:
        raise BadInput(
            f"{args.run}: no label is left to write" + ("" if run.finished else " (the run is not finished)")
        )
    if args.format == "inspect" and path.suffix not in (".eval", ".json"):
        raise BadInput(f"{path}: inspect_ai tells its formats by the name: FILE.eval or FILE.json")
    if path.is_dir() and args.format != "datasets":
        raise BadInput(f"{path}: is a folder; name a file")
    left_out = len(run.claims) - len(claims)
    rest = f", {left_out:,} left out" if left_out else ""
    if without := sum(claim.abstained for claim in claims):
        rest = f", {without:,} of them without a label{rest}"
    if args.format == "dpo":
        found = preference_pairs(run, claims, args.pairs)
        if not found.pairs:
            raise BadInput(f"{args.run}: no question has both a True and a False claim: there is no pair to write")
        write_jsonl(path, found.pairs)
        write_provenance(beside(path), run, claims)
        return (
            f"{len(found.pairs):,} pairs; {found.unpaired:,} claims had no partner, "
            f"{found.contradicting:,} pairs contradicted themselves{rest}"
        )
    if args.format == "csv":
        write_csv(path, plain_rows(run, claims))
    elif args.format == "datasets":
        write_dataset(path, run, claims)
    elif args.format == "sft":
        write_jsonl(path, training_rows(run, claims))
        write_provenance(beside(path), run, claims)
    elif args.format == "inspect":
        check_package("inspect_ai", "--format inspect", "inspect")
        from contrib.inspect_log import write_log  # an extra: imported only where it is asked for

        write_log(path, run, claims)
    elif args.format == "axolotl":
        from contrib.training import axolotl_rows  # an extra: imported only where it is asked for

        write_jsonl(path, axolotl_rows(training_rows(run, claims), args.bos))
        write_provenance(beside(path), run, claims)
    else:
        write_jsonl(path, plain_rows(run, claims))
    return f"{len(claims):,} claims{rest}"


if __name__ == "__main__":
    sys.exit(main())
