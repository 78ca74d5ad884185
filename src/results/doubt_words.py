"""What is said of labels that are not handed over: what is promised of the others, and on what condition."""

from __future__ import annotations

import math
from collections.abc import Iterator

from src.results.doubt import KNOWN, PLACES, Doubt, Part, Wanted
from src.results.messages import agreement
from src.results.text import counted


def doubt_lines(doubt: Doubt) -> list[str]:
    """What a user should know, one line each."""
    return [line for part in doubt.parts for line in _lines_of(part, doubt.wanted)]


def _lines_of(part: Part, wanted: Wanted) -> Iterator[str]:
    yield _margin_line(part) if wanted.abstain is None else _promise(part, wanted, wanted.abstain)
    if wanted.abstain is not None and wanted.basis == KNOWN and part.checked:
        yield (
            "these labels were shown to the search, which can be surer and righter about their claims than about "
            "others: better check labels that it has not seen"
        )
    if part.compared:
        of = "the others" if part.checked else "those"
        yield f"agreement with gold of {of} {PLACES[part.in_pool]} that keep theirs: " + agreement(
            part.agreeing, part.compared
        )


def _margin_line(part: Part) -> str:
    return (
        f"{_kept(part)}, with a margin of at least {part.threshold:g} nat; this promises nothing about how many of "
        "them are right"
    )


def _promise(part: Part, wanted: Wanted, share: float) -> str:
    where = PLACES[part.in_pool]
    basis = f"{counted(part.checked, 'claim')} whose label is checked ({wanted.basis}"
    basis += ", one of each group)" if part.by_group else ")"
    if part.checked < wanted.least_labels:
        return (
            f"no label {where} is kept: {basis} cannot promise less than {1 / (part.checked + 1):.2g} of the labels "
            f"wrong, and {share:g} needs at least {wanted.least_labels} of them"
        )
    if math.isinf(part.threshold):
        return (
            f"no label {where} is kept: {part.wrong} of the {basis} are wrong, too many, or with too large a margin, "
            f"for a share of {share:g}"
        )
    return (
        f"{_kept(part)}, with a margin of at least {part.threshold:.3g} nat: of these at most {share:g} are expected "
        f"to be wrong, if the {basis} are a random draw of all claims; of them {part.wrong} are wrong, "
        f"{part.kept_wrong} of the {part.kept_checked} with such a margin"
    )


def _kept(part: Part) -> str:
    return f"{part.kept} of {counted(part.claims, 'claim')} {PLACES[part.in_pool]} keep their label"
