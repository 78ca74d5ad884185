#!/usr/bin/env python3
"""The job of `make icm`: label the built-in claims by ICM with a small real model on this machine.

    python scripts/run_local.py [--model gemma-3-270m] [--minutes 5] [ICM_OPTION ...]      # e.g. --seed 2

Makes the model if it is missing, starts a vLLM server for the time of the run, times a few questions to see how large a
pool this machine labels in the given minutes (64 claims, 32 or 16, unless --batch_size is given), checks once whether
the server's scores repeat to the last bit, and calls src/experiments/ICM.py, which gets all options not known here. A
run that is complete is only shown: no server is started. Ctrl-C stops the server too, and the same
command resumes the run, with the pool that it has. The exit code is ICM.py's; 2 if the server did not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.determinism.record import needs_check, read_record  # noqa: E402
from core.errors import APIError  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from core.llm_api.engines.vllm import VLLMClient  # noqa: E402
from core.llm_api.llm import ModelAPI  # noqa: E402
from core.settings import Settings  # noqa: E402
from core.vllm_server import ServerFailed, VLLMServer  # noqa: E402
from src.experiments.ICM import build_parser  # noqa: E402
from src.experiments.loading import pool_of  # noqa: E402
from src.experiments.request import RunRequest  # noqa: E402
from src.experiments.resumable import GO_ON_WITH  # noqa: E402
from src.experiments.run_settings import as_begun, run_name, settings_of  # noqa: E402
from src.icm.testbeds import BadInput  # noqa: E402
from src.pipeline.labelling import Labelling  # noqa: E402
from src.pipeline.pool_size import choose_pool, measure  # noqa: E402
from src.results.run_folder import RunFolder  # noqa: E402

ICM: Final = REPO_ROOT / "src" / "experiments" / "ICM.py"
DETERMINISM: Final = REPO_ROOT / "scripts" / "test_determinism.py"


DEFAULTS: Final = ("--alpha", "50", "--calibrate", "mean")
"""What a small model needs (docs/lab-log.md). Given flags come later and win."""

SIZES: Final = (64, 32, 16)
"""Pools to choose among (--batch_size), the largest first."""
MINUTES: Final = 5.0
CHECK_SECONDS: Final = 40.0
"""Seconds for the determinism check."""
END_SECONDS: Final = 10.0
"""Seconds for curves, summary, and stopping the server."""


def icm_command(model: str, given: Sequence[str], size: int = SIZES[0]) -> list[str]:
    """ICM.py on the built-in claims, unless `given` names other data: `size` by search, the rest from their labels."""
    names = _names(given)
    testbed = [] if names & {"--testbed", "--data"} else ["--testbed", "builtin"]
    if testbed and not names & {"--num_batches", "--passes"}:  # those label whole batches by themselves
        testbed.append("--label_rest")
    return [sys.executable, str(ICM), "--model", model, *testbed, "--batch_size", str(size), *DEFAULTS, *given]


def _names(given: Sequence[str]) -> set[str]:
    return {argument.split("=", 1)[0] for argument in given}


def begun_size(model: str, given: Sequence[str]) -> int | None:
    """The --batch_size of a run that these options began earlier; None where there is none."""
    for size in SIZES:
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # ICM.py prints the same error later
                request = _request(model, given, size)
                settings = settings_of(request, pool_of(request))
                request = as_begun(request, settings, partial(_read, request))
                known = _read(request, settings_of(request, pool_of(request)))
        except (SystemExit, BadInput):
            return None
        if known is not None and known["settings"].get("batch_size") == size:
            return size
    return None


def _read(request: RunRequest, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The run.json of the run with these settings; None where there is none."""
    return RunFolder(request.output.runs_dir / run_name(request, settings)).read_run()


async def fitting_size(model: str, given: Sequence[str], url: str, deadline: float) -> int:
    """The --batch_size whose pool this machine labels until `deadline` (monotonic seconds), from the time of a few
    questions; prints how many claims that are and how long it takes.

    Raises BadInput, also where even the smallest pool does not fit the model's context, and an APIError where the
    server does not answer.
    """
    key = Settings.load({"vllm_base_url": url}).vllm_api_key
    async with ModelAPI(VLLMClient(url, model, api_key=key)) as api:
        labelling, sizes = await _largest_that_fits(model, given, api)
        print("measuring how fast this machine answers ...", file=sys.stderr, flush=True)
        speed = await measure(labelling)
        record = read_record(_request(model, given, SIZES[0]).output.runs_dir / "determinism", api.identity)
    check = CHECK_SECONDS if needs_check(record, api.identity, whole=False) else 0.0
    mean = labelling.planned_for(None).pool.problem.costs.mean
    left = deadline - time.monotonic() - check - END_SECONDS
    later = len(labelling.pool.rest)
    claims, seconds = choose_pool(speed, mean, later, left, list(sizes), labelling.pool.problem.settings.search)
    dtype = f" in {api.identity.dtype}" if api.identity.dtype else ""
    print(
        f"{speed.tokens_a_second:,.0f} tokens a second{dtype}: a pool of {claims} of "
        f"{len(labelling.pool.claims) + later + labelling.pool.left_out} claims, labelled in about "
        f"{_minutes(seconds + check)} from now (--batch_size or --minutes choose another)",
        file=sys.stderr,
    )
    if not later and claims < len(labelling.pool.claims) + labelling.pool.left_out:
        print("the claims outside the pool stay without a label: --label_rest labels them from it", file=sys.stderr)
    sys.stderr.flush()
    return sizes[claims]


