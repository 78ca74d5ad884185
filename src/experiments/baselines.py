"""Hold ICM against zero-shot, many-shot and bootstrapping, over several seeds, on held-out claims.

    icm baselines --testbed builtin --model gemma-3-270m --batch_size 64 --alpha 50 --calibrate mean --seeds 1 2 3 4 5
    icm baselines --testbed truthfulQA --test_data data/truthfulqa_test.json --chat_model NAME --chat_url URL ...

Each row labels the pool that a seed draws, then the held-out claims are asked with those labels as demonstrations.
Results go to runs/NAME/baselines.json, a finished row is never made again, and the same command goes on where it
stopped; with more --seeds or --rows it adds them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

import orjson

from core.llm_api.labels import LabelSpace
from core.llm_api.llm import ModelAPI
from core.settings import REPO_ROOT
from src.experiments.arguments import HelpFormatter, Parser, add_search_arguments, at_least, lookahead_of
from src.experiments.baseline_table import TableFolder, row_documents, table_text
from src.experiments.contradictions import refuse
from src.experiments.resumable import run_resumable
from src.experiments.single_run import (
    as_begun,
    check_bad_rows,
    check_same_engine,
    check_same_run,
    finish,
    identity_record,
    load_claims,
    model_api_of,
    pool_of,
    reading_of,
    run_name,
    settings_of,
    tell_opening,
)
from src.experiments.summary import say_shown_again
from src.icm.problem import Stream, generator
from src.icm.testbeds import BadInput, Claim, sample_pool
from src.pipeline.baselines import Prediction
from src.pipeline.chat import ask_chat
from src.pipeline.comparison import TITLES, BootstrapStart, Comparison, Cost, GivenLabels, RowResult
from src.pipeline.datafiles import claims_of, read_rows
from src.pipeline.file_kinds import digest_of
from src.pipeline.labelling import Labelling, Pool
from src.results.run_folder import RunFolder, environment
from src.results.run_reader import read_run

GIVEN: Final[dict[str, GivenLabels]] = {
    "many-shot-gold": "gold",
    "many-shot-random": "random",
    "many-shot-flipped": "flipped",
}
HELD_OUT_SEED: Final = 0
"""Held-out claims are drawn by this, whatever seed draws the pool: every seed is tested on the same ones."""


def build_parser() -> Parser:
    """The search's flags, and those of the comparison."""
    parser = Parser(
        prog="icm baselines",
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=HelpFormatter,
    )
    add_search_arguments(parser)
    compare = parser.add_argument_group("comparison")
    compare.add_argument(
        "--seeds", type=at_least(0), nargs="+", default=[1, 2, 3, 4, 5], help="one pool and search each"
    )
    compare.add_argument(
        "--test_data", type=Path, metavar="FILE", help="held-out claims (default: the data's claims outside the pool)"
    )
    compare.add_argument(
        "--test_size",
        type=at_least(2),
        metavar="N",
        help="this many held-out claims (whole groups), the same for every seed, in no pool (default: all there are)",
    )
    compare.add_argument(
        "--rows",
        nargs="+",
        choices=list(TITLES),
        metavar="ROW",
        help=f"of {', '.join(TITLES)} (default: all; zero-shot-chat only with --chat_model)",
    )
    compare.add_argument("--rounds", type=at_least(1), default=4, help="rounds of bootstrapping")
    compare.add_argument(
        "--bootstrap_from",
        choices=get_args(BootstrapStart),
        default="random",
        help="labels that the first round of bootstrapping shows",
    )
    compare.add_argument("--chat_model", metavar="NAME", help="ask this chat model too, zero-shot, in its template")
    compare.add_argument("--chat_url", metavar="URL", help="vLLM server of --chat_model (default: VLLM_BASE_URL)")
    compare.add_argument("--run", metavar="NAME", help="folder under --runs_dir (default: made from the settings)")
    compare.add_argument("--runs_dir", type=Path, default=REPO_ROOT / "runs", help="where runs and scores are kept")
    compare.add_argument("--lookahead", type=lookahead_of, default=None, metavar="{auto,M}", help="as in icm label")
    compare.add_argument("--quiet", action="store_true", help="no progress bar, no prompt shown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the model failed (resumable), 2 bad input or no usable server, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    args = parser.parse_args(given)
    resume = shlex.join(["icm", "baselines", *given])
    return run_resumable(_run(args, parser.contradiction), resume)


async def _run(args: argparse.Namespace, contradiction: str | None) -> int:
    rows = _rows(args)
    test, shared = _held_out(args)
    settings = _settings(args, test)
    same = as_begun(args, settings, lambda known: TableFolder(args.runs_dir / _name(args, known)).read_table())
    if same is not args:
        return await _run(same, contradiction)
    folder = TableFolder(args.runs_dir / _name(args, settings))
    lock = RunFolder(folder.path)
    known = folder.read_table()
    if known is not None:
        check_same_run(lock, known["settings"], settings)
        rows = [row for row in TITLES if row in rows or row in known["rows_asked"]]
        seeds = sorted({*args.seeds, *known["seeds_asked"]})
        if all(folder.read_row(row, seed) is not None for row in rows for seed in seeds):
            say_shown_again(known)
            print(table_text(known))
            print(f"  table  {folder.table_path}")
            return 0
    else:
        refuse(contradiction)
        seeds = sorted(set(args.seeds))
    with lock:
        async with model_api_of(args) as api:
            engine = identity_record(api.identity)
            if known is not None:
                check_same_engine(lock, known["engine"], api.identity)
                engine = known["engine"]
            document: dict[str, Any] = {
                "settings": settings,
                "engine": engine,
                "chat": None if known is None else known["chat"],
                "environment": environment() if known is None else known["environment"],
                "started": _now() if known is None else known["started"],
                "seeds_asked": seeds,
                "rows_asked": rows,
            }
            for seed in seeds:
                _save(folder, document, rows, seeds)
                if all(folder.read_row(row, seed) is not None for row in rows):
                    continue
                await _one_seed(args, api, folder, document, rows, seed, test, shared)
        finished = _save(folder, document | {"finished": _now()}, rows, seeds)
    print(table_text(finished))
    print(f"  table  {folder.table_path}")
    return 0


async def _one_seed(
    args: argparse.Namespace,
    api: ModelAPI,
    folder: TableFolder,
    document: dict[str, Any],
    rows: Sequence[str],
    seed: int,
    test: Sequence[Claim] | None,
    held_out: frozenset[int],
) -> None:
    """Every missing row of one seed."""
    flags = argparse.Namespace(**{**vars(args), "seed": seed, "label_rest": test is None})
    pool = pool_of(flags, held_out)
    if test is not None:
        pool = replace(pool, rest=tuple(test))
    _check_gold(pool)
    labelling = await Labelling.open(pool, api)
    if seed == document["seeds_asked"][0]:  # the other pools are drawn from the same claims
        await tell_opening(args, labelling, document["settings"]["testbed"], RunFolder(folder.path))
    comparison = Comparison(labelling)
    for row in rows:
        if folder.read_row(row, seed) is not None:
            continue
        if row == "icm":
            result = await _icm(flags, api, folder, comparison, pool)
        elif row == "zero-shot-chat":
            result = await _chat(flags, comparison, document, pool.testbed.space)
        elif row in GIVEN:
            result = await comparison.many_shot(GIVEN[row])
        elif row in ("bootstrap", "bootstrap-consistent"):
            result = await comparison.bootstrap(
                rounds=args.rounds, start=args.bootstrap_from, consistent=row == "bootstrap-consistent"
            )
        else:
            result = await comparison.zero_shot(calibrated=row == "zero-shot-calibrated")
        folder.write_row(result, seed)
        if not args.quiet:
            right = sum(answer.label == answer.gold for answer in result.test)
            print(f"seed {seed}: {TITLES[row]} {right} of {len(result.test)} held-out claims", file=sys.stderr)


async def _icm(
    args: argparse.Namespace, api: ModelAPI, folder: TableFolder, comparison: Comparison, pool: Pool
) -> RowResult:
    """The search of this seed in its own run folder, then its labels as those of any other row."""
    run = RunFolder(folder.seed_path(args.seed))
    flags = argparse.Namespace(**{**vars(args), "label_rest": False})
    alone = replace(pool, rest=(), left_out=len(pool.rest))
    document = await finish(flags, api.share(), alone, run, settings_of(flags, alone))
    found = {claim.row: claim for claim in read_run(run.path).claims}
    labels, log_odds = {}, {}
    for position, claim in enumerate(pool.claims):
        labelled = found[claim.row]
        assert labelled.label is not None
        assert labelled.log_odds is not None
        labels[position], log_odds[position] = labelled.label, labelled.log_odds
    cost = document["cost"]
    return await comparison.given(
        "icm",
        labels,
        log_odds,
        Cost(
            cost["seconds"],
            cost["asked"],
            cost["tokens_sent"],
            round(cost["tokens_cached"]),
            document["model_api"]["requests"],
        ),
    )


async def _chat(
    args: argparse.Namespace, comparison: Comparison, document: dict[str, Any], space: LabelSpace
) -> RowResult:
    flags = argparse.Namespace(**{**vars(args), "model": args.chat_model, "use_vllm": True, "direct": False})
    async with model_api_of(flags, {} if args.chat_url is None else {"vllm_base_url": args.chat_url}) as chat:

        async def ask(texts: Sequence[str]) -> Prediction:
            answers = await ask_chat(chat, texts, space)
            document["chat"] = {"engine": identity_record(chat.identity), "template": answers.template}
            if not answers.template:
                print(f"warning: {args.chat_model} has no chat template: it is asked in plain text", file=sys.stderr)
            return answers.prediction

        return await comparison.asked_elsewhere("zero-shot-chat", ask, chat.stats)


def _save(
    folder: TableFolder, document: Mapping[str, Any], rows: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Write the table of what is there so far."""
    results = folder.read_results(rows, seeds)
    whole = [seed for seed in seeds if all(seed in results.get(row, {}) for row in rows)]
    table = {
        **document,
        "seeds": whole,
        "complete": whole == list(seeds),
        "rows": row_documents({row: {s: r for s, r in of_row.items() if s in whole} for row, of_row in results.items()})
        if whole
        else [],
    }
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_table(table)
    return table


def _rows(args: argparse.Namespace) -> list[str]:
    chosen = args.rows or [row for row in TITLES if row != "zero-shot-chat" or args.chat_model]
    if "zero-shot-chat" in chosen and not args.chat_model:
        raise BadInput("the row zero-shot-chat needs a --chat_model")
    return [row for row in TITLES if row in chosen]


def _held_out(args: argparse.Namespace) -> tuple[list[Claim] | None, frozenset[int]]:
    """(held-out claims that all seeds share, rows of the data file that are therefore in no pool).

    None where they are whatever is outside each seed's pool.
    """
    testbed, claims, _ = load_claims(args)
    rng = generator(HELD_OUT_SEED, Stream.POOL, 1)
    if args.test_data is not None:
        reading, bad = testbed.reading if testbed.digest else reading_of(args), list[str]()
        rows = read_rows(args.test_data, reading.columns.values())
        test = claims_of(testbed, rows, args.test_data, reading, bad.append)
        check_bad_rows(args, args.test_data, bad)
        if args.test_size is not None:
            test = sample_pool(test, args.test_size, rng)
        seen = len({claim.text for claim in claims} & {claim.text for claim in test})
        if seen:
            print(
                f"warning: {seen} claims of {args.test_data} are also among those that pools are drawn from: "
                "their labels may stand in the prompt that asks for them",
                file=sys.stderr,
            )
        # Another file's groups are not those of the pool, whatever they are called.
        return [replace(claim, group=f"test {claim.group}") for claim in test], frozenset()
    if args.test_size is not None:
        test = sample_pool(claims, args.test_size, rng)
        return test, frozenset(claim.row for claim in test)
    return None, frozenset()


def _check_gold(pool: Pool) -> None:
    """A comparison needs to know what is right."""
    unknown = sum(claim.gold is None for claim in pool.claims)
    if unknown:
        raise BadInput(f"{unknown} claims of the pool have no gold label, and a comparison with gold needs them all")
    if not any(claim.gold is not None for claim in pool.rest):
        raise BadInput("no held-out claim has a gold label; give a --test_data file, or a smaller --batch_size")


def _settings(args: argparse.Namespace, test: Sequence[Claim] | None) -> dict[str, Any]:
    """Everything that decides the numbers but the seeds and the rows."""
    flags = argparse.Namespace(**{**vars(args), "seed": 0, "label_rest": True})
    settings = settings_of(flags, pool_of(flags))
    for name in ("seed", "label_rest"):
        del settings[name]
    return settings | {
        "rounds": args.rounds,
        "bootstrap_from": args.bootstrap_from,
        "test_data": None if args.test_data is None else args.test_data.name,
        "test_sha256": None if args.test_data is None else digest_of(args.test_data),
        "test_size": None if test is None else len(test),
        "chat_model": args.chat_model,
    }


def _name(args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    if args.run is not None:
        return run_name(args, settings)
    digest = hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    parts = ("baselines", settings["testbed"], args.model.rsplit("/", 1)[-1], f"N{args.batch_size}", digest)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


if __name__ == "__main__":
    sys.exit(main())
