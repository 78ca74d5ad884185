"""Checks of a search for the known failures of ICM. Pure functions of finished or running runs.

A verdict is "problem" where the labels should not be used as they are, "watch" where they deserve a look, "unknown"
where the run lacks what the check needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import sqrt

from src.icm.consistency import Constraint, Label
from src.icm.label_names import confusion
from src.icm.objective import auc, label_of, no_offset, wilson_interval
from src.results.findings import (
    COLLAPSE_ADVICE,
    FROZEN_ADVICE,
    INCONSISTENT_ADVICE,
    INVERTED_ADVICE,
    SALIENCE_ADVICE,
    SHOWN,
    Finding,
    Verdict,
)
from src.results.messages import COLLAPSE_MIN_LABELS, COLLAPSE_SHARE, collapse_warning
from src.results.run_record import LabelledClaim, RunRecord, final_labels, labels_over_time, probability
from src.results.text import counted

LEANING_SHARE = 0.85  # of one label: not a collapse, and worth a look
FROZEN_SHARE = 0.5  # of the pool labelled, with nothing changed in the second half of the search
FROZEN_MIN_STEPS = 30
FAINT_NATS = 0.25  # a label's mean log-odds below which the others hardly predict it: P = 0.56
CERTAIN = 2.0  # standard errors between a rank statistic and chance
NEAR_MIRROR = 0.75  # of U, from which on the flipped labels are nearly as good


def diagnose(run: RunRecord) -> list[Finding]:
    """Every check of one search. A run of several parts is diagnosed part by part by the caller."""
    return [collapse(run), frozen(run), inconsistency(run), salience(run), inversion(run)]


def collapse(run: RunRecord) -> Finding:
    """Whether nearly all labels are the same: for a model that leans to one answer the most predictable labeling."""
    title = "Collapse to one label"
    labels = [claim.label for claim in run.pool if claim.searched and claim.label is not None]
    if len(labels) < COLLAPSE_MIN_LABELS:
        return Finding("collapse", title, Verdict.UNKNOWN, f"{len(labels)} labels are too few to say.")
    side = max(reversed(range(run.num_labels)), key=labels.count)
    count = labels.count(side)
    share = count / len(labels)
    text = f"{count} of {len(labels)} labels are {run.names[side]}."
    gold = [claim.gold for claim in run.pool if claim.gold is not None]
    gold_share = gold.count(side) / len(gold) if gold else None
    if gold_share is not None:
        text += f" Of the gold labels {gold_share:.0%} are."
    zero_shot = [claim.zero_shot for claim in run.pool if claim.zero_shot is not None]
    details = []
    if zero_shot:
        asked = side if run.num_labels > 2 else 1
        said = sum(label_of(value, no_offset(run.num_labels)) == asked for value in zero_shot)
        details.append(
            f"Without demonstrations the model says {run.names[asked]} to {said} of {len(zero_shot)} claims."
        )
    expected = run.prior is not None and collapse_warning(labels, run.prior) is None
    if expected:
        text += f" The run's prior makes it expect {run.prior:.0%} True."
    if share < LEANING_SHARE or expected:
        return Finding("collapse", title, Verdict.OK, text, tuple(details))
    verdict = Verdict.PROBLEM if share >= COLLAPSE_SHARE else Verdict.WATCH
    if gold_share is not None and gold_share >= LEANING_SHARE:
        verdict = Verdict.WATCH  # gold labels are as unbalanced
    return Finding("collapse", title, verdict, text, tuple(details), COLLAPSE_ADVICE)


def frozen(run: RunRecord) -> Finding:
    """Whether the search stopped taking in claims early, because U of its random seeds was already high."""
    title = "A start that froze the search"
    if run.search != "annealing":
        if run.search in ("ascent", "bootstrapping", "gibbs"):
            text = f"{run.search.capitalize()} labels all claims at once: there is no start that could."
            return Finding("frozen", title, Verdict.OK, text)
        return Finding("frozen", title, Verdict.UNKNOWN, f"Nothing is known here of searches named {run.search}.")
    steps = [record for record in run.journal if record["event"] == "step"]
    start = next((record for record in run.journal if record["event"] == "start"), None)
    if start is None or len(steps) < FROZEN_MIN_STEPS:
        return Finding("frozen", title, Verdict.UNKNOWN, f"{len(steps)} iterations are too few to say.")
    final = final_labels(run.journal)
    size = max(len(run.pool), len(final))
    last = max((record["iteration"] for record in steps if record["accepted"]), default=0)
    given = {at for at, claim in enumerate(run.pool) if claim.is_known}
    seeds = {claim: label for claim, label in final_labels([start]).items() if claim not in given}
    kept = sum(final.get(claim) == label for claim, label in seeds.items())
    text = f"{len(final)} of {size} claims were taken in; the last change was iteration {last} of {len(steps)}. "
    text += (
        f"{kept} of {len(seeds)} labels of the random start were kept."
        if seeds or not given
        else f"It started with {counted(len(given), 'known label')}, none of them random."
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
        return Finding("frozen", title, Verdict.PROBLEM, text, tuple(details), FROZEN_ADVICE)
    if share < FROZEN_SHARE and run.finished:
        return Finding("frozen", title, Verdict.WATCH, text, tuple(details), FROZEN_ADVICE)
    return Finding("frozen", title, Verdict.OK, text, tuple(details))


def inconsistency(run: RunRecord) -> Finding:
    """Constraints that the labels break at the end, and since which iteration."""
    title = "Groups that stay inconsistent"
    if run.constraints is None:
        count = (run.result or {}).get("inconsistent")
        if count is None:
            return Finding("inconsistent", title, Verdict.UNKNOWN, "This run did not record its constraints.")
        text = (
            f"{count} pairs are inconsistent at the end; which ones was not recorded by the version that made this run."
        )
        return Finding(
            "inconsistent",
            title,
            Verdict.WATCH if count else Verdict.OK,
            text,
            (),
            INCONSISTENT_ADVICE if count else (),
        )
    if not run.constraints:
        text = "There are no constraints between these claims, so none can be broken."
        return Finding("inconsistent", title, Verdict.OK, text)
    since = _broken_since(run)
    groups = Counter(run.pool[constraint.claims[0]].group for constraint in since)
    if not since:
        text = f"All {len(run.constraints)} constraints hold, or concern a claim without a label."
        return Finding("inconsistent", title, Verdict.OK, text)
    all_of_them, are = counted(len(run.constraints), "constraint"), "is" if len(since) == 1 else "are"
    text = f"{len(since)} of {all_of_them} {are} broken, in {counted(len(groups), 'group')}."
    details = []
    for constraint, iteration in sorted(since.items(), key=lambda item: item[1])[:SHOWN]:
        *others, last = (f"{run.pool[claim].row} ({run.name_of(run.pool[claim].label)})" for claim in constraint.claims)
        details.append(
            f"Since iteration {iteration}: rows {', '.join(others)} and {last}, "
            f"of which {constraint.relation.value.replace('true', 'True')}."
        )
    verdict = Verdict.PROBLEM if len(since) > len(run.constraints) / 10 else Verdict.WATCH
    return Finding("inconsistent", title, verdict, text, tuple(details), INCONSISTENT_ADVICE)


def salience(run: RunRecord) -> Finding:
    """Whether the labels follow what the model answers without demonstrations, and are predictable with them.

    Measured by the AUC of the zero-shot log-odds against the final labels, which ignores a lean to one answer.
    """
    title = "Is the concept salient to this model?"
    labelled = [c for c in run.pool if c.searched and c.log_odds is not None]
    if len(labelled) < COLLAPSE_MIN_LABELS:
        return Finding("salience", title, Verdict.UNKNOWN, f"{len(labelled)} labels are too few to say.")
    margins = [each[c.label] for c in labelled if (each := run.margins(c)) is not None and c.label is not None]
    margin = sum(margins) / len(margins)
    text = f"Each label is predicted from the others by {margin:.2f} nat on average (P = {probability(margin):.2f})."
    ranked = _rank(labelled)
    if ranked is not None:
        found, error = ranked
        text += (
            f" Zero-shot log-odds rank the labels with AUC {found:.2f} (0.50 is chance, standard error {error:.2f})."
        )
    details = _contrast(run, labelled)
    if margin < FAINT_NATS:
        return Finding("salience", title, Verdict.PROBLEM, text, details, SALIENCE_ADVICE)
    if run.num_labels > 2:
        text += f" Ranks of zero-shot log-odds are of two labels, and these are {run.num_labels}: no contrast."
        return Finding("salience", title, Verdict.UNKNOWN, text, details)
    if ranked is None:
        text += " Zero-shot log-odds were not recorded, or the labels are constant: no contrast."
        return Finding("salience", title, Verdict.UNKNOWN, text, details)
    found, error = ranked
    if found < 0.5 + CERTAIN * error:
        text += (
            " The labels predict each other, but not as the model answers zero-shot: they may follow another concept."
        )
        return Finding("salience", title, Verdict.WATCH, text, details, SALIENCE_ADVICE)
    return Finding("salience", title, Verdict.OK, text, details)


def inversion(run: RunRecord) -> Finding:
    """Whether all labels may be inverted, or two of several swapped: such labelings are other optima of U."""
    title = "Inverted labels" if run.num_labels == 2 else "Swapped labels"
    labelled = [c for c in run.pool if c.searched]
    if len(labelled) < COLLAPSE_MIN_LABELS:
        return Finding("inverted", title, Verdict.UNKNOWN, f"{len(labelled)} labels are too few to say.")
    sentences, suspicion = [_mirror_in_words(run)], Verdict.OK
    ratio = _mirror_ratio(run)
    if ratio is not None and ratio > NEAR_MIRROR:
        suspicion = Verdict.WATCH
    ranked = _rank(labelled)
    if ranked is not None:
        found, error = ranked
        sentences.append(f"Zero-shot log-odds rank the labels with AUC {found:.2f}.")
        if found < 0.5 - CERTAIN * error:
            suspicion = Verdict.WATCH
    given = [c for c in run.pool if c.is_known and c.label is not None and c.log_odds is not None]
    if given:
        right = sum(label_of(c.log_odds, run.offset_of(c)) == c.label for c in given if c.log_odds is not None)
        sentences.append(f"{right} of {len(given)} known labels are what the model predicts from the others.")
        if wilson_interval(right, len(given))[1] < 0.5:
            suspicion = Verdict.WATCH
    known = [claim.agrees for claim in labelled if claim.agrees is not None]
    if known and run.num_labels > 2:
        swap, gained = _best_swap(run, labelled)
        sentences.append(f"{sum(known)} of {len(known)} agree with gold, {sum(known) + gained} with {swap} swapped.")
        suspicion = Verdict.PROBLEM if gained > 0 else Verdict.OK
    elif known:
        low, high = wilson_interval(sum(known), len(known))
        sentences.append(f"{sum(known)} of {len(known)} agree with gold (95% interval {low:.2f} to {high:.2f}).")
        if high < 0.5:
            suspicion = Verdict.PROBLEM
        elif low > 0.5:
            suspicion = Verdict.OK
    if suspicion is Verdict.OK and ratio is None and not known and ranked is None:
        suspicion = Verdict.UNKNOWN
    advice = INVERTED_ADVICE if suspicion in (Verdict.WATCH, Verdict.PROBLEM) else ()
    return Finding("inverted", title, suspicion, " ".join(sentences), (), advice)


def _best_swap(run: RunRecord, labelled: Sequence[LabelledClaim]) -> tuple[str, int]:
    """The two labels whose swap would bring most claims to their gold label, and how many more those are."""
    table = confusion([(claim.label, claim.gold) for claim in labelled], run.num_labels)

    def gained(pair: tuple[int, int]) -> int:
        one, other = pair
        return table[one][other] + table[other][one] - table[one][one] - table[other][other]

    best = max(combinations(range(run.num_labels), 2), key=gained)
    return f"{run.names[best[0]]} and {run.names[best[1]]}", gained(best)


def _mirror_ratio(run: RunRecord) -> float | None:
    """The lower U of the last mirror over the higher one; None where it was not tried."""
    before = 0.0
    found = None
    for record in run.journal:
        if record["event"] == "mirror":
            pair = sorted((before, record["U_proposed"]))
            found = pair[0] / pair[1] if pair[1] > 0 else None
        before = record["U"]
    return found


def _mirror_in_words(run: RunRecord) -> str:
    two = run.num_labels == 2
    tried, done = ("All labels flipped", "flipped") if two else ("The best swap of two labels", "swapped")
    text, before = "The mirror was not tried.", 0.0
    if run.search == "ascent" and run.settings.get("mirror"):
        text = "The mirror of what was found was judged, and U decided."
    for record in run.journal:
        if record["event"] == "mirror":
            end = f"and they were {done}." if record["accepted"] else "so they were not."
            text = f"{tried}: U {record['U_proposed']:.2f} against {before:.2f}, {end}"
        before = record["U"]
    return text


def _rank(labelled: Sequence[LabelledClaim]) -> tuple[float, float] | None:
    """(AUC of zero-shot log-odds against the labels, its standard error under chance); None where it is not defined.

    The error is that of the Mann-Whitney statistic if neither side ranks higher.
    """
    known = [claim for claim in labelled if claim.zero_shot_odds is not None]
    trues = sum(bool(claim.label) for claim in known)
    falses = len(known) - trues
    found = auc([claim.zero_shot_odds or 0.0 for claim in known], [bool(claim.label) for claim in known])
    if found is None:
        return None
    return found, sqrt((trues + falses + 1) / (12 * trues * falses))


def _contrast(run: RunRecord, labelled: Sequence[LabelledClaim]) -> tuple[str, ...]:
    """How much further demonstrations move the log-odds, in one sentence."""
    odds = [claim.zero_shot_odds for claim in labelled if claim.zero_shot_odds is not None]
    if not odds:
        return ()
    mean = sum(odds) / len(odds)
    spread = sum(abs(value - mean) for value in odds) / len(odds)
    final = sum(abs((claim.odds or 0.0) - run.shift_of(claim)) for claim in labelled) / len(labelled)
    center = "the offset of their batch" if run.offsets else f"{run.shift:+.2f}"
    return (
        f"Log-odds lie {spread:.2f} nat from their mean of {mean:+.2f} without demonstrations, and {final:.2f} nat "
        f"from {center} with all the others shown.",
    )


def _broken_since(run: RunRecord) -> dict[Constraint, int]:
    """Constraints broken at the end, and the iteration since which they are broken without a break."""
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