async def _largest_that_fits(model: str, given: Sequence[str], api: ModelAPI) -> tuple[Labelling, dict[int, int]]:
    """The largest pool of SIZES whose prompts fit the model's context, tokenized; and the --batch_size of each pool to
    choose from, by its number of claims, the largest first: a small data set may have the same pool for several.
    """
    for at, size in enumerate(SIZES):
        try:
            labelling = await Labelling.open(pool_of(_request(model, given, size)), api)
        except BadInput:
            if size == SIZES[-1]:
                raise
        else:
            sizes = {len(labelling.pool.claims): size}
            for smaller in SIZES[at + 1 :]:
                with contextlib.suppress(BadInput):  # too small for any group of the claims
                    sizes.setdefault(len(pool_of(_request(model, given, smaller)).claims), smaller)
            return labelling, sizes
    raise AssertionError("unreachable")


def _request(model: str, given: Sequence[str], size: int) -> RunRequest:
    """ICM.py's request for its command line. Raises SystemExit where that is wrong."""
    return RunRequest.of(build_parser().parse_args(icm_command(model, given, size)[2:]))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.1f} minutes"


def run_icm(command: Sequence[str], url: str, again: Sequence[str] = ()) -> int:
    """Run ICM.py against `url` to its end and return its exit code, passing on Ctrl-C and SIGTERM.

    again: the command that also starts the server; a job that is stopped shows it as the way to go on.

    ICM.py gets its own process group, because a terminal's Ctrl-C would otherwise reach it twice: the first one means
    "save and end", the second "end now".
    """
    environment = {**os.environ, "VLLM_BASE_URL": url, "USE_VLLM": "true"}
    if again:
        environment[GO_ON_WITH] = shlex.join(again)
    process = subprocess.Popen(command, env=environment, process_group=0)
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
    finally:
        if process.poll() is None:  # after SIGTERM or SIGHUP
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def again_by(script: str, arguments: Sequence[str] | None) -> list[str]:
    """The command line of `script`, by this interpreter. arguments: None for those of this process."""
    return [sys.executable, script, *(sys.argv[1:] if arguments is None else arguments)]


def check_once(url: str, runs_dir: Path) -> None:
    """Check this server with test_determinism.py, in short, unless it passed before; ICM.py repeats what it finds.

    runs_dir: where ICM.py looks for the result.
    """
    short = ["--quick", "--prompts", "4", "--seconds", str(CHECK_SECONDS), "--unless_passed"]
    command = [sys.executable, str(DETERMINISM), "--url", url, "--runs_dir", str(runs_dir), *short]
    subprocess.run(command, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="gemma-3-270m", help="a model that scripts/prepare_model.py knows")
    parser.add_argument(
        "--minutes",
        type=_positive,
        metavar="M",
        help="take the largest pool of 64, 32 or 16 claims that this machine labels in some M minutes, the server's "
        f"start included (default: {MINUTES:g}); only for a new run",
    )
    parser.add_argument("--server_log", type=Path, default=REPO_ROOT / "runs" / "vllm_server.log")
    options, rest = parser.parse_known_args(arguments)
    # With batches of a whole data set, or a given pool, there is no size to choose.
    free = not _names(rest) & {"--batch_size", "--num_batches", "--passes"}
    size = begun_size(options.model, rest) if free else None
    command = icm_command(options.model, rest, size or SIZES[0])

    if size is not None and options.minutes is not None:
        print(
            f"--minutes is for a new run: these options began one with --batch_size {size} (another --batch_size or "
            "--seed begins a new one)",
            file=sys.stderr,
        )
    # Prints the summary of a complete run (0), nothing of an unfinished one (1), and complains about bad input (2).
    if (code := subprocess.run([*command, "--is_complete"], check=False).returncode) != 1:
        return code
    if size is not None:
        print(f"going on with the run of --batch_size {size}", file=sys.stderr)
    prepare = [sys.executable, str(REPO_ROOT / "scripts" / "prepare_model.py"), "--model", options.model]
    missing = not (REPO_ROOT / "models" / options.model / "provenance.json").is_file()
    if missing and (code := subprocess.run(prepare, check=False).returncode):
        return code
    deadline = time.monotonic() + 60 * (options.minutes or MINUTES)
    try:
        with VLLMServer(model=options.model, log=options.server_log) as server:
            if free and size is None:
                try:
                    size = asyncio.run(fitting_size(options.model, rest, server.url, deadline))
                except (APIError, BadInput) as error:
                    print(f"error: {error}", file=sys.stderr)
                    return 2
                command = icm_command(options.model, rest, size)
            check_once(server.url, _request(options.model, rest, SIZES[0]).output.runs_dir)
            return run_icm(command, server.url, again_by(__file__, arguments))
    except ServerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped before the run began.", file=sys.stderr)
        return 130


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
