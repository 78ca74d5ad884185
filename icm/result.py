"""What a run found, read from its folder, beside the claims as they were given."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson

from icm.claims import Given
from src.icm.label_names import describe_counts
from src.icm.testbeds import BadInput
from src.pipeline.file_kinds import digest_of, read_rows
from src.results.exports import plain_rows
from src.results.messages import agreement, calibration_in_words
from src.results.run_folder import RunFolder
from src.results.run_reader import read_run
from src.results.run_record import RunRecord
from src.results.text import counted, one_line, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXTS: Final = ("question", "choice", "choice_2", "consistency_id")
"""Columns that a run keeps of its claims; a row that was given has its own."""
SHOWN: Final = 10
"""Rows that a notebook shows of a result."""


class Result:
    """The labels of a run. One row a claim, in the order of the claims that were given.

    A claim without a label (outside the pool with label_rest=False, or a bad row that was left out) has None. record:
    the run as src/results reads it.
    """

    def __init__(self, folder: Path, record: RunRecord, given: Given | None = None) -> None:
        self.run_folder = folder
        self.record = record
        self._given = given

    @property
    def labels(self) -> list[bool | str | None]:
        """True or False; of other labels the name."""
        return [row["label"] for row in self.rows]

    @property
    def probabilities(self) -> list[float | None]:
        """P(True) of each claim, after calibration and given the labels of all others; of other labels than True and
        False P(the claim's label)."""
        return [row["probability"] for row in self.rows]

    @property
    def agreement(self) -> float | None:
        """The share of labels of the search that gold labels agree with; None without gold, or before the run's end."""
        agreeing, compared = self._compared
        return agreeing / compared if compared else None

    @property
    def U(self) -> float | None:  # noqa: N802  the paper's name
        """What the search has maximized; None before the run's end."""
        return None if self.record.result is None else float(self.record.result["U"])

    @property
    def finished(self) -> bool:
        return self.record.result is not None

    @property
    def warning(self) -> str | None:
        """What may be wrong with the labels, where the run noticed something."""
        return None if self.record.result is None else self.record.result.get("warning")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decided the labels, as run.json has it."""
        return self.record.settings

    @property
    def cost(self) -> Mapping[str, float]:
        """Questions asked, tokens and seconds of the search."""
        return self.record.cost

    @property
    def prompt(self) -> str:
        """One whole prompt, as the model was asked it."""
        return RunFolder(self.run_folder).prompt_path.read_text("utf-8")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict a claim: its own columns, and `label`, `probability`, `log_odds`, `zero_shot`, `gold`, `by` (what
        gave the label: icm, many-shot, ...) and `row`, its number among the claims.

        Of labels that are not True and False `logprob_NAME` in place of `log_odds`. A column of yours that has one of
        these names, such as a `label` that was read as gold, is given back as given_NAME. A row that lists options is
        one claim an option.
        """
        return [row for _, row in self._placed]

    @cached_property
    def _placed(self) -> list[tuple[int, dict[str, Any]]]:
        """Each row, and its place among the rows that were given."""
        texts = {*TEXTS, *(name for claim in self.record.claims[:1] for name, _ in claim.shown)}
        plain = sorted(
            zip(self._places, plain_rows(self.record, self.record.claims), strict=True),
            key=lambda placed: (placed[0], placed[1]["row"]),
        )
        if self._given is None:
            return plain
        found = defaultdict(list)
        for place, row in plain:
            found[place].append(row)
        nothing = dict.fromkeys(plain[0][1]) if plain else {"label": None, "probability": None}
        return [
            (place, _beside(given, row, texts))
            for place, given in enumerate(self._given.rows)
            for row in found.get(place, [nothing])
        ]

    @cached_property
    def _places(self) -> list[int]:
        """Of each claim of the run, the place of its row among those that were given."""
        folder = RunFolder(self.run_folder)
        path = folder.labels_path if folder.labels_path.exists() else folder.claims_path
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        by_row = {line["row"]: line.get("of_row", line["row"]) for line in lines}
        return [by_row.get(claim.row, claim.row) for claim in self.record.claims]

    @property
    def _compared(self) -> tuple[int, int]:
        agreeing, compared = (self.record.result or {}).get("icm", (0, 0))
        return agreeing, compared

    def to_pandas(self) -> Any:
        """The rows as a pandas data frame, with the index of the one that was given. Needs pandas."""
        import pandas

        index = None if self._given is None else self._given.index
        return pandas.DataFrame(self.rows, index=None if index is None else [index[place] for place, _ in self._placed])

    def plot(self) -> Figure:
        """U, agreement with gold, labelled claims and balance over the iterations, as a matplotlib figure.

        Raises BadInput for a run of several batches or passes, each of which has curves of its own.
        """
        from src.results.plots import draw_curves  # matplotlib takes half a second
        from src.results.style import complete

        if self.record.parts:
            raise BadInput(f"{self.run_folder}: is {len(self.record.parts)} runs; load one of its folders to plot it")
        figure = draw_curves(self.record.journal, self.record.gold, self.record.names)
        complete(figure, f"{self.record.testbed}, {self.record.model}")
        return figure

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return "\n  ".join(self._lines())

    def _repr_html_(self) -> str:
        """The summary and the first rows, for a notebook. Texts of claims are shown, never interpreted."""
        names = [name for name in (*self._shown_columns(), "label", "probability", "gold", "by") if self._has(name)]
        head = "".join(f"<th>{_escaped(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{_escaped(_cell(row.get(name)))}</td>" for name in names) + "</tr>"
            for row in self.rows[:SHOWN]
        )
        more = f"<p>... {len(self.rows) - SHOWN:,} more rows</p>" if len(self.rows) > SHOWN else ""
        said = "<br>".join(_escaped(line) for line in self._lines())
        return f"<p>{said}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"

    def _shown_columns(self) -> list[str]:
        rows = self._given.rows if self._given is not None else self.rows
        texts = [name for name, value in rows[0].items() if isinstance(value, str)] if rows else []
        return [name for name in texts if name not in ("label", "gold", "by")][:3]

    def _has(self, name: str) -> bool:
        return any(row.get(name) is not None for row in self.rows)

    def _lines(self) -> list[str]:
        run, result = self.record, self.record.result
        unlabelled = self.labels.count(None)
        lines = [
            f"ICM result: {counted(len(self.rows) - unlabelled, 'claim')} labelled by {run.model} (search: "
            f"{run.search}, alpha {run.settings.get('alpha', 0):g}, calibration {calibration_in_words(run.settings)})"
        ]
        if result is None:
            return [*lines, f"not finished; run folder {self.run_folder}"]
        if unlabelled:
            lines.append(f"{counted(unlabelled, 'claim')} without a label")
        counts = describe_counts(result)
        lines.append(f"U {result['U']:z.2f}; of the search's {result['labelled']} labels {counts}")
        if self.agreement is not None:
            lines.append(f"agreement with gold {agreement(*self._compared)}")
        if self.warning:
            lines.append(f"warning: {self.warning}")
        return [*lines, f"run folder {self.run_folder}"]


