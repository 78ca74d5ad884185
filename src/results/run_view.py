"""What a page shows of one run, computed and turned into text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from src.icm.consistency import Label
from src.icm.label_names import balance_of, counts_of, describe_counts
from src.icm.objective import LogOdds
from src.results.by_class import measure_text, name_of_f1
from src.results.charts import Chart, calibration_chart, contrast_chart, coverage_chart, curve_charts, margin_chart
from src.results.costs import Bill, usage_of
from src.results.curves import curves_of
from src.results.diagnosis import diagnose
from src.results.findings import Finding, Verdict
from src.results.prices import PriceFile, bill_of
from src.results.rows import ABSTAINED
from src.results.run_record import PROPOSALS, LabelledClaim, RunRecord
from src.results.tables import Confusion, ResultRow, confusion_of, results_of
from src.results.text import duration, number, visible, whole

LONG = 320  # characters of a claim that are shown; the rest unfolds


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure."""

    name: str
    figure: str
    under: str


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A claim as the page shows it, as text."""

    row: str
    question: str
    text: str
    rest: str
    label: str
    gold: str
    log_odds: str
    zero_shot: str
    by: str
    label_key: str
    agrees_key: str
    mark: str
    margin: str


@dataclass(frozen=True, slots=True)
class PartRow:
    """One batch of a run of several."""

    name: str
    cells: tuple[str, ...]
    state: str


@dataclass(frozen=True)
class RunView:
    """One run's section of the page."""

    name: str
    summary: str
    warning: str | None
    tiles: list[Tile]
    results: list[ResultRow]
    confusion: Confusion | None
    parts: list[PartRow]
    findings: list[Finding]
    charts: list[Chart]
    calibration: list[Chart]
    claims: list[ClaimRow]
    names: tuple[str, ...]
    f1: str
    margin_note: str
    rebuilds: bool
    settings: list[tuple[str, str]]
    engine: list[tuple[str, str]]
    costs: list[tuple[str, str]]
    bill: Bill | None


def view_of(run: RunRecord, prices: PriceFile | None = None) -> RunView:
    """The page's section about one run."""
    curves = [(part.name, curves_of(part.journal, part.gold)) for part in run.searches if part.journal]
    found = [
        finding
        for part in run.searches
        for finding in (_named(part.name, diagnose(part)) if run.parts else diagnose(part))
    ]
    if run.parts:
        found = [finding for finding in found if finding.verdict in (Verdict.PROBLEM, Verdict.WATCH)] or found[:5]
    return RunView(
        name=run.name,
        summary=_summary(run),
        warning=(run.result or {}).get("warning"),
        tiles=_tiles(run),
        results=results_of(run),
        confusion=confusion_of(run),
        parts=[_part_row(part) for part in run.parts],
        findings=found,
        charts=curve_charts(curves, visible(balance_of(run.names))) if curves else [],
        calibration=[
            chart
            for chart in (calibration_chart(run), margin_chart(run), contrast_chart(run), coverage_chart(run))
            if chart is not None
        ],
        claims=[_claim_row(run, claim) for claim in run.claims],
        names=run.names,
        f1=name_of_f1(run.names),
        margin_note=_margin_note(run),
        rebuilds=len(curves) == 1 and bool(curves[0][1].rebuilds),
        settings=[(name, _shown(value)) for name, value in run.settings.items()]
        + [("--prior auto", part.estimate.sentence()) for part in run.searches if part.estimate is not None],
        engine=_engine(run),
        costs=_costs(run),
        bill=bill_of(run, prices),
    )


def _summary(run: RunRecord) -> str:
    settings = run.settings
    said = [f"{run.testbed}, {len(run.pool)} claims in the pool", run.model]
    said += [f"{name} {settings[name]}" for name in ("alpha", "seed", "calibrate", "prior") if name in settings]
    said.append(f"search {run.search}")
    if run.started:
        said.append(f"started {_clock(run.started)}")
    said.append(f"finished {_clock(run.finished)}" if run.finished else "not finished")
    if run.skipped:
        said.append(f"{run.skipped} damaged lines left out")
    return "; ".join(map(str, said))


def _clock(stamp: str) -> str:
    """'2026-11-21 19:23 +0000' of '2026-11-21T19:23:51+0000'."""
    return f"{stamp[:10]} {stamp[11:16]} {stamp[19:]}" if len(stamp) > 19 else stamp


