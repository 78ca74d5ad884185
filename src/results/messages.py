"""What the command line says about a run: agreement with gold, warnings, what --check measured. Text only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src.icm.consistency import Label
from src.icm.label_names import TRUE_FALSE_NAMES, Names
from src.icm.objective import Evaluation, wilson_interval
from src.icm.prior import PriorEstimate
from src.icm.problem import SearchSettings
from src.results.text import counted

COLLAPSE_SHARE = 0.95
COLLAPSE_MIN_LABELS = 16
FEW_CLAIMS = 20
"""With fewer claims than this, which of two labelings has the higher U is largely chance."""


def agreement(agreeing: int, compared: int) -> str:
    """'0.84 (54 of 64, 95% interval 0.74 to 0.91)'; Wilson interval."""
    if compared == 0:
        return "unknown (no labels to compare)"
    low, high = wilson_interval(agreeing, compared)
    return f"{agreeing / compared:.2f} ({agreeing} of {compared}, 95% interval {low:.2f} to {high:.2f})"


def calibration_in_words(settings: Mapping[str, Any]) -> str:
    """The calibration of a run's settings in words: "none", "mean", "mean, prior 0.97", or "mean, prior
    auto"."""
    prior = settings.get("prior")
    shown = f"{prior:g}" if isinstance(prior, float) else prior
    return str(settings["calibrate"]) if prior is None else f"{settings['calibrate']}, prior {shown}"


def estimates_in_words(found: Sequence[PriorEstimate]) -> str:
    """The estimated shares of one or more searches in one line."""
    if len(found) == 1:
        return found[0].sentence()
    shares, used = sorted(each.share for each in found), sum(each.prior is not None for each in found)
    return (
        f"share of True claims, estimated without labels in {len(found)} searches: {shares[0]:.2f} to "
        f"{shares[-1]:.2f}; used as --prior in {used}, the others are calibrated to the mean (each run.json says why)"
    )


def collapse_warning(
    labels: Sequence[Label], prior: float | None = None, names: Names = TRUE_FALSE_NAMES, *, calibrated: bool = False
) -> str | None:
    """One line of advice where nearly all labels are the same, None otherwise.

    calibrated: whether the search was; if so, the advice leaves --calibrate out. prior: the share of True claims, where
    it is known; then None also where at least half as many labels as it implies are the rarer one.
    """
    known = [label for label in labels if label is not None]
    if len(known) < COLLAPSE_MIN_LABELS:
        return None
    side = max(range(len(names)), key=known.count)
    share = known.count(side) / len(known)
    if share < COLLAPSE_SHARE:
        return None
    if prior is not None:
        expected = 1 - prior if side else prior
        if 1 - share >= expected / 2:
            return None
    calibrate = "" if calibrated else "Try --calibrate mean, s"
    return (
        f"{known.count(side)} of {len(known)} labels are {names[side]}: the search is "
        "collapsing to one label, which is the most predictable labeling of all for a model that leans to one answer. "
        f"{calibrate or 'S'}ee whether U of gold-like labels can win at all with --check, or use a larger model."
    )


def random_warning(labelled: int, accepted: int) -> str | None:
    """One line where a search that began with random labels changed none of them, None otherwise.

    labelled: how many labels it has. accepted: how many changes it accepted.
    """
    if accepted or not labelled:
        return None
    return (
        f"all {labelled} labels of the search are random: it accepted no change to those that it began with. Try a "
        "smaller --num_seed or a larger pool, and see with --check whether ICM can work here."
    )


def changes_objective(settings: SearchSettings) -> list[str]:
    """How each variant in use changes the paper's U, one sentence each."""
    variants = []
    if settings.context_cap is not None:
        variants.append(
            f"every label is predicted from a balanced sample of at most {settings.context_cap} others "
            "(--context_cap), not from all"
        )
    if settings.local_gain:
        variants.append(
            "claims were taken in by their term of U alone (--local_gain), an estimate; the U shown is the full one"
        )
    return variants


def check_table(worth: Mapping[str, Evaluation], calibration: str) -> str:
    """The table of --check: labeling, U, mean signed log-odds (nats), inconsistent pairs; then what it means.

    calibration: in words (see calibration_in_words). Only what is not done yet and can help is advised: alpha changes
    no order of labelings that are equally consistent.
    """
    wide = max(14, *(len(name) + 2 for name in worth))
    lines = [f"{'labeling':<{wide}}{'U':>10}{'predictability':>17}{'inconsistent':>15}   (calibration: {calibration})"]
    for name, evaluation in worth.items():
        figures = f"{evaluation.utility:>z10.2f}{evaluation.predictability:>z12.3f} nat{evaluation.inconsistent:>15}"
        lines.append(f"{name:<{wide}}{figures}")
    gold = worth.get("gold")
    compared = len(next(iter(worth.values())).log_odds)
    lines.append(counted(compared, "claim") + ("" if gold is None else " whose gold label is known"))
    if gold is None:
        lines.append("No gold labels: compare U of a finished run with U of the constant labelings above.")
    else:
        rivals = [name for name, evaluation in worth.items() if name != "gold" and evaluation.utility >= gold.utility]
        if rivals:
            beat = "beat" if len(rivals) > 1 else "beats"
            advice = ["--calibrate mean"] if calibration == "none" else []
            if any(worth[name].inconsistent != gold.inconsistent for name in rivals):
                advice.append("another --alpha")
            tried = f"{', '.join([*advice, ''])}or a larger model" if advice else "a larger model"
            lines.append(
                f"U(gold) is not the highest ({', '.join(rivals)} {beat} it): on this pool ICM has no reason to find "
                f"the gold labels. Try {tried}."
            )
        else:
            lines.append("U(gold) is the highest: ICM's precondition holds on this pool.")
    if compared < FEW_CLAIMS:
        lines.append(f"Fewer than {FEW_CLAIMS} claims tell little: which U is the highest is then largely chance.")
    return "\n".join(lines)


def token_lines(record: Mapping[str, Any]) -> str:
    """The tokens of a demonstration, for --check, each with the text that it adds. record: see token_record."""
    lines = [f"{name:<14}{_tokens(record[name])}" for name in ("prefix", "demonstration", "separator")]
    labels = ", ".join(repr(text) if token is None else f"{text!r} {token}" for text, token in record["labels"].items())
    return "\n".join([*lines, f"{'labels':<14}{labels}"])


def _tokens(found: str | Sequence[tuple[int, str | None]]) -> str:
    if isinstance(found, str):
        return f"{found!r}, asked in text"
    return "  ".join(f"{token}" if text is None else f"{text!r} {token}" for token, text in found) or "none"
