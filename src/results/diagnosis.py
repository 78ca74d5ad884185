"""What went wrong in a search, and what the literature says to do about it. Pure functions of finished or running runs.

Each check looks for one failure that ICM is known to have and says how it was measured. A verdict is "problem" where
the labels should not be used as they are, "watch" where they deserve a look, "unknown" where the run does not hold
what the check needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from math import sqrt

from src.icm.consistency import Constraint, Label
from src.icm.label_names import confusion
from src.icm.objective import auc, label_of, no_offset, wilson_interval
from src.results.agreement import agreement_of, votes
from src.results.rows import COLLAPSE_MIN_LABELS, COLLAPSE_SHARE, collapse_warning, counted
from src.results.run_record import LabelledClaim, RunRecord, final_labels, labels_over_time, probability

LEANING_SHARE = 0.85  # of one label: not a collapse, and worth a look
FROZEN_SHARE = 0.5  # of the pool labelled, with nothing changed in the second half of the search
FROZEN_MIN_STEPS = 30
FAINT_NATS = 0.25  # a label's mean log-odds below which the others hardly predict it: P = 0.56
CERTAIN = 2.0  # standard errors between a rank statistic and chance
FLIPPING_WATCH, FLIPPING_PROBLEM = 0.05, 0.20  # share of claims that runs label differently
MIRRORED_KAPPA = -0.5
NEAR_MIRROR = 0.75  # of U: from there on the labels are hardly better than their opposites
NEAR_MIRROR = 0.75  # of U, from which on the flipped labels are nearly as good
SHOWN = 5  # examples a finding lists


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WATCH = "watch"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Source:
    """A paper that was looked up."""

    name: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


ICM = Source("Wen et al. 2025, Unsupervised Elicitation of Language Models", "2506.10139")
CONTEXTUAL = Source("Zhao et al. 2021, Calibrate Before Use", "2102.09690")
BATCH = Source("Zhou et al. 2023, Batch Calibration", "2309.17249")
PROMINENT = Source("Farquhar et al. 2023, Challenges with unsupervised LLM knowledge discovery", "2312.10029")
CHALLENGES = Source("Canavan et al. 2026, Three Concrete Challenges and Two Hopes", "2602.20400")
DEMONSTRATIONS = Source("Min et al. 2022, Rethinking the Role of Demonstrations", "2202.12837")
FLIPPED = Source("Wei et al. 2023, Larger language models do in-context learning differently", "2303.03846")


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try, and where it comes from; no source where it is this project's own measurement."""

    text: str
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome. told: one sentence with its numbers. details: examples. advice: empty where all is well."""

    key: str
    title: str
    verdict: Verdict
    told: str
    details: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()


COLLAPSE_ADVICE = (
    Advice(
        "Subtract the model's own lean: --calibrate mean, batch calibration. Contextual calibration does the same from "
        "a content-free prompt.",
        (BATCH, CONTEXTUAL),
    ),
    Advice(
        "Give the search constraints (consistency_id, --consistency gold-free): they are what rules the constant "
        "labeling out; without them the paper's comparisons nearly always ended in it.",
        (ICM,),
    ),
    Advice("Measure before a run whether U of gold-like labels can win at all: icm label --check."),
    Advice(
        "If the true labels may really be so unbalanced, do not trust any unsupervised method blindly: unbalanced sets "
        "are where they were found to fail. Check a sample by hand.",
        (CHALLENGES,),
    ),
)
FROZEN_ADVICE = (
    Advice("Start again from other seeds (--seed) and keep the run with the highest U."),
    Advice(
        "Keep the random start small (--num_seed 8): labelling everything at random, or by zero-shot, trapped the "
        "search; none at all leaves the model without a context.",
        (ICM,),
    ),
    Advice("Start hotter (--initial_T) or cool more slowly (--decay), so that early losses are accepted."),
    Advice(
        "If the seeds alone already have a high U, the last demonstrations may be exploited: --anchors 4 puts the same "
        "ones last for every question (docs/algorithm.md). Models lean to what stands last.",
        (CONTEXTUAL,),
    ),
)
INCONSISTENT_ADVICE = (
    Advice("Raise --consistency_fix_K: more rounds of repair a proposal.", (ICM,)),
    Advice("Lower --alpha: one inconsistent pair then weighs more against predictability.", (ICM,)),
    Advice("Look at the claims: a group that two labels cannot satisfy is often a wrong consistency_id or a bad row."),
)
FLIPS_ADVICE = (
    Advice(
        "Label by the majority of several seeds and leave out, or have checked, what they disagree on. Averaging helps "
        "against noise, and only partly against a concept that is not the one you want.",
        (CHALLENGES,),
    ),
    Advice(
        "Add constraints: removing them raised the variance between runs more than it lowered the best one.", (ICM,)
    ),
    Advice("Take a larger model: the larger of the paper's came closer to what gold labels reach.", (ICM,)),
)
SALIENCE_ADVICE = (
    Advice(
        "Ask whether the model can know this at all: ICM finds concepts that are salient to the model, and ends at "
        "chance on a preference that it cannot guess (the paper's poems about the sun).",
        (ICM,),
    ),
    Advice("Word the question so that it names the concept, and try several wordings with icm label --check."),
    Advice(
        "Suspect another concept that is more prominent than yours (style, length, sycophancy): unsupervised methods "
        "find whatever is most prominent. Read the claims that are labelled most surely.",
        (PROMINENT, CHALLENGES),
    ),
    Advice(
        "Hold it against many-shot with random labels (icm baselines): demonstrations help by their format alone, so a "
        "gain over zero-shot is no sign of the concept.",
        (DEMONSTRATIONS,),
    ),
    Advice("Take a larger base model; what it knows is what can be elicited.", (ICM,)),
)
INVERTED_ADVICE = (
    Advice(
        "Let the search try the mirror (--mirror, the default): single flips cannot cross from one side to the other. "
        "A model follows flipped labels in its context, the larger the better.",
        (FLIPPED,),
    ),
    Advice("Run several seeds and keep the one with the highest U."),
    Advice(
        "Label a dozen claims by hand: which of two mirror images is the true one is all that they need to decide.",
    ),
)


def diagnose(run: RunRecord) -> list[Finding]:
    """Every check of one search. A run of several parts is diagnosed part by part by the caller."""
    return [collapse(run), frozen(run), inconsistency(run), salience(run), inversion(run)]


def collapse(run: RunRecord) -> Finding:
    """Nearly all labels the same: the most predictable labeling of all for a model that leans to one answer."""
    title = "Collapse to one label"
    labels = [claim.label for claim in run.pool if claim.searched and claim.label is not None]
    if len(labels) < COLLAPSE_MIN_LABELS:
        return Finding("collapse", title, Verdict.UNKNOWN, f"{len(labels)} labels are too few to tell.")
    side = max(reversed(range(run.num_labels)), key=labels.count)
    count = labels.count(side)
    share = count / len(labels)
    told = f"{count} of {len(labels)} labels are {run.names[side]}."
    gold = [claim.gold for claim in run.pool if claim.gold is not None]
    gold_share = gold.count(side) / len(gold) if gold else None
    if gold_share is not None:
        told += f" Of the gold labels {gold_share:.0%} are."
    alone = [claim.zero_shot for claim in run.pool if claim.zero_shot is not None]
    details = []
    if alone:
        asked = side if run.num_labels > 2 else 1
        said = sum(label_of(value, no_offset(run.num_labels)) == asked for value in alone)
        details.append(f"Without demonstrations the model says {run.names[asked]} to {said} of {len(alone)} claims.")
    expected = run.prior is not None and collapse_warning(labels, run.prior) is None
    if expected:
        told += f" The run was told to expect {run.prior:.0%} True."
    if share < LEANING_SHARE or expected:
        return Finding("collapse", title, Verdict.OK, told, tuple(details))
    verdict = Verdict.PROBLEM if share >= COLLAPSE_SHARE else Verdict.WATCH
    if gold_share is not None and gold_share >= LEANING_SHARE:
        verdict = Verdict.WATCH  # the truth is as lopsided
    return Finding("collapse", title, verdict, told, tuple(details), COLLAPSE_ADVICE)


def frozen(run: RunRecord) -> Finding:
    """The search stopped taking in claims early: its random seeds were too good for U to leave them."""
    title = "A start that froze the search"
    if run.search != "annealing":
        told = f"{run.search.capitalize()} labels all claims at once: there is no start that could."
        return Finding("frozen", title, Verdict.OK, told)
    steps = [record for record in run.journal if record["event"] == "step"]
    start = next((record for record in run.journal if record["event"] == "start"), None)
    if start is None or len(steps) < FROZEN_MIN_STEPS:
        return Finding("frozen", title, Verdict.UNKNOWN, f"{len(steps)} iterations are too few to tell.")
    final = final_labels(run.journal)
    size = max(len(run.pool), len(final))
    last = max((record["iteration"] for record in steps if record["accepted"]), default=0)
    seeds = final_labels([start])
    kept = sum(final.get(claim) == label for claim, label in seeds.items())
    told = (
        f"{len(final)} of {size} claims were taken in; the last change was iteration {last} of {len(steps)}. "
        f"{kept} of {len(seeds)} labels of the random start were kept."
    )
    details = []
    refused = [
        record["U_proposed"] - record["U"]
        for record in steps
        if not record["accepted"] and record.get("U_proposed") is not None
    ]
    if refused:
        details.append(f"The best refused proposal of {len(refused)} would have changed U by {max(refused):+.2f}.")
    wrong = [c for c, label in seeds.items() if final.get(c) == label and _gold(run, c) not in (None, label)]
    if wrong:
        were = "was" if len(wrong) == 1 else "were"
        details.append(f"{counted(len(wrong), 'wrong label')} of the random start {were} never corrected.")
    share = len(final) / size
    if share < FROZEN_SHARE and last < len(steps) / 2:
        return Finding("frozen", title, Verdict.PROBLEM, told, tuple(details), FROZEN_ADVICE)
    if share < FROZEN_SHARE and run.finished:
        return Finding("frozen", title, Verdict.WATCH, told, tuple(details), FROZEN_ADVICE)
    return Finding("frozen", title, Verdict.OK, told, tuple(details))


def inconsistency(run: RunRecord) -> Finding:
    """Constraints that the labels still break, and since when."""
    title = "Groups that stay inconsistent"
    if run.constraints is None:
        count = (run.result or {}).get("inconsistent")
        if count is None:
            return Finding("inconsistent", title, Verdict.UNKNOWN, "This run did not record its constraints.")
        told = (
            f"{count} pairs are inconsistent at the end; which ones was not recorded by the version that made this run."
        )
        return Finding(
            "inconsistent",
            title,
            Verdict.WATCH if count else Verdict.OK,
            told,
            (),
            INCONSISTENT_ADVICE if count else (),
        )
    if not run.constraints:
        told = "There are no constraints between these claims, so none can be broken."
        return Finding("inconsistent", title, Verdict.OK, told)
    since = _broken_since(run)
    groups = Counter(run.pool[constraint.claims[0]].group for constraint in since)
    if not since:
        told = f"All {len(run.constraints)} constraints hold, or concern a claim without a label."
        return Finding("inconsistent", title, Verdict.OK, told)
    told = f"{len(since)} of {len(run.constraints)} constraints are broken, in {counted(len(groups), 'group')}."
    details = []
    for constraint, iteration in sorted(since.items(), key=lambda item: item[1])[:SHOWN]:
        *others, last = (f"{run.pool[claim].row} ({run.name_of(run.pool[claim].label)})" for claim in constraint.claims)
        details.append(
            f"Since iteration {iteration}: rows {', '.join(others)} and {last}, "
            f"of which {constraint.relation.value.replace('true', 'True')}."
        )
    verdict = Verdict.PROBLEM if len(since) > len(run.constraints) / 10 else Verdict.WATCH
    return Finding("inconsistent", title, verdict, told, tuple(details), INCONSISTENT_ADVICE)


def salience(run: RunRecord) -> Finding:
    """Whether the labels follow something that the model holds without demonstrations, and are predictable with them.

    Rank statistic: AUC of the zero-shot log-odds against the final labels. It ignores the model's lean to one answer.
    """
    title = "Is the concept salient to this model?"
    labelled = [c for c in run.pool if c.searched and c.log_odds is not None]
    if len(labelled) < COLLAPSE_MIN_LABELS:
        return Finding("salience", title, Verdict.UNKNOWN, f"{len(labelled)} labels are too few to tell.")
    margins = [each[c.label] for c in labelled if (each := run.margins(c)) is not None and c.label is not None]
    margin = sum(margins) / len(margins)
    told = f"Each label is predicted from the others by {margin:.2f} nat on average (P = {probability(margin):.2f})."
    ranked = _rank(labelled)
    if ranked is not None:
        found, error = ranked
        told += (
            f" Zero-shot log-odds rank the labels with AUC {found:.2f} (0.50 is chance, standard error {error:.2f})."
        )
    details = _contrast(run, labelled)
    if margin < FAINT_NATS:
        return Finding("salience", title, Verdict.PROBLEM, told, details, SALIENCE_ADVICE)
    if run.num_labels > 2:
        told += f" Ranks of zero-shot log-odds are of two labels, and these are {run.num_labels}: no contrast."
        return Finding("salience", title, Verdict.UNKNOWN, told, details)
    if ranked is None:
        told += " Zero-shot log-odds were not recorded, or the labels are constant: no contrast."
        return Finding("salience", title, Verdict.UNKNOWN, told, details)
    found, error = ranked
    if found < 0.5 + CERTAIN * error:
        told += (
            " The labels predict each other, but not as the model answers on its own: they may follow another concept."
        )
        return Finding("salience", title, Verdict.WATCH, told, details, SALIENCE_ADVICE)
    return Finding("salience", title, Verdict.OK, told, details)


def inversion(run: RunRecord) -> Finding:
    """Signs that every label means its opposite, or that two of several stand for each other: other optima of U."""
    title = "Inverted labels" if run.num_labels == 2 else "Swapped labels"
    labelled = [c for c in run.pool if c.searched]
    if len(labelled) < COLLAPSE_MIN_LABELS:
        return Finding("inverted", title, Verdict.UNKNOWN, f"{len(labelled)} labels are too few to tell.")
    told, suspicion = [_mirror_told(run)], Verdict.OK
    ratio = _mirror_ratio(run)
    if ratio is not None and ratio > NEAR_MIRROR:
        suspicion = Verdict.WATCH
    ranked = _rank(labelled)
    if ranked is not None:
        found, error = ranked
        told.append(f"Zero-shot log-odds rank the labels with AUC {found:.2f}.")
        if found < 0.5 - CERTAIN * error:
            suspicion = Verdict.WATCH
    known = [claim.agrees for claim in labelled if claim.agrees is not None]
    if known and run.num_labels > 2:
        swap, gained = _best_swap(run, labelled)
        told.append(f"{sum(known)} of {len(known)} agree with gold, {sum(known) + gained} with {swap} swapped.")
        suspicion = Verdict.PROBLEM if gained > 0 else Verdict.OK
    elif known:
        low, high = wilson_interval(sum(known), len(known))
        told.append(f"{sum(known)} of {len(known)} agree with gold (95% interval {low:.2f} to {high:.2f}).")
        if high < 0.5:
            suspicion = Verdict.PROBLEM
        elif low > 0.5:
            suspicion = Verdict.OK
    if suspicion is Verdict.OK and ratio is None and not known and ranked is None:
        suspicion = Verdict.UNKNOWN
    advice = INVERTED_ADVICE if suspicion in (Verdict.WATCH, Verdict.PROBLEM) else ()
    return Finding("inverted", title, suspicion, " ".join(told), (), advice)


def flips(runs: Sequence[RunRecord]) -> Finding:
    """Claims that several runs of the same data label differently."""
    title = "Labels that flip between runs"
    shared = votes(runs)
    if len(shared) < COLLAPSE_MIN_LABELS:
        told = f"Two runs of the same data file are needed; these share {len(shared)} claims, too few to tell."
        return Finding("flips", title, Verdict.UNKNOWN, told)
    flipping = {key: claims for key, claims in shared.items() if len({claim.label for claim in claims}) > 1}
    share = len(flipping) / len(shared)
    told = (
        f"{len(flipping)} of {len(shared)} claims that at least two runs labelled have different labels ({share:.0%})."
    )
    agreements = [agreement_of(first, second) for first, second in combinations(runs, 2)]
    kappas = [found for found in agreements if found.kappa is not None and found.compared >= COLLAPSE_MIN_LABELS]
    mirrored = [found for found in kappas if (found.kappa or 0.0) < MIRRORED_KAPPA]
    if kappas:
        lowest = min(kappas, key=lambda found: found.kappa or 0.0)
        told += f" Lowest agreement of two runs: kappa {lowest.kappa:.2f} ({lowest.first} and {lowest.second})."
    details = [f"{found.first} and {found.second} are mirror images of each other." for found in mirrored]
    for claims in sorted(flipping.values(), key=_commonest_share)[:SHOWN]:
        labels = [claim.label for claim in claims]
        side = 1 if runs[0].num_labels == 2 else max(labels, key=labels.count)
        said = f"{labels.count(side)} of {len(claims)} say {runs[0].name_of(side)}"
        details.append(f"{said}: row {claims[0].row}, {_short(claims[0])}")
    if share < FLIPPING_WATCH:
        return Finding("flips", title, Verdict.OK, told, tuple(details))
    verdict = Verdict.PROBLEM if share >= FLIPPING_PROBLEM else Verdict.WATCH
    advice = (*INVERTED_ADVICE[:2], *FLIPS_ADVICE) if mirrored else FLIPS_ADVICE
    return Finding("flips", title, verdict, told, tuple(details), advice)


def _commonest_share(claims: Sequence[LabelledClaim]) -> float:
    labels = [claim.label for claim in claims]
    return max(map(labels.count, labels)) / len(labels)


def _best_swap(run: RunRecord, labelled: Sequence[LabelledClaim]) -> tuple[str, int]:
    """The two labels whose swap would bring most claims to their gold label, and how many more those are."""
    table = confusion([(claim.label, claim.gold) for claim in labelled], run.num_labels)

    def gained(pair: tuple[int, int]) -> int:
        one, other = pair
        return table[one][other] + table[other][one] - table[one][one] - table[other][other]

    best = max(combinations(range(run.num_labels), 2), key=gained)
    return f"{run.names[best[0]]} and {run.names[best[1]]}", gained(best)


def _mirror_ratio(run: RunRecord) -> float | None:
    """U of the side that lost the last mirror over U of the one that won; None where it was not tried."""
    before = 0.0
    found = None
    for record in run.journal:
        if record["event"] == "mirror":
            pair = sorted((before, record["U_proposed"]))
            found = pair[0] / pair[1] if pair[1] > 0 else None
        before = record["U"]
    return found


def _mirror_told(run: RunRecord) -> str:
    two = run.num_labels == 2
    tried, done = ("All labels flipped", "flipped") if two else ("The best swap of two labels", "swapped")
    told, before = "The mirror was not tried.", 0.0
    for record in run.journal:
        if record["event"] == "mirror":
            end = f"and they were {done}." if record["accepted"] else "so they were not."
            told = f"{tried}: U {record['U_proposed']:.2f} against {before:.2f}, {end}"
        before = record["U"]
    return told


def _rank(labelled: Sequence[LabelledClaim]) -> tuple[float, float] | None:
    """(AUC of zero-shot log-odds against the labels, its standard error under chance), None where there is no contrast.

    The error is that of the Mann-Whitney statistic where neither side ranks higher.
    """
    known = [claim for claim in labelled if claim.odds_alone is not None]
    trues = sum(bool(claim.label) for claim in known)
    falses = len(known) - trues
    found = auc([claim.odds_alone or 0.0 for claim in known], [bool(claim.label) for claim in known])
    if found is None:
        return None
    return found, sqrt((trues + falses + 1) / (12 * trues * falses))


def _contrast(run: RunRecord, labelled: Sequence[LabelledClaim]) -> tuple[str, ...]:
    """How much the context adds to what the model says alone."""
    alone = [claim.odds_alone for claim in labelled if claim.odds_alone is not None]
    if not alone:
        return ()
    mean = sum(alone) / len(alone)
    spread = sum(abs(value - mean) for value in alone) / len(alone)
    final = sum(abs((claim.odds or 0.0) - run.shift) for claim in labelled) / len(labelled)
    return (
        f"Log-odds lie {spread:.2f} nat from their mean of {mean:+.2f} without demonstrations, and {final:.2f} nat "
        f"from {run.shift:+.2f} with all the others shown.",
    )


def _broken_since(run: RunRecord) -> dict[Constraint, int]:
    """Constraints broken at the end, and the iteration since which they always were."""
    constraints = run.constraints or ()
    since: dict[Constraint, int] = {}
    for record, labels in zip(run.journal, labels_over_time(run.journal), strict=True):
        for constraint in constraints:
            if constraint.relation.inconsistencies([labels.get(claim) for claim in constraint.claims]):
                since.setdefault(constraint, int(record.get("iteration", 0)))
            else:
                since.pop(constraint, None)
    return since


def _gold(run: RunRecord, position: int) -> Label:
    return run.pool[position].gold if position < len(run.pool) else None


def _short(claim: LabelledClaim, length: int = 100) -> str:
    text = " ".join(f"{claim.question} {claim.choice}".split())
    return text if len(text) <= length else text[: length - 1] + "…"
