"""What is known of each vLLM, as scripts/versions.py measured it: its JSON, and the tables of docs/versions.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from core.files import write_atomically

REPO_ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = REPO_ROOT / "benchmarks" / "results"
PAGE: Final = REPO_ROOT / "docs" / "versions.md"
BEGIN: Final = "<!-- Made by scripts/versions.py from its results -->"
END: Final = "<!-- What follows is written by hand -->"
SHOWN_SIZE: Final = 32
"""Labelled claims of the step whose tokens the page shows."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PatchRow(_Record):
    """A name of vLLM that we replace: see Found in icm_vllm/patches.py."""

    by: str
    target: str
    device: Literal["any", "cpu", "gpu"]
    state: Literal["has", "lacks", "refused"]
    reason: str


class Start(_Record):
    """The server's start. seconds: None where it ran already. said: what our plugin warned of in its log, where that is
    known; error: why it did not start, "" where it did."""

    seconds: float | None = None
    said: list[str] = []
    error: str = ""


class SmokeCheck(_Record):
    """One line of scripts/test_vllm_server.py."""

    name: str
    passed: bool
    found: str


class Determinism(_Record):
    """scripts/test_determinism.py --quick. rows: how many were compared; differing: the names of those that differ, by
    `largest` nats at most (None: other tokens were answered); error: why there is no result."""

    prompts: int = 0
    rows: int = 0
    differing: list[str] = []
    largest: float | None = 0.0
    not_reached: list[str] = []
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.rows > 0 and not self.differing and not self.error


class Tokens(_Record):
    """benchmarks/step.py --quick. bounds: how many were tested; violated: those that do not hold. computed: tokens of
    prompts by case at SHOWN_SIZE claims, without the prefix that was cached; block: tokens of a cache block."""

    bounds: int = 0
    violated: list[str] = []
    computed: dict[str, int] = {}
    block: int | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.bounds > 0 and not self.violated and not self.error


class Row(_Record):
    """One vLLM on one device. changed: versions that differ from requirements/local.lock; built: the date of its wheel.
    What was not measured, because the server did not start, is None."""

    vllm: str
    package: str
    device: Literal["cpu", "gpu"]
    hardware: str
    python: str
    torch: str
    triton: str
    transformers: str
    changed: dict[str, str]
    model: str
    dtype: str
    date: str
    commit: str
    patches: list[PatchRow]
    start: Start
    smoke: list[SmokeCheck] | None = None
    determinism: Determinism | None = None
    tokens: Tokens | None = None

    @property
    def refused(self) -> list[PatchRow]:
        """Names without which a server of this device does not start."""
        return [patch for patch in self.patches if patch.state == "refused"]

    @property
    def passed(self) -> bool:
        """Whether everything was measured and nothing failed."""
        measured = self.smoke and self.determinism and self.tokens
        return bool(
            measured
            and not self.refused
            and not self.start.error
            and self.smoke
            and all(check.passed for check in self.smoke)
            and self.determinism
            and self.determinism.passed
            and self.tokens
            and self.tokens.passed
        )

    def is_of(self, other: Row) -> bool:
        """Whether it is the same measurement, made again."""
        return (self.vllm, self.device, self.model, self.hardware) == (
            other.vllm,
            other.device,
            other.model,
            other.hardware,
        )


_ROWS: Final = TypeAdapter(list[Row])


def results_of(device: str) -> Path:
    """Where the rows of a device are kept."""
    return RESULTS / f"versions-{device}.json"


def read_rows(path: Path) -> list[Row]:
    """The rows of one file, none where it does not exist. Raises ValueError in one line for a file of another kind."""
    try:
        return _ROWS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} does not hold rows of scripts/versions.py ({place}: {first['msg']})") from None


def keep(row: Row, path: Path) -> None:
    """Write a row to its file, in the place of an earlier one of the same vLLM, device and model."""
    rows = [other for other in read_rows(path) if not row.is_of(other)]
    rows = sorted([*rows, row], key=lambda kept: (version_key(kept.vllm), kept.model), reverse=True)
    write_atomically(path, _ROWS.dump_json(rows, indent=1) + b"\n")


def all_rows(folder: Path = RESULTS) -> list[Row]:
    """The rows of every device, the CPU's first, newest versions first."""
    return [row for path in sorted(folder.glob("versions-*.json")) for row in read_rows(path)]


def version_key(version: str) -> tuple[int, ...]:
    """For sorting: 0.9.2 comes before 0.10.0."""
    return tuple(map(int, re.findall(r"\d+", version)))


