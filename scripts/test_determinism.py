#!/usr/bin/env python3
"""Is a score of this engine a function of its prompt alone? Ask the same prompts in many ways and compare every bit.

    python scripts/test_determinism.py --quick                 # the server that VLLM_BASE_URL names, in a minute
    python scripts/test_determinism.py --url http://host:8000  # the whole matrix: minutes, 256 prompts
    python scripts/test_determinism.py --start local           # a server started for the check, restarted halfway
    python scripts/test_determinism.py --direct models/gemma-3-270m --cpu --quick     # vLLM in this process, no server

The reference is each prompt asked alone, nothing cached. The result is kept under --runs_dir, where ICM.py finds it.
Exit code 0: every row is the same to the last bit; 1: one differs; 2: nothing to check there, or wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

    from core.packages import need_packages

    need_packages()

import orjson  # noqa: E402
from tqdm import tqdm  # noqa: E402

from core.determinism.asking import Asker, DirectAsker, HttpAsker, Listed  # noqa: E402
from core.determinism.matrix import Material, Matrix, Row, Size  # noqa: E402
from core.determinism.record import Record, needs_check, read_record, row_record, write_record  # noqa: E402
from core.errors import APIError, ConfigurationError  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from core.llm_api.engines.direct import DirectEngine, DirectOptions  # noqa: E402
from core.llm_api.engines.vllm import START_HINT, VLLMClient  # noqa: E402
from core.llm_api.http.transport import HttpOptions, HttpTransport  # noqa: E402
from core.llm_api.text.http_text import HttpText  # noqa: E402
from core.llm_api.types import EngineIdentity  # noqa: E402
from core.settings import Settings  # noqa: E402
from core.vllm_server import ServerFailed, VLLMServer  # noqa: E402
from src.icm.testbeds import BadInput  # noqa: E402
from src.pipeline.determinism_material import Amount, material_for  # noqa: E402

MAX_MODEL_LEN: Final = 4096
QUICK: Final = (
    Amount(prompts=12, demonstrations=10, long_tokens=3000, long=2, short=16),
    Size(repeats=100, lists=(1, 2, 3, 8), generated=0, top=False),
)
WHOLE: Final = (Amount(prompts=256, demonstrations=24, long_tokens=24_000), Size())
LESS: Final = ((8, 100, 3000, 10), (4, 100, 3000, 10), (4, 40, 1500, 10), (2, 20, 800, 10), (2, 20, 800, 5))
"""What --quick is reduced to with --seconds: prompts, repeats of one, tokens of the long strangers, demonstrations in a
prompt."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine to check: as a search asks it, and with control over what prompts share."""

    engine: VLLMClient | DirectEngine
    asker: Asker
    identity: EngineIdentity


@asynccontextmanager
async def server_engine(url: str, model: str | None, settings: Settings) -> AsyncIterator[Engine]:
    """A running server; `model` defaults to the first that it serves."""
    options = HttpOptions(connect_timeout=settings.connect_timeout, read_timeout=settings.read_timeout)
    http = HttpTransport(url, key=settings.vllm_api_key, key_name="VLLM_API_KEY", options=options, absent=START_HINT)
    try:
        if model is None:
            model = next(iter(await HttpText(http, "").models()), "")
        client = VLLMClient(url, model, api_key=settings.vllm_api_key, options=options)
        try:
            identity = await client.start()
            yield Engine(client, HttpAsker(http, model, client.counting), identity)
        finally:
            await client.aclose()
    finally:
        await http.aclose()


@asynccontextmanager
async def direct_engine(model: str, options: DirectOptions) -> AsyncIterator[Engine]:
    """vLLM in this process."""
    engine = DirectEngine(model, options)
    try:
        identity = await engine.start()
        yield Engine(engine, DirectAsker(engine), identity)
    finally:
        await engine.aclose()


_SHOWN: Final = ("model", "kind", "version", "dtype", "determinism", "fingerprint")


