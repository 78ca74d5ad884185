"""The precondition of ICM: do a pool's gold labels have a higher U than other labelings?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from src.icm.annealing import mirrored_labels, mirrors
from src.icm.consistency import Label, Labels, all_labels
from src.icm.label_names import Names
from src.icm.objective import Evaluation
from src.icm.problem import Candidate, Problem
from src.pipeline.scoring import PoolScorer


def random_labels(count: int, num_labels: int, rng: np.random.Generator) -> Labels:
    """`count` labels, drawn independently."""
    drawn = rng.random(count) < 0.5 if num_labels == 2 else rng.integers(num_labels, size=count)
    return tuple(drawn.tolist())


def reference_labelings(gold: Sequence[Label], rng: np.random.Generator, names: Names) -> dict[str, Labels]:
    """The labelings to compare, by name: gold, gold with two labels swapped, one label for all, random.

    names: of the labels. All of them label the same claims: those whose gold label is known, or every claim where none
    is known.
    """
    count, known = len(names), any(label is not None for label in gold)
    drawn = random_labels(len(gold), count, rng)
    if count == 2:
        turned = {"flipped gold": mirrored_labels(tuple(gold))}
    else:
        swaps = (f"gold, {one} and {other} swapped" for one, other in combinations(names, 2))
        turned = dict(zip(swaps, mirrors(tuple(gold), count), strict=True))
    labelings: dict[str, Labels] = {
        "gold": tuple(gold),
        **{f"all {names[label]}": (label,) * len(gold) for label in reversed(all_labels(count))},
        **turned,
        "random": drawn,
    }
    if not known:
        return {name: labels for name, labels in labelings.items() if name not in ("gold", *turned)}
    shown = {
        name: tuple(label if gold[i] is not None else None for i, label in enumerate(labels))
        for name, labels in labelings.items()
    }
    # Where gold has one label only, the same labeling is not compared with it.
    return {name: labels for name, labels in shown.items() if name == "gold" or labels != shown["gold"]}


async def check_precondition(
    scorer: PoolScorer, problem: Problem, labelings: Mapping[str, Labels]
) -> dict[str, Evaluation]:
    """U of each labeling, in one layout. ICM can find gold only if gold's U is the highest."""
    some = next(iter(labelings.values()))
    layout = problem.new_layout([claim for claim, label in enumerate(some) if label is not None])
    evaluations = await scorer.evaluate([Candidate(labels, layout) for labels in labelings.values()])
    return dict(zip(labelings, evaluations, strict=True))
