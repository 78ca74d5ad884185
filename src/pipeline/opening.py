"""What a run says before it asks anything: its claims, groups and constraints, the engine's type, the labels' tokens,
and one whole prompt of the pool, in which wrong input shows. Text only; the command lines print it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Final

from core.llm_api.labels import TRUE_FALSE, SpelledLabels
from core.llm_api.types import Prompt
from src.icm.consistency import Overview
from src.icm.problem import Stream, generator
from src.pipeline.known import merged
from src.pipeline.labelling import Labelling, Pool
from src.pipeline.precondition import random_labels
from src.results.text import counted

FEW: Final = 3
"""Up to this number, all demonstrations of a prompt are shown."""
PIECE: Final = 600
"""Up to this number of characters, a demonstration or question is shown uncut."""
ENDING: Final = 40
"""Characters of a question's last line that are shown before its label."""
PIECES: Final = 4
"""Tokens of a question's end that are shown before its label."""


def opening(
    labelling: Labelling, tokens: Mapping[str, Any], name: str, batch_size: int, pools: Sequence[Pool] = ()
) -> list[str]:
    """The lines about claims, constraints, engine and labels. Asks nothing.

    tokens: the labelling's token_record. name: of the data. batch_size: what was asked for. pools: all of a data set's
    batches, where there are several.
    """
    pools = pools or [labelling.pool]
    seen = [pool.overview() for pool in pools]
    groups = describe_groups(seen, sum(len(pool.claims) for pool in pools))
    return [
        f"data    {_claims(pools, name, batch_size)}",
        *(f"known   {line}" for line in known_line(pools)),
        f"groups  {groups}; constraints: {describe_constraints(seen)}",
        f"model   {_engine(labelling)}",
        f"labels  {_labels(tokens, labelling.book.labels)}",
    ]


def example_prompt(labelling: Labelling) -> Prompt:
    """One question of the pool with all its other claims as demonstrations, their labels drawn at random.

    The labels are those that `--check` calls random, so no gold label is shown.
    """
    problem = labelling.pool.problem
    labels = random_labels(problem.size, problem.num_labels, generator(problem.settings.seed, Stream.SEEDS, 1))
    layout = problem.new_layout(range(problem.size), labels=labels)
    claim = layout.questions[0]
    return labelling.book.prompt(claim, layout.context(claim), labels)


def prompt_head(row: int, demonstrations: int, labels: str) -> str:
    """The heading of a prompt. labels: which ones its demonstrations have, in words."""
    return f"prompt  row {row} after {counted(demonstrations, 'demonstration')} with {labels}"


def prompt_line(labelling: Labelling, prompt: Prompt, where: str) -> str:
    """The heading of `prompt`, its size, and where to find the whole of it."""
    claim = labelling.pool.claims[int(prompt.name.rpartition(" ")[2])]
    size = f"{prompt.num_tokens:,} tokens" if prompt.num_tokens else f"{len(prompt.text):,} characters"
    return f"{prompt_head(claim.row, len(prompt.segments) - 2, 'random labels')}, {size}; {where}"


def prompt_lines(labelling: Labelling, prompt: Prompt, *, whole: bool) -> list[str]:
    """The prompt, each line after a bar, and in brackets at its end the labels that the model chooses between.

    Unless `whole`, it is shortened to its first and last demonstration and the question.
    """
    _, *demonstrations, question = (segment.text for segment in prompt.segments)
    labels = labelling.book.labels
    texts = labels.texts[::-1] if labels.space == TRUE_FALSE else labels.texts  # True comes first
    return shown_prompt(demonstrations, question, texts, whole=whole)


