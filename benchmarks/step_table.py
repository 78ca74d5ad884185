"""The tables that benchmarks/step.py prints, at most 120 columns wide."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.step_report import (
    CASES,
    CaseResult,
    Report,
    RunResult,
    RunTotal,
    growth,
    middle,
    per_unit,
    run_total,
)

_HEAD = (
    f"{'N':>4}  {'case':<30}{'reps':>4}  {'seconds (min - max)':<21}{'prompt tok':>11}{'computed':>11}{'unit':>6}"
    f"{'CPU s':>7}{'MB sent':>8}{'peak MB':>8}{'tok/s':>6}"
)
_LEGEND = (
    "Medians. computed: prompt tokens not found in the prefix cache. unit: computed / (prompts x (demonstration +",
    "question)). CPU s, peak MB: the client's. MB sent: request bodies. tok/s: prompt tokens a second, cached or not.",
)


def tables(report: Report) -> str:
    """Everything: heading, cases, growth, whole run, checks."""
    parts = [heading(report), case_table(report), growth_table(report)]
    if report.run is not None:
        parts.append(run_table(report.run))
    if report.checks:
        parts.append(check_table(report))
    return "\n\n".join(part for part in parts if part)


def heading(report: Report) -> str:
    """What was measured, and on which engine and machine."""
    engine, machine = report.engine, report.hardware
    gpus = machine.get("gpus") or []
    shown = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU seen"
    lines = [
        report.title,
        f"{engine.get('model', '?')} on {engine.get('kind', '?')} {engine.get('version', '')}",
        f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {shown}; {report.date}, commit "
        f"{report.commit or 'unknown'}",
        f"KV cache: {_count(report.kv_cache_tokens)} tokens in blocks of {report.block_tokens or '?'}",
        *report.notes,
    ]
    return "\n".join(line for line in lines if line)


def case_table(report: Report) -> str:
    """One line a case and size."""
    order = list(CASES)
    lines = [_HEAD]
    reasons = []
    for entry in sorted(report.cases, key=lambda e: (e.size, order.index(e.case))):
        start = f"{entry.size:>4}  {_name(entry.case):<30}"
        if not entry.repetitions:
            lines.append(f"{start}   -  not measured: {entry.not_measured}"[:120])
            continue
        few = "*" if entry.not_measured else " "
        if entry.not_measured:
            reasons.append(f"* N = {entry.size}, {entry.case}: fewer repetitions than asked for ({entry.not_measured})")
        lines.append(f"{start}{len(entry.repetitions):>3}{few}  {_cells(entry)}")
    return "\n".join([*lines, *_LEGEND, *(reason[:120] for reason in reasons)])


def _cells(entry: CaseResult) -> str:
    seconds = [r.seconds for r in entry.repetitions]
    middle_seconds = middle(entry, lambda r: r.seconds) or 0.0
    unit, speed = per_unit(entry), middle(entry, lambda r: r.prompt_tokens / r.seconds)
    sent = middle(entry, lambda r: r.request_bytes)
    spread = f"{_seconds(middle_seconds)} ({_seconds(min(seconds))} - {_seconds(max(seconds))})"
    return (
        f"{spread:<21}{_count(middle(entry, lambda r: r.prompt_tokens)):>11}"
        f"{_count(middle(entry, lambda r: r.computed_tokens)):>11}{'?' if unit is None else f'{unit:.2f}':>6}"
        f"{_seconds(middle(entry, lambda r: r.cpu_seconds) or 0.0):>7}{_mega(sent):>8}"
        f"{_mega(middle(entry, lambda r: r.peak_bytes), 0):>8}{_short(speed):>6}"
    )


def growth_table(report: Report) -> str:
    """Exponents of seconds and of computed tokens over N."""
    lines = [f"{'growth with N: cost ~ N^p':<36}{'p of seconds':>13}{'p of computed tokens':>22}"]
    for case in CASES:
        seconds = growth(report, case, lambda r: r.seconds)
        if seconds is None:
            continue
        # With a full cache, computed tokens depend on the lengths modulo the block, and do not grow as a power.
        computed = None if case == "e" else growth(report, case, lambda r: r.computed_tokens)
        lines.append(f"      {_name(case):<30}{seconds:>13.2f}{'-' if computed is None else f'{computed:.2f}':>22}")
    return "\n".join(lines) if len(lines) > 1 else ""


def run_table(run: RunResult) -> str:
    """A finished run in both layouts, and their ratio."""
    lines = [
        f"A whole run, {run.first} to {run.until} labels: every proposal accepted, nothing repaired; a step is one "
        "question and one evaluation",
        f"{'':<34}{'seconds':>12}{'prompt tokens':>18}{'computed tokens':>18}{'client CPU s':>14}{'MB sent':>10}",
    ]
    totals = {layout: run_total(run, layout) for layout in ("tree", "upstream")}
    rows: list[tuple[str, Callable[[RunTotal], float | None], int, float]] = [
        ("seconds", lambda t: t.seconds, 12, 1.0),
        ("prompt", lambda t: t.prompt_tokens, 18, 1.0),
        ("computed", lambda t: t.computed_tokens, 18, 1.0),
        ("cpu", lambda t: t.cpu_seconds, 14, 1.0),
        ("sent", lambda t: t.request_bytes, 10, 1e-6),
    ]
    for layout, name in (("tree", "tree"), ("upstream", "upstream's order, batched")):
        total = totals[layout]
        if total is None:
            lines.append(f"{name:<34}not measured {run.not_measured.get(layout, '')}"[:120])
            continue
        cells = []
        for key, value, width, scale in rows:
            found = value(total)
            whole = key in ("prompt", "computed")
            text = "?" if found is None else _count(found) if whole else f"{found * scale:,.1f}"
            cells.append(f"{text:>{width}}")
        lines.append(f"{name:<34}{''.join(cells)}")
        if layout == "tree":
            again = "?" if total.rebuild_computed is None else _count(total.rebuild_computed)
            lines.append(
                f"{f'  of it {total.rebuilds} rebuilds':<34}{total.rebuild_seconds:>12,.1f}{'':>18}{again:>18}"
            )
    tree, upstream = totals["tree"], totals["upstream"]
    if tree is not None and upstream is not None:
        cells = []
        for _, value, width, _ in rows:
            ours, theirs = value(tree), value(upstream)
            cells.append(f"{'?' if ours is None or not theirs else f'{ours / theirs:.3f}':>{width}}")
        lines.append(f"{'tree / upstream':<34}{''.join(cells)}")
    if not run.samples:
        return "\n".join(lines)
    lines.append(
        f"Sampled at {', '.join(map(str, sorted({s.size for s in run.samples})))} labels; between them interpolated, "
        "straight in log-log."
    )
    at = ", ".join(map(str, run.rebuilds)) or "no number of"
    lines.append(f"The tree was built anew at {at} labels.")
    for layout, total in totals.items():
        if total is not None and total.measured_to < run.until:
            reason = run.not_measured.get(layout, "interrupted")
            lines.append(f"{layout}: EXTRAPOLATED above {total.measured_to:.0f} labels ({reason})"[:120])
    return "\n".join(lines)


def check_table(report: Report) -> str:
    """What --quick asserts, with its bounds."""
    lines = [f"{'token counts: mean or worst of the repetitions':<92}{'value':>12}{'bound':>12}"]
    lines += [
        f"{check.name:<92}{check.value:>12,.6g}{check.bound:>12,.6g}{'' if check.holds else '  !'}"
        for check in report.checks
    ]
    broken = sum(not check.holds for check in report.checks)
    lines.append(f"{broken} of {len(report.checks)} bounds violated" if broken else f"all {len(report.checks)} hold")
    return "\n".join(lines)


def _name(case: str) -> str:
    return f"{case:<3}{CASES[case]}"


def _seconds(value: float) -> str:
    return f"{value:.{3 if value < 10 else 1 if value < 100 else 0}f}"


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _mega(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value / 1e6:,.{digits}f}"


def _short(value: float | None) -> str:
    if value is None:
        return "?"
    for scale, letter in ((1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{letter}"
    return f"{value:.3g}"