class Report:
    """Prints rows as they come, below them the time left, and at the end the verdict."""

    def __init__(self, quiet: bool) -> None:
        self.rows: list[Row] = []
        self._quiet = quiet
        self._start = time.monotonic()
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._names: Sequence[str] = ()

    def begin(self, names: Sequence[str], lengths: Sequence[int] = ()) -> None:
        """Print the heading. names: of the rows to come; lengths: of the prompts, tokens."""
        self.close()
        self._names = names
        self._bar = tqdm(
            total=len(names),
            unit="row",
            desc="determinism check",
            disable=self._quiet or not sys.stderr.isatty(),  # in a log the rows themselves are the progress
            dynamic_ncols=True,
            leave=False,
            mininterval=0.5,
        )
        self.say(
            "Determinism check: each row asks the same prompts in another way, beside others or partly cached. 0 of "
            "them should differ from when each is asked alone:"
        )
        if lengths:
            # A window of attention that is longer is not tried.
            self.say(f"prompts of {min(lengths):,} to {max(lengths):,} tokens")
        self.say(
            f"{'':<44} {'differ':>9} {'largest, nats':>13} {'labels':>7} {'U moves':>8} {'decisions':>9} {'cached':>7}"
        )

    def add(self, row: Row) -> None:
        """Print one more row."""
        self.rows.append(row)
        self.say(row_line(row))
        self._names = self._names[1:]
        self._bar.set_postfix_str(self._names[0] if self._names else "", refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Remove the line with the time left; idempotent."""
        self._bar.close()

    def end(self, record: Record) -> None:
        """Print the verdict."""
        self.close()
        if not self.rows:
            self.say(
                f"this engine's scores repeated to the last bit when they were checked on {record.finished}, and it "
                "answers as it did then: not checked again"
            )
            return
        failed = [row.name for row in self.rows if row.compared.differing]
        seconds = time.monotonic() - self._start
        verdict = (
            f"{len(failed)} of {len(self.rows)} rows differ"
            if failed
            else f"all {len(self.rows)} rows are the same to the last bit"
        )
        self.say(f"{verdict}; {seconds:.0f} s")
        if record.not_reached:
            self.say(f"not reached in the time given: {', '.join(record.not_reached)}")
        self.say(" ".join(str(record.engine[name]) for name in _SHOWN if record.engine.get(name)))
        if failed:
            self.say("What a difference means and what to do about it: docs/determinism.md")

    def say(self, line: str) -> None:
        """Print a line above the one with the time left."""
        if not self._quiet:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()


def row_line(row: Row) -> str:
    """One line of the table: see Report for its columns."""
    found = row.compared
    largest = "other tokens" if math.isinf(found.largest) else f"{found.largest:.4g}"
    cached = "" if row.cached is None else f"{row.cached:.0%}"
    return (
        f"{row.name:<44} {f'{found.differing}/{found.prompts}':>9} {largest:>13} {found.labels_changed:>7} "
        f"{found.utility_moved:>8.3g} {found.acceptance_changed:>9.2f} {cached:>7}"
    )


async def check(engine: Engine, args: argparse.Namespace, report: Report, earlier: list[Listed] | None) -> Record:
    """Run the matrix on one engine and keep the result. earlier: see Matrix.rows; None: those of the last check."""
    folder = args.runs_dir / "determinism"
    last = read_record(folder, engine.identity)
    # With --seconds a new check would be cut short again.
    if args.unless_passed and last is not None and not needs_check(last, engine.identity, whole=args.seconds is None):
        return last
    amount, size = QUICK if args.quick else WHOLE
    if args.prompts is not None:
        amount = replace(amount, prompts=args.prompts)
    if args.demonstrations is not None:
        amount = replace(amount, demonstrations=args.demonstrations)
    begun = time.monotonic()
    block = await engine.engine.kv_block_size()

    async def material_of(amount: Amount) -> Material:
        return await material_for(engine.engine, amount, context=engine.identity.max_model_len, block=block)

    if args.seconds is not None:
        few = await material_of(replace(amount, prompts=3))
        probe = Matrix(engine.asker, engine.engine, few, size, seed=time.time_ns())
        amount, size = fitting(amount, size, await probe.seconds_a_prompt(), args.seconds)
    material = await material_of(amount)
    if earlier is None and last is not None and last.material == material.digest:
        earlier = last.references
    matrix = Matrix(engine.asker, engine.engine, material, size, seed=time.time_ns())
    names, found = matrix.names(earlier), list[Row]()
    report.begin(names, [len(prompt) for prompt in material.prompts])
    async with aclosing(matrix.rows(earlier)) as rows:
        async for row in rows:
            found.append(row)
            report.add(row)
            if args.seconds is not None and time.monotonic() - begun > args.seconds:
                break
    not_reached = names[len(found) :]
    if last is not None and last.failed_in(not_reached, engine.identity):
        report.say(f"the check of {last.finished} failed in rows that this one did not reach, and its result is kept")
        return last
    return write_record(
        folder,
        engine.identity,
        material,
        found,
        matrix.references(),
        finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        quick=args.quick,
        not_reached=not_reached,
    )


def fitting(amount: Amount, size: Size, prompt_seconds: float, seconds: float) -> tuple[Amount, Size]:
    """As much of a quick check as fits into `seconds`; at least the last of LESS, even if that does not fit.

    prompt_seconds: for one prompt asked by itself, nothing cached.
    """
    for prompts, repeats, long_tokens, demonstrations in LESS:
        if prompts_worth(amount, size) * prompt_seconds <= seconds:
            break
        amount = replace(
            amount,
            prompts=min(amount.prompts, prompts),
            long_tokens=min(amount.long_tokens, long_tokens),
            demonstrations=demonstrations,
        )
        size = replace(size, repeats=min(size.repeats, repeats))
    return amount, size


def prompts_worth(amount: Amount, size: Size) -> float:
    """How many prompts, each by itself, nothing cached, take as long as a quick check. Fitted to 2, 4, 12 prompts."""
    return 24 * amount.prompts + amount.long_tokens / 100 + 0.3 * size.repeats + 35


async def run(args: argparse.Namespace, report: Report) -> Record:
    """Check what the arguments name."""
    if args.direct is not None:
        options = DirectOptions(
            max_model_len=args.max_model_len,
            enforce_eager=True,
            block_size=args.block_size,
            cpu=args.cpu,
            deterministic=args.deterministic,
        )
        async with direct_engine(args.direct, options) as engine:
            return await check(engine, args, report, None)
    settings = Settings.load({"vllm_base_url": args.url})
    if args.start is None:
        async with server_engine(settings.vllm_base_url[0], args.model, settings) as engine:
            return await check(engine, args, report, None)
    record = await _check_started(args, settings, report, None)
    return record if args.quick else await _check_started(args, settings, report, record.references)


async def _check_started(
    args: argparse.Namespace, settings: Settings, report: Report, earlier: list[Listed] | None
) -> Record:
    """Start a server, check it, and stop it."""
    log = args.runs_dir / "determinism" / "vllm.log"
    with VLLMServer(log=log, size=args.start, options=tuple(args.option)) as server:
        async with server_engine(server.url, args.model, settings) as engine:
            return await check(engine, args, report, earlier)


def build_parser() -> FlagParser:
    """Every flag."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--url", help="base URL of a running server (default: VLLM_BASE_URL)")
    which.add_argument(
        "--start", metavar="SIZE", help="start a server: local, 8B, ... as launch_vllm_server.sh takes it"
    )
    which.add_argument("--direct", metavar="PATH_OR_ID", help="check vLLM in this process with this model")
    parser.add_argument(
        "--option", action="append", default=[], help="for --start: an argument for the server (repeat)"
    )
    parser.add_argument("--model", help="name under which it is served (default: the first one it serves)")
    parser.add_argument("--max_model_len", type=int, default=MAX_MODEL_LEN, help="for --direct (default: 4096)")
    parser.add_argument("--cpu", action="store_true", help="for --direct: with the local server's settings for a CPU")
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="for --direct: batch-invariant, or vLLM's own kernels",
    )
    parser.add_argument("--block_size", type=int, help="for --direct: tokens of a cache block")
    parser.add_argument("--quick", action="store_true", help="12 prompts, no generated text, no restart: in a minute")
    parser.add_argument("--prompts", type=int, metavar="N", help="compare N prompts, 1 to 256 (default: 256, quick 12)")
    parser.add_argument(
        "--demonstrations",
        type=int,
        metavar="N",
        help="in each prompt, 2 to 250 (default: 24, quick 10): many make prompts longer than a window of attention",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="for --quick: ask a slow engine less, so as to end in about S seconds; rows left out are named",
    )
    parser.add_argument(
        "--unless_passed", action="store_true", help="do nothing where this engine passed before and answers as then"
    )
    parser.add_argument("--runs_dir", type=Path, default=REPO_ROOT / "runs", help="where the result is kept for ICM.py")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write rows and engine there ('-': only print them)"
    )
    return parser


