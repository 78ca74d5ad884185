"""Label a data set by Internal Coherence Maximization (Wen et al. 2025, arXiv 2506.10139).

    python ICM.py --testbed truthfulQA --alpha 50 --model meta-llama/Llama-3.1-8B --batch_size 32 --num_seed 4 --K 50

The model is asked at VLLM_BASE_URL (environment or SECRETS; start one with scripts/launch_vllm_server.sh), in this
process with --direct, or at an OpenAI-compatible LLAMA_API_BASE with --no-use_vllm. Results go to runs/NAME/; the same
command resumes a run that was stopped, and shows a finished one.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import orjson

if __package__ in (None, ""):  # run as a script, from any folder, without an installed package
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.llm_api.errors import APIError, ConfigurationError, ServerUnreachable
from core.llm_api.llm import open_model_api
from core.llm_api.types import EngineIdentity
from core.settings import Settings
from src.icm.annealing import LayoutName, Scheduler, SearchSettings, Stop
from src.icm.objective import Calibration, Objective
from src.icm.report import agreement, check_table, collapse_warning
from src.icm.testbeds import TESTBEDS, BadInput, ConsistencyMode
from src.pipeline.datafiles import load_data_file, load_testbed
from src.pipeline.labelling import Labelling, Pool, prepare, result_record
from src.pipeline.plots import plot_curves
from src.pipeline.progress import SearchProgress
from src.pipeline.run_folder import FORMAT, RunFolder, environment

COSTS = (
    *("asked", "from_cache", "asked_ahead", "ahead_used"),
    *("tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds"),
)
REPOSITORY = Path(__file__).resolve().parents[2]


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the published code under its own name and default, and what this project adds."""
    defaults = SearchSettings()
    parser = _Parser(
        prog="ICM.py",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=_HelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--testbed", default="gsm8k", choices=list(TESTBEDS), help="builtin ships with the code")
    data.add_argument("--data", type=Path, metavar="FILE", help="your own .json, .jsonl or .csv instead of a testbed")
    data.add_argument("--data_dir", type=Path, default=REPOSITORY / "data", help="where the testbeds' files lie")
    data.add_argument("--batch_size", type=_at_least(2), default=256, help="claims in the pool (whole groups)")
    data.add_argument(
        "--consistency",
        choices=get_args(ConsistencyMode),
        default="gold-free",
        help="constraints between claims of a group; upstream reproduces keys that leak gold labels",
    )
    data.add_argument(
        "--label_rest",
        action="store_true",
        help="then label the file's other claims with the pool's labels as demonstrations",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="meta-llama/Llama-3.1-70B", help="name under which the model is served")
    model.add_argument(
        "--use_vllm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a vLLM server without rate limits, or an external API; default: whichever is configured",
    )
    model.add_argument("--direct", action="store_true", help="vLLM in this process, no server; --model is a path or id")
    model.add_argument(
        "--missing_label",
        choices=("error", "floor"),
        default=None,
        help="an answer without a label token: stop, or floor it and count it (default: error)",
    )
    model.add_argument(
        "--prompts_per_request",
        type=_at_least(1),
        default=None,
        help="split a pool into requests of this many prompts (default: one request)",
    )
    model.add_argument("--read_timeout", type=_finite, default=None, help="seconds for one answer (default: 900)")

    search = parser.add_argument_group("search")
    search.add_argument("--alpha", type=_finite, default=30.0, help="weight of mutual predictability in U")
    search.add_argument("--seed", type=_at_least(0), default=defaults.seed, help="of the pool, the labels, the search")
    search.add_argument("--num_seed", type=_at_least(0), default=defaults.num_seed, help="claims labelled at random")
    search.add_argument("--K", type=_at_least(0), default=defaults.K, help="iterations at most")
    search.add_argument(
        "--consistency_fix_K",
        type=_at_least(0),
        default=defaults.consistency_fix_K,
        help="repairs tried for an inconsistent proposal",
    )
    search.add_argument(
        "--decay", type=_finite, default=defaults.decay, help="the paper's beta with --scheduler log; the base with exp"
    )
    search.add_argument("--initial_T", type=_finite, default=defaults.initial_T, help="first temperature, units of U")
    search.add_argument("--final_T", type=_finite, default=defaults.final_T, help="lowest temperature, units of U")
    search.add_argument(
        "--scheduler",
        choices=get_args(Scheduler),
        default=defaults.scheduler,
        help="log: T0/(1+decay*ln(n)); log-upstream: T0/(1+2*ln(1+accepted)); exp: T0*decay^accepted",
    )
    search.add_argument(
        "--stop",
        choices=get_args(Stop),
        default=defaults.stop,
        help="labelled: when no claim is left to try and --patience proposals changed nothing; K: after K",
    )
    search.add_argument("--patience", type=_at_least(1), default=defaults.patience, help="see --stop")
    search.add_argument(
        "--calibrate",
        choices=get_args(Calibration),
        default="none",
        help="mean: subtract the pool's mean log-odds from every score (changes the objective)",
    )
    search.add_argument(
        "--layout",
        choices=get_args(LayoutName),
        default=defaults.layout,
        help="order of demonstrations: prefix tree, or the published code's fixed order",
    )
    search.add_argument(
        "--anchors",
        type=_at_least(0),
        default=defaults.anchors,
        help="labels that stand last in every prompt of a tree, the same for all",
    )
    search.add_argument(
        "--max_tail",
        type=_at_least(1),
        default=defaults.max_tail,
        help="labels appended to the tree before it is rebuilt at the latest (default: as a cost model says)",
    )

    search.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        default=defaults.mirror,
        help="once settled, flip every label if U says so: inverted labels are a second optimum",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--run", metavar="NAME", help="folder under --runs_dir (default: made from the settings)")
    run.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs", help="where runs and cached scores are kept")
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
        type=_lookahead_of,
        default=None,
        metavar="{auto,M}",
        help="ask the questions of the next M proposals with those that must be asked; the labels do not depend on it. "
        "0: none (default: auto, from the acceptance rate and the seconds of a batch; none at an external API)",
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


class _Parser(argparse.ArgumentParser):
    """Complains in one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The epilog as it is written, and behind each flag its default, unless there is none or the text tells it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS, False) or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text}")
    return value


def _at_least(least: int) -> Any:
    def whole_number(text: str) -> int:
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^63, not {value}")
        return value

    return whole_number


def _lookahead_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"must be auto, or a whole number up to 1024, not {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the model failed (resumable), 2 bad input or no usable server, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    args = build_parser().parse_args(arguments)
    program = ["icm", "label"] if sys.argv[0] == "icm label" else ["python", sys.argv[0]]
    resume = shlex.join([*program, *(sys.argv[1:] if arguments is None else arguments)])
    try:
        return asyncio.run(_run(args))
    except (BadInput, ConfigurationError, ServerUnreachable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (APIError, OSError, MemoryError) as error:
        said = "out of memory." if isinstance(error, MemoryError) else error
        print(f"error: {said}\nNothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print(f"\nstopped. Nothing is lost; go on with:\n  {resume}", file=sys.stderr)
        return 130


async def _run(args: argparse.Namespace) -> int:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _task().cancel)
    pool = pool_of(args)
    settings = _settings(args, pool)
    folder = RunFolder(args.runs_dir / _run_name(args, settings))
    known = folder.read_run()
    if known is not None:
        _readable(folder, known)
        _same_run(folder, known["settings"], settings)
        if "result" in known and not args.check:
            _print_summary(folder, known)
            return 0
    if args.is_complete:
        return 1
    if args.consistency == "upstream" and pool.testbed.upstream_leaks:
        print(
            "warning: --consistency upstream makes its keys from gold labels: accuracy is not unsupervised",
            file=sys.stderr,
        )
    api = open_model_api(
        Settings.load(
            {
                "missing_label": args.missing_label,
                "prompts_per_request": args.prompts_per_request,
                "read_timeout": args.read_timeout,
                "cache_path": args.runs_dir / "responses.sqlite",
            }
        ),
        model=args.model,
        use_vllm=args.use_vllm,
        direct=args.direct,
    )
    with folder:
        async with api:
            labelling = await Labelling.open(pool, api)
            if args.check:
                print(check_table(await labelling.check(), args.calibrate))
                return 0
            document = await _label(args, labelling, folder, settings, folder.read_run())
    _print_summary(folder, document)
    return 0


async def _label(
    args: argparse.Namespace,
    labelling: Labelling,
    folder: RunFolder,
    settings: Mapping[str, Any],
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """Search, label the rest if asked, write the results; returns the finished run.json."""
    if known is None:
        known = {
            "settings": settings,
            "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "engine": _identity_record(labelling.identity),
            "kv_capacity": await labelling.api.kv_cache_tokens(),
            "environment": environment(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        folder.write_run(known)
    else:
        _same_engine(folder, known["engine"], labelling.identity)
    labelling = labelling.planned_for(known["kv_capacity"])
    with SearchProgress(labelling.pool, args.quiet) as progress:
        state = await labelling.search(folder, progress.update, _lookahead(args, labelling.identity))
    zero_shot = await labelling.zero_shot()
    predictions = {}
    if None in state.labels:
        predictions["predicted"] = await labelling.predict_unlabelled(state)
    if labelling.pool.rest:
        predictions["many-shot"] = await labelling.label_rest(state)
    folder.write_labels(labelling.label_rows(state, predictions))
    records = folder.read_log()
    title = f"{settings['testbed']}, {args.model}, alpha {args.alpha:g}, calibration {args.calibrate}"
    plot_curves(records, labelling.pool.gold, folder.curves_path, title)
    cost = {key: round(sum(record.get(key, 0) for record in records), 3) for key in COSTS}
    warning = collapse_warning(state.labels)
    document = {
        **known,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "result": result_record(labelling, state, zero_shot, predictions) | {"warning": warning},
        "cost": cost,
        "left_out": labelling.pool.left_out,
        "model_api": labelling.api.stats.as_dict(),
    }
    folder.write_run(document)
    return document


def _lookahead(args: argparse.Namespace, identity: EngineIdentity) -> int | None:
    """--lookahead, None where it is auto. Every question of an external API is paid for: auto asks none early there."""
    if args.lookahead is None and identity.kind == "openai-compatible":
        return 0
    return None if args.lookahead is None else int(args.lookahead)


def pool_of(args: argparse.Namespace) -> Pool:
    """The pool and its constraints, from flags and files alone."""
    if args.initial_T <= 0 or args.final_T <= 0 or args.decay <= 0:
        raise BadInput("--initial_T, --final_T and --decay must be above 0")
    if args.data is not None:
        testbed, claims, path = load_data_file(args.data)
    else:
        testbed, claims, path = load_testbed(args.testbed, args.data_dir)
    search = SearchSettings(**{field.name: getattr(args, field.name) for field in fields(SearchSettings)})
    pool = prepare(
        testbed,
        claims,
        path,
        batch_size=args.batch_size,
        consistency=args.consistency,
        objective=Objective(args.alpha, args.calibrate),
        settings=search,
    )
    return pool if args.label_rest else replace(pool, rest=(), left_out=len(pool.rest))


def _settings(args: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Everything that decides the labels, for run.json and the run's name. Holds no key and no path."""
    decisive = {field.name: getattr(args, field.name) for field in fields(SearchSettings)}
    return {
        "testbed": pool.testbed.name if args.data is None else args.data.name,
        "data_sha256": pool.data_digest,
        "model": args.model,
        "batch_size": args.batch_size,
        "consistency": args.consistency,
        "alpha": args.alpha,
        "calibrate": args.calibrate,
        "label_rest": args.label_rest,
        **decisive,
    }


def _run_name(args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    if args.run is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", args.run):
            raise BadInput(f"--run {args.run!r}: a name of letters, digits, '_', '.' and '-', not a path")
        return str(args.run)
    digest = hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    parts = (settings["testbed"], args.model.rsplit("/", 1)[-1], f"N{args.batch_size}", f"seed{args.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).lstrip(".-")


def _readable(folder: RunFolder, known: Mapping[str, Any]) -> None:
    """A run that an earlier version began rebuilt its tree by another rule; only its result can still be shown."""
    if known.get("format", 0) < FORMAT and "result" not in known:
        raise BadInput(
            f"{folder.path}: was begun by an earlier version, whose journal this one cannot go on with. "
            "Move it away, or choose another --run"
        )


def _same_run(folder: RunFolder, known: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    changed = [name for name in settings if known.get(name) != settings[name]]
    if changed:
        told = ", ".join(f"--{name} {known.get(name)}, now {settings[name]}" for name in changed)
        raise BadInput(f"{folder.path}: was started with {told}. Use the same flags, or another --run")


def _same_engine(folder: RunFolder, known: Mapping[str, Any], identity: EngineIdentity) -> None:
    """Scores of two models must not mix in one run. Raises BadInput where model or version differ."""
    now = _identity_record(identity)
    changed = [name for name in ("model", "root", "revision", "version") if known.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} {known.get(name)!r}, now {now[name]!r}" for name in changed)
        raise BadInput(f"{folder.path}: was started on another engine ({told}). Start that one, or use another --run")
    if known.get("fingerprint") != now["fingerprint"]:
        logging.warning(
            "the engine answers a fixed prompt differently than when this run began (other hardware, "
            "precision or kernels?): its scores differ slightly from the run's first part"
        )


def _identity_record(identity: EngineIdentity) -> dict[str, Any]:
    return {field.name: getattr(identity, field.name) for field in fields(identity)}


def _task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _print_summary(folder: RunFolder, document: Mapping[str, Any]) -> None:
    result, settings, cost = document["result"], document["settings"], document["cost"]
    calibration = settings["calibrate"]
    print(
        f"{settings['testbed']}: {result['labelled']} claims labelled by {document['engine']['model']} in "
        f"{result['iterations']} iterations, {cost['seconds']:.0f} s (calibration: {calibration})"
    )
    print(f"  agreement with gold  {agreement(*result['icm'])}")
    print(f"  zero-shot            {agreement(*result['zero_shot'])}")
    print(f"  zero-shot calibrated {agreement(*result['zero_shot_calibrated'])}")
    for by, counts in result["predicted"].items():
        outside = "not taken in by the search" if by == "predicted" else "outside the pool"
        print(f"  {by:<20} {agreement(*counts)}  (claims {outside}, labelled from the pool's labels)")
    print(
        f"  U {result['U']:.2f}: {settings['alpha']:g} x {result['predictability']:.3f} nat - "
        f"{result['inconsistent']} inconsistent pairs; {result['true_labels']} of {result['labelled']} True"
    )
    computed = cost["tokens_computed"]
    if computed:
        total = computed + cost["tokens_cached"]
        print(
            f"  prompt tokens {total:,.0f}, computed {computed:,.0f} (prefix cache hit rate {1 - computed / total:.3f})"
        )
    if cost.get("asked_ahead"):
        print(f"  questions asked ahead {cost['asked_ahead']:,.0f}, used {cost['ahead_used']:,.0f}")
    if cost["floored"]:
        print(f"  {cost['floored']} answers lacked a label token and were floored")
    if document["left_out"]:
        print(f"  {document['left_out']} claims of the file are outside the pool, without a label (see --label_rest)")
    print(f"  labels {folder.labels_path}\n  curves {folder.curves_path}\n  log    {folder.log_path}")
    if result["warning"]:
        print(f"warning: {result['warning']}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
