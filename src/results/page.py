"""One self-contained HTML page of one or several runs: no network, no inline handlers, claims as escaped text.

The page's Content-Security-Policy allows only its own style and script, by their hashes, so markup that was not escaped
could neither run nor fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any

from src.icm.testbeds import BadInput
from src.results.asking_view import Sheet
from src.results.charts import Chart
from src.results.findings import Finding, Verdict
from src.results.flips import flips
from src.results.landscape import Landscape
from src.results.landscape_view import chart_of, grids_of
from src.results.landscape_words import verdict_sentence, words
from src.results.prices import PriceFile
from src.results.run_reader import BaselineTable
from src.results.run_record import RunRecord
from src.results.run_view import view_of
from src.results.side_by_side import Grid
from src.results.sweep_charts import cost_charts, sweep_charts
from src.results.sweep_table import SweepTable, cost_grid, grid_of, summary_of
from src.results.text import number, visible

if TYPE_CHECKING:
    from jinja2 import Environment

VERDICTS = {Verdict.OK: "fine", Verdict.WATCH: "look", Verdict.PROBLEM: "problem", Verdict.UNKNOWN: "cannot tell"}


def render_report(tables: Sequence[BaselineTable], runs: Sequence[RunRecord], prices: PriceFile | None = None) -> str:
    """The page of `icm report`. Raises BadInput where jinja2 is not installed."""
    views = [view_of(run, prices) for run in runs]
    subjects = "; ".join(dict.fromkeys(f"{run.testbed} labelled by {run.model}" for run in runs)) or "Baselines"
    return _render(
        "report.html.j2",
        title=visible(f"{subjects}: Internal Coherence Maximization"),
        heading=subjects,
        subheading="Internal Coherence Maximization, " + (f"{len(views)} runs" if len(views) != 1 else "one run"),
        tables=tables,
        runs=views,
        across=flips(runs) if len(runs) > 1 else None,
    )


def render_comparison(
    grids: Sequence[Grid], charts: Sequence[Chart], across: Finding | None, tables: Sequence[BaselineTable], names: str
) -> str:
    """The page of `icm compare`."""
    return _render(
        "compare.html.j2",
        title="Runs side by side",
        heading="Runs side by side",
        subheading=names,
        grids=grids,
        charts=charts,
        across=across,
        tables=tables,
    )


def render_landscape(landscape: Landscape, subject: str) -> str:
    """The page of `icm landscape`. subject: of which claims and model, in words."""
    return _render(
        "landscape.html.j2",
        title=visible(f"Landscape of U: {subject}"),
        heading="Does U lead to truth?",
        subheading=subject,
        verdict=landscape.verdict,
        sentence=verdict_sentence(landscape),
        words=words(landscape),
        chart=chart_of(landscape),
        grids=grids_of(landscape),
    )


def render_asking(sheet: Sheet, title: str, subject: str, file: str, then: str) -> str:
    """The page of `icm ask`. subject: of which claims and model. file: what it saves. then: the next command."""
    return _render(
        "asking.html.j2",
        "asking.js",
        title=visible(f"{title}: {subject}"),
        heading=title,
        subheading=subject,
        sheet=sheet,
        file=file,
        then=then,
    )


def render_sweep(table: SweepTable) -> str:
    """The page of a sweep, in the folder that holds its cells."""
    return _render(
        "sweep.html.j2",
        title=visible(table.title),
        heading=table.title,
        subheading=summary_of(table),
        grid=replace(grid_of(table), title="Table"),
        charts=sweep_charts(table),
        cost_charts=cost_charts(table),
        cost=cost_grid(table),
        missing=table.missing,
        result_file="baselines.json" if table.command == "baselines" else "labels.jsonl",
        settings=[(name, str(value)) for name, value in table.settings.items()],
    )


def _render(template: str, program: str = "filter.js", **values: Any) -> str:
    environment = _environment()
    style, script = _asset("style.css"), _asset(program)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    from markupsafe import Markup

    return environment.get_template(template).render(
        **values,
        policy=policy,
        style=Markup(style),  # noqa: S704  our own files, which the policy names by their hashes
        script=Markup(script),  # noqa: S704
        verdicts=VERDICTS,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
    )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError:
        raise BadInput("HTML pages need jinja2: pip install 'icm-elicitation[report]'") from None
    environment = Environment(
        loader=PackageLoader("src.results"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"visible": lambda value: visible(str(value)), "number": number}
    return environment


def _asset(name: str) -> str:
    return (resources.files("src.results") / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
