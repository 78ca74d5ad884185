"""A run as plain values: the claims with their labels, the journal, settings, result and costs.

Read from files by `src.results.run_reader`; curves, diagnosis, reports, comparisons and exports use only these values.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from src.icm.consistency import Constraint, Label
from src.icm.label_names import TRUE_FALSE_NAMES, Names, names_of
from src.icm.objective import LogOdds, calibration_offset, margins_of, no_offset
from src.icm.prior import PriorEstimate, read_estimate
from src.icm.testbeds import TESTBEDS, Testbed, recorded_testbed

SEARCHED = ("icm", "vote")  # `by` of a label that a search gave, or the majority of several
PROPOSALS = ("step", "evaluation")  # events of a journal that may change labels and are counted as iterations
KNOWN = "known"  # `by` of a label that was given and kept
IN_POOL = (*SEARCHED, "predicted", KNOWN)  # `by` of a label that belongs to a claim of the pool, unless it is `outside`


@dataclass(frozen=True, slots=True)
class LabelledClaim:
    """One claim and the run's results for it.

    log_odds: final leave-one-out log-odds, nats. zero_shot: log-odds without demonstrations, nats. Both None if
    unknown. by: "icm" for a label of the search, "vote" for the majority of several, "predicted" for a claim of the
    pool that the search did not take in, "known" for a label that was given and kept, else what gave the label. row:
    index in the data file. shown: what else its testbed's template shows, by placeholder. abstained: whether the label
    is not to be handed over (see doubt). outside: whether it is a known label of a claim outside the pool. batch: the
    number of the batch that it was labelled in; None where there are none.
    """

    row: int
    group: str
    question: str
    choice: str
    choice_2: str | None = None
    label: Label = None
    log_odds: LogOdds | None = None
    gold: Label = None
    by: str = "icm"
    zero_shot: LogOdds | None = None
    shown: tuple[tuple[str, str], ...] = ()
    abstained: bool = False
    outside: bool = False
    batch: int | None = None

    @property
    def fields(self) -> dict[str, str]:
        """The texts that its testbed's template shows, by placeholder."""
        return {"question": self.question, "choice": self.choice, "choice_2": self.choice_2 or "", **dict(self.shown)}

    @property
    def odds(self) -> float | None:
        """Log-odds where there are two labels; None where there are more."""
        return None if isinstance(self.log_odds, tuple) else self.log_odds

    @property
    def zero_shot_odds(self) -> float | None:
        """Zero-shot log-odds where there are two labels; None where there are more."""
        return None if isinstance(self.zero_shot, tuple) else self.zero_shot

    @property
    def in_pool(self) -> bool:
        return self.by in IN_POOL and not self.outside

    @property
    def is_known(self) -> bool:
        """Whether the label was given, and kept by the search."""
        return self.by == KNOWN

    @property
    def searched(self) -> bool:
        """Whether a search gave the label."""
        return self.label is not None and self.by in SEARCHED

    @property
    def gold_to_find(self) -> Label:
        """The gold label; None where the label was known, so that there is nothing to compare."""
        return None if self.is_known else self.gold

    @property
    def agrees(self) -> bool | None:
        """Whether the label is the gold one; None where either is missing, and where the label was known."""
        return None if self.label is None or self.gold_to_find is None else self.label == self.gold


