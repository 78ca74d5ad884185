"""Show what a testbed asks a model, before anything is asked: a whole prompt, groups, relations and labels.

    icm testbed --list
    icm testbed mine.yaml --show
    icm testbed mine.yaml --show 8 --model meta-llama/Llama-3.1-8B

With --model the model's tokens around each label are shown, and how many claims fit into its context; the model is
reached as by icm label, and only its tokenizer is asked. docs/testbeds.md says what a testbed file holds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from core.llm_api.llm import ModelAPI, open_model_api
from core.llm_api.tokens import pieces
from core.settings import KEPT_IN, Settings
from src.experiments.arguments import Parser, at_least, command_parser, testbed_named
from src.experiments.resumable import run_resumable
from src.icm.prompts import PromptBook
from src.icm.testbeds import DEFINITIONS, BadInput, Claim, Testbed
from src.pipeline.datafiles import load_testbed, load_testbed_file
from src.pipeline.opening import describe_constraints, describe_groups, prompt_head, shown_prompt
from src.pipeline.testbed_files import read_testbed, testbed_path

DEMONSTRATIONS: Final = 3
BEFORE: Final = 4
"""Tokens of a question's end that are shown before its label."""


def build_parser() -> Parser:
    """The testbed, where its data is, and the model whose tokens are shown."""
    parser = command_parser("icm testbed", __doc__)
    parser.add_argument(
        "testbed", nargs="?", type=testbed_named, metavar="{NAME,FILE}", help="a built-in one, or a file: mine.yaml"
    )
    parser.add_argument("--list", action="store_true", help="name the built-in testbeds, and what each is about")
    parser.add_argument(
        "--show",
        nargs="?",
        type=at_least(0),
        const=DEMONSTRATIONS,
        default=DEMONSTRATIONS,
        metavar="N",
        help="demonstrations in the prompt",
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="claims in place of those that the testbed names")
    parser.add_argument("--data_dir", type=Path, default=KEPT_IN / "data", help="where the testbeds' files lie")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="name under which the model is served; default: no tokens are shown")
    model.add_argument(
        "--use_vllm", action=argparse.BooleanOptionalAction, default=None, help="a vLLM server, or an external API"
    )
    model.add_argument("--direct", action="store_true", help="vLLM in this process, no server; --model is a path or id")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 the model failed, 2 bad input or no usable server, 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.list:
        width = max(map(len, DEFINITIONS))
        print("\n".join(f"{name:<{width}}  {definition.about}" for name, definition in DEFINITIONS.items()))
        return 0
    if args.testbed is None:
        parser.error("name a testbed or a file, or see which there are with --list")
    command = ["icm", "testbed", *(sys.argv[1:] if arguments is None else arguments)]
    return run_resumable(_show(args), shlex.join(command))


async def _show(args: argparse.Namespace) -> int:
    testbed, claims, path = _load(args)
    if len(claims) <= args.show:
        raise BadInput(f"{path}: has {len(claims)} claims; a prompt with {args.show} demonstrations takes one more")
    print("\n".join(_summary(testbed, claims, path)))
    chosen = claims[: args.show + 1]
    if args.model is None:
        texts = [claim.text for claim in chosen]
        labels = testbed.space.texts
        shown = [text + labels[at % len(labels)] + testbed.separator for at, text in enumerate(texts[:-1])]
        print("\n".join(_prompt(chosen, shown, texts[-1], labels)))
        print("tokens  are shown with --model NAME, and how many claims fit into its context")
        return 0
    async with open_model_api(
        Settings.load(), model=args.model, use_vllm=args.use_vllm, direct=args.direct, scores=False
    ) as api:
        book = await PromptBook.open(
            api, [claim.text for claim in claims], space=testbed.space, separator=testbed.separator
        )
        size = len(testbed.space)
        shown = [book.demonstrations[at][at % size].text for at in range(args.show)]
        print("\n".join(_prompt(chosen, shown, book.questions[args.show].text, book.labels.texts)))
        print("\n".join(await _tokens(api, book, args.show)))
        print(_fits(api, book))
    return 0


def _load(args: argparse.Namespace) -> tuple[Testbed, list[Claim], Path]:
    file = testbed_path(args.testbed)
    if file is not None:
        return load_testbed_file(read_testbed(file), file, args.data_dir, args.data)
    if args.data is not None:
        raise BadInput(
            f"--data needs a testbed file that says how it is read, not {args.testbed}: icm testbed FILE --data ..."
        )
    return load_testbed(args.testbed, args.data_dir)


def _summary(testbed: Testbed, claims: Sequence[Claim], path: Path) -> list[str]:
    names, texts = testbed.space.names, testbed.space.texts
    counts = Counter("no gold label" if claim.gold is None else names[claim.gold] for claim in claims)
    gold = ", ".join(f"{counts[name]} {name}" for name in (*names, "no gold label") if counts[name])
    seen = [testbed.consistency(claims, "gold-free").overview([claim.group for claim in claims], testbed.grouped_by)]
    labels = ", ".join(f"{name} {text!r}" for name, text in zip(names, texts, strict=True))
    return [
        f"testbed {testbed.name}",
        f"data    {path}: {len(claims)} claims ({gold})",
        f"groups  {describe_groups(seen, len(claims))}; constraints: {describe_constraints(seen)}",
        f"labels  {labels}; {testbed.separator!r} between demonstrations",
    ]


def _prompt(claims: Sequence[Claim], shown: Sequence[str], question: str, labels: Sequence[str]) -> list[str]:
    head = prompt_head(claims[-1].row, len(shown), "labels in turn, not gold")
    return [f"{head}:", *shown_prompt(shown, question, labels, whole=True)]


async def _tokens(api: ModelAPI, book: PromptBook, claim: int) -> list[str]:
    """One line a label: the question's last tokens, the label's and the separator's."""
    question = book.questions[claim].tokens
    if question is None or book.labels.tokens is None:
        return ["tokens  none: this model is asked in text, where each label must be one token"]
    lines = []
    for ids in book.labels.tokens:
        end = question[-BEFORE:]
        parts = [await _pieces(api, part) for part in (end, ids, book.separator.tokens or ())]
        count = "1 token" if len(ids) == 1 else f"{len(ids)} tokens"
        lines.append(f"tokens  ... {parts[0]}  [{parts[1]}]  {parts[2]}   (label: {count})")
    several = len(book.labels.nodes)
    return [*lines, f"queries {several} a prompt"]


async def _pieces(api: ModelAPI, tokens: Sequence[int]) -> str:
    texts = await pieces(api, tokens)
    return " ".join(f"{token}" if texts is None else f"{texts[at]!r} {token}" for at, token in enumerate(tokens))


def _fits(api: ModelAPI, book: PromptBook) -> str:
    limit, size = api.identity.max_model_len, len(book.questions)
    if limit is None:
        return "fits    not known: the server does not state its context"
    longest = book.longest_prompt(size)
    if longest == 0:
        return "fits    not known: this model is asked in text"
    fit = book.claims_that_fit(limit - 1, size)
    some = f"all {size}" if longest <= limit - 1 else f"{fit} of {size}"
    return f"fits    {some} claims in one prompt of at most {limit:,} tokens (with all: {longest:,})"
