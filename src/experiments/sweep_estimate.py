"""What the cells of a sweep will ask, before any of them runs (`icm run FILE --dry_run`).

Questions are estimated from the settings and the size of the pool, or taken from finished cells that differ in nothing
but their seed. Tokens need the model's tokenizer: where a server answers, the mean demonstration is measured, and a
question is taken to show as many of them as searches have shown on average.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Final

from core.errors import APIError
from src.experiments.baselines import ComparisonRequest
from src.experiments.loading import pools_of
from src.experiments.sweep import Engines, Planned, has_result, planned
from src.experiments.sweep_cells import Sweep
from src.experiments.sweep_results import costs_of
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.baselines import BASELINES
from src.pipeline.labelling import Labelling, Pool
from src.results.side_by_side import Grid, as_text
from src.results.text import counted, whole

OF_ANNEALING: Final = 1.5
"""Questions of a search by annealing, as a multiple of the pool's size squared. Searches of pools of 24 to 256 claims
asked 0.5 to 2.6 (benchmarks/results/variants-*.json, searches-qwen1.5b-h200.json); of random answers and
of a model with random weights, 1 to 6 times the estimate."""
SHOWN_BY_ANNEALING: Final = 0.5
"""Demonstrations that its average question shows, as a share of the pool, which grows as it goes on."""
OF_OTHERS: Final = 12
"""Questions for each claim of the pool of a search that nothing is known of here."""
HOW: Final = """Questions from the settings. Searches by annealing were measured to ask a third of them to twice as
many, and up to 6 times as many where the model had random weights; the others ask about so many at most. Tokens: of
the mean demonstration, as many as searches have shown. Finished cells of other seeds tell both better. What several
cells ask alike is asked once, which is not counted here."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """questions: of one cell. shown: demonstrations in all of them together, 0 where it is not known. basis: of what
    it was made."""

    questions: float
    shown: float
    basis: str = "settings"

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.questions + other.questions, self.shown + other.shown, self.basis)

    def times(self, count: int) -> Estimate:
        """So many of them."""
        return Estimate(self.questions * count, self.shown * count, self.basis)


@dataclass(frozen=True, slots=True)
class CellEstimate:
    """tokens: sent, None without a tokenizer. error: why nothing can be said of this cell."""

    name: str
    claims: int
    questions: float
    tokens: float | None
    basis: str
    error: str = ""


def of_search(size: int, settings: SearchSettings) -> Estimate:
    """One search over a pool of `size` claims, and its claims once without demonstrations."""
    cap = size - 1 if settings.context_cap is None else min(settings.context_cap, size - 1)
    if settings.search == "annealing":
        grown = min(size, settings.num_seed + settings.K)  # an iteration takes in one claim at most
        asked = OF_ANNEALING * grown**2
        if settings.stop == "K":
            asked = max(asked, settings.K)
        asked = min(asked, (settings.K + 2) * (size + 1))
        shown = min(SHOWN_BY_ANNEALING * size, cap)
    else:
        rounds = {
            "bootstrapping": settings.bootstrap_rounds + 1,
            "ascent": settings.ascent_questions,
        }
        asked, shown = rounds.get(settings.search, OF_OTHERS) * size, cap
    return Estimate(asked, asked * shown) + Estimate(size, 0)


def of_row(row: str, size: int, held_out: int, each: Planned) -> Estimate:
    """One row of a comparison: the pool's labels, and the held-out claims after them."""
    assert each.comparison is not None
    pool, after = Estimate(size, size * (size - 1)), Estimate(held_out, held_out * size)
    if row.startswith("zero-shot"):
        return Estimate(size + held_out, 0)
    rounds = {"bootstrap": each.comparison.rounds, "bootstrap-consistent": each.comparison.rounds}
    rounds["bootstrap-best"] = each.comparison.rounds * each.comparison.restarts
    if row == "icm":
        return of_search(size, each.request.search) + pool + after
    return pool.times(rounds.get(row, 0) + 1) + after


def of_cell(each: Planned, pools: Sequence[Pool]) -> Estimate:
    """A cell from its settings and its pools."""
    size = [len(pool.claims) for pool in pools]
    if each.comparison is None:
        passes = each.request.parts.passes
        found = Estimate(0, 0)
        for count in size:
            found += of_search(count, each.request.search).times(passes)
        if each.request.label_rest:
            rest = len(pools[0].rest)
            found += Estimate(rest, rest * size[0])
        return found
    held_out = _held_out(each.comparison, pools)
    found = Estimate(0, 0)
    for row in _rows(each.comparison):
        found += of_row(row, size[0], held_out, each)
    return found.times(len(set(each.comparison.seeds)))


def _rows(request: ComparisonRequest) -> Sequence[str]:
    return request.rows or [
        name for name, row in BASELINES.items() if not (row.on_request or row.needs_chat or row.needs_known)
    ]


def _held_out(request: ComparisonRequest, pools: Sequence[Pool]) -> int:
    """Held-out claims; those of a --test_data file are taken to be as many as the data's others."""
    return request.test_size or len(pools[0].rest)