@dataclass(frozen=True)
class RunRecord:
    """One run. Mappings are those of run.json, empty where the run does not have them yet.

    claims: the pool in its order, then claims outside it. constraints: between pool positions; None where the run's
    version did not record them. skipped: damaged lines of its files that were left out. parts: the runs of its batches,
    where a data set was labelled in several; `claims` are then those of all.
    """

    name: str
    settings: Mapping[str, Any]
    claims: tuple[LabelledClaim, ...]
    journal: tuple[Mapping[str, Any], ...] = ()
    constraints: tuple[Constraint, ...] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None
    cost: Mapping[str, float] = field(default_factory=dict)
    model_api: Mapping[str, float] = field(default_factory=dict)
    started: str | None = None
    finished: str | None = None
    left_out: int = 0
    skipped: int = 0
    parts: tuple[RunRecord, ...] = ()
    testbed_file: Mapping[str, Any] = field(default_factory=dict)
    prior_estimate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> Names:
        """The labels' names, in their order."""
        return names_of(self.settings)

    @property
    def num_labels(self) -> int:
        return len(self.names)

    @property
    def says_true(self) -> bool:
        """Whether the labels are True and False."""
        return self.names == TRUE_FALSE_NAMES

    @property
    def texts(self) -> tuple[str, ...]:
        """Each label's text in a prompt, leading space included."""
        return tuple(map(str, self.settings.get("label_texts") or [f" {name}" for name in self.names]))

    def name_of(self, label: Label) -> str:
        return "none" if label is None else self.names[label]

    @property
    def pool(self) -> tuple[LabelledClaim, ...]:
        return tuple(claim for claim in self.claims if claim.in_pool)

    @property
    def gold(self) -> list[Label]:
        """Gold labels by pool position; None where the label was known, so that there is nothing to compare."""
        return [claim.gold_to_find for claim in self.pool]

    @cached_property
    def offset(self) -> LogOdds:
        """The offset of the final log-odds, nats: 0 unless calibrated. Of several batches each has its own (offset_of);
        this is that of all claims together."""
        if self.settings.get("calibrate") != "mean":
            return no_offset(self.num_labels)
        if self.parts and self.settings.get("prior") == "auto":  # each has its own estimate, or the mean
            return fmean([part.shift for part in self.parts if part.journal] or [0.0])
        shown = (claim for claim in self.pool if claim.searched or claim.is_known)
        known = [claim.log_odds for claim in shown if claim.log_odds is not None]
        return calibration_offset(known, "mean", self.prior, self.num_labels)

    @cached_property
    def offsets(self) -> dict[int, LogOdds]:
        """The offset of each batch by its number, nats; of several passes the mean, as a claim has the mean of their
        log-odds. Empty where there are no batches, or no calibration."""
        found: dict[int, list[LogOdds]] = defaultdict(list)
        for part in self.parts if self.settings.get("calibrate") == "mean" else ():
            batch = batch_of(part.name)
            if batch is not None and any(claim.log_odds is not None for claim in part.pool):
                found[batch].append(part.offset)
        return {batch: _mean(of_passes) for batch, of_passes in sorted(found.items())}

    def offset_of(self, claim: LabelledClaim) -> LogOdds:
        """The offset of a claim's final log-odds, nats: that of its batch, where there are several."""
        return self.offset if claim.batch is None else self.offsets.get(claim.batch, self.offset)

    def shift_of(self, claim: LabelledClaim) -> float:
        """`offset_of` where there are two labels, 0 where there are more."""
        offset = self.offset_of(claim)
        return 0.0 if isinstance(offset, tuple) else offset

    def margins(self, claim: LabelledClaim) -> tuple[float, ...] | None:
        """The margin of each label of a claim, nats; None where its log-odds are not known."""
        return None if claim.log_odds is None else margins_of(claim.log_odds, self.offset_of(claim))

    def sureness(self, claim: LabelledClaim) -> float | None:
        """The margin of a claim's likeliest label, nats; None where its log-odds are not known."""
        margins = self.margins(claim)
        return None if margins is None else max(margins)

    @property
    def shift(self) -> float:
        """`offset` where there are two labels, 0 where there are more."""
        return 0.0 if isinstance(self.offset, tuple) else self.offset

    @property
    def prior(self) -> float | None:
        """The share of True claims that the run was calibrated to, given or estimated; None where it was calibrated to
        the mean, or not."""
        prior = self.settings.get("prior")
        if prior == "auto":
            prior = self.prior_estimate.get("prior")
        return prior if isinstance(prior, float) and 0 < prior < 1 else None

    @property
    def estimate(self) -> PriorEstimate | None:
        """The estimated share of True claims; None where it was not to be estimated, or is not yet."""
        return read_estimate(self.prior_estimate)

    @property
    def offset_in_words(self) -> str:
        """`offset` in words."""
        if self.parts:
            return "the mean of its batch" if self.prior is None else "the offset of its batch"
        return "the pool's mean" if self.prior is None else f"what {100 * self.prior:g}% of the pool's log-odds exceed"

    @property
    def searches(self) -> tuple[RunRecord, ...]:
        """The runs that hold a journal: its parts, or itself."""
        return self.parts or (self,)

    @property
    def compares(self) -> bool:
        """Whether a claim is "choice is better than choice_2". The built-in testbed's choice_2 is in no prompt."""
        if self.testbed_file or self.testbed in TESTBEDS:
            return "choice_2" in self.asked_by.columns
        return self._any_choice_2

    @property
    def _any_choice_2(self) -> bool:
        return any(claim.choice_2 for claim in self.claims)

    @property
    def asked_by(self) -> Testbed:
        """The testbed that its claims were asked by. Raises BadInput where the recorded testbed file is damaged."""
        return recorded_testbed(self.testbed, self.testbed_file, self._any_choice_2)

    @property
    def model(self) -> str:
        return str(self.engine.get("model") or self.settings.get("model") or "unknown model")

    @property
    def search(self) -> str:
        """The name of the search (src/icm/searches/)."""
        return str(self.settings.get("search") or "annealing")

    @property
    def testbed(self) -> str:
        return str(self.settings.get("testbed") or "unknown testbed")


