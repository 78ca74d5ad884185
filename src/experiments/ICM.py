"""Label a data set by Internal Coherence Maximization (Wen et al. 2025, arXiv 2506.10139).

    icm label --testbed truthfulQA --alpha 50 --model meta-llama/Llama-3.1-8B --batch_size 32 --num_seed 4 --K 50

The model is asked at VLLM_BASE_URL (environment or SECRETS; start one with scripts/launch_vllm_server.sh), in this
process with --direct, or at an OpenAI-compatible LLAMA_API_BASE with --no-use_vllm. Results go to runs/NAME/; the same
command resumes a run that was stopped, and shows a finished one.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

if __package__ in (None, ""):  # run as a script, from any folder, without an installed package
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

    from core.packages import need_packages

    need_packages()

from src.experiments.arguments import (
    AddedUp,
    Parser,
    add_choice_of_search,
    add_search_arguments,
    at_least,
    command_parser,
    lookahead_of,
)
from src.experiments.beside import Beside
from src.experiments.contradictions import refuse
from src.experiments.doubting import add_doubt_arguments, check_wanted, write_doubt
from src.experiments.loading import pool_of, print_continuing, warn_of_leaks
from src.experiments.parts import run_parts
from src.experiments.request import TRACKERS, OutputRequest, PartsRequest, RunRequest
from src.experiments.resumable import run_resumable
from src.experiments.run_settings import as_begun, run_name, settings_of
from src.experiments.same_run import check_readable, check_same_run, may_be_renamed
from src.experiments.single_run import check_log_to, label_pool, model_api_of, print_opening, show_again
from src.experiments.summary import print_summary
from src.icm.problem import SearchSettings
from src.pipeline.labelling import Labelling
from src.pipeline.prior_estimate import with_prior
from src.results.messages import calibration_in_words, check_table, token_lines
from src.results.run_folder import RunFolder


def build_parser() -> Parser:
    """The search's flags, and those of one run."""
    parser = command_parser("icm label", __doc__)
    add_search_arguments(parser)
    add_choice_of_search(parser)
    parts, output = PartsRequest(), OutputRequest()
    run = parser.add_argument_group("run")
    run.add_argument(
        "--seed", type=at_least(0), default=SearchSettings().seed, help="of the pool, the labels, the search"
    )
    run.add_argument(
        "--label_rest",
        action="store_true",
        help="then label the file's other claims with the pool's labels as demonstrations",
    )
    run.add_argument(
        "--num_batches",
        type=_batches,
        default=parts.num_batches,
        metavar="{all,B}",
        help="split the data into B batches of --batch_size (all: as many as it takes) and label each by itself",
    )
    run.add_argument(
        "--passes",
        type=at_least(1),
        default=parts.passes,
        metavar="N",
        help="label every batch N times (odd) from other random seeds, and let the majority decide",
    )
    run.add_argument(
        "--at_once",
        type=at_least(1),
        default=parts.at_once,
        metavar="N",
        help="batches and passes that are searched at the same time; the labels do not depend on it",
    )
    run.add_argument(
        "--continue_from",
        metavar="RUN",
        help="start with the labels of another run, finished or not, for its claims that are still in the data, in "
        "place of random ones; then go on with what is new. RUN: its name under --runs_dir, or its folder. They are in "
        "the pool whatever --batch_size is. Of a finished run its answers are taken over too",
    )
    add_doubt_arguments(run)
    run.add_argument("--run", metavar="NAME", help="folder under --runs_dir (default: made from the settings)")
    run.add_argument("--runs_dir", type=Path, default=output.runs_dir, help="where runs and cached scores are kept")
    run.add_argument(
        "--check",
        action="store_true",
        help="only measure whether ICM can work here: U of gold, constant, flipped and random labels",
    )
    run.add_argument(
        "--is_complete",
        action="store_true",
        help="only tell whether this run is finished: exit code 0 and its summary, or 1",
    )
    run.add_argument(
        "--lookahead",
        type=lookahead_of,
        default=None,
        metavar="{auto,M}",
        help="ask the questions of the next M proposals with those that must be asked; the labels do not depend on it. "
        "0: none (default: auto, from the acceptance rate and the seconds of a batch; none at an external API)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar, no prompt shown")
    run.add_argument(
        "--metrics_port",
        type=at_least(1),
        metavar="PORT",
        help="serve a single search's metrics for Prometheus at http://127.0.0.1:PORT/metrics (docs/monitoring.md)",
    )
    run.add_argument(
        "--log_to",
        nargs="+",
        action=AddedUp,
        choices=TRACKERS,
        default=output.log_to,
        help="log the run while it is searched to these tools, by their own packages: Weights & Biases (offline unless "
        "WANDB_MODE says otherwise), MLflow, TensorBoard (docs/handover.md)",
    )
    return parser


def _batches(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be all, or a whole number, not {text}")
    return at_least(1)(text)


def main(arguments: Sequence[str] | None = None, program: Sequence[str] = ("icm", "label")) -> int:
    """Exit codes: 0 done, 1 the model failed (resumable), 2 bad input or no usable server, 130 interrupted.

    program: what comes before the flags in the command line that resumes a stopped run.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    parser = build_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    request = RunRequest.of(parser.parse_args(given), parser.contradiction)
    return run_resumable(_run(request), shlex.join([*program, *given]))


async def _run(request: RunRequest) -> int:
    folder = await label(request)
    return 1 if folder is None and request.is_complete else 0


async def label(request: RunRequest, beside: Beside | None = None) -> RunFolder | None:
    """The folder of the finished run. None for a pool that was only measured, and a run that is not finished yet.

    The library (icm/) calls it, too. beside: where it is one of several runs.
    """
    check_log_to(request)
    if request.parts.several:
        return await run_parts(request, beside)
    pool = pool_of(request)
    check_wanted(request.doubt, [pool])
    settings = settings_of(request, pool)
    runs_dir = request.output.runs_dir
    same = as_begun(request, settings, lambda known: RunFolder(runs_dir / run_name(request, known)).read_run())
    if same is not request:
        return await label(same, beside)
    folder = RunFolder(runs_dir / run_name(request, settings) if beside is None else beside.folder)
    known = folder.read_run()
    if known is not None:
        check_readable(folder, known)
        check_same_run(folder, known["settings"], settings, renamed=may_be_renamed(known), continues=True)
        if "result" in known and not request.check:
            show_again(request, folder, known)
            return folder
    else:
        refuse(request.contradiction)
    if request.is_complete:
        return None
    warn_of_leaks(request, pool)
    if request.output.told:
        print_continuing(request, pool, None if request.check else folder)
    opened = model_api_of(request) if beside is None else beside.opened(request)
    with nullcontext() if request.check else folder:
        async with opened as api:
            labelling = await Labelling.open(pool, api)
            await print_opening(request, labelling, settings["testbed"], None if request.check else folder)
            if request.check:
                print(token_lines(await labelling.token_record()))
                labelling, _ = await with_prior(labelling)
                print(check_table(await labelling.check(), calibration_in_words(settings)))
                return None
            document = await label_pool(
                request,
                labelling,
                folder,
                settings,
                folder.read_run(),
                progress=None if beside is None else beside.progress.begin(len(pool.claims)).of("search"),
                cache_share=1 if beside is None else beside.cache_share,
            )
            document = write_doubt(folder, document, request.doubt, told=request.output.told)
    if request.output.told:
        print_summary(folder, document)
    return folder


if __name__ == "__main__":
    sys.exit(main(program=(sys.executable, __file__)))
