"""Does U lead to truth for this model and data? U against agreement with gold for about a hundred labelings.

    icm landscape --testbed builtin --model gemma-3-270m --batch_size 32 --alpha 50 --calibrate mean
    icm landscape --data claims.csv --model NAME --found runs/A runs/B

Run it before a search: a search finds labels of a high U, and here it shows whether those are true ones. The labelings
are gold, gold with 5 to 50% of its labels changed, random ones, one label for all, zero-shot, bootstrapped, mirrored
ones, and what searches found (--found). U is of the whole pool: every claim is asked after all others. Without gold
labels the page says how many peaks U has.

Results go to runs/NAME: landscape.html, landscape.png and landscape.json. A stopped command goes on where it was.
The flags of data, model and search are those of icm label; of the search's, only the objective (--alpha, --calibrate,
--prior), the seed and the order of demonstrations count here: nothing is annealed. docs/landscape.md explains the page.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from core.files import write_atomically
from src.experiments.arguments import AddedUp, Parser, add_search_arguments, at_least, command_parser
from src.experiments.contradictions import refuse
from src.experiments.loading import pool_of, warn_of_leaks
from src.experiments.request import OutputRequest, RunRequest
from src.experiments.resumable import run_resumable
from src.experiments.run_settings import run_name, settings_of
from src.experiments.same_run import check_same_engine, check_same_run
from src.experiments.single_run import model_api_of, print_opening
from src.experiments.summary import say_shown_again
from src.icm.consistency import Labels
from src.icm.label_names import written_label
from src.icm.labelings import FEWEST, Evaluated, Labeling, Plan, whole
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.labelling import Labelling, Pool
from src.pipeline.landscape import Answers, evaluated, survey
from src.pipeline.progress import bar_of
from src.results.landscape import Landscape
from src.results.landscape_folder import LandscapeFolder, labeling_records, read_odds
from src.results.landscape_view import grids_of, write_picture
from src.results.landscape_words import verdict_sentence, words
from src.results.messages import calibration_in_words
from src.results.page import render_landscape
from src.results.run_folder import RunFolder, environment, now
from src.results.run_reader import read_run
from src.results.side_by_side import as_text

LABELINGS: Final = 100
OF_U: Final = ("seed", "layout", "anchors", "context_cap")
"""Settings of a search that decide U of given labels; the others are of its way to them."""


@dataclass(frozen=True, slots=True)
class LandscapeRequest:
    """What a landscape is asked for. run: the claims, the model and the objective. found: run folders."""

    run: RunRequest
    labelings: int
    found: Sequence[Path] = field(default=())

    @classmethod
    def of(cls, args: argparse.Namespace, contradiction: str | None = None) -> LandscapeRequest:
        """From the parsed flags."""
        return cls(RunRequest.of(args, contradiction), args.labelings, tuple(args.found or ()))


def build_parser() -> Parser:
    """The search's flags, and those of the landscape."""
    parser = command_parser("icm landscape", __doc__)
    add_search_arguments(parser)
    group = parser.add_argument_group("landscape")
    group.add_argument(
        "--labelings",
        type=at_least(FEWEST),
        default=LABELINGS,
        metavar="L",
        help=f"about this many labelings in all, at least {FEWEST}",
    )
    group.add_argument(
        "--found",
        type=Path,
        nargs="+",
        action=AddedUp,
        metavar="RUN",
        help="also the labels of these runs of the same pool: folders, or names under --runs_dir",
    )
    group.add_argument(
        "--seed",
        type=at_least(0),
        default=SearchSettings().seed,
        help="of the pool (as in icm label) and the labelings",
    )
    group.add_argument("--run", metavar="NAME", help="folder under --runs_dir (default: made from the settings)")
    group.add_argument("--runs_dir", type=Path, default=OutputRequest().runs_dir, help="where runs and scores are kept")
    group.add_argument("--quiet", action="store_true", help="no progress bar, no prompt shown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the model failed (resumable), 2 bad input or no usable server, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    request = LandscapeRequest.of(parser.parse_args(given), parser.contradiction)
    return run_resumable(_run(request), shlex.join(["icm", "landscape", *given]))


async def _run(request: LandscapeRequest) -> int:
    await survey_pool(request)
    return 0


async def survey_pool(request: LandscapeRequest) -> tuple[LandscapeFolder, Landscape]:
    """The finished landscape and its folder. The library (icm/) calls it, too."""
    run = request.run
    if run.objective.estimate_prior:
        raise BadInput("--prior auto is estimated for a search; for a landscape, --prior P gives a share")
    pool = pool_of(run)
    settings = _settings(request, pool)
    found = _found(request, pool)
    folder = LandscapeFolder(run.output.runs_dir / run_name(run, settings, "landscape"))
    lock = RunFolder(folder.path)
    known = folder.read()
    answers = Answers()
    if known is None:
        if lock.read_run() is not None:
            raise BadInput(f"{folder.path}: holds a run. Choose another --run for the landscape")
        refuse(run.contradiction)
    else:
        check_same_run(lock, known["settings"], settings)
        before = folder.labelings(known, pool.names)
        answers.of.update({labeling.labels: odds for labeling, odds in before})
        if known["zero_shot"] is not None:
            answers.zero_shot = read_odds(known["zero_shot"])
        found_before = {labeling.name: labeling.labels for labeling, _ in before if labeling.kind == "found"}
        if known["finished"] and found.items() <= found_before.items():
            landscape = _landscape(pool, evaluated(pool.problem, [labeling for labeling, _ in before], answers))
            if run.output.told:
                say_shown_again(known)
                _tell(folder, landscape)
            return folder, landscape
        found = found_before | found
    warn_of_leaks(run, pool)
    with lock:
        async with model_api_of(run) as api:
            if known is not None:
                check_same_engine(lock, known["engine"], api.identity)
            labelling = await Labelling.open(pool, api)
            await print_opening(run, labelling, settings["testbed"], lock, searches=False)
            begun = {
                "settings": settings,
                "engine": asdict(api.identity) if known is None else known["engine"],
                "environment": environment() if known is None else known["environment"],
                "started": now() if known is None else known["started"],
                "claims": [{"row": claim.row, "gold": written_label(claim.gold, pool.names)} for claim in pool.claims],
            }
            landscape = await _survey(request, labelling, folder, begun, found, answers)
        _draw(folder, landscape, settings)
    if run.output.told:
        _tell(folder, landscape)
    return folder, landscape


async def _survey(
    request: LandscapeRequest,
    labelling: Labelling,
    folder: LandscapeFolder,
    begun: Mapping[str, Any],
    found: Mapping[str, Labels],
    answers: Answers,
) -> Landscape:
    """Ask what is not in `answers` yet; landscape.json is written after every batch. begun: its first part."""
    pool = labelling.pool
    gold = whole(pool.gold) is not None
    plan = Plan.of(request.labelings, gold=gold)
    most = plan.most(len(pool.names), gold=gold, found=len(found))
    if request.run.output.told:
        _say_how_much(pool, most, answers)

    def write(labelings: Sequence[Evaluated], finished: str | None) -> None:
        records = labeling_records(labelings, pool.names)
        folder.write({**begun, "finished": finished, "zero_shot": answers.zero_shot, "labelings": records})

    with bar_of(most, "labelings", request.run.output.quiet, " [{elapsed}<{remaining}]") as bar:
        bar.initial = bar.n = len(answers.of)

        def on_batch(labelings: Sequence[Labeling]) -> None:
            write(evaluated(pool.problem, labelings, answers), None)
            bar.update(len(answers.of) - bar.n)

        landscape = await survey(labelling, plan, found, answers, on_batch)
        bar.total = bar.n
        bar.refresh()
    write(landscape, now())
    return _landscape(pool, landscape)


def _say_how_much(pool: Pool, most: int, answers: Answers) -> None:
    size, known, cap = len(pool.claims), len(answers.of), pool.problem.settings.context_cap
    questions = (most - known + (answers.zero_shot is None)) * size
    before = f"; {known} labelings are known from before" if known else ""
    print(
        f"asking about at most {most} labelings of {size} claims: {questions:,} questions, each "
        f"after up to {size - 1 if cap is None else min(cap, size - 1)} demonstrations{before}",
        file=sys.stderr,
        flush=True,
    )


def _landscape(pool: Pool, labelings: Sequence[Evaluated]) -> Landscape:
    return Landscape(labelings, tuple(pool.gold_to_find), pool.problem.objective.alpha, pool.names)


def _draw(folder: LandscapeFolder, landscape: Landscape, settings: Mapping[str, Any]) -> None:
    """The picture and the page. Raises BadInput where jinja2 is not installed."""
    subject = (
        f"{settings['testbed']}, {len(landscape.gold)} claims, {settings['model']}, alpha {settings['alpha']:g}, "
        f"calibration {calibration_in_words(settings)}"
    )
    write_picture(landscape, folder.picture_path, subject)
    write_atomically(folder.page_path, render_landscape(landscape, subject).encode("utf-8", "replace"))


def _tell(folder: LandscapeFolder, landscape: Landscape) -> None:
    print(verdict_sentence(landscape))
    print("\n".join(f"  {line}" for line in words(landscape)))
    print(f"\n{as_text(grids_of(landscape))}\n")
    print(f"  page     {folder.page_path}\n  picture  {folder.picture_path}\n  data     {folder.document_path}")


def _found(request: LandscapeRequest, pool: Pool) -> dict[str, Labels]:
    """The labels of --found runs, by what they are called here. Raises BadInput for a run of another pool."""
    found: dict[str, Labels] = {}
    for given in request.found:
        path = given if given.is_dir() else request.run.output.runs_dir / given
        run = read_run(path)
        if run.settings.get("data_sha256") != pool.data_digest or run.names != pool.names:
            raise BadInput(f"{path}: labels other data than {pool.testbed.name} as it is here, or other labels")
        by_row = {claim.row: claim.label for claim in run.claims}
        labels = tuple(by_row.get(claim.row) for claim in pool.claims)
        missing = labels.count(None)
        if missing:
            raise BadInput(
                f"{path}: has no label for {missing} of the pool's {len(labels)} claims. A run of the same pool has "
                "the same --seed and --batch_size, and is finished"
            )
        searched = {claim.row for claim in run.claims if claim.searched}
        predicted = sum(claim.row not in searched for claim in pool.claims)
        if predicted:
            print(
                f"{path}: is of another pool; {predicted} of this one's {len(labels)} labels are predictions from its "
                "labels, which its search did not judge",
                file=sys.stderr,
            )
        name = f"run {run.name}"
        found[name if name not in found else f"run {path}"] = labels
    return found


def _settings(request: LandscapeRequest, pool: Pool) -> dict[str, Any]:
    """Everything that decides the labelings and their U."""
    unused = {each.name for each in fields(SearchSettings)} - set(OF_U) | {"label_rest"}
    of_run = {name: value for name, value in settings_of(request.run, pool).items() if name not in unused}
    return of_run | {"labelings": request.labelings}


if __name__ == "__main__":
    sys.exit(main())
