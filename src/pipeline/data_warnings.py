"""What looks wrong in a data file: warnings, and how to say what the values of its labels mean."""

from __future__ import annotations

import logging
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from core.llm_api.labels import TRUE_FALSE, LabelSpace
from src.icm.columns import OURS, Reading, as_written, near_misses
from src.icm.consistency import Relation
from src.icm.testbeds import BadInput, Claim, Testbed
from src.icm.values import BadLabel, is_missing, listed, parse_label, shown
from src.pipeline.file_kinds import Row

log = logging.getLogger(__name__)

ALL_ONE_QUESTION: Final = 5
"""If all rows have one question, and they are more than this, it is probably an instruction, repeated in every row.

Multiple-choice questions seldom have more options.
"""

SHOWN_VALUES: Final = 3
"""Values of a column that --map does not name, as a warning shows them."""
LONGEST_WORD: Final = 40
"""Characters of a value that an error message still shows how to map."""

TRUE_WORDS: Final = frozenset(("yes", "y", "t", "correct", "right", "positive", "pos", "valid", "good"))
FALSE_WORDS: Final = frozenset(("no", "n", "f", "incorrect", "wrong", "negative", "neg", "invalid", "bad", "-1"))


def warn_of_unused_values(
    rows: Sequence[Row], names: Mapping[tuple[str, ...], Mapping[str, str]], path: Path, reading: Reading
) -> None:
    """Warn of values that --map names and no row has, in one line a column. names: our name by the file's, by a row's
    columns."""
    for column, meanings in reading.values.items():
        present = Counter(
            as_written(row.fields[theirs])
            for row in rows
            for theirs, ours in names[tuple(row.fields)].items()
            if ours == column and not is_missing(row.fields[theirs])
        )
        absent = [value for value in meanings if value not in present]
        if absent:
            common = listed([value for value, _ in present.most_common(SHOWN_VALUES)])
            nothing = f": it changes nothing; the column holds {common}" if len(absent) == len(meanings) else ""
            log.warning(
                "%s: %s: no row has %s there%s",
                *(path, reading.says("map", column), " or ".join(map(repr, absent)), nothing),
            )


def warn_of_near_misses(
    testbed: Testbed, reading: Reading, rows: Sequence[Row], claims: Sequence[Claim], path: Path
) -> None:
    """Warn of columns that are not read and were perhaps meant to be, since nothing else shows it."""
    columns = list(dict.fromkeys(name for row in rows for name in row.fields))
    has_gold = any(claim.gold is not None for claim in claims)
    near = near_misses(columns, {*OURS, *testbed.columns}, has_gold)
    if near:
        pairs = ",".join(f"{ours}={theirs}" for theirs, ours in near.items())
        log.warning(
            "%s: columns not read: %s; did you mean %s? Then say %s",
            *(path, ", ".join(near), ", ".join(near.values()), reading.says("columns", pairs)),
        )


def check_may_be_empty(testbed: Testbed, rows: Sequence[Row], path: Path) -> None:
    """Raises BadInput where no row has one of `testbed.may_be_empty`; warns where some rows have nothing in it."""
    for column in testbed.may_be_empty:
        if not any(column in row.fields for row in rows):
            raise BadInput(f"{path}: lacks the column {column}, by which the claims of a group constrain each other")
        without = [row.line for row in rows if not row.unread and is_missing(row.fields.get(column))]
        if without:
            log.warning(
                "%s:%d: has nothing in %s (%d such rows): it does not constrain such a claim",
                *(path, without[0], column, len(without)),
            )


def warn_of_odd_claims(testbed: Testbed, claims: Sequence[Claim], rows: Sequence[Row], path: Path) -> None:
    """Warn of claims that can be used, and are perhaps not what the user meant."""
    forged = [rows[claim.of_row].line for claim in claims if testbed.imitates(claim)]
    if forged:
        log.warning(
            "%s:%d: holds a line that begins like the prompt's own (%d such rows): the model may read that claim as "
            "several demonstrations, labels included (docs/security.md)",
            *(path, forged[0], len(forged)),
        )
    golds: dict[str, Claim] = {}
    known = [claim for claim in claims if claim.gold is not None]
    twice = [(golds[c.text], c) for c in known if golds.setdefault(c.text, c).gold != c.gold]
    if twice:
        first, second = (rows[claim.of_row].line for claim in twice[0])
        log.warning(
            "%s:%d: is the same claim as line %d, with the other gold label (%d such rows): agreement with gold cannot "
            "be complete",
            *(path, second, first, len(twice)),
        )
    sets: dict[tuple[str, Relation], list[Claim]] = defaultdict(list)
    for claim in claims:
        if claim.relation is not None and claim.option is None:
            sets[claim.group, claim.relation].append(claim)
    broken = [each for (_, holds), each in sets.items() if holds.inconsistencies([claim.gold for claim in each])]
    if broken:
        log.warning(
            "%s:%d: is of a group whose gold labels break its consistency_relation (%d such groups): one of the two is "
            "wrong",
            *(path, rows[broken[0][0].of_row].line, len(broken)),
        )
    used = len({claim.of_row for claim in claims})
    if testbed.grouped_by == "question" and used > ALL_ONE_QUESTION and len({c.group for c in claims}) == 1:
        log.warning(
            "%s: all %d rows have one question, which makes them one group; if it is an instruction and no question, "
            "use --group_by none",
            *(path, used),
        )


def meaning_of_labels(rows: Iterable[Row], testbed: Testbed, reading: Reading) -> str:
    """The end of an error message about a label: the values in its column, and how to say what they mean.

    Empty where the column holds lists.
    """
    column = (row.fields.get("label") if row.written is None else row.written for row in rows)
    counts = Counter(text for each in column if (text := _plain(each)) is not None)
    if not counts:
        return ""
    given = reading.values.get("label", {})
    values = ", ".join(f"{shown(text)} ({count})" for text, count in counts.most_common(3))
    said = f". The column's commonest values: {values}"
    unknown = [
        text for text, _ in counts.most_common() if not _is_label(given.get(as_written(text), text), testbed.space)
    ]
    if not unknown:  # the label is a list with something else in it
        return said
    if testbed.digest:
        names = testbed.space.names
        return (
            f"{said}; say in the testbed file which label each means, as in "
            f"map: {{label: {{{shown(unknown[0])}: {shown(names[-1])}}}}} (there are: {', '.join(names)})"
        )
    unknown = unknown[:2]
    if any(set(",:") & set(text) or not text.isprintable() or len(text) > LONGEST_WORD for text in unknown):
        return said
    guesses = [_guess(text) for text in unknown]
    sure = all(guesses) and len(set(guesses)) == len(guesses)
    if not sure:
        guesses = ["false", "true"] if guesses[0] == "false" or guesses[1:] == ["true"] else ["true", "false"]
    other = "" if sure else ", or the other way round"
    kept = [(theirs, ours) for theirs, ours in given.items() if _is_label(ours)]
    pairs = [*kept, *zip(unknown, guesses, strict=False)]
    flag = shlex.quote(f"label={','.join(map(':'.join, pairs))}")
    return f"{said}; say what they mean, as by --map {flag}{other}"


def _plain(value: object) -> str | None:
    return None if is_missing(value) or isinstance(value, list | dict) else str(value).strip()


def _is_label(text: str, space: LabelSpace = TRUE_FALSE) -> bool:
    try:
        parse_label(text, space)
    except BadLabel:
        return False
    return True


def _guess(text: str) -> str:
    """The label that a word probably means: true, false, or an empty text."""
    word = as_written(text)
    return "true" if word in TRUE_WORDS else "false" if word in FALSE_WORDS else ""
