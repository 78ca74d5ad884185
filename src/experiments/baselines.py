"""Hold ICM against zero-shot, many-shot and bootstrapping, over several seeds, on held-out claims.

    icm baselines --testbed builtin --model gemma-3-270m --batch_size 64 --alpha 50 --calibrate mean --seeds 1 2 3 4 5
    icm baselines --testbed truthfulQA --test_data data/truthfulqa_test.json --chat_model NAME --chat_url URL ...

Each row labels the pool that a seed draws, then the held-out claims are asked with those labels as demonstrations.
Results go to runs/NAME/baselines.json. A finished row is never made again: the same command goes on where it stopped,
and with more --seeds or --rows it adds them.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

from core.llm_api.llm import ModelAPI
from core.llm_api.types import EngineIdentity
from src.experiments.arguments import (
    Parser,
    add_choice_of_search,
    add_search_arguments,
    at_least,
    command_parser,
    lookahead_of,
)
from src.experiments.baseline_table import TableFolder, row_documents, table_text
from src.experiments.beside import Beside
from src.experiments.contradictions import refuse
from src.experiments.loading import Loaded, check_bad_rows, load, pool_of
from src.experiments.request import OutputRequest, RunRequest
from src.experiments.resumable import run_resumable
from src.experiments.run_settings import as_begun, run_name, settings_of
from src.experiments.same_run import check_same_engine, check_same_run
from src.experiments.single_run import model_api_of, print_opening, read_or_label
from src.experiments.summary import say_shown_again
from src.icm.problem import BootstrapStart, Stream, generator
from src.icm.testbeds import BadInput, Claim, sample_pool
from src.pipeline.baselines import BASELINES, run_baseline
from src.pipeline.baselines.row_result import Cost
from src.pipeline.baselines.trial import ChatModel, Options, Searched, Trial
from src.pipeline.datafiles import claims_of, read_rows
from src.pipeline.file_kinds import digest_of
from src.pipeline.labelling import Labelling, Pool
from src.pipeline.prior_estimate import with_prior
from src.results.run_folder import RunFolder, environment, now
from src.results.run_reader import read_run

HELD_OUT_SEED: Final = 0
"""Held-out claims are drawn with this seed whatever the pool's is, so every pool is tested on the same ones."""


_OF_KNOWN: Final = "few-shot-known"
"""The row whose demonstrations are the known labels."""


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """What a comparison is asked for; fields have the names of their flags. run: the search of every seed."""

    run: RunRequest
    seeds: Sequence[int]
    test_data: Path | None
    test_size: int | None
    rows: Sequence[str] | None
    rounds: int
    bootstrap_from: BootstrapStart
    restarts: int
    chat_model: str | None
    chat_url: str | None

    @classmethod
    def of(cls, args: argparse.Namespace, contradiction: str | None = None) -> ComparisonRequest:
        own = {each.name: getattr(args, each.name) for each in fields(cls) if each.name != "run"}
        return cls(run=RunRequest.of(args, contradiction), **own)

    def searching(self, seed: int, *, label_rest: bool) -> RunRequest:
        """The search of one seed."""
        return replace(self.run, search=replace(self.run.search, seed=seed), label_rest=label_rest)