def _tiles(run: RunRecord) -> list[Tile]:
    tiles, steps = [], 0
    icm = results_of(run)[0]
    if icm.interval:
        low, high = icm.interval
        tiles.append(
            Tile(
                "agreement with gold", f"{icm.share:.3f}", f"{icm.agreeing} of {icm.compared}; {low:.2f} to {high:.2f}"
            )
        )
    labelled = sum(claim.searched for claim in run.claims)
    counts = describe_counts(counts_of((claim.label for claim in run.claims if claim.searched), run.names))
    known = sum(claim.is_known for claim in run.pool)
    if run.pool:
        more = f"; {known} more are known" if known else ""
        tiles.append(Tile("labelled by the search", whole(labelled), f"of {len(run.pool)} in the pool; {counts}{more}"))
    if without := sum(claim.abstained for claim in run.claims):
        given = sum(claim.label is not None for claim in run.claims)
        tiles.append(Tile("labels handed over", whole(given - without), f"of {given}; the others are too doubtful"))
    journals = [part.journal for part in run.searches if part.journal]
    if journals:
        last = sum(journal[-1]["U"] for journal in journals) / len(journals)
        steps = sum(record["event"] in PROPOSALS for journal in journals for record in journal)
        accepted = sum(
            record.get("accepted", False) for journal in journals for record in journal if record["event"] in PROPOSALS
        )
        tiles.append(
            Tile("U(D)" if len(journals) == 1 else "U(D), mean of batches", f"{last:,.2f}", "higher is more coherent")
        )
        tiles.append(Tile("iterations", whole(steps), f"{accepted} changed labels"))
    usage = usage_of(run)
    tiles.append(
        Tile(
            "time",
            duration(usage.seconds),
            f"{usage.seconds / steps:.2f} s a step" if steps else "of the search",
        )
    )
    if usage.hit_rate is not None:
        tiles.append(
            Tile("prefix cache hit rate", f"{usage.hit_rate:.3f}", f"{whole(usage.computed_tokens)} tokens computed")
        )
    return tiles


def _claim_row(run: RunRecord, claim: LabelledClaim) -> ClaimRow:
    text = visible(claim.choice)
    if run.compares and claim.choice_2:
        text += f"\n— better than: {visible(claim.choice_2)}"
    rest = ""
    if len(text) > LONG:
        text, rest = text[:LONG], text[LONG:]
    agrees, sureness = claim.agrees, run.sureness(claim)
    return ClaimRow(
        row=str(claim.row),
        question=visible(claim.question),
        text=text,
        rest=rest,
        label=_label(run, claim.label),
        gold=_label(run, claim.gold) + (" ✗" if agrees is False else ""),
        log_odds=_odds(claim.log_odds),
        zero_shot=_odds(claim.zero_shot),
        by="–" if claim.label is None else ABSTAINED if claim.abstained else visible(claim.by),
        label_key="-" if claim.label is None else str(int(claim.label)),
        agrees_key={True: "1", False: "0", None: "-"}[agrees],
        mark={True: "yes", False: "no", None: ""}[agrees],
        margin="" if sureness is None else f"{sureness:.3f}",
    )


def _margin_note(run: RunRecord) -> str:
    if run.num_labels > 2:
        first = run.names[0]
        order = f"Log-odds in nats, each label's against {first}, in the order {', '.join(run.names[1:])}; "
        return order + "the margin is log P of the likeliest label less that of all others together."
    if run.parts and run.shift:
        return f"Log-odds in nats; the margin is their distance from {run.offset_in_words}."
    against = f", {run.offset_in_words}" if run.shift else ""
    return f"Log-odds in nats; the margin is their distance from {run.shift:.2f}{against}."


def _odds(log_odds: LogOdds | None) -> str:
    return ", ".join(map(number, log_odds)) if isinstance(log_odds, tuple) else number(log_odds)


def _part_row(part: RunRecord) -> PartRow:
    icm = results_of(part)[0]
    steps = sum(record["event"] in PROPOSALS for record in part.journal)
    cells = (
        str(sum(claim.searched for claim in part.claims)),
        number(part.journal[-1]["U"]) if part.journal else "–",
        f"{icm.share:.3f} ({icm.agreeing} of {icm.compared})" if icm.compared else "–",
        measure_text(icm.by_class.balanced, 3),
        measure_text(icm.by_class.f1, 3),
        str(steps),
        number(part.cost.get("seconds"), 0),
    )
    return PartRow(part.name, cells, "finished" if part.finished else "in progress")


def _named(name: str, found: Sequence[Finding]) -> list[Finding]:
    return [replace(one, title=f"{name}: {one.title}") for one in found]


def _label(run: RunRecord, label: Label) -> str:
    return "–" if label is None else visible(run.names[label])


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _engine(run: RunRecord) -> list[tuple[str, str]]:
    rows = [(name, _shown(value)) for name, value in run.engine.items() if value not in ("", None)]
    for name, value in run.environment.items():
        if name == "packages" and isinstance(value, dict):
            rows += [(str(package), str(version)) for package, version in value.items()]
        else:
            rows.append((str(name), _shown(value)))
    return rows


def _costs(run: RunRecord) -> list[tuple[str, str]]:
    usage = usage_of(run)
    rows = [
        ("prompt tokens", whole(usage.prompt_tokens)),
        ("of the search, found cached", whole(usage.cached_tokens)),
        ("of the search, computed", whole(usage.computed_tokens)),
        ("prefix cache hit rate", number(usage.hit_rate, 3)),
        ("output tokens, one an answer", whole(usage.output_tokens)),
        ("requests", whole(usage.requests)),
        ("questions of the search", whole(usage.asked)),
        ("of them from the response cache", whole(usage.from_cache)),
        ("seconds of the search", number(usage.seconds, 1)),
    ]
    if run.left_out:
        rows.append(("claims of the file left out", whole(run.left_out)))
    if not usage.complete:
        rows.append(("note", "resumed or not finished: requests of earlier processes are not counted"))
    return rows
