"""One pool, one folder: the model that labels it, and the run from its first question to its finished run.json."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

from core.determinism.record import manifest_entry, read_record
from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.types import Capabilities
from core.settings import Settings
from src.experiments.doubting import write_doubt_again
from src.experiments.loading import bad_rows_record, warn_once
from src.experiments.request import RunRequest
from src.experiments.same_run import (
    check_readable,
    check_same_engine,
    check_same_run,
    check_same_tokens,
    may_be_renamed,
)
from src.experiments.summary import print_summary, say_shown_again
from src.icm.searches.seam import Record, Standing
from src.pipeline.continuing import end_record, gone_rows
from src.pipeline.labelling import Labelling, Pool, result_record
from src.pipeline.opening import example_prompt, opening, prompt_line, prompt_lines
from src.pipeline.prior_estimate import with_prior
from src.pipeline.progress import Progress, SearchProgress
from src.pipeline.search import OnRecord
from src.results.messages import calibration_in_words, changes_objective, collapse_warning, random_warning
from src.results.plots import plot_curves
from src.results.rows import known_rows, pool_rows
from src.results.run_folder import RunFolder, environment, now
from src.results.run_reader import read_run
from src.results.text import counted

COSTS = (
    *("asked", "from_cache", "asked_ahead", "ahead_used"),
    *("tokens_sent", "tokens_cached", "tokens_computed", "floored", "seconds"),
)


def model_api_of(request: RunRequest, more: Mapping[str, object] | None = None) -> ModelAPI:
    """The ModelAPI of a request, not yet started. more: settings that override the request's."""
    model = request.model
    settings = Settings.load(
        {
            "missing_label": model.missing_label,
            "prompts_per_request": model.prompts_per_request,
            "read_timeout": model.read_timeout,
            "vllm_base_url": model.base_url,
            "cache_path": request.output.runs_dir / "responses.sqlite",
            **(more or {}),
        }
    )
    return open_model_api(settings, model=model.model, use_vllm=model.use_vllm, direct=model.direct)


def determinism_of(request: RunRequest, api: ModelAPI) -> dict[str, Any] | None:
    """The last determinism check of this engine, for run.json; warns where scores may not be exact to the last bit.

    None for an engine that cannot be checked.
    """
    if not api.capabilities.checkable:
        return None
    identity = api.identity
    entry = manifest_entry(identity, read_record(request.output.runs_dir / "determinism", identity))
    if entry["doubt"]:
        warn_once(str(entry["doubt"]))
    return dict(entry)


async def print_opening(
    request: RunRequest,
    labelling: Labelling,
    name: str,
    folder: RunFolder | None,
    pools: Sequence[Pool] = (),
    *,
    searches: bool = True,
) -> None:
    """Print on standard error what the model will be asked, and write one whole prompt to `folder`.

    name: of the data. folder: None to write nothing and print the whole prompt. pools: as in `opening`.
    searches: whether a search follows, which may begin with random labels only.
    """
    prompt = example_prompt(labelling)
    lines = opening(labelling, await labelling.token_record(), name, request.data.batch_size, pools)
    if folder is not None:
        folder.write_prompt(prompt.text)
        lines += _all_random(pools or [labelling.pool]) if searches else []
    lines.append(prompt_line(labelling, prompt, "whole:" if folder is None else f"whole in {folder.prompt_path}"))
    if folder is None or not request.output.quiet:
        lines += prompt_lines(labelling, prompt, whole=folder is None)
    if request.output.told:
        print("\n".join(lines), file=sys.stderr, flush=True)


def _all_random(pools: Sequence[Pool]) -> list[str]:
    """A warning where a search begins with random labels for all claims, which it can then only correct."""
    for pool in pools:
        size, settings = len(pool.claims), pool.problem.settings
        seeds = settings.num_seed
        if pool.continued is None and seeds >= size and settings.search == "annealing":
            return [
                f"warning: all {size} claims of the pool begin with a random label (--num_seed {seeds}), and none is "
                "predicted first: use a smaller --num_seed or a larger pool"
            ]
    return []