def build_parser() -> Parser:
    """The search's flags, and those of the comparison."""
    parser = command_parser("icm baselines", __doc__)
    add_search_arguments(parser)
    add_choice_of_search(parser)
    defaults, on_request = Options(), [row for row, baseline in BASELINES.items() if baseline.on_request]
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
        choices=list(BASELINES),
        metavar="ROW",
        help=f"of {', '.join(BASELINES)} (default: all but the costly {', '.join(on_request)}; "
        "zero-shot-chat only with --chat_model, few-shot-known only with known labels)",
    )
    compare.add_argument("--rounds", type=at_least(1), default=defaults.rounds, help="rounds of bootstrapping")
    compare.add_argument(
        "--bootstrap_from",
        choices=get_args(BootstrapStart),
        default=defaults.start,
        help="labels that the first round of bootstrapping shows",
    )
    compare.add_argument(
        "--restarts",
        type=at_least(1),
        default=defaults.restarts,
        metavar="R",
        help="random starts of the row bootstrap-best, which keeps the one that ends with the highest U",
    )
    compare.add_argument("--chat_model", metavar="NAME", help="ask this chat model too, zero-shot, in its template")
    compare.add_argument("--chat_url", metavar="URL", help="vLLM server of --chat_model (default: VLLM_BASE_URL)")
    compare.add_argument("--run", metavar="NAME", help="folder under --runs_dir (default: made from the settings)")
    compare.add_argument(
        "--runs_dir", type=Path, default=OutputRequest().runs_dir, help="where runs and scores are kept"
    )
    compare.add_argument("--lookahead", type=lookahead_of, default=None, metavar="{auto,M}", help="as in icm label")
    compare.add_argument("--quiet", action="store_true", help="no progress bar, no prompt shown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the model failed (resumable), 2 bad input or no usable server, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    request = ComparisonRequest.of(parser.parse_args(given), parser.contradiction)
    resume = shlex.join(["icm", "baselines", *given])
    return run_resumable(run_comparison(request), resume)


async def run_comparison(request: ComparisonRequest, beside: Beside | None = None) -> int:
    """Make every row that is missing, print the table. Returns the exit code.

    beside: where this is one of several runs, which print nothing.
    """
    run = request.run
    loaded = load(run.data)
    test, shared = _held_out(request, loaded)
    settings = _settings(request, test, loaded)
    rows = _rows(request, knows=not {"known", "gold_seeds"}.isdisjoint(settings))
    runs_dir = run.output.runs_dir

    def begun(known: Mapping[str, Any]) -> Mapping[str, Any] | None:
        path = runs_dir / run_name(run, known, "baselines") if beside is None else beside.folder
        return TableFolder(path).read_table()

    same = as_begun(run, settings, begun)
    if same is not run:
        return await run_comparison(replace(request, run=same), beside)
    folder = TableFolder(runs_dir / run_name(run, settings, "baselines") if beside is None else beside.folder)
    lock = RunFolder(folder.path)
    known = folder.read_table()
    if "known" in settings and (known is None or _OF_KNOWN not in known["rows_asked"]):
        rows = _where_known(request, rows, shared, loaded)
    if known is not None:
        defaults = {"restarts": Options().restarts}  # recorded only where it differs
        check_same_run(lock, defaults | known["settings"], defaults | settings)
        rows = [row for row in BASELINES if row in rows or row in known["rows_asked"]]
        seeds = sorted({*request.seeds, *known["seeds_asked"]})
        if all(folder.read_row(row, seed) is not None for row in rows for seed in seeds):
            if beside is None:
                say_shown_again(known)
                _tell(folder, known)
            return 0
    else:
        refuse(run.contradiction)
        search = run.search.search
        if "icm" not in rows and not run.search_by_default:
            asked = " ".join(rows)
            raise BadInput(f"--search {search} and --rows {asked} contradict each other: only the row icm searches")
        seeds = sorted(set(request.seeds))
    with lock:
        async with model_api_of(run) if beside is None else beside.opened(run) as api:
            engine = asdict(api.identity)
            if known is not None:
                check_same_engine(lock, known["engine"], api.identity)
                engine = known["engine"]
            document: dict[str, Any] = {
                "settings": settings,
                "engine": engine,
                "chat": None if known is None else known["chat"],
                "environment": environment() if known is None else known["environment"],
                "started": now() if known is None else known["started"],
                "seeds_asked": seeds,
                "rows_asked": rows,
            }
            if known is None:
                document["flags"] = run.recorded_flags()
            else:
                document |= {name: known[name] for name in ("flags", "prior_estimates") if name in known}
            if beside is not None:
                beside.progress.begin(len(seeds) * run.data.batch_size)
            for seed in seeds:
                _save(folder, document, rows, seeds)
                if any(folder.read_row(row, seed) is None for row in rows):
                    await _one_seed(request, api, folder, document, rows, seed, test, shared, loaded, beside)
                if beside is not None:
                    beside.progress.finish(f"seed-{seed}", run.data.batch_size, "")
        finished = _save(folder, document | {"finished": now()}, rows, seeds)
    if beside is None:
        _tell(folder, finished)
    return 0


def _tell(folder: TableFolder, document: Mapping[str, Any]) -> None:
    print(table_text(document))
    print(f"  table  {folder.table_path}")


async def _one_seed(
    request: ComparisonRequest,
    api: ModelAPI,
    folder: TableFolder,
    document: dict[str, Any],
    rows: Sequence[str],
    seed: int,
    test: Sequence[Claim] | None,
    held_out: frozenset[int],
    loaded: Loaded,
    beside: Beside | None,
) -> None:
    """Every missing row of one seed."""
    of_seed = request.searching(seed, label_rest=test is None)
    pool = pool_of(of_seed, held_out, loaded)
    if test is not None:
        pool = replace(pool, rest=tuple(test))
    _check_gold(pool)
    labelling = await Labelling.open(pool, api)
    if seed == document["seeds_asked"][0]:  # the other pools are drawn from the same claims
        await print_opening(request.run, labelling, document["settings"]["testbed"], RunFolder(folder.path))
    labelling = replace(labelling, api=api.share())
    estimates = document.setdefault("prior_estimates", {})
    labelling, estimate = await with_prior(labelling, estimates.get(str(seed)), quiet=request.run.output.quiet)
    if estimate is not None:
        estimates[str(seed)] = estimate.record()
    options = Options(request.rounds, request.bootstrap_from, request.restarts, request.run.bootstrap_from_halves)
    search, chat = partial(_search, of_seed, api, folder, pool, beside), _chat_model(request, document)
    for row in rows:
        if folder.read_row(row, seed) is not None:
            continue
        result = await run_baseline(Trial(row, labelling, options, search, chat))
        folder.write_row(result, seed)
        if not request.run.output.quiet:
            right = sum(answer.label == answer.gold for answer in result.test)
            print(f"seed {seed}: {BASELINES[row].title} {right} of {len(result.test)} held-out claims", file=sys.stderr)


async def _search(
    request: RunRequest, api: ModelAPI, folder: TableFolder, pool: Pool, beside: Beside | None
) -> Searched:
    """The search of this seed in its own run folder."""
    run = RunFolder(folder.seed_path(request.search.seed))
    request = replace(request, label_rest=False)
    searched = replace(pool, rest=(), left_out=len(pool.rest))
    document = await read_or_label(
        request,
        api.share(),
        searched,
        run,
        settings_of(request, searched),
        progress=None if beside is None else beside.progress.of(run.path.name),
        cache_share=1 if beside is None else beside.cache_share,
    )
    found = {claim.row: claim for claim in read_run(run.path).claims}
    labels, log_odds = {}, {}
    for position, claim in enumerate(pool.claims):
        labelled = found[claim.row]
        assert labelled.label is not None
        assert labelled.log_odds is not None
        labels[position], log_odds[position] = labelled.label, labelled.log_odds
    cost = document["cost"]
    return Searched(
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


def _chat_model(request: ComparisonRequest, document: dict[str, Any]) -> ChatModel | None:
    """The chat model of the request; its identity is added to the table's document when it is asked."""
    if request.chat_model is None:
        return None
    model = replace(request.run.model, model=request.chat_model, use_vllm=True, direct=False, base_url=None)
    server = {} if request.chat_url is None else {"vllm_base_url": request.chat_url}

    def on_asked(identity: EngineIdentity, template: bool) -> None:
        document["chat"] = {"engine": asdict(identity), "template": template}
        if not template:
            print(f"warning: {request.chat_model} has no chat template: it is asked in plain text", file=sys.stderr)

    return ChatModel(partial(model_api_of, replace(request.run, model=model), server), on_asked)


def _save(
    folder: TableFolder, document: Mapping[str, Any], rows: Sequence[str], seeds: Sequence[int]
) -> dict[str, Any]:
    """Write the table of the rows that are finished so far."""
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


def _rows(request: ComparisonRequest, *, knows: bool) -> list[str]:
    """The rows that are asked for, in the table's order. knows: whether labels are known."""
    chat = bool(request.chat_model)
    default = [
        row
        for row, each in BASELINES.items()
        if not each.on_request and (chat or not each.needs_chat) and (knows or not each.needs_known)
    ]
    chosen = request.rows or default
    for row in chosen:
        if BASELINES[row].needs_chat and not chat:
            raise BadInput(f"the row {row} needs a --chat_model")
        if BASELINES[row].needs_known and not knows:
            raise BadInput(f"the row {row} needs known labels: --known FILE, or --gold_seeds N")
    return [row for row in BASELINES if row in chosen]


def _where_known(request: ComparisonRequest, rows: list[str], held_out: frozenset[int], loaded: Loaded) -> list[str]:
    """The rows without the one that shows known labels, where no seed's pool has any, which is told; so are seeds
    whose pool has none. Raises BadInput where that row was asked for by name."""
    if _OF_KNOWN not in rows:
        return rows
    seeds = sorted(set(request.seeds))
    pools = {seed: pool_of(request.searching(seed, label_rest=False), held_out, loaded) for seed in seeds}
    without = [seed for seed, pool in pools.items() if pool.problem.known is None]
    if not without:
        return rows
    named = f"seed{'s' if len(without) > 1 else ''} {', '.join(map(str, without))}"
    why = f"no claim in the pool of {named} has a known label"
    if len(without) < len(seeds):
        print(f"warning: {why}: the row {_OF_KNOWN} is zero-shot there", file=sys.stderr)
        return rows
    if request.rows:
        raise BadInput(f"the row {_OF_KNOWN} shows known labels, and {why}: use a larger --batch_size")
    print(f"the row {_OF_KNOWN} is left out: {why}", file=sys.stderr)
    return [row for row in rows if row != _OF_KNOWN]


def _held_out(request: ComparisonRequest, loaded: Loaded) -> tuple[list[Claim] | None, frozenset[int]]:
    """(held-out claims that all seeds share, rows of the data file that are therefore in no pool).

    None where each seed tests on whatever is outside its pool.
    """
    testbed, claims, *_ = loaded
    rng = generator(HELD_OUT_SEED, Stream.POOL, 1)
    if request.test_data is not None:
        reading, bad = testbed.reading if testbed.digest else request.run.data.reading(), list[str]()
        rows = read_rows(request.test_data, reading.columns.values())
        test = claims_of(testbed, rows, request.test_data, reading, bad.append)
        check_bad_rows(request.run.data, request.test_data, bad)
        if request.test_size is not None:
            test = sample_pool(test, request.test_size, rng)
        seen = len({claim.text for claim in claims} & {claim.text for claim in test})
        if seen:
            print(
                f"warning: {seen} claims of {request.test_data} are also among those that pools are drawn from: "
                "their labels may stand in the prompt that asks for them",
                file=sys.stderr,
            )
        # Groups of another file are other groups, even under the same name.
        return [replace(claim, group=f"test {claim.group}") for claim in test], frozenset()
    if request.test_size is not None:
        test = sample_pool(claims, request.test_size, rng)
        return test, frozenset(claim.row for claim in test)
    return None, frozenset()


def _check_gold(pool: Pool) -> None:
    """Raises BadInput where the gold labels that a comparison needs are missing."""
    unknown = sum(claim.gold is None for claim in pool.claims)
    if unknown:
        raise BadInput(f"{unknown} claims of the pool have no gold label, and a comparison with gold needs them all")
    if not any(claim.gold is not None for claim in pool.rest):
        raise BadInput("no held-out claim has a gold label; give a --test_data file, or a smaller --batch_size")


def _settings(request: ComparisonRequest, test: Sequence[Claim] | None, loaded: Loaded) -> dict[str, Any]:
    """Everything that decides the numbers, except the seeds and the rows."""
    search = request.searching(0, label_rest=True)
    settings = settings_of(search, pool_of(search, loaded=loaded))
    for name in ("seed", "label_rest"):
        del settings[name]
    return settings | {
        "rounds": request.rounds,
        "bootstrap_from": request.bootstrap_from,
        # Only where it differs, so that older tables can go on.
        **({} if request.restarts == Options().restarts else {"restarts": request.restarts}),
        **({"bootstrap_share": "prior"} if _follows_prior(request.run) else {}),
        "test_data": None if request.test_data is None else request.test_data.name,
        "test_sha256": None if request.test_data is None else digest_of(request.test_data),
        "test_size": None if test is None else len(test),
        "chat_model": request.chat_model,
    }


def _follows_prior(run: RunRequest) -> bool:
    """Whether bootstrapping starts with the share of True that --prior says."""
    return run.search.start_share == "prior" and not run.bootstrap_from_halves


if __name__ == "__main__":
    sys.exit(main())
