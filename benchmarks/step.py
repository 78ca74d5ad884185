"""What one step of a search costs, in upstream's order and as a tree, on one server in one run; and a whole search.

    python benchmarks/step.py --server http://127.0.0.1:8000 --model llama-8b --json step.json --png step.png
    python benchmarks/step.py --start local --sizes 16 32 64 --repeats 3
    python benchmarks/step.py --direct FOLDER --engine '{"load_format": "dummy"}'
    python benchmarks/step.py --plot_only step.json --png step.png

docs/benchmarks.md says what each case (a to f) is and what the numbers mean. Options for the vLLM server that --start
starts stand after --. Exit code 0: done; 1: --quick found more computed tokens than it allows; 2: it could not run;
130: interrupted. Results are written after every case, so an interrupt keeps what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from core.packages import need_packages

    need_packages()

from benchmarks.step_cases import Cases
from benchmarks.step_machine import commit, hardware, without_folders
from benchmarks.step_measure import Backend, Budget, HttpEngine, Progress
from benchmarks.step_report import CASES, Report, read_json, token_checks, write_json
from benchmarks.step_run import RunSimulation
from benchmarks.step_table import tables
from core.errors import APIError
from core.flags import FlagParser
from core.llm_api.engines.direct import DirectEngine, DirectOptions
from core.llm_api.engines.vllm_group import vllm_engine
from core.llm_api.llm import ModelAPI
from core.settings import Settings
from core.vllm_server import ServerFailed, VLLMServer

LETTERS: Final = tuple(case for case in CASES if len(case) == 1)
QUICK_SIZES: Final = (16, 32)


class BadOptions(Exception):
    """One line about the command line."""


def parser() -> FlagParser:
    """The options, without those after --."""
    made = FlagParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="step.py [options] [-- ...]"
    )
    where = made.add_argument_group("what is measured (one of them)").add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--server",
        metavar="URL",
        help="a running vLLM server, or several, with commas; nobody else may use them",
    )
    where.add_argument(
        "--start", metavar="SIZE", help="start scripts/launch_vllm_server.sh: one of its sizes, or a folder"
    )
    where.add_argument("--direct", metavar="FOLDER", help="vLLM in this process")
    where.add_argument("--plot_only", metavar="FILE", type=Path, help="table and PNG of an earlier --json")
    made.add_argument("--model", help="as --server names it; with --start local a folder of models/")
    made.add_argument("--engine", metavar="JSON", default="{}", help="arguments of vllm.LLM for --direct")
    made.add_argument(
        "--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512], metavar="N", help="labelled claims"
    )
    made.add_argument("--repeats", type=int, default=5, help="of every case and size (default 5)")
    made.add_argument("--cases", nargs="+", choices=LETTERS, default=list(LETTERS), help="default: all")
    made.add_argument("--claim_tokens", type=int, default=40, help="words a claim, 8 more or less (default 40)")
    made.add_argument("--run", type=int, metavar="N", help="simulate a whole search from 8 to N labels too")
    made.add_argument(
        "--rebuild_every",
        type=int,
        help="--run rebuilds the tree after so many labels; default: as the planner does",
    )
    made.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="wall time, vLLM's start included; skip what would not fit, and say so",
    )
    made.add_argument(
        "--route",
        choices=("plain", "auto"),
        default="auto",
        help="how all but (a) are sent: auto as trees of segments to servers that take them, plain as whole prompts",
    )
    made.add_argument("--quick", action="store_true", help="N = 16 and 32, once; checks token counts, never times")
    made.add_argument("--seed", type=int, default=0, help="of lengths, labels and trees; words are new in every call")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    made.add_argument("--png", type=Path, metavar="FILE", help="draw (needs matplotlib)")
    made.add_argument("--title", default="", help="of table and PNG")
    made.add_argument("--notes", nargs="+", default=[], metavar="TEXT", help="kept in the JSON")
    return made


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, server options). Raises BadOptions for what argparse cannot see."""
    given = list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    args, options = parser().parse_args(given[:cut]), given[cut + 1 :]
    if options and not args.start:
        raise BadOptions("options after -- are for the server that --start starts")
    if args.server and not args.model:
        raise BadOptions("--server needs --model, the name under which it serves the model")
    if args.plot_only and not args.plot_only.is_file():
        raise BadOptions(f"there is no file {args.plot_only}")
    if min([*args.sizes, args.repeats, args.claim_tokens, args.rebuild_every or 1]) < 1 or min(args.sizes) < 4:
        raise BadOptions("--sizes must be at least 4, counts at least 1")
    if args.run is not None and args.run <= 8:
        raise BadOptions("--run starts from 8 labels: give more")
    if args.quick:
        args.sizes, args.repeats = list(QUICK_SIZES), 1
    return args, options


