#!/usr/bin/env python3
"""Draw the panels of the Grafana dashboard from a Prometheus, without Grafana.

    python scripts/render_dashboard.py --prometheus http://127.0.0.1:9090 --minutes 10 --out dashboard.png
    python scripts/render_dashboard.py --row "The search" --out search.png

Uses the queries of configs/monitoring/icm-run.dashboard.json; an empty panel says "no data". Exit code 1 if a query is
refused, 2 if Prometheus does not answer.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import orjson

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
if str(REPO_ROOT) not in sys.path:  # run as a script, without an installed package
    sys.path.insert(0, str(REPO_ROOT))

from core.errors import APIError, RequestRejected  # noqa: E402
from core.flags import FlagParser  # noqa: E402
from core.llm_api.http.retry import RetryPolicy  # noqa: E402
from core.llm_api.http.transport import HttpOptions, HttpTransport  # noqa: E402

DASHBOARD: Final = REPO_ROOT / "configs" / "monitoring" / "icm-run.dashboard.json"
POINTS: Final = 200


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its row, title, unit, and queries with the pattern of their legend."""

    row: str
    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel: name, times (Unix seconds) and values."""

    name: str
    times: list[float]
    values: list[float]


def read_panels(path: Path = DASHBOARD) -> list[Panel]:
    """The panels of a dashboard file, in order."""
    panels, row = [], ""
    for panel in orjson.loads(path.read_bytes())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
            continue
        queries = tuple((target["expr"], target["legendFormat"]) for target in panel["targets"])
        panels.append(Panel(row, panel["title"], panel["fieldConfig"]["defaults"]["unit"], queries))
    return panels


def without_variables(query: str, interval: str) -> str:
    """A query with Grafana's variables filled in: every run and pool, and one interval of rates."""
    return query.replace("$__rate_interval", interval).replace("$run", ".*").replace("$pool_id", ".*")


async def ask(http: HttpTransport, panel: Panel, minutes: float, interval: str) -> list[Line]:
    """The lines of a panel over the last minutes."""
    end = time.time()
    lines = []
    for query, legend in panel.queries:
        words = {
            "query": without_variables(query, interval),
            "start": end - minutes * 60,
            "end": end,
            "step": max(1.0, minutes * 60 / POINTS),
        }
        answer = orjson.loads(await http.send("GET", f"/api/v1/query_range?{urlencode(words)}"))
        for series in answer["data"]["result"]:
            times = [float(at) for at, _ in series["values"]]
            lines.append(Line(_named(legend, series["metric"]), times, [float(value) for _, value in series["values"]]))
    return lines


def draw(panels: Sequence[Panel], lines: Sequence[Sequence[Line]], out: Path) -> None:
    """All panels into one picture, three a row; times in seconds since the first point of all."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    start = min((line.times[0] for some in lines for line in some if line.times), default=0.0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel, some in zip(axes.flat, panels, lines, strict=False):
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        for line in some:
            axis.plot([at - start for at in line.times], line.values, label=line.name, linewidth=1.5)
        if some:
            axis.legend(fontsize=7)
            axis.set_xlabel("seconds", fontsize=8)
        else:
            axis.text(0.5, 0.5, "no data", ha="center", va="center", transform=axis.transAxes)
        axis.set_ylabel({"s": "seconds", "percentunit": "share"}.get(panel.unit, ""), fontsize=8)
        axis.set_ylim(bottom=0 if all(value >= 0 for line in some for value in line.values) else None)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _named(legend: str, labels: dict[str, Any]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", str(value))
    return legend


async def _run(options: argparse.Namespace) -> int:
    http = HttpTransport(
        options.prometheus, key=None, key_name="", options=HttpOptions(read_timeout=30, retry=RetryPolicy(1))
    )
    panels = [panel for panel in read_panels() if options.row in (None, panel.row)]
    try:
        lines = [await ask(http, panel, options.minutes, options.interval) for panel in panels]
    except RequestRejected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except APIError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        await http.aclose()
    draw(panels, lines, options.out)
    empty = [panel.title for panel, some in zip(panels, lines, strict=True) if not some]
    print(f"{len(panels)} panels in {options.out}" + (f"; no data: {', '.join(empty)}" if empty else ""))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="base URL (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how far back (default: 10)")
    parser.add_argument("--interval", default="30s", help="over which rates are taken (default: 30s)")
    parser.add_argument("--row", choices=sorted({panel.row for panel in read_panels()}), help="only this row's panels")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    return asyncio.run(_run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
