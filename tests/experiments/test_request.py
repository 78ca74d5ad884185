"""RunRequest: what flags become, what is recorded of them, and what a command decides by itself."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from src.experiments import ICM, baselines
from src.experiments.baselines import ComparisonRequest
from src.experiments.request import DataRequest, ModelRequest, OutputRequest, PartsRequest, RunRequest
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.searches import DEFAULT
from src.results.doubt import Wanted

PARTS: tuple[type[Any], ...] = (
    *(DataRequest, ModelRequest, SearchSettings, PartsRequest, OutputRequest, Wanted, RunRequest),
)
NOT_FLAGS = {
    *("data", "model", "search", "objective", "parts", "output", "curves", "doubt", "contradiction", "flags"),
    *("base_url", "told", "seeds_by_default", "search_by_default", "continue_as_before"),
    *("continue_without_outside", "bootstrap_from_halves"),
}
"""Fields of RunRequest and its parts that no flag has the name of, base_url and told being of the library,
seeds_by_default and search_by_default what --num_seed and --search leave open; --data, --model and --search are fields
of its parts."""


def request_of(*flags: str) -> RunRequest:
    return RunRequest.of(ICM.build_parser().parse_args(flags))


def test_every_flag_of_a_run_has_its_field() -> None:
    flags = {action.dest for action in ICM.build_parser()._actions} - {"help"}
    named = {each.name for part in PARTS for each in fields(part)} - (NOT_FLAGS - {"data", "model", "search"})
    assert named | {"alpha", "calibrate", "prior"} == flags


def test_without_flags_every_part_is_at_its_defaults() -> None:
    request = request_of()
    parts = (request.data, request.model, request.search, request.parts, request.output)
    assert parts == (DataRequest(), ModelRequest(), SearchSettings(search=DEFAULT), PartsRequest(), OutputRequest())
    assert request.objective == Objective(30.0)
    assert not request.parts.several


def test_random_seeds_are_asked_for_or_a_default() -> None:
    assert (request_of().seeds_by_default, request_of().search.num_seed) == (True, 8)
    asked = request_of("--num_seed", "8")
    assert (asked.seeds_by_default, asked.search.num_seed) == (False, 8)
    assert request_of().recorded_flags()["num_seed"] == asked.recorded_flags()["num_seed"] == 8


def test_flags_are_recorded_as_they_were_given() -> None:
    request = request_of("--data", "d.csv", "--map", "label=yes:true", "--alpha", "7", "--num_batches", "all")
    recorded = request.recorded_flags()
    parsed = vars(ICM.build_parser().parse_args([]))
    assert list(recorded) == [name for name in parsed if name != "search_by_default"]
    assert (recorded["data"], recorded["map"], recorded["alpha"]) == ("d.csv", "['label=yes:true']", 7)
    assert recorded["num_batches"] is None
    assert request.parts.several
    by_itself = replace(request, data=replace(request.data, group_by="none"))
    assert by_itself.recorded_flags() == {**recorded, "group_by": "none"}


@pytest.mark.parametrize("label_rest", [True, False])
def test_a_seed_of_a_comparison_records_all_flags_of_the_comparison(label_rest: bool) -> None:
    args = baselines.build_parser().parse_args(["--seeds", "1", "2", "--chat_model", "c", "--runs_dir", "r"])
    search = ComparisonRequest.of(args).searching(2, label_rest=label_rest)
    assert (search.search.seed, search.label_rest, search.output.runs_dir) == (2, label_rest, Path("r"))
    recorded = search.recorded_flags()
    assert (recorded["seed"], recorded["label_rest"], recorded["seeds"]) == (2, label_rest, "[1, 2]")
    given = [name for name in vars(args) if name != "search_by_default"]
    assert list(recorded) == [*given, "seed", "label_rest"]