async def read_or_label(
    request: RunRequest,
    api: ModelAPI,
    pool: Pool,
    folder: RunFolder,
    settings: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    cache_share: int = 1,
) -> dict[str, Any]:
    """The finished run.json of `pool` in `folder`: read where it exists, else made by label_pool.

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
            request, labelling, folder, settings, folder.read_run(), progress=progress, cache_share=cache_share
        )


async def label_pool(
    request: RunRequest,
    labelling: Labelling,
    folder: RunFolder,
    settings: Mapping[str, Any],
    known: dict[str, Any] | None,
    *,
    progress: Progress | None = None,
    cache_share: int = 1,
) -> dict[str, Any]:
    """Begin the run or go on with it, label the rest if asked, write the results; returns the finished run.json.

    known: the run.json of a run to resume, None for a new one. progress: shows every step; None: a new progress bar.
    cache_share: how many runs share the server's KV cache. Logs the run to the tools of --log_to.
    """
    names = request.output.log_to
    if not names:
        return await _label_pool(request, labelling, folder, settings, known, progress, cache_share)
    from contrib.tracking.tracking import tracked  # an extra: imported only where it is asked for

    with tracked(names, folder.path, request.output.runs_dir) as tracking:
        document = await _label_pool(
            request, labelling, folder, settings, known, progress, cache_share, tracking.update
        )
        tracking.finish()
        await tracking.settle()
    if not request.output.quiet:
        say_where(tracking.where)
    return document


def say_where(places: Sequence[str]) -> None:
    """Print where a run can be looked at in the tools that it was logged to."""
    for place in places:
        print(f"to look at the run: {place}", file=sys.stderr, flush=True)


def check_log_to(request: RunRequest) -> None:
    """Raises BadInput where a tool of --log_to is not installed."""
    if request.output.log_to:
        from contrib.tracking.tracker import check_installed

        check_installed(request.output.log_to)


def show_again(request: RunRequest, folder: RunFolder, known: dict[str, Any]) -> None:
    """Show a finished run, with the labels handed over that are asked for now; --is_complete changes nothing of it."""
    if not request.is_complete:
        known = write_doubt_again(folder, known, request.doubt, told=request.output.told)
    if request.output.told:
        say_shown_again(known)
        print_summary(folder, known)
    if not request.is_complete:
        _log_finished(request, folder)


def _log_finished(request: RunRequest, folder: RunFolder) -> None:
    """Log a run that is finished already to the tools of --log_to."""
    if request.output.log_to:
        from contrib.tracking.tracking import track_files

        run = read_run(folder.path)
        for name in dict.fromkeys(request.output.log_to):
            say_where(track_files(name, folder.path, run, None))


async def _label_pool(
    request: RunRequest,
    labelling: Labelling,
    folder: RunFolder,
    settings: Mapping[str, Any],
    known: dict[str, Any] | None,
    progress: Progress | None,
    cache_share: int,
    also: OnRecord | None = None,
) -> dict[str, Any]:
    """See label_pool. also: called with every new line of the journal, too."""
    # Several searches at once cannot share the port, so none of them gets it.
    port = request.output.metrics_port if progress is None else None

    def on_step(state: Standing, record: Record) -> None:
        shown.update(state, record)

    # Before anything is written: where the port is taken, no run has begun.
    with _published(port, labelling, folder.path.name, _both(on_step, also)) as on_record:
        known = await _begun(request, labelling, folder, settings, known, cache_share)
        labelling = labelling.planned_for(known["kv_capacity"])
        if not known.get("continued_from", {}).get("answers"):
            labelling = labelling.without_answers()
        quiet = request.output.quiet or progress is not None
        labelling, estimate = await with_prior(labelling, known.get("prior_estimate"), quiet=quiet)
        if estimate is not None and "prior_estimate" not in known:
            known["prior_estimate"] = estimate.record()
            folder.write_run(known)
        with progress or SearchProgress(labelling.pool, request.output.quiet) as shown:
            state = await labelling.search(folder, on_record, _lookahead(request, labelling.api.capabilities))
    if (end := end_record(labelling.pool.problem, state)) is not None:
        folder.write_layout(end)
    records = folder.read_log()
    cost = {key: round(sum(record.get(key, 0) for record in records), 3) for key in COSTS}
    if progress is None and request.output.told and not request.output.quiet:
        print(_last_questions(labelling, state, cost), file=sys.stderr, flush=True)
    zero_shot = await labelling.zero_shot()
    predictions = {}
    if None in state.labels:
        predictions["predicted"] = await labelling.predict_unlabelled(state)
    if labelling.pool.rest:
        predictions["many-shot"] = await labelling.label_rest(state)
    folder.write_labels(labelling.label_rows(state, predictions, zero_shot))
    objective = labelling.pool.problem.objective
    model, calibration = request.model.model, calibration_in_words(settings)
    search = settings.get("search", "annealing")
    title = f"{settings['testbed']}, {model}, alpha {objective.alpha:g}, calibration {calibration}, {search}"
    if request.curves:
        plot_curves(records, labelling.pool.gold_to_find, folder.curves_path, title, labelling.pool.names)
    warning = collapse_warning(
        state.labels, objective.prior, labelling.pool.names, calibrated=objective.calibration != "none"
    )
    if labelling.pool.problem.starts_at_random:
        labelled = len(state.labelled) - labelling.pool.problem.num_known
        warning = random_warning(labelled, state.accepted) or warning
    document = {
        **known,
        "finished": now(),
        "result": result_record(labelling, state, zero_shot, predictions)
        | {"warning": warning, "changes_objective": changes_objective(labelling.pool.problem.settings)},
        "cost": cost,
        "left_out": labelling.pool.left_out,
        **bad_rows_record(labelling.pool),
        "model_api": labelling.api.stats.as_dict(),
    }
    folder.write_run(document)
    return document


async def _begun(
    request: RunRequest,
    labelling: Labelling,
    folder: RunFolder,
    settings: Mapping[str, Any],
    known: dict[str, Any] | None,
    cache_share: int,
) -> dict[str, Any]:
    """The run.json of a run that goes on, `known`, if it can here, or of a new one, written. As in label_pool."""
    if known is not None:
        check_same_engine(folder, known["engine"], labelling.identity)
        await check_same_tokens(folder, known.get("tokens"), labelling)
        determinism_of(request, labelling.api)
        return known
    known = await beginning(request, labelling.api, settings, cache_share=cache_share)
    known["tokens"] = await labelling.token_record()
    known |= testbed_record(labelling.pool)
    pool, problem = labelling.pool, labelling.pool.problem
    if pool.continued is not None:
        taken_over = _taken_over(labelling, known["tokens"], told=request.output.told)
        known["continued_from"] = pool.continued.summary() | taken_over
        if pool.continued.gone:
            folder.write_gone(gone_rows(pool.continued))
    if pool.known is not None:
        known["known_labels"] = {"labels": problem.num_known, "from": list(pool.known.sources)}
        if pool.known_elsewhere:
            folder.write_known(known_rows(pool.known_elsewhere, pool.known.labels, pool.names))
    folder.write_claims(pool_rows(pool.claims, problem.consistency, pool.names, problem.known))
    folder.write_run(known)
    return known


def _taken_over(labelling: Labelling, tokens: Mapping[str, Any], *, told: bool) -> dict[str, Any]:
    """For run.json: how many answers of the run that it goes on from need not be asked again; says why where none."""
    pool = labelling.pool
    carried, end = pool.problem.carried, None if pool.continued is None else pool.continued.end
    if carried is None or end is None:
        return {}
    answers = len(carried.log_odds) if end.answers_are_of(labelling.identity, tokens) else 0
    if answers:
        line = f"{counted(answers, 'answer')} of its search are taken over, in their order: they are not asked again"
    elif carried.log_odds:
        line = "its answers are asked again: another engine, or another version of it, gave them"
    else:
        line = "its answers are asked again, without the claims that are gone or in another group; their order stays"
    if told:
        print(line, file=sys.stderr)
    return {"answers": answers}


async def beginning(
    request: RunRequest, api: ModelAPI, settings: Mapping[str, Any], *, cache_share: int = 1
) -> dict[str, Any]:
    """run.json of a run that begins: its settings and flags, the engine, and the version of this code.

    cache_share: how many runs share the server's KV cache.
    """
    capacity = await api.kv_cache_tokens()
    return {
        "settings": settings,
        "flags": request.recorded_flags(),
        "engine": asdict(api.identity),
        "determinism": determinism_of(request, api),
        "kv_capacity": None if capacity is None else capacity // cache_share,
        "environment": environment(),
        "started": now(),
    }


def _both(first: OnRecord, second: OnRecord | None) -> OnRecord:
    if second is None:
        return first

    def on_record(state: Standing, record: Record) -> None:
        first(state, record)
        second(state, record)

    return on_record


def _published(
    port: int | None, labelling: Labelling, run: str, on_record: OnRecord
) -> AbstractContextManager[OnRecord]:
    """A callback for the journal's records: `on_record`, and where a port is given also the metrics served there."""
    if port is None:
        return nullcontext(on_record)
    from contrib.monitoring.run_metrics import published  # an extra: imported only where it is asked for

    return published(port, labelling.api, run, labelling.pool, on_record)