def load(run: str | Path, given: Given | None = None) -> Result:
    """The result of a run's folder, also of one that is still in progress or was stopped: its labels so far.

    The other columns of the claims come from the data file that the run read, if it is still there and the same.
    Raises BadInput where there is no run. given: the claims as they were given, where the caller has them.
    """
    folder = Path(run)
    record = read_run(folder)
    return Result(folder, record, _from_file(folder, record) if given is None else given)


def _from_file(folder: Path, record: RunRecord) -> Given | None:
    flags = (RunFolder(folder).read_run() or {}).get("flags", {})
    path = Path(str(flags.get("data")))
    try:
        if not flags.get("data") or digest_of(path) != record.settings.get("data_sha256"):
            return None
        return Given([row.fields for row in read_rows(path, _theirs(record))])
    except (OSError, BadInput):
        return None


def _theirs(record: RunRecord) -> Sequence[str]:
    return [part.partition("=")[2] for part in str(record.settings.get("columns", "")).split(",") if part]


def _beside(given: Mapping[str, Any], found: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """A row that was given, and what was found for it. found: a row of plain_rows. texts: its columns of the claim."""
    results = {name: value for name, value in found.items() if name not in texts}
    own = {f"given_{name}" if name in results else name: value for name, value in given.items()}
    if found.get("choice") is not None and not isinstance(own.get("choice"), str | None):
        own["choice"] = found["choice"]  # one of the options that the row lists
    return own | results


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else one_line(str(value))


def _escaped(text: str) -> str:
    return html.escape(visible(text))
