"""One pool, one folder: what flags ask for, whether it is what the folder holds, and the run itself."""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson

from contrib.monitoring.run_metrics import published
from core.determinism.record import manifest_entry, read_record
from core.llm_api.labels import TRUE_FALSE
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.types import Capabilities, EngineIdentity, known_to_differ
from core.settings import Settings
from src.icm.columns import Reading, parse_columns, parse_values
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.searches.seam import Standing
from src.icm.testbeds import BadInput, Claim, Testbed
from src.pipeline.continuing import read_continued
from src.pipeline.datafiles import load_data_file, load_testbed, load_testbed_file
from src.pipeline.labelling import Labelling, Pool, prepare_batches, result_record
from src.pipeline.opening import example_prompt, opening, prompt_line, prompt_lines
from src.pipeline.progress import Progress, SearchProgress
from src.pipeline.testbed_files import read_testbed, testbed_path
from src.results.plots import plot_curves
from src.results.rows import calibration_told, changes_objective, collapse_warning, pool_rows, random_warning
from src.results.run_folder import FORMAT, RunFolder, environment

SHOWN_BAD_ROWS = 3
OF_TESTBED_FILE = ("testbed_sha256", "labels", "label_texts")
"""Settings that no flag says."""
OF_CONTENT = ("data_sha256", "continue_from")
"""Settings that are digests."""
VARIANTS = ("search", "context_cap", "best_of", "local_gain", "bootstrap_rounds", "bootstrap_start")
COSTS = (
    *("asked", "from_cache", "asked_ahead", "ahead_used"),
    *("tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds"),
)


def model_api_of(args: argparse.Namespace, more: Mapping[str, object] | None = None) -> ModelAPI:
    """The ModelAPI that the flags ask for, not yet started. more: settings that win over them."""
    settings = Settings.load(
        {
            "missing_label": args.missing_label,
            "prompts_per_request": args.prompts_per_request,
            "read_timeout": args.read_timeout,
            "cache_path": args.runs_dir / "responses.sqlite",
            **(more or {}),
        }
    )
    return open_model_api(settings, model=args.model, use_vllm=args.use_vllm, direct=args.direct)


def warn_of_leaks(args: argparse.Namespace, pool: Pool) -> None:
    """Say so where the constraints are made from gold labels."""
    if args.consistency == "upstream" and pool.testbed.upstream_leaks:
        print(
            "warning: --consistency upstream makes its keys from gold labels: accuracy is not unsupervised",
            file=sys.stderr,
        )


def tell_of_continuing(args: argparse.Namespace, pool: Pool) -> None:
    """Say which labels the search starts with, and which of the other run's it cannot take over."""
    if pool.continued is not None:
        file = data_name(args, pool.testbed)
        outside = len(pool.rest) + pool.left_out
        for line in pool.continued.notes(
            file=file, model=args.model, pool=len(pool.claims), outside=0 if args.label_rest else outside
        ):
            print(line, file=sys.stderr)


def determinism_of(args: argparse.Namespace, api: ModelAPI) -> dict[str, Any] | None:
    """The last determinism check of this engine, for run.json; warns where it gives no reason to trust the last bit.

    None for an engine that cannot be checked.
    """
    if not api.capabilities.checkable:
        return None
    identity = api.identity
    entry = manifest_entry(identity, read_record(args.runs_dir / "determinism", identity))
    if entry["doubt"]:
        _warn_once(str(entry["doubt"]))
    return dict(entry)


@functools.cache
def _warn_once(text: str) -> None:
    """One warning, however many batches of a data set are labelled."""
    logging.warning("%s", text)


def reading_of(args: argparse.Namespace) -> Reading:
    """How --columns, --map and --group_by say that --data is to be read."""
    given = [f"--{name}" for name in ("columns", "map", "group_by") if getattr(args, name) is not None]
    file = testbed_path(args.testbed)
    if file is not None and given:
        raise BadInput(f"{' and '.join(given)} say how a --data file is to be read; {file} says it here")
    if args.data is None and given:
        raise BadInput(f"{' and '.join(given)} say how a --data file is to be read; a testbed's files are known")
    return Reading(
        columns={} if args.columns is None else parse_columns(args.columns),
        values=parse_values(args.map or ()),
        group_by=args.group_by,
    )


def data_name(args: argparse.Namespace, testbed: Testbed) -> str:
    """What the claims are called: after their testbed, or after a --data file that has none."""
    return args.data.name if args.data is not None and not testbed.digest else testbed.name


def load_claims(args: argparse.Namespace) -> tuple[Testbed, list[Claim], Path]:
    """The claims of --data or --testbed."""
    return _load(args)[:3]


