#!/usr/bin/env python3
"""Which versions of vLLM this project works with: measure them, and write the tables of docs/versions.md.

    python scripts/versions.py                       # every vLLM for the CPU of VERSIONS that has no row yet
    python scripts/versions.py 0.31.0 --again        # this one, in a fresh environment, even if it has one
    python scripts/versions.py --here --model FOLDER # the vLLM of this Python, on its GPU or CPU
    python scripts/versions.py --here --url URL      # with a server of it that runs already
    python scripts/versions.py --page                # only write the page from the results
    python scripts/versions.py oldest --run -- -m pytest tests/icm_vllm      # something else in an environment

For each: which of our patches go in (icm_vllm/patches.py), whether a server starts, the smoke check, the determinism
check (--quick) and the token counts of benchmarks/step.py --quick. Environments are made in a temporary folder, some
4 GB each, and removed. Results are kept version by version in benchmarks/results/versions-cpu.json or -gpu.json: an
interrupted call is repeated to go on. Exit code 0: all passed; 1: something failed or was refused; 2: it could not run.
With --run it is that of what was run; 125: there is no environment to run it in.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

    from core.packages import need_packages

    need_packages()

from core.errors import ConfigurationError, StorageFailed  # noqa: E402
from core.files import write_atomically  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from scripts.version_environment import NoEnvironment, environment  # noqa: E402
from scripts.version_measure import NotMeasurable, measure  # noqa: E402
from scripts.version_rows import PAGE, all_rows, keep, page_with, read_rows, results_of  # noqa: E402

VERSIONS: Final = ("0.32.0", "0.31.0", "0.30.0", "0.29.0", "0.28.0", "0.27.1")
"""vLLM for the CPU, of every minor version its newest patch; the last is the oldest that is supported."""
MODEL: Final = "gemma-3-270m"
_WHOLE: Final = re.compile(r"\d+\.\d+\.\d+(\.?(a|b|rc|post|dev)\d+)*")
"""A version as its row names it: 0.32 would be another than 0.32.0."""
NO_ENVIRONMENT: Final = 125
"""Exit code of --run where nothing was run; pytest, which also ends with 2, has no such one."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends as Ctrl-C does, so that the environment is removed."""


def parser() -> FlagParser:
    """Every flag."""
    made = FlagParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="versions.py [options] [VERSION ...] [-- server options]",
    )
    made.add_argument(
        "versions", nargs="*", metavar="VERSION", help=f"default: {' '.join(VERSIONS)}; or oldest: {VERSIONS[-1]}"
    )
    what = made.add_mutually_exclusive_group()
    what.add_argument("--here", action="store_true", help="measure the vLLM of this Python")
    what.add_argument("--page", action="store_true", help="only write docs/versions.md")
    what.add_argument(
        "--run",
        action="store_true",
        help="run the environment's Python with what stands behind --, and measure nothing",
    )
    made.add_argument("--again", action="store_true", help="also where there is a row already")
    made.add_argument("--url", help="for --here: a running server of this Python's vLLM, which nobody else may use")
    made.add_argument(
        "--log", type=Path, help="for --here: where the server's log goes; for --url: where it is, for its warnings"
    )
    made.add_argument(
        "--model", default=MODEL, help=f"a name in models/, or for --here on a GPU a folder (default: {MODEL})"
    )
    made.add_argument("--results", type=Path, metavar="FILE", help="where rows are kept (default: by device, as above)")
    return made


def wrong(args: argparse.Namespace, behind: Sequence[str]) -> str:
    """Why these arguments mean nothing together; "" where they do."""
    if args.versions and (args.here or args.page):
        return "versions are for environments that are made: leave them out with --here and --page"
    if (args.url or args.log) and not args.here:
        return f"{'--url' if args.url else '--log'} is for --here"
    if args.url and behind:
        return "server options behind -- are for a server that is started, not for --url"
    if behind and not (args.here or args.run):
        return "what stands behind -- is for --here or --run"
    if args.run and (not behind or len(args.versions) != 1):
        return "--run takes one version, and what to run behind --"
    if args.results and (args.page or args.run):
        return "--results is for versions that are measured: the page is made of the rows in benchmarks/results"
    for version in args.versions:
        if not _WHOLE.fullmatch(version):
            return f"{version!r} is no version of vLLM: give all three numbers, as in {VERSIONS[0]}"
    if args.again and (args.here or args.page or args.run):
        return "--again is for versions that are measured in environments of their own"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    args, behind = parser().parse_args(given[:cut]), given[cut + 1 :]
    args.versions = [VERSIONS[-1] if version == "oldest" else version for version in args.versions]
    if problem := wrong(args, behind):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    try:
        if args.page:
            write_page()
            return 0
        if args.run:
            with environment(args.versions[0]) as python:
                return _python(python, behind)
        return _here(args, behind) if args.here else _environments(args)
    except (NotMeasurable, NoEnvironment, ConfigurationError, StorageFailed, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ENVIRONMENT if args.run else 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the version that it was at", file=sys.stderr)
        return 130


def _leave(number: int, frame: FrameType | None) -> None:
    raise Terminated


def write_page() -> None:
    """Write the tables of docs/versions.md from the rows of all devices."""
    write_atomically(PAGE, page_with(PAGE.read_text(encoding="utf-8"), all_rows()))


def _here(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Measure this environment and keep the row."""
    row = measure(model=args.model, url=args.url, options=options, log=args.log)
    path = args.results or results_of(row.device)
    keep(row, path)
    print(f"vLLM {row.vllm} on a {row.device} {'passes' if row.passed else 'does not pass'}; kept in {path}")
    if args.results is None:
        write_page()
    return 0 if row.passed else 1


def _environments(args: argparse.Namespace) -> int:
    """Measure each version that has no row yet in an environment of its own."""
    path = args.results or results_of("cpu")
    codes = [0]
    for version in args.versions or VERSIONS:
        known = [row for row in read_rows(path) if (row.vllm, row.device) == (version, "cpu")]
        if known and not args.again:
            print(f"vLLM {version} is in {path.name} already (--again measures it again)", file=sys.stderr)
            continue
        print(f"vLLM {version}", file=sys.stderr, flush=True)
        try:
            with environment(version) as python:
                results = ["--results", str(path)] if args.results else []
                command = [str(Path(__file__).resolve()), "--here", "--model", args.model, *results]
                codes.append(_python(python, command))
        except NoEnvironment as error:
            print(f"error: vLLM {version}: {error}", file=sys.stderr)
            codes.append(2)
    return max(codes)


def _python(python: Path, arguments: Sequence[str]) -> int:
    """Run an environment's Python in the repository to its end; returns the exit code. Ctrl-C reaches it, too."""
    environ = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHON")}
    process = subprocess.Popen([str(python), *arguments], cwd=REPO_ROOT, env=environ)
    try:
        return process.wait()
    except KeyboardInterrupt as stopped:
        if isinstance(stopped, Terminated):  # Ctrl-C reached it already
            process.terminate()
        process.wait()
        raise


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())
