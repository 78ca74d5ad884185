"""Everything that a run is asked for, typed: made from parsed flags in one place, changed by dataclasses.replace.

Every field has the name of its flag: a new flag is a new field here, and no other module reads a parser's namespace.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from core.settings import KEPT_IN
from src.icm.columns import GroupedBy, Reading, parse_columns, parse_values
from src.icm.objective import Objective
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput, ConsistencyMode, Testbed
from src.pipeline.testbed_files import testbed_path
from src.results.doubt import Wanted

Plain = str | int | float | bool | None
PLANNED_AT_ONCE: Final = 4
"""Searches assumed to share the server's KV cache, however many run: plans decide scores (see planner)."""
TRACKERS: Final = ("wandb", "mlflow", "tensorboard")
"""The tools of contrib/tracking, which is imported only where one of them is asked for."""


@dataclass(frozen=True, slots=True)
class DataRequest:
    """Which claims, how their file is read, and how many of them one search labels."""

    testbed: str = "gsm8k"
    data: Path | None = None
    data_dir: Path = KEPT_IN / "data"
    batch_size: int = 256
    consistency: ConsistencyMode = "gold-free"
    columns: str | None = None
    map: Sequence[str] | None = None
    group_by: GroupedBy | None = None
    skip_bad_rows: bool = False
    known: Path | None = None
    gold_seeds: int = 0

    @classmethod
    def of(cls, args: Namespace) -> DataRequest:
        return cls(**_named(cls, args))

    def reading(self) -> Reading:
        """How --data is read, by --columns, --map and --group_by. Raises BadInput where these do not apply."""
        flags = {"columns": self.columns, "map": self.map, "group_by": self.group_by}
        given = [f"--{name}" for name, value in flags.items() if value is not None]
        file = testbed_path(self.testbed)
        told = f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} how a --data file is read"
        if file is not None and given:
            raise BadInput(f"{told}; here {file} does")
        if self.data is None and given:
            raise BadInput(f"{told}; a testbed's files are known")
        return Reading(
            columns={} if self.columns is None else parse_columns(self.columns),
            values=parse_values(self.map or ()),
            group_by=self.group_by,
        )

    def name_of(self, testbed: Testbed) -> str:
        """The name of the claims: their testbed's, or that of a --data file without a testbed."""
        return self.data.name if self.data is not None and not testbed.digest else testbed.name


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """Which model, and how it is reached. None: by the settings.

    base_url: of vLLM servers; without a flag, for the library.
    """

    model: str = "meta-llama/Llama-3.1-70B"
    use_vllm: bool | None = None
    direct: bool = False
    missing_label: str | None = None
    prompts_per_request: int | None = None
    read_timeout: float | None = None
    base_url: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class PartsRequest:
    """How many searches the data is split into. num_batches: None for as many as hold all claims."""

    num_batches: int | None = 1
    passes: int = 1
    at_once: int = PLANNED_AT_ONCE

    @property
    def several(self) -> bool:
        return self.num_batches != 1 or self.passes != 1


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """Where a run is kept, and what it shows while it runs. run: None for a name made from the settings. log_to: the
    tools that it is logged to (contrib/tracking).

    told: whether its opening and its summary are printed; the library, which has no flag for it, gives them back.
    """

    run: str | None = None
    runs_dir: Path = KEPT_IN / "runs"
    quiet: bool = False
    metrics_port: int | None = None
    told: bool = True
    log_to: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """Everything that a run is asked for.

    continue_as_before: as versions did that kept no layout at the end (see as_begun). continue_without_outside: as
    versions did that did not take over known labels of claims outside the other run's pool. bootstrap_from_halves: as
    in tables of versions in which the random labels of their bootstrapping did not follow --prior.
    doubt: which labels are not handed over; no part of what decides them. search_by_default: whether no search was
    named (searches.default_search). lookahead: proposals whose questions are asked early; None is auto. check,
    is_complete: see the flags.
    curves: whether curves.png is drawn. contradiction: why these flags cannot begin a run (see Parser), None where they
    can. seeds_by_default: whether search.num_seed was not asked for, so that no label is random where some are known.
    flags: all flags of the command as they were given, as text where JSON has no such type.
    """

    data: DataRequest
    model: ModelRequest
    search: SearchSettings
    objective: Objective
    parts: PartsRequest
    output: OutputRequest
    doubt: Wanted = field(default_factory=Wanted)
    search_by_default: bool = False
    label_rest: bool = False
    continue_from: str | None = None
    continue_as_before: bool = False
    continue_without_outside: bool = False
    bootstrap_from_halves: bool = False
    lookahead: int | None = None
    check: bool = False
    is_complete: bool = False
    curves: bool = True
    contradiction: str | None = None
    seeds_by_default: bool = True
    flags: Mapping[str, Plain] = field(default_factory=dict)

    @classmethod
    def of(cls, args: Namespace, contradiction: str | None = None) -> RunRequest:
        """From the parsed flags of a command; flags that the command does not have get their defaults."""
        search = _search(args)
        return cls(
            data=DataRequest.of(args),
            model=ModelRequest(**_named(ModelRequest, args)),
            search=search,
            objective=_objective(args),
            parts=PartsRequest(**_named(PartsRequest, args)),
            output=OutputRequest(**_named(OutputRequest, args)),
            doubt=Wanted(**_named(Wanted, args)),
            contradiction=contradiction,
            seeds_by_default=getattr(args, "num_seed", None) is None,
            flags={name: _plain(value) for name, value in vars(args).items() if name != "search_by_default"}
            | ({"num_seed": search.num_seed} if "num_seed" in args else {}),
            **{name: getattr(args, name) for name in _OF_THE_RUN if name in args},
        )

    def recorded_flags(self) -> dict[str, Plain]:
        """For run.json: the flags as they were given, except those that a command sets itself."""
        decided = {"group_by": self.data.group_by, "seed": self.search.seed, "label_rest": self.label_rest}
        return {**self.flags, **decided}


def _search(args: Namespace) -> SearchSettings:
    found = _named(SearchSettings, args)
    if found.get("num_seed", 0) is None:
        del found["num_seed"]
    if found.get("start_share", "") is None:
        found["start_share"] = "half" if args.prior is None else "prior"
    return SearchSettings(**found)


def _objective(args: Namespace) -> Objective:
    estimated = args.prior == "auto"
    return Objective(args.alpha, args.calibrate, None if estimated else args.prior, estimate_prior=estimated)


_OF_THE_RUN: Final = ("search_by_default", "label_rest", "continue_from", "lookahead", "check", "is_complete")


def _named(part: type[Any], args: Namespace) -> dict[str, Any]:
    """The flags that have the names of the part's fields."""
    return {each.name: getattr(args, each.name) for each in fields(part) if each.name in args}


def _plain(value: Any) -> Plain:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