def _load(args: argparse.Namespace) -> tuple[Testbed, list[Claim], Path, list[str]]:
    """The same, and of every row that was left out, why. Raises BadInput for the first one without --skip_bad_rows."""
    bad: list[str] = []
    reading = reading_of(args)
    if (file := testbed_path(args.testbed)) is not None:
        testbed, claims, path = load_testbed_file(read_testbed(file), file, args.data_dir, args.data, bad.append)
    elif args.data is not None:
        testbed, claims, path = load_data_file(args.data, reading, bad.append)
    else:
        testbed, claims, path = load_testbed(args.testbed, args.data_dir, bad.append)
    check_bad_rows(args, path, bad)
    return testbed, claims, path, bad


def check_bad_rows(args: argparse.Namespace, path: Path, bad: Sequence[str]) -> None:
    """Raises BadInput where rows cannot be used (bad: why, each), unless --skip_bad_rows; then it warns."""
    if not bad:
        return
    if not args.skip_bad_rows:
        others = f" ({len(bad)} rows cannot be used)" if len(bad) > 1 else ""
        raise BadInput(f"{bad[0]}{others}. Mend it, or leave such rows out with --skip_bad_rows")
    shown = "; ".join(complaint.removeprefix(f"{path}:") for complaint in bad[:SHOWN_BAD_ROWS])
    more = "; ..." if len(bad) > SHOWN_BAD_ROWS else ""
    count = f"{len(bad)} rows are" if len(bad) > 1 else "1 row is"
    _warn_once(f"{path}: {count} left out (--skip_bad_rows): line {shown}{more}")


def pool_of(args: argparse.Namespace, held_out: Collection[int] = ()) -> Pool:
    """The pool and its constraints, from flags and files alone. held_out: rows that must not be in it."""
    [pool] = pools_of(args, 1, held_out)
    return pool if args.label_rest else replace(pool, rest=(), left_out=len(pool.rest))


def pools_of(args: argparse.Namespace, count: int | None, held_out: Collection[int] = ()) -> list[Pool]:
    """The same for `count` pools that share no claim; None: for as many as hold all claims."""
    if args.initial_T <= 0 or args.final_T <= 0 or args.decay <= 0:
        raise BadInput("--initial_T, --final_T and --decay must be above 0")
    testbed, claims, path, bad = _load(args)
    claims = [claim for claim in claims if claim.row not in held_out]
    name = getattr(args, "continue_from", None)  # a flag of ICM.py alone
    continued = None if name is None else read_continued(name, args.runs_dir, testbed, claims, path)
    given = [field.name for field in fields(SearchSettings) if field.name in args]  # some are flags of ICM.py alone
    search = SearchSettings(**{name: getattr(args, name) for name in given})
    pools = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=args.batch_size,
        count=count,
        consistency=args.consistency,
        objective=Objective(args.alpha, args.calibrate, args.prior),
        settings=search,
        continued=continued,
    )
    return [replace(pool, bad_rows=tuple(bad)) for pool in pools]


