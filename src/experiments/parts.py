"""A run of several searches: a data set in batches (`--num_batches`), each labelled once or by a vote (`--passes`).

Every search is an ordinary run in its own folder, with its own journal; several use one server at the same time. A
search depends only on its claims and its seed, so the labels do not depend on how many run at once.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from core.llm_api.llm import ModelAPI
from src.experiments.beside import Beside
from src.experiments.contradictions import refuse
from src.experiments.doubting import check_wanted, write_doubt
from src.experiments.loading import bad_rows_record, pools_of, warn_of_leaks
from src.experiments.request import PLANNED_AT_ONCE, RunRequest
from src.experiments.run_settings import as_begun, run_name, settings_of
from src.experiments.same_run import check_readable, check_same_engine, check_same_run, may_be_renamed
from src.experiments.single_run import (
    COSTS,
    beginning,
    model_api_of,
    print_opening,
    read_or_label,
    show_again,
    testbed_record,
)
from src.experiments.summary import print_summary
from src.icm.label_names import counts_of, read_label
from src.icm.problem import part_seed
from src.icm.testbeds import BadInput
from src.pipeline.labelling import Labelling, Pool
from src.pipeline.progress import PartsProgress
from src.results.messages import collapse_warning, random_warning
from src.results.run_folder import RunFolder, now
from src.results.run_record import KNOWN


@dataclass(frozen=True)
class Part:
    """One search. pass_number is 0 where there is only one pass."""

    name: str
    batch: int
    pass_number: int
    pool: Pool


async def run_parts(request: RunRequest, beside: Beside | None = None) -> RunFolder | None:
    """Label every part, put their labels together, print the summary. Returns the finished run's folder.

    None where it was only asked whether the run is finished, and it is not. beside: where it is one of several runs.
    """
    parts = _parts(request)
    check_wanted(request.doubt, [part.pool for part in parts if part.pass_number == 0])
    settings = settings_of(request, parts[0].pool) | {
        "num_batches": len({part.batch for part in parts}),
        "passes": request.parts.passes,
    }
    runs_dir = request.output.runs_dir
    same = as_begun(request, settings, lambda known: RunFolder(runs_dir / run_name(request, known)).read_run())
    if same is not request:
        return await run_parts(same, beside)
    folder = RunFolder(runs_dir / run_name(request, settings) if beside is None else beside.folder)
    known = folder.read_run()
    if known is not None:
        check_readable(folder, known)
        check_same_run(folder, known["settings"], settings, renamed=may_be_renamed(known))
        if "result" in known:
            show_again(request, folder, known)
            return folder
    else:
        refuse(request.contradiction)
    if request.is_complete:
        return None
    warn_of_leaks(request, parts[0].pool)
    with folder:
        async with model_api_of(request) if beside is None else beside.opened(request) as api:
            if known is None:
                begun = await beginning(request, api, settings)
                known = {"kind": "parts", **begun, **testbed_record(parts[0].pool)}
                known["parts"] = [part.name for part in parts]
                folder.write_run(known)
            else:
                check_same_engine(folder, known["engine"], api.identity)
                settings = known["settings"]  # with the model's old name, as in the parts that exist
            first = await Labelling.open(replace(parts[0].pool, rest=()), api)
            pools = [part.pool for part in parts if part.pass_number == 0]
            await print_opening(request, first, settings["testbed"], folder, pools)
            documents = await _label_all(request, api, folder, parts, settings, beside)
            rows = _rows(folder, parts)
            folder.write_labels(rows)
            document = {
                **known,
                "finished": now(),
                "result": _result(parts, documents, rows),
                "cost": {key: round(sum(each["cost"][key] for each in documents), 3) for key in COSTS},
                "left_out": len(parts[0].pool.rest),
                **bad_rows_record(parts[0].pool),
                "model_api": api.stats.as_dict() | _sums([each["model_api"] for each in documents]),
            }
            folder.write_run(document)
            document = write_doubt(folder, document, request.doubt, told=request.output.told)
    if request.output.told:
        print_summary(folder, document)
    return folder


def _parts(request: RunRequest) -> list[Part]:
    """Every batch's passes, in order. Raises BadInput for flags that cannot be combined."""
    if request.check:
        raise BadInput("--check measures one pool: leave out --num_batches and --passes")
    if request.continue_from is not None:
        raise BadInput("--continue_from goes on with one pool: leave out --num_batches and --passes")
    if request.label_rest:
        raise BadInput(
            "--label_rest labels from one pool's labels: leave out --num_batches and --passes, or --label_rest "
            "(--num_batches all labels every claim)"
        )
    if request.parts.passes % 2 == 0:
        raise BadInput(f"--passes {request.parts.passes}: must be odd, or votes could be equal")
    parts = []
    for batch, pool in enumerate(pools_of(request, request.parts.num_batches)):
        for number in range(request.parts.passes):
            name = f"batch-{batch:03d}" + (f"-pass-{number}" if request.parts.passes > 1 else "")
            search = replace(pool.problem.settings, seed=part_seed(request.search.seed, batch, number))
            parts.append(Part(name, batch, number, replace(pool, problem=replace(pool.problem, settings=search))))
    return parts