async def measure(args: argparse.Namespace, report: Report, budget: Budget, server_options: Sequence[str] = ()) -> None:
    """Fill `report`, writing it to args.json after every case."""
    report.title, report.notes = args.title, list(args.notes)
    report.date, report.commit, report.hardware = datetime.now(UTC).strftime("%Y-%m-%d"), commit(), hardware()
    salt = secrets.randbits(32)
    report.settings = {
        **{name: getattr(args, name) for name in _SETTINGS},
        "salt": salt,
        "server": "given" if args.server else "started" if args.start else "in process",
        "server_options": without_folders(server_options),
        "engine": _without_folders(json.loads(args.engine)),
    }

    def save() -> None:
        if args.json is not None:
            write_json(report, args.json)

    progress = Progress()
    async with opened(args, salt, progress) as backend:
        identity = backend.api.identity
        report.engine = {
            "kind": identity.kind,
            "model": Path(identity.model).name,
            "version": identity.version,
            "fingerprint": identity.fingerprint[:12],
            "determinism": identity.determinism,
            "max_model_len": identity.max_model_len,
        }
        report.kv_cache_tokens, report.block_tokens = backend.kv_cache_tokens, backend.block_tokens
        async with progress.doing("warming up"):
            await backend.warm_up()
        cases = Cases(
            backend,
            report,
            cases=args.cases,
            sizes=args.sizes,
            repeats=args.repeats,
            budget=budget,
            progress=progress,
            save=save,
        )
        await cases.quick_ones()
        await cases.slow_ones(range(1))
        if args.run is not None:
            await RunSimulation(backend, report, budget, progress, save).measure(args.run, args.rebuild_every)
        await cases.slow_ones(range(1, args.repeats))
    if args.quick:
        report.checks = token_checks(report)
    save()


@asynccontextmanager
async def opened(args: argparse.Namespace, salt: int, progress: Progress) -> AsyncIterator[Backend]:
    """The requested engine, started, without a response cache."""
    async with AsyncExitStack() as stack:
        single_engine: HttpEngine | None = None
        single: ModelAPI | None = None
        engine: HttpEngine | DirectEngine
        if args.direct:
            engine = DirectEngine(args.direct, direct_options(args.engine))
        else:
            settings = Settings.load({"vllm_base_url": args.server})
            engine = vllm_engine(settings, args.model, use_extension=args.route == "auto")
            singly = settings.model_copy(update={"prompts_per_request": 1})
            single_engine = vllm_engine(singly, args.model, use_extension=False)
            single = await stack.enter_async_context(ModelAPI(single_engine))
        async with progress.doing("starting vLLM" if args.direct else "asking the server for its model"):
            api = await stack.enter_async_context(ModelAPI(engine))
        yield await Backend.open(
            engine, api, single_engine, single, claim_tokens=args.claim_tokens, seed=args.seed, salt=salt
        )


def direct_options(text: str) -> DirectOptions:
    """--engine as DirectOptions; arguments that it does not name go to vLLM as they are."""
    given = json.loads(text)
    named = {field.name for field in dataclasses.fields(DirectOptions)} - {"extra"}
    extra = {name: value for name, value in given.items() if name not in named}
    return DirectOptions(**{name: value for name, value in given.items() if name in named}, extra=extra)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. See the module for the exit codes."""
    report = Report()
    code = 0
    try:
        args, server_options = parse(sys.argv[1:] if arguments is None else arguments)
        if not isinstance(json.loads(args.engine), dict):
            raise BadOptions("--engine must be a JSON object")
        if args.png is not None and args.png.suffix != ".png":
            raise BadOptions("--png must end in .png")
        if args.plot_only:
            report = _earlier(args.plot_only)
            report.title = args.title or report.title
        else:
            code = _measured(args, report, server_options)
    except json.JSONDecodeError as error:
        print(f"error: --engine is not JSON ({error})", file=sys.stderr)
        return 2
    except (BadOptions, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if any(entry.repetitions for entry in report.cases) or report.run is not None:
        if args.png is not None:
            code = _draw(report, args.png) or code
        print(tables(report))
    return code


def _earlier(path: Path) -> Report:
    try:
        return read_json(path)
    except ValueError as error:
        raise BadOptions(str(error)) from None


def _measured(args: argparse.Namespace, report: Report, server_options: list[str]) -> int:
    """Fill `report`; the exit code."""
    budget = Budget(args.budget)  # includes starting vLLM
    try:
        if args.start:
            with tempfile.TemporaryDirectory() as folder, _server(args, server_options, Path(folder)) as server:
                args.server, args.model = server.url, server.model
                asyncio.run(measure(args, report, budget, server_options))
        else:
            asyncio.run(measure(args, report, budget))
    except (APIError, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was measured follows", file=sys.stderr)
        return 130
    violated = [check for check in report.checks if not check.holds]
    if violated:
        print(
            f"error: {len(violated)} bounds on computed tokens are violated, first: {violated[0].name} "
            f"({violated[0].value:g} > {violated[0].bound:g})",
            file=sys.stderr,
        )
    return 1 if violated else 0


def _server(args: argparse.Namespace, options: list[str], folder: Path) -> VLLMServer:
    log = args.json.with_suffix(".server.log") if args.json is not None else folder / "server.log"
    if args.start == "local":
        return VLLMServer(size="local", model=args.model or "gemma-3-270m", options=tuple(options), log=log)
    model = args.model or Path(args.start).name
    named = [] if "--served-model-name" in options else ["--served-model-name", model]
    return VLLMServer(size=args.start, model=model, options=(*options, *named), log=log)


def _draw(report: Report, path: Path) -> int:
    try:
        from benchmarks.step_plot import draw
    except ImportError as error:
        print(f"error: no PNG ({error}); elsewhere: step.py --plot_only FILE.json --png {path.name}", file=sys.stderr)
        return 2
    draw(report, path)
    return 0


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    return {k: without_folders([v])[0] if isinstance(v, str) else v for k, v in options.items()}


_SETTINGS: Final = (
    "sizes",
    "repeats",
    "cases",
    "claim_tokens",
    "run",
    "rebuild_every",
    "budget",
    "route",
    "quick",
    "seed",
)

if __name__ == "__main__":
    sys.exit(main())