def shown_prompt(demonstrations: Sequence[str], question: str, labels: Sequence[str], *, whole: bool) -> list[str]:
    """The lines of `prompt_lines`, from the texts of a prompt and of the labels."""
    if whole:
        pieces = [*demonstrations, question]
    elif len(demonstrations) <= FEW:
        pieces = [*map(_cut, demonstrations), _cut(question)]
    else:
        middle = f"[... {len(demonstrations) - 2} more demonstrations ...]\n\n"
        pieces = [_cut(demonstrations[0]), middle, _cut(demonstrations[-1]), _cut(question)]
    end = f"[{'|'.join(labels)}]"
    return [f"  | {line}" if line else "  |" for line in _printable("".join(pieces) + end).split("\n")]


def _claims(pools: Sequence[Pool], name: str, batch_size: int) -> str:
    searched = sum(len(pool.claims) for pool in pools)
    first = pools[0]
    # `rest` of every batch are the claims that are in no batch.
    outside = len(first.rest) + first.left_out
    batches = f" in {len(pools)} batches" if len(pools) > 1 else ""
    bad = len(first.bad_rows)
    unusable = f"; {bad} row{'' if bad == 1 else 's'} left out that cannot be used" if bad else ""
    if outside:
        later = "labelled afterwards from their labels" if len(pools) == 1 and first.rest else "left without a label"
        return f"{name}: {searched} of {searched + outside} claims{batches}, the other {outside} {later}{unusable}"
    more = f" (--batch_size {batch_size}; the file has no more)" if len(pools) == 1 and batch_size > searched else ""
    return f"{name}: all {searched} claims{batches}{more}{unusable}"


def known_line(pools: Sequence[Pool]) -> list[str]:
    """How many labels are known and kept, and where they are from; nothing where none is."""
    known = reduce(merged, (pool.known for pool in pools))
    searched = [claim for pool in pools for claim in pool.claims]
    return [] if known is None else [known.line(searched, pools[0].names, in_batches=len(pools) > 1)]


def describe_groups(seen: Sequence[Overview], claims: int) -> str:
    """How many groups of how many claims, and what made them. claims: how many there are in all."""
    groups = sum(each.groups for each in seen)
    smallest, largest = min(each.smallest for each in seen), max(each.largest for each in seen)
    column = seen[0].grouped_by
    if largest == 1:
        none = f"none, each of the {claims} claims stands by itself"
        return none if column == "none" else f"{none} (by the column {column})"
    sizes = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
    return f"{counted(groups, 'group')} of {sizes} claims, made by the column {column}"


def describe_constraints(seen: Sequence[Overview]) -> str:
    """How many constraints there are of each kind."""
    counts = Counter[str]()
    for each in seen:
        counts.update(each.constraints)
    return ", ".join(f"{count} x {relation}" for relation, count in counts.items()) or "none"


def _engine(labelling: Labelling) -> str:
    identity = labelling.identity
    version = f" {identity.version}" if identity.version else ""
    return f"{identity.model} on {identity.kind}{version}, computes in {identity.dtype or 'an unknown type'}"


def _labels(record: Mapping[str, Any], spelled: SpelledLabels) -> str:
    texts = spelled.texts[::-1] if spelled.space == TRUE_FALSE else spelled.texts  # True comes first
    named = [(text, record["labels"][text]) for text in texts]
    labels = " and ".join(repr(text) if token is None else f"{text!r} {token}" for text, token in named)
    demonstration = record["demonstration"]
    if isinstance(demonstration, str):
        last_line = demonstration[: -len(record["separator"])].rpartition("\n")[2]
        ending = last_line[-ENDING:] + record["separator"]
        return f"{labels}, asked in text; a demonstration ends in {ending!r}"
    end = demonstration[-(PIECES + 1 + len(record["separator"])) :]
    return f"{labels}; a prompt begins with {_spelled(record['prefix'])}; a demonstration ends in {_spelled(end)}"


def _spelled(tokens: Sequence[tuple[int, str | None]]) -> str:
    shown = " ".join(f"{token}" if text is None else f"{text!r} {token}" for token, text in tokens)
    return shown or "no special token"


def _cut(text: str) -> str:
    if len(text) <= PIECE:
        return text
    half = PIECE // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def _printable(text: str) -> str:
    """Characters that would move a terminal's cursor are spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