def tried(rows: Iterable[Row]) -> dict[str, str]:
    """What TRIED of icm_vllm/patches.py says of these rows: on which devices each version passed."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.passed:
            found.setdefault(row.vllm, set()).add(row.device.upper())
    return {version: " and a ".join(sorted(found[version])) for version in sorted(found, key=version_key)}


def page_with(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables of these rows in place of those that it has. Raises ValueError without their marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} lacks the line {END if begin else BEGIN}")
    return "\n".join([before + begin, "", *tables(rows), "", end + after])


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of markdown: what passes; then what is missing or failed, by name; then which versions it ran with."""
    yield from _heading(
        "vLLM",
        "on",
        "patches",
        "starts",
        "smoke check",
        "determinism check",
        "bounds on tokens",
        "tokens of a step: cold, a label appended, all cached",
        "",
    )
    for row in rows:
        verdict = "**passes**" if row.passed else "refused" if row.refused else "fails"
        cells = [_name(row), row.hardware, _patches(row), _start(row.start), *_checks(row), verdict]
        yield f"| {' | '.join(cells)} |"
    remarks = [line for row in rows for line in _remarks(row)]
    yield ""
    yield "What is missing or failed:" if remarks else "Nothing is missing, nothing failed."
    if remarks:
        yield ""
        yield from remarks
    yield ""
    files = [results_of(device).relative_to(REPO_ROOT) for device in dict.fromkeys(row.device for row in rows)]
    named = [f"[{path.name}](../{path})" for path in files]
    yield f"Measured with (everything: {', '.join(named)}):"
    yield ""
    yield from _heading("vLLM", "torch", "Triton", "transformers", "Python", "not as locked", "model", "date")
    for row in rows:
        changed = ", ".join(f"{name} {version}" for name, version in row.changed.items())
        model = f"{row.model}, {row.dtype}"
        cells = [_name(row), row.torch, row.triton, row.transformers, row.python, changed, model, row.date]
        yield f"| {' | '.join(cells)} |"


def _heading(*names: str) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"


def _name(row: Row) -> str:
    return f"{row.vllm} {row.device.upper()}"


def _patches(row: Row) -> str:
    """Of those for this device."""
    states = Counter(patch.state for patch in row.patches if patch.device in ("any", row.device))
    return f"{states['has']} of {states.total()}" if states else "not known"


def _start(start: Start) -> str:
    if start.error:
        return "no"
    return "ran already" if start.seconds is None else f"in {start.seconds:.0f} s"


def _checks(row: Row) -> Iterator[str]:
    if row.smoke is None:
        yield "-"
    else:
        failed = [check.name for check in row.smoke if not check.passed]
        yield f"{len(row.smoke) - len(failed)} of {len(row.smoke)} pass"
    check, tokens = row.determinism, row.tokens
    if check is None or check.error:
        yield "-"
    else:
        yield f"{len(check.differing)} of {check.rows} rows differ, {check.prompts} prompts"
    if tokens is None or tokens.error:
        yield "-"
        yield "-"
    else:
        yield f"{tokens.bounds - len(tokens.violated)} of {tokens.bounds} hold"
        yield ", ".join(f"{tokens.computed[case]:,}" if case in tokens.computed else "?" for case in "cde")


def _remarks(row: Row) -> Iterator[str]:
    """One bullet for everything of a row that is not as it should be."""
    name = f"- **{_name(row)}**:"
    for patch in row.patches:
        if patch.state != "has" and patch.device in ("any", row.device):
            word = "refused without" if patch.state == "refused" else "lacks"
            yield f"{name} {word} `{patch.target}` ({patch.by}): {patch.reason}"
    if row.start.error:
        yield f"{name} the server did not start: {row.start.error}"
    for said in row.start.said:
        yield f"{name} the server warned: {said}"
    for check in row.smoke or []:
        if not check.passed:
            yield f"{name} smoke check, {check.name}: {check.found}"
    if (determinism := row.determinism) is not None:
        if determinism.error:
            yield f"{name} determinism check: {determinism.error}"
        if determinism.differing:
            largest = "other tokens" if determinism.largest is None else f"up to {determinism.largest:.2g} nat"
            yield f"{name} rows that differ ({largest}): {', '.join(determinism.differing)}"
        if determinism.not_reached:
            yield f"{name} rows not reached in the time given: {', '.join(determinism.not_reached)}"
    if (tokens := row.tokens) is not None:
        if tokens.error:
            yield f"{name} token counts: {tokens.error}"
        for violated in tokens.violated:
            yield f"{name} bound that does not hold: {violated}"
