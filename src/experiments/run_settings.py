"""What decides a run's labels, and the name of its folder, which is made from that."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

import orjson

from core.llm_api.labels import TRUE_FALSE
from src.experiments.request import RunRequest
from src.icm.columns import Reading
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.labelling import Pool

VARIANTS = (
    *("search", "context_cap", "best_of", "local_gain", "start_share", "bootstrap_rounds", "bootstrap_start"),
    *("ascent_starts", "ascent_sweeps", "ascent_questions", "ascent_error"),
    *("gibbs_sweeps", "gibbs_temperature", "gibbs_cooling"),
)


def settings_of(request: RunRequest, pool: Pool) -> dict[str, Any]:
    """Everything that decides the labels, for run.json and the run's name. Holds no key and no path."""
    data, objective = request.data, request.objective
    decisive = {
        field.name: value
        for field in fields(SearchSettings)
        # Left out at their defaults, so that runs begun before these variants existed can go on.
        if (value := getattr(request.search, field.name)) != field.default or field.name not in VARIANTS
    }
    return {
        "testbed": data.name_of(pool.testbed),
        # Only of a testbed file, whose content decides what the model is asked.
        **({"testbed_sha256": pool.testbed.digest} if pool.testbed.digest else {}),
        "data_sha256": pool.data_digest,
        "model": request.model.model,
        "batch_size": data.batch_size,
        "consistency": data.consistency,
        "alpha": objective.alpha,
        "calibrate": objective.calibration,
        # Only where it is given, so that runs begun before this flag existed can go on.
        **({} if objective.prior is None else {"prior": objective.prior}),
        **({"prior": "auto"} if objective.estimate_prior else {}),
        "label_rest": request.label_rest,
        **_settings_of_labels(pool),
        **_settings_of_reading(data.reading(), pool),
        **({} if pool.continued is None else {"continue_from": pool.continued.digest}),
        **({} if pool.known_digest is None else {"known": pool.known_digest}),
        **({} if pool.known_outside_digest is None else {"known_outside": pool.known_outside_digest}),
        **({"gold_seeds": data.gold_seeds} if data.gold_seeds else {}),
        **_settings_of_end(pool),
        **decisive,
        "num_seed": pool.problem.settings.num_seed,  # 0 by default where labels are known
    }


def _settings_of_labels(pool: Pool) -> dict[str, Any]:
    """The labels' names and texts; nothing for True and False, so that older runs can go on."""
    space = pool.testbed.space
    return {} if space == TRUE_FALSE else {"labels": list(space.names), "label_texts": list(space.texts)}


def _settings_of_reading(reading: Reading, pool: Pool) -> dict[str, Any]:
    """How a --data file is read; nothing where that is the default, so that older runs can go on."""
    found: dict[str, Any] = {}
    if reading.columns:
        found["columns"] = ",".join(f"{ours}={theirs}" for ours, theirs in sorted(reading.columns.items()))
    if reading.values:
        found["map"] = " ".join(
            f"{column}={','.join(f'{theirs}:{ours}' for theirs, ours in sorted(meanings.items()))}"
            for column, meanings in sorted(reading.values.items())
        )
    if pool.testbed.grouped_by == "question":
        found["group_by"] = pool.testbed.grouped_by
    return found


def _settings_of_end(pool: Pool) -> dict[str, Any]:
    """Where the search begins that goes on from the end of another one; nothing where it starts anew from its labels,
    as earlier versions did. A pool of other claims than theirs is told by what is in it."""
    continued = pool.continued
    if continued is None or continued.as_before:
        return {}
    return {"continued": "in place" if continued.end is None or pool.problem.carried is None else continued.end.digest}


def as_begun(
    request: RunRequest, settings: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
) -> RunRequest:
    """The request; as an earlier version took the same flags where it began this run: with --group_by none, before rows
    with the same question became one group, with --start_share half, before random labels followed --prior, in a new
    order of the demonstrations, before those of the run that it goes on from were kept, with --search annealing, while
    that was the search where none is named, with bootstrapping from halves, before it followed --prior, or without
    known labels of claims outside the other run's pool, before they were taken over.

    read: the run.json of the run with given settings, which name its folder; None where there is none.
    """

    def begun(as_then: Mapping[str, Any], changed: Collection[str] = ()) -> bool:
        known = read(as_then)
        if known is None or known.get("settings") != as_then:
            return False
        if {"bootstrap_share", "known_outside"} >= set(changed):  # in which no version had a choice
            return True
        # Without a name to go on under, what a version with these flags began is another run, which was asked for so.
        return as_then == settings or request.output.run is not None or "start_share" not in (known.get("flags") or {})

    named = request.search.search
    earlier: dict[str, tuple[Callable[[RunRequest], RunRequest], str]] = {}
    if request.data.group_by is None and "group_by" in settings:
        earlier["group_by"] = (
            lambda now: replace(now, data=replace(now.data, group_by="none")),
            "this run was begun with every row as a group by itself, and goes on so (--group_by none); in a new one, "
            "rows with the same question are one group",
        )
    if request.flags.get("start_share") is None and "start_share" in settings:
        earlier["start_share"] = (
            lambda now: replace(now, search=replace(now.search, start_share="half")),
            "this run was begun with half of its random labels True, and goes on so (--start_share half); in a new "
            "one, they follow --prior",
        )
    if "known_outside" in settings:
        earlier["known_outside"] = (
            lambda now: replace(now, continue_without_outside=True),
            "this run was begun without known labels of claims outside the pool of the run that it goes on from, and "
            "goes on so; a new one keeps them",
        )
    if "bootstrap_share" in settings:
        earlier["bootstrap_share"] = (
            lambda now: replace(now, bootstrap_from_halves=True),
            "this table was begun with half of the labels that bootstrapping starts with True, and goes on so; in a "
            "new one, they follow --prior",
        )
    if "continued" in settings and not request.continue_as_before:
        earlier["continued"] = (
            lambda now: replace(now, continue_as_before=True),
            "this run was begun with the labels of another one in a new order, and goes on so; a new run keeps theirs",
        )
    if request.search_by_default and "search" in settings and not begun(settings):
        earlier["search"] = (
            lambda now: replace(now, search=replace(now.search, search="annealing"), search_by_default=False),
            "this run was begun by annealing, which was the search where none is named, and goes on so (--search "
            f"annealing); a new one is by {named} (--search {named})",
        )
    for count in range(1, len(earlier) + 1):
        for changed in combinations(earlier, count):
            if begun({name: value for name, value in settings.items() if name not in changed}, changed):
                for name in changed:
                    change, told = earlier[name]
                    request = change(request)
                    print(told, file=sys.stderr)
                return request
    return request


def run_name(request: RunRequest, settings: Mapping[str, Any], kind: str | None = None) -> str:
    """The folder under --runs_dir: --run, or made from the settings. Raises BadInput where --run is a path.

    kind: of what is not one run with one seed, such as a table of baselines.
    """
    run = request.output.run
    if run is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", run):
            raise BadInput(f"--run {run!r}: a name of letters, digits, '_', '.' and '-', not a path")
        return run
    digest = hashlib.sha256(orjson.dumps(settings, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]
    model, size = request.model.model.rsplit("/", 1)[-1], request.data.batch_size
    parts = [settings["testbed"], model, f"N{size}", digest]
    if kind is None:
        parts.insert(3, f"seed{request.search.seed}")
    else:
        parts.insert(0, kind)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(parts)).lstrip(".-")
