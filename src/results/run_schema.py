"""What a journal's line and a run.json must hold to be shown: files may be old, damaged, or from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

Position = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Number = Annotated[float, Field(gt=-1e100, lt=1e100)]  # what can be drawn: not NaN either


def _count_or_none(value: object) -> object:
    """The count, None where it is not one: a line is kept even if a server that restarted reset its counters."""
    return value if isinstance(value, int | float) and 0 <= value < 1 << 53 else None


Cost = Annotated[int | float | None, BeforeValidator(_count_or_none)]


class _AnyLine(TypedDict, total=False):
    """Keys of lines for any number of labels, and their costs."""

    event: str
    iteration: Count
    claim: Position
    claims: list[Position]
    U: Number
    U_proposed: Number | None
    T: Number | None
    probability: Number | None
    accepted: bool
    predictability: Number | None
    inconsistent: int | None
    labelled: Count
    asked: Cost
    from_cache: Cost
    asked_ahead: Cost
    ahead_used: Cost
    floored: Cost
    tokens_sent: Cost
    tokens_cached: Cost
    tokens_computed: Cost
    seconds: Cost


class JournalLine(_AnyLine, total=False):
    """Keys of src/icm/journal.py for two labels. Keys of other versions are left out."""

    labels: dict[Position, bool]
    shown: dict[Position, bool]
    changes: dict[Position, bool]
    scores: dict[Position, Number]
    answers: list[Number]
    log_odds: Number | None
    current: bool | None
    predicted: bool | None
    true_labels: Count


class LineOfMany(_AnyLine, total=False):
    """The same for more than two labels."""

    num_labels: Count
    labels: dict[Position, Position]
    shown: dict[Position, Position]
    changes: dict[Position, Position]
    scores: dict[Position, list[Number]]
    answers: list[list[Number]]
    log_odds: list[Number] | None
    current: Position | None
    predicted: Position | None
    label_counts: list[Count]


_NEEDED = {
    "start": {"labels"},
    "step": {"iteration", "accepted"},
    "mirror": {"iteration", "accepted", "U_proposed"},
    "rebuild": {"iteration"},
    "evaluation": {"iteration", "accepted", "labels", "scores"},
    "questions": {"claims", "answers"},
}
_line = TypeAdapter(JournalLine)
_line_of_many = TypeAdapter(LineOfMany)


def journal_line(record: object, num_labels: int = 2) -> Mapping[str, Any] | None:
    """The validated line, with claims as numbers; None where it is not a line of a journal of so many labels."""
    line: Mapping[str, Any]
    try:
        line = _line.validate_python(record) if num_labels == 2 else _line_of_many.validate_python(record)
    except ValidationError:
        return None
    if num_labels > 2 and not _fits(line, num_labels):
        return None
    event = line.get("event")
    if event is None or "U" not in line or not _NEEDED.get(event, set()) <= line.keys():
        return None
    if event == "mirror" and line["U_proposed"] is None:
        return None
    return line


def _fits(line: Mapping[str, Any], num_labels: int) -> bool:
    labels = [label for name in ("labels", "shown", "changes") for label in line.get(name, {}).values()]
    odds = [*line.get("scores", {}).values(), *line.get("answers", [])]
    odds += [line["log_odds"]] if line.get("log_odds") is not None else []
    return (
        line.get("num_labels", num_labels) == num_labels
        and all(label < num_labels for label in labels)
        and all(len(values) == num_labels - 1 for values in odds)
    )


def _counted(counts: object) -> object:
    """Only those that were counted."""
    return {name: value for name, value in counts.items() if value is not None} if isinstance(counts, dict) else counts


def part_names(names: Sequence[object]) -> list[str]:
    """Those that are names of folders directly in the run's."""
    return [
        name for name in names if isinstance(name, str) and name not in ("", ".", "..") and not set("/\0") & set(name)
    ]


def _empty_if_null(value: object) -> object:
    return {} if value is None else value


Mapped = Annotated[dict[str, Any], BeforeValidator(_empty_if_null)]
Counts = Annotated[dict[str, int | float], BeforeValidator(_counted), BeforeValidator(_empty_if_null)]
PartNames = Annotated[list[Any], AfterValidator(part_names)]


class RunDocument(BaseModel):
    """The part of run.json that is shown."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    settings: Mapped = {}
    prior_estimate: Mapped = {}
    engine: Mapped = {}
    environment: Mapped = {}
    result: dict[str, Any] | None = None
    cost: Counts = {}
    model_api: Counts = {}
    started: str | None = None
    finished: str | None = None
    left_out: Count = 0
    parts: PartNames = []
    testbed: Mapped = {}


def first_complaint(error: ValidationError) -> str:
    """The first error of a validation in one line: its place and its message."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