def testbed_record(pool: Pool) -> dict[str, Any]:
    """For run.json: the content of a testbed file, which may be edited or gone when the run is read."""
    return {"testbed": pool.testbed.record()} if pool.testbed.digest else {}


def _last_questions(labelling: Labelling, state: Standing, cost: Mapping[str, Any]) -> str:
    """One line: what is asked after the search, and how long that takes at the search's speed, where it is known."""
    pool = labelling.pool
    left = len(pool.rest) + state.labels.count(None)
    later = f" and labelling {left} other claims from the pool" if left else ""
    tokens = (len(pool.claims) + left) * pool.problem.costs.mean
    # Not known where most answers came from the response cache.
    known = cost["seconds"] and cost["tokens_computed"] and 2 * cost["from_cache"] <= cost["asked"]
    took = f" (about {tokens * cost['seconds'] / cost['tokens_computed']:.0f} s)" if known else ""
    return f"search finished; asking the pool's {len(pool.claims)} claims zero-shot{later}{took}"


def _lookahead(request: RunRequest, engine: Capabilities) -> int | None:
    """--lookahead; None is auto. At an engine that is billed auto asks nothing early."""
    if request.search.best_of > 1 or (request.lookahead is None and engine.billed):
        return 0  # best_of's next questions depend on its answers, and it asks several at once anyway
    return request.lookahead