def settings_of(args: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Everything that decides the labels, for run.json and the run's name. Holds no key and no path."""
    decisive = {
        field.name: value
        for field in fields(SearchSettings)
        # Left out at their defaults: runs that were begun before there were variants go on.
        if (value := getattr(args, field.name, field.default)) != field.default or field.name not in VARIANTS
    }
    return {
        "testbed": data_name(args, pool.testbed),
        # Only of a file: its words decide what the model is asked.
        **({"testbed_sha256": pool.testbed.digest} if pool.testbed.digest else {}),
        "data_sha256": pool.data_digest,
        "model": args.model,
        "batch_size": args.batch_size,
        "consistency": args.consistency,
        "alpha": args.alpha,
        "calibrate": args.calibrate,
        # Only where it is given: runs that were begun before there was one go on.
        **({} if args.prior is None else {"prior": args.prior}),
        "label_rest": args.label_rest,
        **_settings_of_labels(pool),
        **_settings_of_reading(args, pool),
        **({} if pool.continued is None else {"continue_from": pool.continued.digest}),
        **decisive,
    }


def _settings_of_labels(pool: Pool) -> dict[str, Any]:
    """The labels' names and texts; nothing of True and False, so that runs that were begun go on."""
    space = pool.testbed.space
    return {} if space == TRUE_FALSE else {"labels": list(space.names), "label_texts": list(space.texts)}


def _settings_of_reading(args: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """How a --data file is read; nothing where it is read as it always was, so that runs that were begun go on."""
    reading = reading_of(args)
    found: dict[str, Any] = {}
    if reading.columns:
        found["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in sorted(reading.columns.items()))
    if reading.values:
        found["map"] = " ".join(
            f"{column}={','.join(f'{theirs}:{ours}' for theirs, ours in sorted(meanings.items()))}"
            for column, meanings in sorted(reading.values.items())
        )
    if pool.grouped_by == "question":
        found["group_by"] = pool.grouped_by
    return found


def as_begun(
    args: argparse.Namespace, settings: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> argparse.Namespace:
    """The flags, with --group_by none where this run was begun before rows with one question were one group.

    read: what is known of a run by its settings, as its folder is named after them.
    """
    if args.group_by is not None or "group_by" not in settings:
        return args
    before = {name: value for name, value in settings.items() if name != "group_by"}
    known = read(before)
    if known is None or known.get("settings") != before:
        return args
    print(
        "this run was begun with every row as a group by itself, and goes on so (--group_by none); in a new one, rows "
        "with the same question are one group",
        file=sys.stderr,
    )
    return argparse.Namespace(**{**vars(args), "group_by": "none"})


def run_name(args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """The folder under --runs_dir: --run, or made from the settings. Raises BadInput where --run is a path."""
    if args.run is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", args.run):
            raise BadInput(f"--run {args.run!r}: a name of letters, digits, '_', '.' and '-', not a path")
        return str(args.run)
    digest = hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    parts = (settings["testbed"], args.model.rsplit("/", 1)[-1], f"N{args.batch_size}", f"seed{args.seed}", digest)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).lstrip(".-")


async def tell_opening(
    args: argparse.Namespace,
    labelling: Labelling,
    name: str,
    folder: RunFolder | None,
    pools: Sequence[Pool] = (),
) -> None:
    """Say on standard error what the model will be asked, and keep one whole prompt of it in `folder`.

    name: of the data. folder: None where nothing is kept; the prompt is then shown whole. pools: as in `opening`.
    """
    prompt = example_prompt(labelling)
    lines = opening(labelling, await labelling.token_record(), name, args.batch_size, pools)
    if folder is not None:
        folder.write_prompt(prompt.text)
        lines += _all_random(pools or [labelling.pool])
    lines.append(prompt_line(labelling, prompt, "whole:" if folder is None else f"whole in {folder.prompt_path}"))
    if folder is None or not args.quiet:
        lines += prompt_lines(labelling, prompt, whole=folder is None)
    print("\n".join(lines), file=sys.stderr, flush=True)


def _all_random(pools: Sequence[Pool]) -> list[str]:
    """A warning where a search begins with a random label for every claim: it can then only correct them."""
    for pool in pools:
        size, settings = len(pool.claims), pool.problem.settings
        seeds = settings.num_seed
        if pool.continued is None and seeds >= size and settings.search == "annealing":
            return [
                f"warning: all {size} claims of the pool begin with a random label (--num_seed {seeds}), and none is "
                "predicted first: use a smaller --num_seed or a larger pool"
            ]
    return []


async def finish(
    args: argparse.Namespace,
    api: ModelAPI,
    pool: Pool,
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    cache_share: int = 1,
) -> dict[str, Any]:
    """The finished run.json of `pool` in `folder`: begun, gone on with, or read, whichever it needs.

    progress and cache_share as in label_pool.
    """
    known = folder.read_run()
    if known is not None:
        check_readable(folder, known)
        check_same_run(folder, known["settings"], settings, renamed=may_be_renamed(known))
        if "result" in known:
            return known
    with folder:
        labelling = await Labelling.open(pool, api)
        return await label_pool(
            args, labelling, folder, settings, folder.read_run(), progress=progress, cache_share=cache_share
        )


async def beginning(
    args: argparse.Namespace, api: ModelAPI, settings: Mapping[str, Any], *, cache_share: int = 1
) -> dict[str, Any]:
    """What run.json says of a run that begins: asked for what, of which engine, by which version of this.

    cache_share: how many runs share the server's KV cache.
    """
    capacity = await api.kv_cache_tokens()
    return {
        "settings": settings,
        "flags": {name: _plain(value) for name, value in vars(args).items()},
        "engine": identity_record(api.identity),
        "determinism": determinism_of(args, api),
        "kv_capacity": None if capacity is None else capacity // cache_share,
        "environment": environment(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


async def label_pool(
    args: argparse.Namespace,
    labelling: Labelling,
    folder: RunFolder,
    settings: Mapping[str, Any],
    known: dict[str, Any] | None,
    *,
    progress: Progress | None = None,
    cache_share: int = 1,
) -> dict[str, Any]:
    """Search, label the rest if asked, write the results; returns the finished run.json.

    progress: told of every step (default: a bar of its own). cache_share: how many runs share the server's KV cache.
    """
    if known is None:
        known = await beginning(args, labelling.api, settings, cache_share=cache_share)
        known["tokens"] = await labelling.token_record()
        known |= testbed_record(labelling.pool)
        if labelling.pool.continued is not None:
            known["continued_from"] = labelling.pool.continued.summary()
        folder.write_claims(pool_rows(labelling.pool.claims, labelling.pool.problem.consistency, labelling.pool.names))
        folder.write_run(known)
    else:
        check_same_engine(folder, known["engine"], labelling.identity)
        await check_same_tokens(folder, known.get("tokens"), labelling)
        determinism_of(args, labelling.api)
    labelling = labelling.planned_for(known["kv_capacity"])
    # Of several searches at once none has the port; nor does a command that has no such flag.
    port = getattr(args, "metrics_port", None) if progress is None else None
    with (
        progress or SearchProgress(labelling.pool, args.quiet) as shown,
        published(port, labelling.api, folder.path.name, labelling.pool, shown.update) as heard,
    ):
        state = await labelling.search(folder, heard, _lookahead(args, labelling.api.capabilities))
    records = folder.read_log()
    cost = {key: round(sum(record.get(key, 0) for record in records), 3) for key in COSTS}
    if progress is None and not args.quiet:
        print(_last_questions(labelling, state, cost), file=sys.stderr, flush=True)
    zero_shot = await labelling.zero_shot()
    predictions = {}
    if None in state.labels:
        predictions["predicted"] = await labelling.predict_unlabelled(state)
    if labelling.pool.rest:
        predictions["many-shot"] = await labelling.label_rest(state)
    folder.write_labels(labelling.label_rows(state, predictions, zero_shot))
    title = f"{settings['testbed']}, {args.model}, alpha {args.alpha:g}, calibration {calibration_told(settings)}"
    plot_curves(records, labelling.pool.gold, folder.curves_path, title, labelling.pool.names)
    warning = collapse_warning(state.labels, args.prior, labelling.pool.names, calibrated=args.calibrate != "none")
    if labelling.pool.problem.starts_at_random:
        warning = random_warning(len(state.labelled), state.accepted) or warning
    document = {
        **known,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "result": result_record(labelling, state, zero_shot, predictions)
        | {"warning": warning, "changes_objective": changes_objective(labelling.pool.problem.settings)},
        "cost": cost,
        "left_out": labelling.pool.left_out,
        **bad_rows_record(labelling.pool),
        "model_api": labelling.api.stats.as_dict(),
    }
    folder.write_run(document)
    return document


def bad_rows_record(pool: Pool) -> dict[str, Any]:
    """What run.json says of rows that were left out, where there are any."""
    bad = pool.bad_rows
    return {"bad_rows": {"count": len(bad), "first": list(bad[:SHOWN_BAD_ROWS])}} if bad else {}


def testbed_record(pool: Pool) -> dict[str, Any]:
    """What run.json says of a testbed that is a file: it may be edited or gone when the run is read."""
    return {"testbed": pool.testbed.record()} if pool.testbed.digest else {}


def _last_questions(labelling: Labelling, state: Standing, cost: Mapping[str, Any]) -> str:
    """What is asked after the search, and how long that takes at the search's own speed where it is known."""
    pool = labelling.pool
    left = len(pool.rest) + state.labels.count(None)
    later = f" and labelling {left} other claims from the pool" if left else ""
    tokens = (len(pool.claims) + left) * pool.problem.costs.mean
    # Not where the answers came from the cache of responses, which says nothing of the engine.
    known = cost["seconds"] and cost["tokens_computed"] and 2 * cost["from_cache"] <= cost["asked"]
    took = f" (about {tokens * cost['seconds'] / cost['tokens_computed']:.0f} s)" if known else ""
    return f"search finished; asking the pool's {len(pool.claims)} claims zero-shot{later}{took}"


def _lookahead(args: argparse.Namespace, engine: Capabilities) -> int | None:
    """--lookahead, None where it is auto. Where every question is paid for, auto asks none early."""
    if args.best_of > 1 or (args.lookahead is None and engine.billed):
        return 0  # what best_of will need next depends on its answers, and it asks several at once anyway
    return None if args.lookahead is None else int(args.lookahead)


def check_readable(folder: RunFolder, known: Mapping[str, Any]) -> None:
    """A run that an earlier version began rebuilt its tree by another rule; only its result can still be shown."""
    if known.get("format", 0) < FORMAT and "result" not in known:
        raise BadInput(
            f"{folder.path}: was begun by an earlier version, whose journal this one cannot go on with. "
            "Move it away, or choose another --run"
        )


def check_same_run(
    folder: RunFolder,
    known: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    renamed: bool = False,
    continues: bool = False,
) -> None:
    """Raises BadInput where `folder` was started with other settings. renamed: see may_be_renamed. continues: another
    run of the same command can go on from this one's labels."""
    changed = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    if renamed:
        changed = [name for name in changed if name != "model"]
    if changed:
        flags = [name for name in changed if name not in (*OF_TESTBED_FILE, *OF_CONTENT)]
        told = [f"--{name} {known.get(name)}, now {settings.get(name)}" for name in flags]
        if any(name in OF_TESTBED_FILE for name in changed):
            told.insert(0, f"another content of its testbed file {known.get('testbed')} (see {folder.path}/run.json)")
        if "continue_from" in changed:
            told.insert(0, _continued_told(known.get("continue_from"), settings.get("continue_from")))
        advice = "Use the same flags, or another --run"
        if "data_sha256" in changed and known.get("testbed") == settings.get("testbed"):
            told.insert(0, f"another content of {settings['testbed']}, which has changed since")
            if set(changed) <= set(OF_CONTENT):
                advice = "Use another --run"
                if continues:
                    advice = f"To go on from its labels: --continue_from {folder.path.name} --run NEW"
        raise BadInput(f"{folder.path}: was started with {', '.join(told)}. {advice}")


def _continued_told(before: str | None, now: str | None) -> str:
    """What differs in --continue_from. Of both the digest is known, which says nothing to anybody."""
    if before is None:
        return "no --continue_from"
    if now is None:
        return "--continue_from, now without"
    return "other labels of another run (--continue_from)"


def may_be_renamed(known: Mapping[str, Any]) -> bool:
    """Whether the run of this run.json can go on under another name of its model: there is something left to ask, and
    check_same_engine can see whether it is the same model."""
    return "result" not in known and bool(known["engine"].get("fingerprint"))


def check_same_engine(folder: RunFolder, known: Mapping[str, Any], identity: EngineIdentity) -> None:
    """Scores of two models must not mix in one run. Raises BadInput where the version differs, the type or the model's
    configuration (if both are known), or the model; that may lie elsewhere and have another name if it answers alike.
    """
    now = identity_record(identity)
    names = [name for name in ("model", "root") if known.get(name) != now[name]]
    moved = bool(names) and identity.has_content_of(known)
    changed = [] if moved else names
    changed += [name for name in ("revision", "version") if known.get(name) != now[name]]
    changed += [name for name in ("dtype", "config") if known_to_differ(known.get(name, ""), now[name])]
    if changed:
        told = ", ".join(f"{name} {_short(known.get(name))!r}, now {_short(now[name])!r}" for name in changed)
        raise BadInput(f"{folder.path}: was started on another engine ({told}). Start that one, or use another --run")
    if moved:
        told = ", ".join(f"{name} {known.get(name)!r}, now {now[name]!r}" for name in names)
        print(f"the run goes on: the model answers as before ({told})", file=sys.stderr, flush=True)
    if known.get("fingerprint") != now["fingerprint"]:
        logging.warning(
            "the engine answers a fixed prompt differently than when this run began (other hardware, "
            "precision or kernels?): its scores differ slightly from the run's first part"
        )


async def check_same_tokens(folder: RunFolder, known: Mapping[str, Any] | None, labelling: Labelling) -> None:
    """Raises BadInput where the run began with other tokens for the same claims: by a version that had no record of
    them (known: None) and spelled this model's labels in another way, or before the model's tokenizer changed."""
    now = orjson.loads(orjson.dumps(await labelling.token_record()))
    if known is None:
        changed = [] if await labelling.asks_as_before() else ["demonstration"]
    else:
        changed = [name for name in now if _ids(known.get(name)) != _ids(now[name])]
    if changed:
        raise BadInput(
            f"{folder.path}: was started with other tokens for its {' and '.join(changed)}, by an earlier version or "
            "another tokenizer, and scores of two kinds of prompts must not mix. Move it away, or use another --run"
        )


def _ids(recorded: Any) -> Any:
    """Without the texts, which not every server tells."""
    return [token for token, _ in recorded] if isinstance(recorded, list) else recorded


def _short(value: object) -> object:
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def identity_record(identity: EngineIdentity) -> dict[str, Any]:
    """The engine's identity for run.json."""
    return {field.name: getattr(identity, field.name) for field in fields(identity)}
