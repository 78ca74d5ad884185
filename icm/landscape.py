"""`landscape` and `alandscape`: does U lead to truth for this model and these claims?"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icm.event_loop import finished, resumable
from icm.settings import Asked, Written, parsed, quietly
from src.experiments import landscape as command
from src.experiments.landscape import LandscapeRequest
from src.icm.label_names import written_label
from src.results.landscape import Landscape
from src.results.landscape_words import verdict_sentence, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LandscapeResult:
    """U of many labelings of one pool. record: as src/results has it."""

    def __init__(self, folder: Path, record: Landscape) -> None:
        self.run_folder = folder
        self.record = record

    @property
    def verdict(self) -> str:
        """Whether the labels of a high U are the true ones, in a sentence."""
        return verdict_sentence(self.record)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a labeling: its name and kind, U, agreement, broken constraints, and its labels in the pool's order.

        agreement: with gold; where it is not known, with the labeling of the highest U.
        """
        return [
            {
                "name": each.labeling.name,
                "kind": each.labeling.kind,
                "U": each.utility,
                "agreement": self.record.agreement(each),
                "inconsistent": each.evaluation.inconsistent,
                "labels": [written_label(label, self.record.names) for label in each.labeling.labels],
            }
            for each in self.record.evaluated
        ]

    def plot(self) -> Figure:
        """U over agreement, coloured by the kind of labeling: a matplotlib figure."""
        from src.results.landscape_view import chart_of  # matplotlib takes half a second
        from src.results.style import complete

        figure = chart_of(self.record).figure
        complete(figure)
        return figure

    def __repr__(self) -> str:
        return "\n  ".join([self.verdict, *words(self.record), f"page {self.run_folder / 'landscape.html'}"])

    def _repr_html_(self) -> str:
        return f"<p>{'<br>'.join(html.escape(line) for line in repr(self).splitlines())}</p>"


def landscape(
    claims: Any = None,
    *,
    model: str,
    testbed: str | Path | Mapping[str, Any] | None = None,
    template: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    base_url: str | Sequence[str] | None = None,
    runs_dir: str | Path = "runs",
    run: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> LandscapeResult:
    """See, before a search, whether U leads to truth for this model and these claims (docs/landscape.md).

    The keywords are those of `label`; settings are the flags of `icm landscape`: labelings=100, alpha=50,
    calibrate="mean", batch_size=64, found=[result, ...] for the labels of runs of the same pool. The page needs jinja2.
    """
    settings |= {"model": model, "runs_dir": runs_dir, "run": run, "quiet": quiet}
    return finished(_surveyed(Asked(claims, testbed, template, labels, base_url), settings))


async def alandscape(
    claims: Any = None,
    *,
    model: str,
    testbed: str | Path | Mapping[str, Any] | None = None,
    template: str | None = None,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    base_url: str | Sequence[str] | None = None,
    runs_dir: str | Path = "runs",
    run: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> LandscapeResult:
    """`landscape` in a running event loop."""
    settings |= {"model": model, "runs_dir": runs_dir, "run": run, "quiet": quiet}
    return await _surveyed(Asked(claims, testbed, template, labels, base_url), settings)


async def _surveyed(asked: Asked, settings: Mapping[str, Any]) -> LandscapeResult:
    parser = command.build_parser()
    with Written() as written:
        request = LandscapeRequest.of(parsed(asked, parser, settings, written).flags, parser.contradiction)
        with resumable():
            folder, found = await command.survey_pool(replace(request, run=quietly(request.run, asked)))
    return LandscapeResult(folder.path, found)