async def dry_run(sweep: Sweep, at_once: int | None = None) -> int:
    """Print every cell with what it will ask. Nothing is written. Returns the exit code: 1 if a cell cannot run."""
    folder, cells, engines = planned(sweep, at_once)
    engines.cached = False
    print(f"{sweep.size_in_words}; in {folder}\n", file=sys.stderr)
    finished = {each.cell.name for each in cells if has_result(each, sweep)}
    measured = _measured(sweep, folder, finished)
    unreachable: dict[str, str] = {}
    try:
        estimates = [await _estimate(each, sweep, engines, finished, measured, unreachable) for each in cells]
    finally:
        await engines.aclose()
    print(as_text([_grid(estimates, finished)]))
    print(f"\n{HOW}")
    for model, reason in unreachable.items():
        print(f"no tokens for {model}: {reason}")
    for estimate in estimates:
        if estimate.error:
            print(f"{estimate.name}: {estimate.error}", file=sys.stderr)
    return 1 if any(estimate.error for estimate in estimates) else 0


async def _estimate(
    each: Planned,
    sweep: Sweep,
    engines: Engines,
    finished: set[str],
    measured: Mapping[tuple[str, ...], list[Mapping[str, float]]],
    unreachable: dict[str, str],
) -> CellEstimate:
    name, parts = each.cell.name or sweep.loaded.path.stem, each.request.parts
    try:
        request = replace(each.request, label_rest=True)
        pools = pools_of(request, parts.num_batches if each.comparison is None else 1)
        claims = sum(len(pool.claims) for pool in pools)
        if each.cell.name in finished:
            return CellEstimate(name, claims, 0, None, "finished")
        known = measured.get(_key(sweep, each))
        if known:
            basis = f"{len(known)} finished"
            asked, sent = (fmean(cost.get(key, 0) for cost in known) for key in ("asked", "tokens_sent"))
            later = _asked_later(each, pools)
            return CellEstimate(name, claims, asked + later, sent * (asked + later) / max(1, asked), basis)
        estimate = of_cell(each, pools)
        tokens = await _tokens(each, pools[0], estimate, engines, unreachable)
    except (BadInput, OSError) as error:
        return CellEstimate(name, 0, 0, None, "", " ".join(str(error).split()))
    return CellEstimate(name, claims, estimate.questions, tokens, estimate.basis)


def _asked_later(each: Planned, pools: Sequence[Pool]) -> int:
    """Questions of a cell that its recorded costs, of searches and of rows' labels of the pool, do not count."""
    if each.comparison is not None:
        return len(_rows(each.comparison)) * _held_out(each.comparison, pools) * len(set(each.comparison.seeds))
    rest = len(pools[0].rest) if each.request.label_rest else 0
    return sum(len(pool.claims) for pool in pools) + rest


async def _tokens(
    each: Planned, pool: Pool, estimate: Estimate, engines: Engines, unreachable: dict[str, str]
) -> float | None:
    """Prompt tokens of a cell; None where its engine cannot be asked."""
    if each.request.model.direct:
        unreachable.setdefault(each.request.model.model, "its tokenizer is loaded with the model (--direct)")
    if each.request.model.model in unreachable:
        return None
    try:
        async with engines.opened(each.request) as api:
            labelling = await Labelling.open(replace(pool, rest=()), api)
    except APIError as error:
        unreachable[each.request.model.model] = " ".join(str(error).split())
        return None
    costs = labelling.planned_for(None).pool.problem.costs
    return estimate.shown * fmean(costs.demonstrations) + estimate.questions * fmean(costs.questions)


def _measured(sweep: Sweep, folder: Path, finished: set[str]) -> dict[tuple[str, ...], list[Mapping[str, float]]]:
    """Costs of finished cells by the settings that are no seed."""
    found: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for cell in sweep.cells:
        if cell.name in finished:
            costs = costs_of(folder / cell.name, sweep.loaded.experiment.command)
            found.setdefault(tuple(cell.values[name] for name in sweep.columns), []).append(costs)
    return found


def _key(sweep: Sweep, each: Planned) -> tuple[str, ...]:
    return tuple(each.cell.values[name] for name in sweep.columns)


def _grid(estimates: Sequence[CellEstimate], finished: set[str]) -> Grid:
    left = [each for each in estimates if each.basis != "finished"]
    tokens = [each.tokens for each in left if each.tokens is not None]
    partly = ", at least" if len(tokens) < len(left) else ""
    total = [
        "all that is left" + partly,
        "",
        whole(sum(each.questions for each in left)),
        whole(sum(tokens) or None),
        "",
    ]
    return Grid(
        "Expected",
        f"{counted(len(left), 'cell')} to run" + (f", {len(finished)} finished" if finished else ""),
        ["cell", "claims", "questions", "prompt tokens", "from"],
        [
            [
                each.name,
                whole(each.claims) if each.claims else "–",
                "–" if each.error else _about(each.questions),
                "–" if each.tokens is None else _about(each.tokens),
                "cannot run" if each.error else each.basis,
            ]
            for each in estimates
        ]
        + [total],
    )


def _about(value: float) -> str:
    """Two digits of it: more would say too much."""
    return whole(float(f"{value:.2g}"))
