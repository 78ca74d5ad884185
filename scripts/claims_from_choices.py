"""Turn a multiple-choice data set into claims for `icm label --data`: one claim a choice, grouped by question.

    python scripts/claims_from_choices.py arc.jsonl --form arc -o claims.jsonl
    python scripts/claims_from_choices.py mine.jsonl --question stem --choices options --answer key -o claims.jsonl
    python scripts/claims_from_choices.py --made additions --count 200 -o claims.jsonl

For data sets whose columns are not a question and a list of options, which `--data` reads by itself (docs/data.md):
ARC, HellaSwag, PIQA, WinoGrande and TruthfulQA's multiple choice, in any file that --data takes. The right choice
becomes the gold label, which is only used to report agreement. --made needs no file: it makes sums, right and wrong by
a few, or pairs of numbers of which one is larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    from core.packages import OF_FILES, need_packages

    need_packages(OF_FILES)

import numpy as np

from core.errors import StorageFailed
from core.flags import FlagParser
from src.icm.values import BadInput, options_of
from src.pipeline.datafiles import read_rows
from src.results.handover import write_jsonl


@dataclass(frozen=True, slots=True)
class Item:
    """A question and its choices. right: for each choice, whether it is right; None if unknown."""

    question: str
    choices: list[str]
    right: list[bool | None]


Form = Callable[[Mapping[str, Any]], Item]


def arc(row: Mapping[str, Any]) -> Item:
    """question, choices {text, label}, answerKey."""
    labels = row["choices"]["label"]
    return Item(row["question"], row["choices"]["text"], [label == row["answerKey"] for label in labels])


def hellaswag(row: Mapping[str, Any]) -> Item:
    """ctx, endings, label (the index as text; empty in the test part)."""
    return Item(row["ctx"], row["endings"], _one_of(len(row["endings"]), row.get("label")))


def piqa(row: Mapping[str, Any]) -> Item:
    """goal, sol1, sol2, label (0 or 1; -1 in the test part)."""
    return Item(row["goal"], [row["sol1"], row["sol2"]], _one_of(2, row.get("label")))


def winogrande(row: Mapping[str, Any]) -> Item:
    """sentence with a _, option1, option2, answer ("1" or "2"; empty in the test part)."""
    answer = row.get("answer")
    right = _one_of(2, int(answer) - 1 if answer not in (None, "") else None)
    return Item(row["sentence"], [row["sentence"].replace("_", row[f"option{n}"]) for n in (1, 2)], right)


def truthfulqa(row: Mapping[str, Any]) -> Item:
    """question, mc1_targets {choices, labels}: the multiple-choice form, not the claims of prepare_data.py."""
    target = row["mc1_targets"]
    return Item(row["question"], target["choices"], [bool(label) for label in target["labels"]])


FORMS: dict[str, Form] = {form.__name__: form for form in (arc, hellaswag, piqa, winogrande, truthfulqa)}


def additions(rng: np.random.Generator) -> Item:
    """A sum, and the same sum off by a few."""
    a, b = (int(n) for n in rng.integers(1, 100, size=2))
    wrong = a + b + int(rng.choice([-10, -3, -2, -1, 1, 2, 3, 10]))
    return Item(f"What is {a} + {b}?", [f"{a} + {b} = {a + b}", f"{a} + {b} = {wrong}"], [True, False])


def larger(rng: np.random.Generator) -> Item:
    """Two numbers; one of them is larger."""
    a, b = (int(n) for n in rng.choice(100, size=2, replace=False))
    return Item(f"Which is larger, {a} or {b}?", [f"{a} is larger than {b}", f"{b} is larger than {a}"], [a > b, b > a])


MADE = {"additions": additions, "larger": larger}


def own_form(question: str, choices: str, answer: str | None) -> Form:
    """The form with these field names; the answer is given as `--data` takes it (docs/data.md)."""

    def form(row: Mapping[str, Any]) -> Item:
        options = options_of(row[choices], None if answer is None else row[answer])
        if options is None:
            raise TypeError(f"{choices} is no list")
        return Item(str(row[question]), [option.text for option in options], [option.gold for option in options])

    return form


def claims_of(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """The rows of a `--data` file. The choices of one question are one group, and exactly one of them is true."""
    for number, item in enumerate(items):
        for choice, right in zip(item.choices, item.right, strict=True):
            row: dict[str, Any] = {"question": item.question, "choice": choice, "consistency_id": str(number)}
            if len(set(item.choices)) == len(item.choices) > 1 and (None in item.right or item.right.count(True) == 1):
                row["consistency_relation"] = "exactly one"
            yield row if right is None else row | {"label": int(right)}


def build_parser() -> FlagParser:
    """The script's flags."""
    text = (__doc__ or "").partition("\n\n")
    parser = FlagParser(description=text[0], epilog=text[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="of any kind that --data takes")
    parser.add_argument("--form", choices=list(FORMS), help="whose file it is")
    parser.add_argument("--question", metavar="FIELD", help="of a file of your own: the question")
    parser.add_argument("--choices", metavar="FIELD", help="its list of choices")
    parser.add_argument("--answer", metavar="FIELD", help="index, letter or text of the right one, if it is known")
    parser.add_argument("--made", choices=list(MADE), help="make claims instead of reading them")
    parser.add_argument("--count", type=int, default=100, help="questions to make, two claims each (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the made ones (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the claims go (.jsonl)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 bad input."""
    args = build_parser().parse_args(arguments)
    try:
        count = write_jsonl(args.output, claims_of(_items(args)))
    except (BadInput, StorageFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {args.output}: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(f"{args.output}: {count} claims")
    return 0


def _items(args: argparse.Namespace) -> list[Item]:
    named = [name for name in ("file", "form", "question", "choices", "answer") if getattr(args, name) is not None]
    if args.made:
        if named:
            given = ", ".join(name if name == "file" else f"--{name}" for name in named)
            raise BadInput(f"--made makes claims, and {given} would read some: leave one out")
        if not 1 <= args.count <= 1_000_000:
            raise BadInput(f"--count must be between 1 and 1,000,000, not {args.count}")
        rng = np.random.default_rng(args.seed)
        return [MADE[args.made](rng) for _ in range(args.count)]
    if args.file is None or (args.form is None) == (args.question is None or args.choices is None):
        raise BadInput("give a file with --form, or with --question and --choices; or --made without a file")
    if args.form and len(named) > 2:
        raise BadInput(f"--form knows the fields of its file: leave out --{named[2]}")
    form = FORMS[args.form] if args.form else own_form(args.question, args.choices, args.answer)
    items = []
    for row in read_rows(args.file):
        if row.bad is not None:
            raise BadInput(f"{args.file}:{row.line}: {row.bad}")
        try:
            items.append(form(row.fields))
        except KeyError as error:
            raise BadInput(f"{args.file}:{row.line}: lacks the field {error}") from None
        except (BadInput, TypeError, ValueError, IndexError) as error:
            raise BadInput(f"{args.file}:{row.line}: is not of this form ({error})") from None
    return items


def _one_of(count: int, index: object) -> list[bool | None]:
    """Whether each of `count` choices is right, from the index of the right one; all None where that is not given."""
    if index in (None, "", -1, "-1"):
        return [None] * count
    which = int(str(index))
    if not 0 <= which < count:
        raise ValueError(f"the answer {index!r} is not among {count} choices")
    return [at == which for at in range(count)]


if __name__ == "__main__":
    sys.exit(main())
