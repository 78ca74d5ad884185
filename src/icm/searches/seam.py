"""What a search is given and gives back: the model to ask, the journal to write, and where it stands.

A search is `run(problem, ask, journal)`: a pure function of the problem, the answers and the journal's lines. It
imports no engine, file or event loop; whatever comes from outside comes through `ask` and `journal`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from src.icm.consistency import Labels
from src.icm.objective import Evaluation, LogOdds
from src.icm.prefix_tree import Layout
from src.icm.problem import Candidate, Problem

Record = dict[str, Any]
"""One line of the journal: plain values, `event` and `U` among them."""


class JournalMismatch(Exception):
    """The journal is not one of this search: other settings, other code, or damaged in the middle."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a search stands after a line of its journal, and what it ends with.

    labels: of the pool's N claims, None where there is none yet. evaluation: of these labels in this layout. iteration,
    accepted: proposals so far, and how many of them changed what it stands at. rebuilds: layouts built after the first.
    """

    iteration: int
    labels: Labels
    layout: Layout
    evaluation: Evaluation
    accepted: int = 0
    rebuilds: int = 0

    @property
    def labelled(self) -> tuple[int, ...]:
        """The claims that have a label, as pool positions in ascending order."""
        return tuple(i for i, label in enumerate(self.labels) if label is not None)

    def asks_next(self, problem: Problem) -> str | None:
        """What it is about to ask, in words, where that takes long and no claim is labelled meanwhile; else None."""
        return None


Found = Standing
"""What a search ends with."""


Questions = tuple[Sequence[int], Candidate]
"""Claims to ask about, and the labeling that is shown with each."""


class Ask(Protocol):
    """A model that is asked about the pool. Answers are log-odds in nats (see objective).

    intent: what the search would ask next (src/icm/speculation.py), so that it can be asked along; an answer never
    depends on it, and None asks nothing else.
    """

    async def evaluate(self, candidates: Sequence[Candidate], intent: object = None) -> list[Evaluation]:
        """The worth of every labeling: each labelled claim after all other labelled ones, all in one batch."""
        ...

    async def predict(self, claims: Sequence[int], candidate: Candidate, intent: object = None) -> list[LogOdds]:
        """Of each of `claims`, after all labelled claims of `candidate` but itself, in one batch."""
        ...

    async def predict_many(self, questions: Sequence[Questions]) -> list[list[LogOdds]]:
        """What `predict` says of each of `questions`, all in one batch."""
        ...

    async def zero_shot(self) -> list[LogOdds]:
        """Of every claim of the pool, without demonstrations, in one batch."""
        ...


class Journal(Protocol):
    """One line for everything that decides how the search goes on, so that it can be resumed."""

    @property
    def records(self) -> Sequence[Record]:
        """The lines that were there when the search was started: none in a new run."""
        ...

    async def write(self, record: Record, standing: Standing) -> None:
        """Keep one more line; `standing` is where it leaves the search."""
        ...


class Search(Protocol):
    """A file of this folder."""

    @property
    def SETTINGS(self) -> Collection[str]:  # noqa: N802, a constant of the file
        """Flags that this search uses and not every other one does, without their dashes: most are fields of
        SearchSettings. The others are refused beside it."""
        ...

    async def run(self, problem: Problem, ask: Ask, journal: Journal) -> Found:
        """Search, from where the journal ends. Raises JournalMismatch where that is none of this search."""
        ...
