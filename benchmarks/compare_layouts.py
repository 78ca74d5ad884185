"""How much does the order of demonstrations change the leave-one-out scores? The tree against other orders.

    VLLM_BASE_URL=http://localhost:8000 python benchmarks/compare_layouts.py --testbed truthfulQA-preference \
        --model gemma-3-270m --size 32

Scores the same claims with gold labels as demonstrations in several layouts and compares each with the published
code's order: correlation, mean signed log-odds (of more than two labels the margin of the gold one), accuracy, how
often the label differs. Random orders (another one for every question) are the measure: a layout does no harm if it
differs from upstream's no more than they do. In "siblings together" a claim's sibling is the last demonstration before
its question, which no layout of ours does. Computed tokens and seconds of each are shown, too; give a new --cache, or
none, to measure them.

--testbed FILE takes claims of your own, with two labels or more (docs/testbeds.md).

--distances measures something else: how far from its question must a claim's sibling be, so that its label does not
give the answer away? Random orders, with the siblings moved to this many demonstrations before the question.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.flags import FlagParser
from core.llm_api.llm import open_model_api
from core.llm_api.types import Segment
from core.settings import Settings
from src.experiments.arguments import testbed_named
from src.icm.objective import Objective, all_margins
from src.icm.prefix_tree import Layout, TreeLayout, UpstreamLayout
from src.icm.problem import SearchSettings
from src.icm.testbeds import BadInput
from src.pipeline.datafiles import load_testbed, load_testbed_file
from src.pipeline.labelling import Labelling, Pool, prepare_batches
from src.pipeline.testbed_files import read_testbed, testbed_path

Contexts = dict[int, Sequence[int]]


def siblings_together(size: int) -> Callable[[int], Sequence[int]]:
    """A tree that halves the pool in its order, groups side by side: the sibling is the last demonstration."""

    def context(claim: int) -> Sequence[int]:
        low, high, path = 0, size, []
        while high - low > 1:
            middle = (low + high) // 2
            inside, outside = ((low, middle), (middle, high)) if claim < middle else ((middle, high), (low, middle))
            path += list(range(*outside))
            low, high = inside
        return path

    return context


def siblings_at(order: Sequence[int], groups: Sequence[str], claim: int, distance: int) -> list[int]:
    """`order` without `claim`, its siblings moved so that `distance` demonstrations stand after them."""
    others = [other for other in order if groups[other] != groups[claim]]
    siblings = [other for other in order if groups[other] == groups[claim] and other != claim]
    cut = max(0, len(others) - distance)
    return [*others[:cut], *siblings, *others[cut:]]


def in_order_of(layout: Layout) -> Contexts:
    """The contexts of every question, in the order in which the layout asks them."""
    return {claim: layout.context(claim) for claim in layout.questions}


def layouts(pool: Pool, draws: int, distances: Sequence[int]) -> dict[str, list[Contexts]]:
    """Every layout that is compared, several draws of the random ones; with `distances` those orders instead."""
    size, groups = len(pool.claims), pool.problem.groups
    if distances:
        found: dict[str, list[Contexts]] = {"upstream's order": [in_order_of(UpstreamLayout.build(range(size)))]}
        for draw in range(draws):
            order = np.random.default_rng([2024, draw]).permutation(size).tolist()
            for distance in distances:
                contexts = {claim: siblings_at(order, groups, claim, distance) for claim in order}
                found.setdefault(f"siblings {distance} before", []).append(dict(contexts))
        return found
    named: dict[str, list[Contexts]] = {"upstream's order": [in_order_of(UpstreamLayout.build(range(size)))]}
    for draw in range(draws):
        rng = np.random.default_rng([2024, draw])
        for name, anchors in (("tree", 0), ("tree, 4 anchors", 4)):
            tree = TreeLayout.build(range(size), groups, rng, anchors=anchors)
            named.setdefault(name, []).append(in_order_of(tree))
        order = rng.permutation(size).tolist()
        grown = TreeLayout.build(order[: size * 3 // 4], groups, rng)
        for claim in order[size * 3 // 4 :]:
            grown = grown.append(claim)
        named.setdefault("tree, a quarter appended", []).append(in_order_of(grown))
        shuffled = {claim: [o for o in rng.permutation(size).tolist() if o != claim] for claim in range(size)}
        named.setdefault("random order per question", []).append(dict(shuffled))
    if len(set(groups)) < size:
        together = siblings_together(size)
        named["siblings together"] = [{claim: together(claim) for claim in range(size)}]
    return named


async def measure(args: argparse.Namespace) -> dict[str, object]:
    """Score every layout; returns the table's numbers."""
    if (file := testbed_path(args.testbed)) is not None:
        testbed, claims, path = load_testbed_file(read_testbed(file), file, args.data_dir)
    else:
        testbed, claims, path = load_testbed(args.testbed, args.data_dir)
    settings = SearchSettings(seed=args.seed)
    [pool] = prepare_batches(
        testbed,
        claims,
        path,
        batch_size=args.size,
        consistency="gold-free",
        objective=Objective(1.0, num_labels=len(testbed.space)),
        settings=settings,
    )
    pool = Pool(pool.testbed, pool.claims, (), pool.problem, pool.data_digest)
    gold = pool.gold
    if None in gold:
        raise BadInput("this comparison demonstrates gold labels, and some claims have none")
    truth, numbers = np.array(gold, dtype=int), np.arange(len(gold))
    async with open_model_api(Settings.load({"cache_path": args.cache}), model=args.model) as api:
        labelling = await Labelling.open(pool, api)
        scores: dict[str, list[np.ndarray]] = {}
        costs: dict[str, list[tuple[int, float]]] = {}
        if args.without_bos:
            labelling = replace(labelling, book=replace(labelling.book, prefix=Segment("", ())))
        for name, drawn in layouts(pool, args.draws, args.distances).items():
            for contexts in drawn:
                prompts = [
                    labelling.book.prompt(claim, context, gold, position / len(contexts))
                    for position, (claim, context) in enumerate(contexts.items())
                ]
                before, started = await api.prefix_cache(), time.perf_counter()
                answer = await api.score(prompts, labelling.book.labels)
                seconds, after = time.perf_counter() - started, await api.prefix_cache()
                by_claim = dict(zip(contexts, answer.logprobs, strict=True))
                logprobs = np.stack([by_claim[claim] for claim in range(len(gold))])
                scores.setdefault(name, []).append(logprobs[:, 1:] - logprobs[:, :1])
                computed = (after - before).computed if after is not None and before is not None else 0
                costs.setdefault(name, []).append((computed, round(seconds, 2)))
                print(f"  scored: {name}", file=sys.stderr)
        engine = labelling.identity.describe()
    reference = scores["upstream's order"][0]
    as_upstream = all_margins(reference).argmax(axis=1)
    rows = []
    for name, found in scores.items():
        margins = [all_margins(log_odds) for log_odds in found]
        predicted = [each.argmax(axis=1) for each in margins]
        rows.append(
            {
                "layout": name,
                "mean_signed": [round(float(np.mean(each[numbers, truth])), 3) for each in margins],
                "accuracy": [round(float(np.mean(labels == truth)), 3) for labels in predicted],
                "correlation": [round(float(np.corrcoef(reference.flat, s.flat)[0, 1]), 3) for s in found],
                "sign_differs": [round(float(np.mean(labels != as_upstream)), 3) for labels in predicted],
                "computed_tokens": [tokens for tokens, _ in costs[name]],
                "seconds": [seconds for _, seconds in costs[name]],
            }
        )
    return {"testbed": args.testbed, "claims": len(gold), "engine": engine, "rows": rows}


