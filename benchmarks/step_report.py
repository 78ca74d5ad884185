"""The results of benchmarks/step.py: its JSON, and the numbers made from it. Nothing here asks a model.

Sizes are labelled claims (N), times seconds, tokens prompt tokens, memory and requests bytes. None: unknown to the
engine or the operating system.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import numpy as np
from pydantic import TypeAdapter, ValidationError

from core.files import write_atomically
from src.icm.planner import TokenCosts, pays_to_rebuild
from src.icm.prefix_tree import TreeLayout

CASES: Final = {
    "a": "upstream, request a prompt",
    "b": "upstream, one batch",
    "c": "tree, cold",
    "d0": "a new claim's question",
    "d": "tree, one label appended",
    "e": "tree, all cached",
    "f": "both labels of one claim",
}
"""Every case and its short name, in the order of the table. d0 is measured along with d."""


@dataclass(frozen=True)
class Repetition:
    """One measurement. prompts: those that the engine was asked, equal ones once."""

    seconds: float
    cpu_seconds: float
    prompts: int
    prompt_tokens: int
    computed_tokens: int | None
    requests: int
    retries: int
    request_bytes: int | None
    peak_bytes: int | None


@dataclass
class CaseResult:
    """All repetitions of one case at one nominal size.

    Tokens of a demonstration (question, label, separator) and of a question as measured in the claims of the case, mean
    and largest. not_measured: why there is no repetition, or fewer than asked for; "" where all are there.
    """

    case: str
    size: int
    repetitions: list[Repetition] = field(default_factory=list)
    not_measured: str = "not reached"
    demonstration_tokens: float = 0.0
    demonstration_max: int = 0
    question_tokens: float = 0.0
    question_max: int = 0


@dataclass
class RunSample:
    """Consecutive steps of a simulated run around one size, and what building its state cold cost.

    sizes: labels after each step. built_size, built: the cold evaluation of a new tree (or upstream's order) that the
    steps started from.
    """

    layout: str
    size: int
    built_size: int
    built: Repetition
    sizes: list[int]
    steps: list[Repetition]


@dataclass
class RunResult:
    """Samples of a whole run from `first` to `until` labels; see step_run for what is assumed.

    rebuilds: sizes at which the tree is built anew.
    """

    first: int
    until: int
    rebuilds: list[int]
    samples: list[RunSample] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    """Why a layout lacks sizes."""


@dataclass
class Check:
    """A bound on token counts, as --quick tests it."""

    name: str
    value: float
    bound: float
    holds: bool


@dataclass
class Report:
    """Everything that one call of step.py measured, as in its JSON."""

    title: str = ""
    notes: list[str] = field(default_factory=list)
    date: str = ""
    commit: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    kv_cache_tokens: int | None = None
    block_tokens: int | None = None
    cases: list[CaseResult] = field(default_factory=list)
    run: RunResult | None = None
    checks: list[Check] = field(default_factory=list)
    benchmark: str = "step"
    format: int = 1

    def case(self, case: str, size: int) -> CaseResult:
        """The entry of one case and size; it must be there."""
        return next(entry for entry in self.cases if (entry.case, entry.size) == (case, size))


_JSON: Final = TypeAdapter(Report)


def write_json(report: Report, path: Path) -> None:
    """Write atomically, so that an interrupt leaves the last whole file."""
    write_atomically(path, _JSON.dump_json(report, indent=1) + b"\n")


def read_json(path: Path) -> Report:
    """Raises OSError, or ValueError in one line for a file that step.py did not write."""
    try:
        return _JSON.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path.name} is not a result of step.py ({place}: {first['msg']})") from None


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """p of the least-squares fit value = c * size ** p; None with fewer than two sizes or a value that is not > 0."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def middle(entry: CaseResult, value: Callable[[Repetition], float | None]) -> float | None:
    """Median over the repetitions, None where nothing or not everything was measured."""
    values = [value(r) for r in entry.repetitions]
    known = [v for v in values if v is not None]
    return median(known) if known and len(known) == len(values) else None


def per_unit(entry: CaseResult) -> float | None:
    """Computed tokens / (prompts * (demonstration + question)): an appended label costs at least 1."""
    unit = entry.demonstration_tokens + entry.question_tokens
    return middle(entry, lambda r: None if r.computed_tokens is None else r.computed_tokens / (r.prompts * unit))


def growth(report: Report, case: str, value: Callable[[Repetition], float | None]) -> float | None:
    """The exponent of a case's medians over N."""
    found = [(entry.size, middle(entry, value)) for entry in report.cases if entry.case == case]
    points = [(size, v) for size, v in found if v is not None]
    return exponent([size for size, _ in points], [v for _, v in points]) if points else None


# Whole runs


def fixed_rebuilds(first: int, until: int, every: int) -> list[int]:
    """Sizes at which a run from `first` labels rebuilds its tree if it does after every `every` appended labels."""
    return list(range(first + every, until, every))


def planned_rebuilds(first: int, until: int, costs: TokenCosts) -> list[int]:
    """Sizes at which the search's planner rebuilds the tree of a run that only appends, until it has `until` labels."""
    groups, rng = [str(claim) for claim in range(until)], np.random.default_rng(0)
    sizes = []
    layout = TreeLayout.build(range(first), groups, rng)
    for size in range(first, until):
        if pays_to_rebuild(costs, layout, spent_on_tail=0):
            sizes.append(size)
            layout = TreeLayout.build(range(size), groups, rng)
        layout = layout.append(size)
    return sizes


def interpolate(sizes: Sequence[float], values: Sequence[float], at: Iterable[float]) -> list[float]:
    """Values between measured sizes: straight lines in log-log, continued beyond both ends along the fit of all.

    In log-log, because chords of a quadratic would lie above it and overstate what grows faster. Values that are not
    positive are interpolated over log size instead; those of equal sizes are averaged.
    """
    wanted = np.log(np.asarray([float(x) for x in at], dtype=np.float64))
    distinct = sorted(set(sizes))
    ys = np.array([fmean(v for x, v in zip(sizes, values, strict=True) if x == size) for size in distinct])
    xs = np.log(np.asarray(distinct, dtype=np.float64))
    logarithmic = bool((ys > 0).all())
    if logarithmic:
        ys = np.log(ys)
    found = np.interp(wanted, xs, ys)
    if len(distinct) > 1:
        slope = np.polyfit(xs, ys, 1)[0]
        found += slope * (np.minimum(wanted - xs[0], 0) + np.maximum(wanted - xs[-1], 0))
    result: list[float] = (np.exp(found) if logarithmic else found).tolist()
    return result


@dataclass(frozen=True)
class RunTotal:
    """The cost of a whole run. measured_to: the largest size that was sampled; beyond it costs are extrapolated."""

    seconds: float
    cpu_seconds: float
    prompt_tokens: float
    computed_tokens: float | None
    request_bytes: float | None
    rebuilds: int
    rebuild_seconds: float
    rebuild_computed: float | None
    measured_to: float


def run_total(run: RunResult, layout: str) -> RunTotal | None:
    """The steps from `first` to `until` labels, the first evaluation and, for the tree, every rebuild.

    Costs between sampled sizes are interpolated and summed label by label (the trapezoid rule with a step of one).
    """
    samples = sorted((s for s in run.samples if s.layout == layout and s.steps), key=lambda s: s.size)
    if not samples:
        return None
    at = [fmean(sample.sizes) for sample in samples]
    built_at = [float(sample.built_size) for sample in samples]
    steps = range(run.first + 1, run.until + 1)
    rebuilds = run.rebuilds if layout == "tree" else []

    def known(value: Callable[[Repetition], float | None]) -> tuple[float, float] | None:
        """(everything, of that rebuilds); None if unknown."""
        every = [[value(step) for step in sample.steps] for sample in samples]
        built = [value(sample.built) for sample in samples]
        per_step = [[v for v in values if v is not None] for values in every]
        cold = [v for v in built if v is not None]
        if len(cold) < len(built) or any(len(a) < len(b) for a, b in zip(per_step, every, strict=True)):
            return None
        again = sum(interpolate(built_at, cold, rebuilds))
        start = sum(interpolate(built_at, cold, [run.first]))
        return sum(interpolate(at, [fmean(v) for v in per_step], steps)) + again + start, again

    seconds, cpu, prompt = (
        known(lambda r: r.seconds),
        known(lambda r: r.cpu_seconds),
        known(lambda r: r.prompt_tokens),
    )
    computed, sent = known(lambda r: r.computed_tokens), known(lambda r: r.request_bytes)
    assert seconds is not None
    assert cpu is not None
    assert prompt is not None
    return RunTotal(
        seconds=seconds[0],
        cpu_seconds=cpu[0],
        prompt_tokens=prompt[0],
        computed_tokens=None if computed is None else computed[0],
        request_bytes=None if sent is None else sent[0],
        rebuilds=len(rebuilds),
        rebuild_seconds=seconds[1],
        rebuild_computed=None if computed is None else computed[1],
        measured_to=max(samples[-1].sizes),
    )


# What --quick asserts


def token_checks(report: Report) -> list[Check]:
    """Bounds on computed tokens, never on times. B: the engine's block, to whose borders cached prefixes are cut."""
    block = report.block_tokens or 16
    checks = []
    for size in sorted({entry.size for entry in report.cases}):
        found = {entry.case: entry for entry in report.cases if entry.size == size and entry.repetitions}

        def computed(case: str, found: dict[str, CaseResult] = found) -> float | None:
            return middle(found[case], _computed) if case in found else None

        def at_most(name: str, value: float | None, bound: float, size: int = size) -> None:
            known = math.nan if value is None else value
            checks.append(Check(f"N = {size}: {name}", known, round(bound, 2), known <= bound))

        if "c" in found:
            entry = found["c"]
            demonstrations = 1.2 * size * math.log2(size) * entry.demonstration_tokens
            bound = demonstrations + size * entry.question_tokens + 2 * size * block
            at_most(
                f"cold tree <= 1.2 N log2 N demonstrations + N questions + 2 N B, B = {block}", computed("c"), bound
            )
        for case, name in (("d", "appended label"), ("f", "both labels")):
            if case in found:
                entry = found[case]
                cost = entry.demonstration_max + entry.question_max + block
                worst = max((r.computed_tokens or 0) / r.prompts for r in entry.repetitions)
                missing = computed(case) is None
                at_most(f"{name}: a prompt <= demonstration + question + B", None if missing else worst, cost)
        if "e" in found:
            prompts = found["e"].repetitions[0].prompts
            at_most("all cached <= N B", computed("e"), prompts * block)
        if "c" in found and "b" in found:
            at_most("cold tree below upstream's order", computed("c"), computed("b") or 0.0)
        if "b" in found:
            at_most("upstream in one batch: requests", found["b"].repetitions[0].requests, 1)
        if "a" in found:
            at_most("upstream one by one: prompts a request", size / found["a"].repetitions[0].requests, 1)
        if "a" in found and "b" in found:
            shares = [(computed(case) or math.nan) / found[case].repetitions[0].prompt_tokens for case in "ab"]
            at_most("one by one against one batch, share computed, either way <= 1.25", _either_way(*shares), 1.25)
    return checks


def _computed(repetition: Repetition) -> float | None:
    return repetition.computed_tokens


def _either_way(first: float, second: float) -> float:
    return max(first / second, second / first) if first and second else math.nan