async def _label_all(
    request: RunRequest,
    api: ModelAPI,
    folder: RunFolder,
    parts: Sequence[Part],
    settings: Mapping[str, Any],
    beside: Beside | None,
) -> list[dict[str, Any]]:
    """Every part's finished run.json. The first failure stops the others, which lose nothing, and is raised."""
    turns = asyncio.Semaphore(request.parts.at_once)
    claims = sum(len(part.pool.claims) for part in parts)
    share = min(PLANNED_AT_ONCE, len(parts)) * (1 if beside is None else beside.cache_share)
    shown = PartsProgress(claims, len(parts), request.output.quiet) if beside is None else beside.progress.begin(claims)

    async def label(part: Part) -> dict[str, Any]:
        of_part = dict(settings) | {"part": part.name, "part_seed": part.pool.problem.settings.seed}
        pool = replace(part.pool, rest=())
        async with turns:
            document = await read_or_label(
                request,
                api.share(exclusive=request.parts.at_once == 1),
                pool,
                RunFolder(folder.path / part.name),
                of_part,
                progress=progress.of(part.name),
                cache_share=share,
            )
        agreeing, compared = _known(document["result"])
        agreement = f", agreement {agreeing / compared:.2f}" if compared else ""
        progress.finish(part.name, len(pool.claims), f"U {document['result']['U']:.1f}{agreement}")
        return document

    failure: BaseException | None = None
    tasks: list[asyncio.Task[dict[str, Any]]] = []
    with shown as progress:
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(label(part), name=part.name) for part in parts]
        except BaseExceptionGroup as failures:
            failure = failures.exceptions[0]
    if failure is not None:
        raise failure
    return [task.result() for task in tasks]


def _rows(folder: RunFolder, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The rows of labels.jsonl, one a claim, ordered by its row in the data; of several passes the majority's label."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for part in parts:
        for line in RunFolder(folder.path / part.name).labels_path.read_bytes().splitlines():
            row = orjson.loads(line)
            found[row["row"], part.batch].append(row)
    return [_voted(rows) | {"batch": batch} for (_, batch), rows in sorted(found.items())]


def _voted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the passes' rows: the majority's label, and the mean of their log_odds.

    Of labels that are not True and False: the one with most votes (of equals the one that comes first among the passes)
    and the mean of their logprobs.
    """
    if len(rows) == 1 or rows[0]["by"] == KNOWN:
        return rows[0]
    if "logprobs" in rows[0]:
        given = [row["label"] for row in rows]
        mean = {name: sum(row["logprobs"][name] for row in rows) / len(rows) for name in rows[0]["logprobs"]}
        counts = {name: given.count(name) for name in mean}
        chosen = max(given, key=given.count)
        return {**rows[0], "label": chosen, "logprobs": mean, "by": "vote", "votes_of": counts, "votes": len(rows)}
    votes = sum(row["label"] for row in rows)
    return {
        **rows[0],
        "label": 2 * votes > len(rows),
        "log_odds": sum(row["log_odds"] for row in rows) / len(rows),
        "by": "vote",
        "votes_true": votes,
        "votes": len(rows),
    }


def _result(
    parts: Sequence[Part], documents: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of all parts: sums over them, means of U and predictability, and the voted labels."""
    results = [document["result"] for document in documents]
    voted = [row for row in rows if row["by"] in ("icm", "vote")]
    predicted = [row for row in rows if row["by"] == "predicted"]
    known = sum(row["by"] == KNOWN for row in rows)
    names, objective = parts[0].pool.names, parts[0].pool.problem.objective
    prior, calibration = objective.prior, objective.calibration
    first = [result for part, result in zip(parts, results, strict=True) if part.pass_number == 0]
    labels = [read_label(row["label"], names) for row in rows]
    accepted = sum(result["accepted"] for result in results)
    return {
        **_sums([{key: r[key] for key in ("iterations", "accepted", "rebuilds", "inconsistent")} for r in results]),
        "labelled": len(voted),
        **({"known": known} if known else {}),
        **counts_of([read_label(row["label"], names) for row in voted], names),
        "U": sum(r["U"] for r in results) / len(results),
        "predictability": sum(r["predictability"] for r in results) / len(results),
        "icm": _agreement(voted),
        "zero_shot": _added([r["zero_shot"] for r in first]),
        "zero_shot_calibrated": _added([r["zero_shot_calibrated"] for r in first]),
        "predicted": {"predicted": _agreement(predicted)} if predicted else {},
        "warning": (random_warning(len(voted), accepted) if parts[0].pool.problem.starts_at_random else None)
        or collapse_warning(labels, prior, names, calibrated=calibration != "none"),
        "changes_objective": results[0]["changes_objective"],
        "parts": [
            {
                "part": part.name,
                "labelled": result["labelled"],
                "U": result["U"],
                "icm": result["icm"],
                "seconds": document["cost"]["seconds"],
                "warning": result["warning"],
            }
            for part, result, document in zip(parts, results, documents, strict=True)
        ],
    }


def _agreement(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    known = [row for row in rows if row["gold"] is not None]
    return sum(row["label"] == row["gold"] for row in known), len(known)


def _known(result: Mapping[str, Any]) -> tuple[int, int]:
    """Agreement of all of a part's labels, also of those that the search did not give."""
    return _added([result["icm"], *result["predicted"].values()])


def _added(counts: Sequence[Sequence[int]]) -> tuple[int, int]:
    return sum(a for a, _ in counts), sum(n for _, n in counts)


def _sums(records: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {key: sum(record[key] for record in records) for key in records[0]}