def main() -> int:
    """Print the table; with --json also write it."""
    parser = FlagParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--testbed", default="truthfulQA-preference", type=testbed_named, metavar="{NAME,FILE}")
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--size", type=int, default=32, help="claims")
    parser.add_argument("--draws", type=int, default=3, help="of every random layout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distances", type=int, nargs="*", default=[], metavar="D", help="see above")
    parser.add_argument("--without_bos", action="store_true", help="leave out the model's own first token")
    parser.add_argument("--cache", type=Path, default=None, help="response cache to use and fill")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    try:
        result = asyncio.run(measure(args))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = result["rows"]
    assert isinstance(rows, list)
    print(f"{result['testbed']}, {result['claims']} claims, gold labels, {result['engine']}")
    print(
        f"{'layout':<28}{'mean signed log-odds':<24}{'accuracy':<18}{'r with upstream':<18}{'label differs':<18}"
        f"{'computed tokens':<24}seconds"
    )
    for row in rows:
        shown = [
            " ".join(f"{v:.2f}" for v in row[k]) for k in ("mean_signed", "accuracy", "correlation", "sign_differs")
        ]
        shown += [" ".join(map(str, row["computed_tokens"])), " ".join(f"{v:.1f}" for v in row["seconds"])]
        widths = (24, 18, 18, 18, 24, 0)
        cells = (f"{text:<{width}}" for text, width in zip(shown, widths, strict=True))
        print(f"{row['layout']:<28}{''.join(cells)}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