def _of_direct(args: argparse.Namespace) -> str:
    """The first given flag that only concerns an engine in this process; "" where there is none."""
    given = {
        "--cpu": args.cpu,
        "--block_size": args.block_size is not None,
        "--max_model_len": args.max_model_len != MAX_MODEL_LEN,
        "--no-deterministic": not args.deterministic,
    }
    return next((flag for flag, there in given.items() if there), "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    args = build_parser().parse_args(arguments)
    if args.prompts is not None and not 1 <= args.prompts <= 256:
        print("error: --prompts must be from 1 to 256", file=sys.stderr)
        return 2
    if args.demonstrations is not None and not 2 <= args.demonstrations <= 250:
        print("error: --demonstrations must be from 2 to 250", file=sys.stderr)
        return 2
    if args.demonstrations is not None and args.seconds is not None:
        print("error: --seconds chooses how many demonstrations there are: leave out --demonstrations", file=sys.stderr)
        return 2
    if args.seconds is not None and not args.quick:
        print("error: --seconds is for --quick", file=sys.stderr)
        return 2
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        print("error: --seconds must be above 0", file=sys.stderr)
        return 2
    if args.option and args.start is None:
        print("error: --option is for --start", file=sys.stderr)
        return 2
    if (flag := _of_direct(args)) and args.direct is None:
        instead = f"; for --start give --option={flag}" if args.start and flag == "--no-deterministic" else ""
        print(f"error: {flag} is for --direct{instead}", file=sys.stderr)
        return 2
    if args.model is not None and args.direct is not None:
        print("error: --model is for a server; --direct names its model itself", file=sys.stderr)
        return 2
    only_json = args.json is not None and str(args.json) == "-"
    if args.json is not None and not only_json and (args.json.is_dir() or not args.json.parent.is_dir()):
        print(f"error: --json {args.json}: name a file in a folder that is there", file=sys.stderr)
        return 2
    report = Report(quiet=only_json)
    try:
        record = asyncio.run(run(args, report))
        report.end(record)
    except (ConfigurationError, BadInput, ServerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        report.close()
        print("\nstopped; nothing was recorded", file=sys.stderr)
        return 130
    finally:
        report.close()
    if args.json is not None:
        rows = [row_record(row) for row in report.rows]
        engine = {name: value for name, value in record.engine.items() if name != "root"}  # a path of this machine
        document = {"engine": engine, "finished": record.finished, "passed": record.passed, "rows": rows}
        text = orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
        if only_json:
            print(text)
        else:
            args.json.write_text(text + "\n", encoding="utf-8")
    return 0 if record.passed else 1


if __name__ == "__main__":
    sys.exit(main())