def batch_of(part: str) -> int | None:
    """The number of a part's batch by its name, such as RUN/batch-003-pass-1; None where the name says none."""
    found = re.search(r"(?:^|/)batch-(\d+)(?:-pass-\d+)?$", part)
    return None if found is None else int(found[1])


def _mean(values: Sequence[LogOdds]) -> LogOdds:
    if isinstance(values[0], tuple):
        return tuple(fmean(each) for each in zip(*values, strict=True))
    return values[0] if len(values) == 1 else fmean(values)  # type: ignore[arg-type]


def labels_over_time(journal: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[int, int]]:
    """The pool's labels by position after each journal line: one mapping, which changes as the caller goes on."""
    labels: dict[int, int] = {}
    two = is_of_two(journal)
    for record in journal:
        changes = changes_in(record)
        if record["event"] == "evaluation" and changes:
            labels.clear()
        labels |= {int(claim): bool(label) if two else label for claim, label in changes.items()}
        yield labels


def changes_in(record: Mapping[str, Any]) -> Mapping[Any, Any]:
    """The labels that a journal line gives to claims; at a start, and at the best evaluation so far, these are all."""
    if record["event"] == "evaluation" and not record.get("accepted"):
        return {}
    return record.get("labels") or record.get("changes") or {}


def is_of_two(journal: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the labels of a journal are True and False, and not indices of more."""
    return not journal or journal[0].get("num_labels", 2) == 2


def final_labels(journal: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The pool's labels by position as the journal leaves them."""
    last = deque(labels_over_time(journal), maxlen=1)
    return dict(last[0]) if last else {}


def final_scores(journal: Sequence[Mapping[str, Any]]) -> dict[int, LogOdds]:
    """The last evaluation's log-odds (nats) by pool position; empty where nothing was evaluated."""
    for record in reversed(journal):
        scores = record.get("scores")
        if scores and record.get("accepted", True):
            return {
                int(claim): tuple(value) if isinstance(value, list | tuple) else float(value)
                for claim, value in scores.items()
            }
    return {}


def with_journal_labels(claims: Sequence[LabelledClaim], journal: Sequence[Mapping[str, Any]]) -> list[LabelledClaim]:
    """`claims` (the pool, in its order) labelled as the journal leaves them: a run that is not finished."""
    labels = final_labels(journal)
    scores = final_scores(journal)
    return [
        replace(claim, label=labels.get(at), log_odds=scores.get(at), by=KNOWN if claim.is_known else "icm")
        for at, claim in enumerate(claims)
    ]


def probability(log_odds: float) -> float:
    """P(True) from log-odds in nats, without overflow."""
    if log_odds >= 0:
        return 1 / (1 + math.exp(-log_odds))
    power = math.exp(log_odds)
    return power / (1 + power)
