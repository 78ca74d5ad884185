"""What a landscape means, in sentences: the verdict for somebody who reads nothing else, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from src.icm.labelings import Evaluated
from src.results.findings import Verdict
from src.results.landscape import LEADS, NEAR, NEARLY_HIGHEST, Landscape
from src.results.text import counted


def verdict_sentence(landscape: Landscape) -> str:
    """What it comes to, for somebody who reads nothing else."""
    if not landscape.has_gold:
        return _without_gold(landscape)
    top, verdict = landscape.agreement(landscape.highest), landscape.verdict
    if verdict is Verdict.OK:
        return (
            f"U leads to truth here: labelings with a higher U agree more with gold, and the labels with "
            f"the highest U agree with gold on {top:.0%} of the claims. A search that finds a higher U finds better "
            "labels."
        )
    if verdict is Verdict.WATCH and top < NEAR:
        return (
            "U leads part of the way to truth here: labelings with a higher U tend to agree more with gold, but those "
            f"with the highest agree with it on {top:.0%} of the claims only. Expect a search to find labels that are "
            "better than chance, and look at some by hand."
        )
    if verdict is Verdict.WATCH:
        return (
            f"U leads part of the way to truth here: the labels with the highest U agree with gold on {top:.0%} of the "
            "claims, but elsewhere a higher U does not mean much more of it. A search can end at labels of a lower U "
            "that are wrong, such as mirrored ones; one from several starts (--search ascent) is surer."
        )
    return f"U does not lead to truth for this model and data: {_failure(landscape)}"


def _failure(landscape: Landscape) -> str:
    top = landscape.agreement(landscape.highest)
    advice = "Try a larger model or another template; more searching does not help."
    if landscape.highest.labeling.kind == "constant":
        name = landscape.highest.labeling.name
        return f"its highest U is that of one label for every claim ({name}). Try --calibrate mean, or a larger model."
    if len(landscape.names) == 2 and top <= 1 - NEAR:
        return (
            f"the labels with the highest U are gold's inverse (agreement {top:.0%}). The model tells the two kinds of "
            "claims apart and takes one for the other: flip all labels, after a look at some claims by hand."
        )
    if top < landscape.halfway:
        return f"the labels with the highest U agree with gold on {top:.0%} of the claims only. {advice}"
    return f"labelings with a higher U do not agree more with gold than others. {advice}"


def _without_gold(landscape: Landscape) -> str:
    begin = "Without gold nothing here says whether U leads to truth; it says how many peaks U has. "
    rivals = landscape.nearly_highest
    far = [each for each in rivals if landscape.agreement(each) < NEAR]
    if far:
        agree = "agrees" if len(far) == 1 else "agree"
        return begin + (
            f"There are several: {counted(len(far), 'labeling')} with nearly the highest U {agree} with the highest "
            f"one on {_span([landscape.agreement(each) for each in far])} of the claims, and U alone does not say "
            "which is true. Label some claims by hand before a search."
        )
    near = f"all {len(rivals)} others that come near it say nearly the same" if rivals else "no other labeling is near"
    return begin + (
        f"In what was tried there is one: {near}. Whether it is the truth, or its mirror, some claims labelled by hand "
        "will tell."
    )


def words(landscape: Landscape) -> list[str]:
    """What the verdict rests on, one sentence a line."""
    lines = [_correlation_line(landscape), _highest_line(landscape)]
    gold = landscape.gold_labeling
    if gold is not None:
        lines.append(_above_gold_line(landscape, gold))
    elif landscape.has_gold:
        known = sum(label is not None for label in landscape.gold)
        lines.append(
            f"Gold is known of {known} of the {len(landscape.gold)} claims: agreement is that on those, and U "
            "of gold is not known."
        )
    if landscape.has_gold and landscape.without_gold:
        best = max(landscape.without_gold, key=lambda each: each.utility)
        lines.append(
            f"Of the labelings made without gold, {best.labeling.name} has the highest U, {best.utility:.2f}; it "
            f"agrees with gold on {landscape.agreement(best):.0%}."
        )
    if landscape.mirrors:
        lower = sum(mirror.utility < original.utility for original, mirror in landscape.mirrors)
        line = f"{lower} of {len(landscape.mirrors)} mirrored labelings have a lower U than their originals"
        of_gold = next((mirror for original, mirror in landscape.mirrors if original is gold), None)
        lines.append(line + ("." if of_gold is None else f"; that of gold has {of_gold.utility:.2f}."))
    if landscape.has_gold:
        lines.append(
            "Thresholds: U leads to truth where the labels with the highest U agree with gold on at least "
            f"{max(NEAR, landscape.halfway):.0%} of the claims, the rank correlation is at least {LEADS:g} and its "
            "interval above 0; part of the way where only the first holds, or where they agree on at least "
            f"{landscape.halfway:.0%} (halfway between the commonest label for all claims and every label right) and "
            "the interval is above 0; else it does not."
        )
    else:
        lines.append(
            f"Thresholds: a labeling is nearly as high as the highest where its U is at most {NEARLY_HIGHEST:.0%} of "
            f"the way down to the median U, and another peak where it agrees with the highest on less than {NEAR:.0%}."
        )
    return lines


def _correlation_line(landscape: Landscape) -> str:
    count = len(landscape.compared)
    if landscape.correlation is None:
        return f"U or the agreement with {landscape.against} is the same for all {count} labelings: no correlation."
    if landscape.interval is None:
        inside = "too few for an interval"
    else:
        low, high = landscape.interval
        inside = f"95% interval {low:.2f} to {high:.2f}, bootstrap over labelings"
    without = landscape.correlation_without_mirrors
    also = f"; {without:.2f} without the mirrored ones" if landscape.mirrors and without is not None else ""
    return (
        f"Rank correlation (Spearman) of U and agreement with {landscape.against}, {count} different labelings: "
        f"{landscape.correlation:.2f} ({inside}){also}."
    )


def _highest_line(landscape: Landscape) -> str:
    highest = landscape.highest
    line = f"Highest U: {highest.utility:.2f}, {highest.labeling.name}"
    if not landscape.has_gold:
        return f"{line}. Agreement below is with its labels, not with the truth."
    return f"{line}; it agrees with gold on {landscape.agreement(highest):.0%}."


def _above_gold_line(landscape: Landscape, gold: Evaluated) -> str:
    above = landscape.above_gold
    if not above:
        return f"U of gold is {gold.utility:.2f}; no labeling has a higher one."
    have, agree = ("has", "agrees") if len(above) == 1 else ("have", "agree")
    return (
        f"U of gold is {gold.utility:.2f}; {counted(len(above), 'labeling')} {have} a higher one and {agree} with gold "
        f"on {_span([landscape.agreement(each) for each in above])}."
    )


def _span(shares: Sequence[float]) -> str:
    lowest, highest = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return lowest if lowest == highest else f"{lowest} to {highest}"
